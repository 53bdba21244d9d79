"""What the official Anthropic client gets from the real server."""

from __future__ import annotations

import pytest

MODEL = "smollm2-135m"
GREEDY = {"temperature": 0}  # the client has no field of its own for it
PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server, anthropic):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_text_whole_and_streamed(client):
    fields = {"model": MODEL, "messages": PARIS, "max_tokens": 12, "extra_body": GREEDY}
    whole = client.messages.create(**fields)
    assert "Paris" in whole.content[0].text
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**fields) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tokens_are_counted_as_messages_uses_them(client):
    fields = {"model": MODEL, "messages": PARIS, "system": "Be brief."}
    counted = client.messages.count_tokens(**fields)
    for _ in range(2):  # the second time the prompt is in the cache
        usage = client.messages.create(max_tokens=1, **fields).usage
        assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_a_stop_sequence(client):
    message = client.messages.create(
        model=MODEL, messages=PARIS, max_tokens=12, extra_body=GREEDY, stop_sequences=["France"]
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "France")
    assert "France" not in message.content[0].text


def test_errors(client, anthropic):
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", messages=PARIS, max_tokens=1)
    image = {"type": "image", "source": {"type": "url", "url": "https://example.org/fox.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(
            model=MODEL, messages=[{"role": "user", "content": [image]}], max_tokens=1
        )


def test_a_tool_whole_and_streamed_and_its_result(tool_server, anthropic):
    client = anthropic.Anthropic(base_url=tool_server.url, api_key="none", max_retries=0)
    fields = {
        "model": MODEL,
        "max_tokens": 60,
        "tools": [WEATHER],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "extra_body": GREEDY,
    }
    whole = client.messages.create(messages=PARIS, **fields)
    assert whole.stop_reason == "tool_use"
    (call,) = whole.content
    assert (call.type, call.name) == ("tool_use", "get_weather")
    assert set(call.input) == {"city"}
    with client.messages.stream(messages=PARIS, **fields) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 21 degrees"}
    fields["tool_choice"] = {"type": "none"}
    answer = client.messages.create(
        messages=[
            *PARIS,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result]},
        ],
        **fields,
    )
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.content[0].text
    client.close()
