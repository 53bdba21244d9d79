"""What client programs send to /v1/messages (tests/clients/requests), streamed and whole, and their
answers as the types of the official client read them."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import pytest

FOLDER = Path(__file__).parents[2] / "clients" / "requests"
FILES = sorted(FOLDER.glob("*-messages-*.json"))
TEMPLATE = Path(__file__).parents[1] / "chat_templates" / "chatml_tools.jinja"
CALL = '<tool_call>\n{"name": "tool_1", "arguments": {}}\n</tool_call>'


def request_of(path):
    """The body in a file, and the notes about it."""
    fields = json.loads(path.read_text())
    notes = {name: value for name, value in fields.items() if name.startswith("_")}
    return {name: fields[name] for name in fields.keys() - notes.keys()}, notes


def test_there_are_requests():
    clients = {request_of(path)[1]["_client"] for path in FILES}
    assert clients == {"anthropic-python", "claude-code", "litellm"}


@pytest.fixture
def types(anthropic):
    """Readers of messages and events that take nothing but what the client's types say."""
    message = pydantic.TypeAdapter(anthropic.types.Message)
    event = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)
    return message, event


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
async def test_it_is_answered(ask, build, types, events_of, path, stream):
    body, notes = request_of(path)
    app, read = build(TEMPLATE.read_text()), types
    tools = any("input_schema" in tool for tool in body.get("tools", ()))
    said = (
        f"Hello.{CALL}" if tools and not any(t.get("strict") for t in body["tools"]) else "Hello."
    )
    fields = body | {"model": "tiny", "stream": stream, "max_tokens": 200}
    response = await ask(said, app=app, url=notes["_path"], headers=notes["_headers"], **fields)
    assert response.status_code == 200, response.text
    if not stream:
        message = read[0].validate_json(response.text)
    else:
        events = events_of(response.text)
        for event in events:
            if event["type"] != "ping":  # the client leaves them out
                read[1].validate_python(event)
        message = read[0].validate_python(
            events[0]["message"] | events[-2]["delta"] | {"content": []}
        )
        opened = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
        assert opened[0] == "text"
        assert ("tool_use" in opened) == (CALL in said)
    assert message.stop_reason == ("tool_use" if CALL in said else "end_turn")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
async def test_its_tokens_are_counted(ask, build, path):
    body, notes = request_of(path)
    app, headers = build(TEMPLATE.read_text(), unknown_fields="refuse"), notes["_headers"]
    fields = body | {"model": "tiny", "stream": False}
    usage = (await ask(app=app, headers=headers, **fields)).json()["usage"]
    counted = await ask(app=app, url="/v1/messages/count_tokens", headers=headers, **fields)
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted.json() == {"input_tokens": total}


async def test_claude_codes_turns_share_their_beginnings(ask, build, engine):
    """The next prompt of a session begins with the one before."""
    body, notes = request_of(FOLDER / "claude-code-messages-01.json")
    app = build(TEMPLATE.read_text())
    fields = body | {"model": "tiny", "stream": False, "max_tokens": 10}
    await ask(app=app, headers=notes["_headers"], **fields)
    more = [{"role": "assistant", "content": "text"}, {"role": "user", "content": "text"}]
    fields["messages"] = [*body["messages"], *more, {"role": "system", "content": "text"}]
    await ask(app=app, headers=notes["_headers"], **fields)
    first, second = (added.token_ids for added in engine.added)
    assert second[: len(first)] == first
