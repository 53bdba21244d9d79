"""What client programs sent to /v1/responses, and what becomes of what they are answered."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent, response_create_params
from openai.types.responses.input_token_count_params import InputTokenCountParams

from headstart.server.api.openai_responses.body import CountBody, ResponsesBody

TESTS = Path(__file__).parents[2]
REQUESTS = sorted((TESTS / "clients" / "requests").glob("*-responses-*.json"))
TEMPLATE = TESTS / "server" / "chat_templates" / "chatml_tools.jinja"
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


def read(path):
    """A request and what is expected of it."""
    sent = json.loads(path.read_text())
    body = {key: value for key, value in sent.items() if not key.startswith("_")}
    return body | {"model": "tiny"}, sent["_expected"]["status"]


def functions(tools):
    """The functions of tools: their namespaces and their names."""
    for tool in tools:
        for inner in tool.get("tools", [tool]):
            if inner["type"] == "function":
                yield tool["name"] if "tools" in tool else None, inner["name"]


@pytest.fixture
def app(build):
    return build(TEMPLATE.read_text(), context=1 << 16)


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
async def test_a_request_is_answered(ask, app, ignored, path):
    body, expected = read(path)
    response = await ask(app=app, **body)
    if expected != 200:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "background")
        return
    assert response.status_code == 200, response.text
    for field in ("client_metadata", "prompt_cache_key"):
        assert (field in ignored(response)) == (field in body)
    assert ("include=reasoning.encrypted_content" in ignored(response)) == (
        "reasoning.encrypted_content" in body.get("include", ())
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path", [path for path in REQUESTS if read(path)[0].get("tools")], ids=lambda path: path.stem
)
async def test_a_call_goes_back_and_forth(ask, app, events_of, path, stream):
    body = read(path)[0] | {"stream": stream, "max_output_tokens": 999}
    for namespace, name in functions(body["tools"]):
        shown = name if namespace is None else f"{namespace}__{name}"
        call = (
            f'I look.\n<tool_call>\n{{"name": "{shown}", "arguments": {{"p1": "x"}}}}\n</tool_call>'
        )
        response = await ask(call, app=app, **body)
        assert response.status_code == 200, response.text
        if stream:
            events = events_of(response.text)
            for event in events:
                EVENT.validate_python(event)
            answer = events[-1]["response"]
        else:
            answer = response.json()
        Response.model_validate(answer)
        called = answer["output"][-1]
        assert (called["type"], called["name"]) == ("function_call", name)
        assert called.get("namespace") == namespace
        result = {"type": "function_call_output", "call_id": called["call_id"], "output": "wet"}
        given = body["input"]
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        went_on = body | {"input": [*given, *answer["output"], result]}
        response = await ask(app=app, **went_on)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (ResponsesBody, response_create_params.ResponseCreateParamsStreaming),
        (CountBody, InputTokenCountParams),
    ],
)
def test_every_field_of_the_official_client_is_known(body, params):
    assert set(typing.get_type_hints(params)) - set(body.model_fields) == set()
