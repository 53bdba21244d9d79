"""Fields that say what an answer shows, and how long it may take."""

from __future__ import annotations

import asyncio

import pytest

from headstart.engine.errors import RequestError
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(params=[CHAT, TEXT])
def path(request):
    return request.param


@pytest.fixture
def body(path, chat_body):
    def build(**fields):
        text = {"model": "tiny", "prompt": "the fox", "max_tokens": 16}
        return chat_body(**fields) if path == CHAT else text | fields

    return build


async def test_token_ids_of_prompt_and_answer(client, engine, path, body, say):
    answer = (await client.post(path, json=body(return_token_ids=True))).json()
    [choice] = answer["choices"]
    holder = answer if path == CHAT else choice
    assert holder["prompt_token_ids"] == engine.added[0].token_ids
    assert choice["token_ids"] == [*say("hello world"), 2]
    plain = (await client.post(path, json=body())).text
    assert "token_ids" not in plain


async def test_token_ids_in_a_stream(client, engine, path, body, events, say):
    # The text is held back for the stop string, the tokens are not.
    fields = {"return_token_ids": True, "stream": True, "stop": "hello world."}
    chunks = events((await client.post(path, json=body(**fields))).text)[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    holders = chunks if path == CHAT else choices
    assert holders[0]["prompt_token_ids"] == engine.added[0].token_ids
    assert not any("prompt_token_ids" in holder for holder in holders[1:])
    parts = [choice["token_ids"] for choice in choices if choice.get("token_ids")]
    assert parts == [[token_id] for token_id in [*say("hello world"), 2]]


async def test_token_ids_end_where_the_stop_string_does(client, engine, path, body, say):
    engine.per_output = 100
    ids = say("hello world")
    answer = (await client.post(path, json=body(return_token_ids=True, stop="h"))).json()
    assert answer["choices"][0]["token_ids"] == ids[:1]
    assert answer["usage"]["completion_tokens"] == 1


async def test_tokens_as_token_ids(client, path, body, say):
    ids = say("hello world")
    fields = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    fields["return_tokens_as_token_ids"] = True
    choice = (await client.post(path, json=body(**fields))).json()["choices"][0]
    expected = [f"token_id:{token_id}" for token_id in ids]
    if path == TEXT:
        assert choice["logprobs"]["tokens"] == expected
        second = choice["logprobs"]["top_logprobs"][0]
        assert second == {f"token_id:{ids[0]}": -0.5, f"token_id:{(ids[0] + 1) % 400}": -1.5}
        return
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == expected
    assert content[0]["bytes"] == list(expected[0].encode())
    assert content[0]["top_logprobs"][0]["token"] == expected[0]


async def test_the_request_may_be_named(client, path, body):
    kind = "chatcmpl" if path == CHAT else "cmpl"
    response = await client.post(path, json=body(request_id="job-7"))
    assert response.json()["id"] == f"{kind}-job-7"
    assert response.headers["x-request-id"] == "job-7"
    head = {"x-request-id": "mine"}
    response = await client.post(path, json=body(request_id="job-7"), headers=head)
    assert response.headers["x-request-id"] == "mine"
    for name in ("", "a b", "a\n", "x" * 129):
        response = await client.post(path, json=body(request_id=name))
        assert response.json()["error"]["param"] == "request_id"


async def test_usage_in_every_event(client, path, body, events):
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(path, json=body(stream=True, n=2, stream_options=options))
    chunks = events(response.text)[:-1]
    *parts, last = chunks
    for index in (0, 1):
        counts = [
            chunk["usage"]["completion_tokens"]
            for chunk in parts
            if chunk["choices"][0]["index"] == index
        ]
        assert counts == sorted(counts)
        assert counts[-1] * 2 == last["usage"]["completion_tokens"]
    assert all(part["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for part in parts)
    options = {"continuous_usage_stats": True}
    response = await client.post(path, json=body(stream=True, stream_options=options))
    assert response.json()["error"]["param"] == "stream_options.continuous_usage_stats"


async def test_the_best_choices_are_answered(client, engine, say):
    texts = ["the", "fox", "dog", ""]
    engine.answer = lambda i: say(texts[i % 4])
    engine.logprob = lambda i: [-2.0, -0.5, -1.0, -0.1][i % 4]
    fields = {"prompt": ["a", "b"], "n": 2, "best_of": 4, "return_token_ids": True, "seed": 5}
    answer = (await client.post(TEXT, json={"model": "tiny"} | fields)).json()
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == ["fox", "dog", "fox", "dog"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in choices] == [None] * 4
    assert choices[0]["token_ids"] == [*say("fox"), 2]
    assert [added.params.logprobs for added in engine.added] == [0] * 8
    assert [added.params.seed for added in engine.added] == [5, 6, 7, 8] * 2
    generated = sum(len(say(text)) + 1 for text in texts)
    assert answer["usage"]["completion_tokens"] == 2 * generated


async def test_best_of_n_is_all_of_them(client, engine):
    for fields in ({"best_of": 2, "n": 2}, {"best_of": 1, "stream": True}):
        response = await client.post(TEXT, json={"model": "tiny", "prompt": "a"} | fields)
        assert response.status_code == 200
    assert all(added.params.logprobs is None for added in engine.added)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", ["field", "header", "flag"])
async def test_time_is_over_before_the_first_token(
    engine, tokenizer, connect_to, path, body, stream, n, way
):
    limit = 0.05 if way == "flag" else 100.0
    settings = ServerSettings(request_timeout=limit)
    client = connect_to(create_app(engine, tokenizer, model_names=["tiny"], settings=settings))
    engine.hold = True
    fields = {"timeout": 0.05} if way == "field" else {"timeout": 99}
    headers = {"X-Request-Timeout": "0.05"} if way == "header" else {}
    sent = body(stream=stream, n=n, **fields)
    response = await client.post(path, json=sent, headers=headers)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    assert "within 0.05 s" in error["message"]
    assert [added.stream.aborted for added in engine.added] == [1] * n


@pytest.mark.parametrize("n", [1, 3])
async def test_time_is_over_in_the_middle_of_a_stream(client, engine, path, body, events, n):
    engine.hold = True
    sent = asyncio.create_task(client.post(path, json=body(stream=True, timeout=0.3, n=n)))
    while len(engine.added) < n:
        await asyncio.sleep(0.002)
    gate = engine.added[0].stream.gate
    gate.set()
    while engine.added[0].stream.taken < 2:
        await asyncio.sleep(0)
    gate.clear()
    response = await sent
    assert response.status_code == 200
    *parts, error, done = events(response.text)
    assert parts
    assert (error["error"]["code"], done) == ("timeout", "[DONE]")
    assert [added.stream.aborted for added in engine.added] == [1] * n


async def test_nothing_comes_behind_the_error(app, engine, connect_to, path, body):
    engine.answer = lambda i: [5 + i % 100] * 200
    late: list[dict] = []

    async def watched(scope, receive, send):
        ended = False

        async def noting(message):
            nonlocal ended
            if ended:
                late.append(message)
                return
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        await app(scope, receive, noting)

    client = connect_to(watched)
    for timeout in (0.002, 0.004, 0.008, 0.016):
        fields = {"stream": True, "n": 8, "max_tokens": 200, "timeout": timeout}
        response = await client.post(path, json=body(**fields))
        await asyncio.sleep(0)
        assert response.status_code == 504 or response.text.endswith("data: [DONE]\n\n")
    assert late == []


async def test_time_enough(client, engine, path, body):
    response = await client.post(path, json=body(timeout=60), headers={"x-request-timeout": "60"})
    assert response.status_code == 200
    assert engine.added[0].stream.aborted == 0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
async def test_headers_that_are_no_time(client, engine, path, body, value):
    response = await client.post(path, json=body(), headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"
    assert not engine.added


@pytest.mark.parametrize("value", [0, -1, "5", True])
async def test_fields_that_are_no_time(client, path, body, value):
    response = await client.post(path, json=body(timeout=value))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout"


async def test_the_priority_reaches_the_engine(client, engine, path, body):
    for fields in ({"priority": -5, "n": 2}, {"priority": None}, {}):
        assert (await client.post(path, json=body(**fields))).status_code == 200
    assert [added.priority for added in engine.added] == [-5, -5, 0, 0]


async def test_a_priority_that_the_engine_refuses_is_a_400(client, engine, path, body):
    engine.fail_after = (0, RequestError("this server goes by arrival", "priority"))
    response = await client.post(path, json=body(priority=1))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"
