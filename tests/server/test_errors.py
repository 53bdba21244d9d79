"""What goes wrong: a clear 4xx or 503 in OpenAI's shape, and no input makes a 5xx."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.server.api.openai_chat.routes import ChatBody
from headstart.server.api.openai_completions.routes import CompletionBody
from headstart.server.http.app import create_app
from headstart.server.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"


def check_shape(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid array"),
        ({"messages": [1]}, "messages[0]", ""),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "its type is 'image_url', and this model reads text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "string",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "messages[0].content[0]",
            "an object with a type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "required",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"response_format": {"type": "x"}}, "response_format.type", "'json_schema'"),
        ({"priority": 2**31}, "priority", "less than or equal to"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream_options": 1}, "stream_options", "must be an object"),
        ({"stream": "true"}, "stream", "valid boolean"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 10**30}, "n", "at most 16"),
        ({"n": 1.5}, "n", "integer"),
        ({"n": True}, "n", "integer"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": 3}, "temperature", "at most 2.0"),
        ({"temperature": -1}, "temperature", "at least 0.0"),
        ({"top_p": -0.1}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", ""),
        ({"min_p": 2}, "min_p", "at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
        ({"seed": 2**63}, "seed", ""),
        ({"max_tokens": 0}, "max_tokens", "at least 1, or -1"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1, or -1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "old name"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ""}, "stop", "1 to 1024"),
        ({"stop": ["a", ""]}, "stop[1]", "1 to 1024"),
        ({"stop": ["a", 1]}, "stop[1]", "string"),
        ({"stop": 5}, "stop", "list of strings"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "vocabulary has 400"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "list of token ids"),
        ({"stop_token_ids": 3}, "stop_token_ids", "list of token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "[-100, 100]"),
        ({"logit_bias": {"1": True}}, "logit_bias.1", "[-100, 100]"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "vocabulary has 400"),
        ({"logit_bias": []}, "logit_bias", "object"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ""),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"cache_salt": ""}, "cache_salt", ""),
        ({"model": None}, "model", "valid string"),
    ],
)
async def test_bad_fields(client, engine, chat_body, fields, param, words):
    response = await client.post(CHAT, json=chat_body(**fields))
    assert response.status_code == 400, response.text
    error = check_shape(response)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.added == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model": "tiny",}',
        b"\xff\xfe",
        b'{"model": "ti\xffny", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"model": "tiny", "metadata": "\\ud800", "messages": []}',
        b"[" * 30000,
        b'{"a":' * 10000,
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"model": "tiny", "temperature": NaN, "messages": [{"role":"user","content":"x"}]}',
        b'{"model": "tiny", "temperature": 1e999, "messages": [{"role":"user","content":"x"}]}',
    ],
)
@pytest.mark.parametrize("url", [CHAT, "/v1/completions"])
async def test_bad_json(client, engine, url, content):
    response = await client.post(url, content=content)
    assert response.status_code == 400, response.text
    check_shape(response)
    assert engine.added == []


async def test_a_surrogate_pair_is_a_character(client, engine, chat_body, tokenizer):
    body = json.dumps(chat_body(messages=[{"role": "user", "content": "\U0001f44d"}]))
    assert "\\ud83d\\udc4d" in body
    assert (await client.post(CHAT, content=body)).status_code == 200
    data = b"".join(map(tokenizer.token_bytes, engine.added[0].token_ids))
    assert "\U0001f44d".encode() in data


async def test_huge_lists_of_faults_are_cheap(client):
    body = {"model": "tiny", "messages": [1] * 15000}
    error = check_shape(await client.post(CHAT, json=body))
    assert error["param"] == "messages[0]"


async def test_too_many_messages(client, chat_body):
    body = chat_body(messages=[{"role": "user", "content": ""}] * 1500)
    assert (await client.post(CHAT, json=body)).status_code == 400


async def test_prompt_longer_than_the_context(app, client, chat_body):
    body = chat_body(messages=[{"role": "user", "content": "x " * 1000}])
    error = check_shape(await client.post(CHAT, json=body))
    messages = body["messages"]
    count = len(app.state.runtime.chat_template.encode(messages))
    assert (
        f"the prompt has {count} tokens; this model's maximum context length is 256 tokens"
        in (error["message"])
    )
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x " * 300}]}),
        ("/v1/completions", {"prompt": "x " * 300}),
        ("/v1/completions", {"prompt": [5] * 256}),
        ("/v1/responses", {"input": "x " * 300}),
        ("/v1/embeddings", {"input": ["x", "x " * 300]}),
    ],
)
async def test_clients_know_a_prompt_that_is_too_long(client, engine, url, body):
    response = await client.post(url, json={"model": "tiny"} | body)
    assert response.status_code == 400
    error = check_shape(response)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256" in error["message"]
    assert engine.added == []


async def test_anthropics_clients_know_it_too(client):
    messages = [{"role": "user", "content": "x " * 300}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 5}
    response = await client.post("/v1/messages", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.match(r"prompt is too long: \d+ tokens > 255 maximum", error["message"])


CHATTING = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("url", "field", "body", "asked"),
    [
        *(
            (url, field, body, asked)
            for url, field, body in (
                (CHAT, "max_tokens", CHATTING),
                (CHAT, "max_completion_tokens", CHATTING),
                ("/v1/completions", "max_tokens", {"prompt": "hi"}),
                ("/v1/responses", "max_output_tokens", {"input": "hi"}),
                ("/v1/messages", "max_tokens", CHATTING),
            )
            for asked in (32_000, 256, 10**30)
        ),
        (CHAT, "max_tokens", CHATTING, -1),
        (CHAT, "max_completion_tokens", CHATTING, -1),
        ("/v1/completions", "max_tokens", {"prompt": "hi"}, -1),
    ],
)
async def test_more_tokens_than_there_is_room_for_are_what_is_left(
    client, engine, url, field, body, asked
):
    response = await client.post(url, json={"model": "tiny", field: asked} | body)
    assert response.status_code == 200, response.text
    [added] = engine.added
    assert added.params.max_tokens == 256 - len(added.token_ids)


async def test_body_too_large_is_not_read(client, settings):
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 8192
            yield b"x" * 8192

    response = await client.post(CHAT, content=endless())
    assert response.status_code == 413
    assert str(settings.max_body_bytes) in check_shape(response)["message"]
    assert read <= settings.max_body_bytes + 2 * 8192


async def test_a_declared_size_is_enough_to_refuse(client, settings):
    response = await client.post(CHAT, content=b"x" * (settings.max_body_bytes + 1))
    assert response.status_code == 413
    check_shape(response)


async def test_unknown_model(client, chat_body):
    response = await client.post(CHAT, json=chat_body(model="gpt-9"))
    assert response.status_code == 404
    error = check_shape(response)
    assert "'gpt-9'" in error["message"]
    assert "'tiny'" in error["message"]
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/other/name", 404),
    ],
)
async def test_routes(client, method, path, status):
    response = await client.request(method, path)
    assert response.status_code == status
    check_shape(response)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("HEAD", CHAT, "POST"),
        ("OPTIONS", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
    ],
)
async def test_methods(client, method, path, allowed):
    response = await client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    if method != "HEAD":
        check_shape(response)


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/", "/health"])
@pytest.mark.parametrize("host", ["[", "a b", "evil.example", ""])
async def test_the_host_header_changes_nothing(live_url, path, host):
    async with httpx.AsyncClient() as client:
        response = await client.get(live_url + path, headers={"host": host})
    assert response.status_code == (404 if path == "/v1/nothing" else 200)
    assert "location" not in response.headers


@pytest.mark.parametrize("state", ["dead", "draining"])
async def test_unavailable(app, client, engine, chat_body, state):
    if state == "dead":
        engine.ready = False
    else:
        app.state.runtime.draining = True
    for response in (
        await client.post(CHAT, json=chat_body()),
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}),
        await client.get("/health"),
    ):
        assert response.status_code == 503
        assert check_shape(response)["type"] == "service_unavailable_error"
        assert response.headers["retry-after"] == "1"


async def test_no_chat_template(engine, backend, chat_body):
    app = create_app(engine, Tokenizer(backend), model_names=["tiny"])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.post(CHAT, json=chat_body())
        assert response.status_code == 400
        assert "no chat template" in check_shape(response)["message"]
        fine = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert fine.status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "tiny", 2**63, -1, 0, 1, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "5"])
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*ChatBody.model_fields, *CompletionBody.model_fields}))


@given(fields=st.dictionaries(FIELDS | st.text(max_size=4), JSON, max_size=4))
@settings(
    max_examples=3 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_bodies_are_never_a_5xx(engine, tokenizer, fields):
    app = create_app(engine, tokenizer, model_names=["tiny"])
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    text = {"model": "tiny", "prompt": "x", "max_tokens": 2}

    async def run() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            for url, base in ((CHAT, chat), ("/v1/completions", text)):
                content = json.dumps(base | fields, allow_nan=True)
                response = await http.post(url, content=content)
                assert response.status_code in (200, 400, 404), response.text
                if response.status_code != 200:
                    check_shape(response)

    asyncio.run(run())


@given(content=st.binary(max_size=60))
@settings(
    max_examples=settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_bytes_are_a_400(engine, tokenizer, content):
    app = create_app(engine, tokenizer, model_names=["tiny"])

    async def run() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            response = await http.post(CHAT, content=content)
            assert response.status_code == 400
            check_shape(response)

    asyncio.run(run())
