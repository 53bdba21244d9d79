"""OpenAI's Agents SDK, over Responses and over chat completions: a tool and an answer."""

import asyncio
import os
from typing import Annotated

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from pydantic import Field

MODEL = os.environ["MODEL"]
asked = []


@function_tool
def get_weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather of a city."""
    asked.append(city)
    return "12 degrees"


async def main() -> None:
    client = AsyncOpenAI(max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(
            name="weather",
            instructions="Answer in one short sentence.",
            model=kind(model=MODEL, openai_client=client),
            tools=[get_weather],
            model_settings=ModelSettings(
                tool_choice="required", parallel_tool_calls=False, max_tokens=200
            ),
        )
        whole = await Runner.run(agent, "What is the weather in Paris?", max_turns=4)
        streamed = Runner.run_streamed(agent, "What is the weather in Rome?", max_turns=4)
        events = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in events, events
        for answer in (whole.final_output, streamed.final_output):
            assert answer, answer
            print(f"{kind.__name__}: {answer}")
    assert len(asked) >= 4, asked


asyncio.run(main())
