"""Tools of the default model with its own chat template, which knows none."""

from __future__ import annotations

import json

import jsonschema
import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city at this moment",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "at": {
                    "type": "object",
                    "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
                    "required": ["days"],
                },
            },
            "required": ["city", "unit"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time now"}}
TOOLS = [WEATHER, CLOCK]
QUESTION = {"role": "user", "content": "What is the weather in Rome? Use get_weather."}


@pytest.fixture
def ask(server):
    """``ask(messages, field=value)``: the choice of a greedy answer, and the usage."""
    with server.client() as client:

        def send(messages, **fields):
            request = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 160}
            answer = client.chat.completions.create(messages=messages, **(request | fields))
            return answer.choices[0], answer.usage

        yield send


def check(call):
    """That a call is one of the tools', and right."""
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        assert arguments == {}
    else:
        assert call.function.name == "get_weather"
        schema = WEATHER["function"]["parameters"]
        jsonschema.validate(arguments, schema | {"additionalProperties": False})
        assert set(arguments.get("at", {})) <= {"days"}


def test_a_forced_call(ask):
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        found, _ = ask([QUESTION], tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        assert found.finish_reason == "tool_calls"
        [call] = found.message.tool_calls
        check(call)


def test_a_loop_of_two_turns(ask):
    """The first call is forced, what follows it is the model's own choice: text, or right calls."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    first, _ = ask([QUESTION], tools=TOOLS, tool_choice=named)
    messages = [QUESTION]
    found = first
    for said in ("12 degrees, rain", "13 degrees, sun"):
        messages.append(found.message.model_dump(exclude_none=True))
        for call in found.message.tool_calls or ():
            check(call)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
        if not found.message.tool_calls:
            assert found.message.content
            messages.append({"role": "user", "content": "And in Paris?"})
        found, usage = ask(messages, tools=TOOLS)
        assert found.finish_reason in ("stop", "tool_calls", "length")
        # The turns before are the same text as they were.
        assert usage.prompt_tokens_details.cached_tokens > 150


def called_for(*cities):
    """A chat in which the tool was called for each of these."""
    for i, city in enumerate(cities):
        yield {"role": "user", "content": f"What is the weather in {city}?"}
        arguments = json.dumps({"city": city, "unit": "celsius"})
        call = {"id": f"call_{i}", "type": "function"}
        call["function"] = {"name": "get_weather", "arguments": arguments}
        yield {"role": "assistant", "content": None, "tool_calls": [call]}
        yield {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}
        yield {"role": "assistant", "content": f"It is 12 degrees in {city}."}


def test_calls_of_its_own_are_right(server):
    """So small a model calls where it has seen calls, and never in a form that is not a call."""
    question = {"role": "user", "content": "What is the weather in Rome?"}
    with server.client() as client:
        answer = client.chat.completions.create(
            model="smollm2-135m",
            messages=[*called_for("Paris", "Oslo", "Lima"), question],
            tools=[WEATHER],
            temperature=1,
            max_tokens=100,
            seed=1,
            n=8,
        )
    calls = 0
    for found in answer.choices:
        assert "<tool_" not in (found.message.content or "")
        for call in found.message.tool_calls or ():
            calls += 1
            if found.finish_reason != "length":
                check(call)
    assert calls > 1


def test_chats_with_the_same_tools_share_their_beginning(ask):
    system = {"role": "system", "content": "Be brief."}
    _, first = ask([QUESTION], tools=TOOLS, max_tokens=1)
    _, second = ask([system, {"role": "user", "content": "Hi"}], tools=TOOLS, max_tokens=1)
    assert second.prompt_tokens_details.cached_tokens > 150
    assert first.prompt_tokens > 200
