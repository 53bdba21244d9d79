"""LangChain, LiteLLM and more of the official client, against the real server and model."""

from __future__ import annotations

import base64
import json
import math
import os
import struct

import jsonschema
import pytest
from pydantic import BaseModel, Field

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France? Answer in one sentence."
PARIS = [{"role": "user", "content": QUESTION}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}

pytestmark = pytest.mark.filterwarnings("ignore:Items? .*ReadOnly:UserWarning")  # LiteLLM's types


class City(BaseModel):
    capital: bool
    country: str = Field(max_length=20)  # whatever the model says, it ends within max_tokens


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


# Either library is imported where it is used, since that takes seconds.


def langchain(server):
    os.environ["LANGCHAIN_TRACING_V2"] = os.environ["LANGSMITH_TRACING"] = "false"
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=60,
        max_retries=0,
        timeout=300,
    )


def lite(server, **fields):
    fields = {"max_tokens": 60, "messages": PARIS} | fields
    # Before the import: LiteLLM would fetch a table of prices.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    litellm.telemetry = False
    return litellm.completion(
        model=f"openai/{MODEL}",
        api_base=f"{server.url}/v1",
        api_key="none",
        temperature=0,
        num_retries=0,
        **fields,
    )


def test_langchain_chats(server):
    chat = langchain(server)
    answer = chat.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata["input_tokens"] > 5
    chunks = list(chat.stream(QUESTION))
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == answer.content


def test_langchain_calls_a_tool(tool_server):
    chat = langchain(tool_server)
    answer = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke("Weather in Paris?")
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert isinstance(call["args"]["city"], str)


def test_langchain_reads_structured_output(server):
    found = langchain(server).with_structured_output(City, method="json_schema").invoke(QUESTION)
    assert isinstance(found, City)


def test_litellm_chats(server):
    answer = lite(server)
    assert "Paris" in answer.choices[0].message.content
    chunks = list(lite(server, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_litellm_calls_a_tool(tool_server):
    answer = lite(tool_server, tools=[WEATHER], tool_choice=FORCED)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_litellm_reads_structured_output(server):
    schema = City.model_json_schema() | {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    City.model_validate_json(lite(server, response_format=wanted).choices[0].message.content)


def test_parse(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=PARIS, response_format=City, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_required_tools_as_deltas(tool_server):
    client = tool_server.client()
    request = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 60}
    tools = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**request, **tools).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    names, arguments, reasons = [], "", []
    for chunk in client.chat.completions.create(**request, **tools, stream=True):
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        for part in choice.delta.tool_calls or ():
            assert part.index == 0
            if part.function.name:
                names.append(part.function.name)
            arguments += part.function.arguments or ""
    assert names == ["get_weather"]
    assert arguments == call.function.arguments
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def asked_before(cities):
    """A chat in which a tool was called for each of these."""
    for i, city in enumerate(cities):
        arguments = json.dumps({"city": city, "unit": "celsius"})
        function = {"name": "get_weather", "arguments": arguments}
        call = {"id": f"call{i}", "type": "function", "function": function}
        yield {"role": "user", "content": f"What is the weather in {city}?"}
        yield {"role": "assistant", "content": None, "tool_calls": [call]}
        yield {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}
        yield {"role": "assistant", "content": f"It is 12 degrees in {city}."}


def test_a_strict_tool_is_called_right_or_not_at_all(tool_server):
    """Without ``strict`` this model gets a quarter of its calls wrong."""
    function = {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 40},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    }
    before, calls, texts = list(asked_before(("Paris", "Oslo", "Rome"))), 0, 0
    for question in ("What is the weather in Lima?", "Tell me a joke."):
        answer = tool_server.client().chat.completions.create(
            model=MODEL,
            messages=[*before, {"role": "user", "content": question}],
            tools=[{"type": "function", "function": function}],
            temperature=1,
            max_tokens=100,
            seed=1,
            n=12,
        )
        for choice in answer.choices:
            assert "<tool_call>" not in (choice.message.content or "")
            texts += not choice.message.tool_calls
            for call in choice.message.tool_calls or ():
                if choice.finish_reason != "length":
                    jsonschema.validate(json.loads(call.function.arguments), function["parameters"])
                assert call.function.name == "get_weather"
                calls += 1
    # Both come, and more than once; how often depends on roundings, which machines differ in.
    assert calls > 1, (calls, texts)
    assert texts > 1, (calls, texts)


def test_embeddings(client):
    texts = ["The cat sat.", "A cat was sitting.", "Interest rates rose."]
    answer = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    rows = [entry.embedding for entry in answer.data]
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert all(math.isclose(sum(x * x for x in row), 1, rel_tol=1e-4) for row in rows)
    encoded = client.embeddings.create(model=MODEL, input=texts, encoding_format="base64")
    for entry, row in zip(encoded.data, rows, strict=True):
        raw = base64.b64decode(entry.embedding)
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(row, abs=1e-6)
    # The client's default is base64, which it decodes.
    assert client.embeddings.create(model=MODEL, input=texts[0]).data[0].embedding == pytest.approx(
        rows[0], abs=1e-6
    )


def test_seeds_and_logprobs(client):
    request = {"model": MODEL, "messages": PARIS, "max_tokens": 8, "logprobs": True}
    first, second, other = (
        client.chat.completions.create(**request, temperature=1.5, seed=seed) for seed in (3, 3, 4)
    )
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    assert first.choices[0].logprobs.content[0].logprob <= 0


def test_logprobs_of_the_prompt(client):
    request = {"model": MODEL, "prompt": "One two three four", "max_tokens": 1, "temperature": 0}
    echoed = client.completions.create(**request, echo=True, logprobs=1).choices[0]
    assert echoed.text.startswith("One two three four")
    assert echoed.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in echoed.logprobs.token_logprobs[1:])
    shown = client.completions.create(**request, extra_body={"prompt_logprobs": 1}).choices[0]
    assert shown.prompt_logprobs[0] is None
    assert len(shown.prompt_logprobs) == len(echoed.logprobs.tokens) - 1


def test_usage_at_the_end_of_a_stream(client):
    *_, last = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.choices == []
    assert last.usage.completion_tokens == 5
