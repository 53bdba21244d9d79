"""What the official Anthropic client gets from the real server."""

from __future__ import annotations

import anthropic
import pytest

MODEL = "smollm2-135m"
GREEDY = {"temperature": 0}  # the client has no field of its own for it
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server):
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


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", messages=PARIS, max_tokens=1)
    image = {"type": "image", "source": {"type": "url", "url": "https://example.org/fox.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(
            model=MODEL, messages=[{"role": "user", "content": [image]}], max_tokens=1
        )
