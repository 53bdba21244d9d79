"""Fields of /v1/messages that are ignored, lengths, headers and the list of models."""

from __future__ import annotations

import pytest

from headstart.engine.errors import RequestError

IGNORED = "x-headstart-ignored"
TOOL = {"name": "look", "input_schema": {"type": "object"}}
BASH = {"type": "bash_20250124", "name": "bash"}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"context_management": {"edits": []}}, "context_management"),
        ({"mcp_servers": []}, None),
        ({"betas": ["x"]}, "betas"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"service_tier": "auto"}, None),
        ({"speed": "fast"}, "speed"),
        ({"speed": "standard"}, None),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"container": {"skills": []}}, "container"),
        ({"cache_control": {"type": "ephemeral"}}, "cache_control"),
        ({"metadata": {"user_id": "x"}}, "metadata"),
        ({"thread": {"type": "create"}}, None),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        ({"n": 2}, "n"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[].defer_loading"),
        ({"tools": [TOOL | {"defer_loading": False, "type": "custom"}]}, None),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[].input_examples"),
        ({"tools": [TOOL | {"allowed_callers": ["code"]}]}, "tools[].allowed_callers"),
        ({"tools": [TOOL | {"allowed_callers": ["direct"], "strict": True}]}, None),
        ({"tools": [TOOL | {"eager_input_streaming": True}]}, "tools[].eager_input_streaming"),
        ({"tools": [TOOL | {"cache_control": {}}]}, "tools[].cache_control"),
        ({"tools": [TOOL, BASH]}, "tools[type=bash]"),
        ({"tools": [BASH, TOOL], "tool_choice": {"type": "any"}}, "tools[type=bash]"),
        ({"tools": [BASH]}, "tools[type=bash]"),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}, "tools[type=mcp_toolset]"),
        ({"tool_choice": {"type": "auto", "x": 1}}, "tool_choice.x"),
    ],
)
async def test_what_is_ignored(ask, fields, named):
    response = await ask(**fields)
    assert response.status_code == 200, response.text
    assert response.headers.get(IGNORED) == named


async def test_the_names_of_betas_are_no_fields(ask):
    response = await ask(headers={"anthropic-beta": "some-beta-2025-01-01"})
    assert response.status_code == 200
    assert IGNORED not in response.headers


async def test_hosted_tools_are_not_shown(ask, build, prompt):
    app = build()
    await ask(app=app, tools=[TOOL, BASH])
    assert "look" in prompt(app)
    assert "bash" not in prompt(app)


async def test_thinking_has_parts_that_are_ignored(ask, build, thinks):
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    response = await ask(app=build(thinks), thinking=thinking)
    assert response.headers[IGNORED] == "thinking.budget_tokens, thinking.display"


async def test_effort_goes_to_a_template_that_reads_it(ask, build, prompt):
    app = build("{{ reasoning_effort }}|{% for m in messages %}{{ m.content }}{% endfor %}")
    response = await ask(app=app, output_config={"effort": "high"})
    assert prompt(app) == "high|hi"
    assert IGNORED not in response.headers


@pytest.mark.parametrize("name", ["output_config", "output_format"])
async def test_a_schema(ask, engine, name):
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"fox": {}}}}
    response = await ask("{}", **{name: {"format": form} if name == "output_config" else form})
    assert response.status_code == 200, response.text
    assert "fox" in engine.added[-1].params.grammar


async def test_all_that_is_refused_is_named_at_once(ask):
    response = await ask(mcp_servers=[{"url": "x"}], compaction={"type": "summarize"})
    message = response.json()["error"]["message"]
    assert "mcp_servers is not supported: headstart calls no servers" in message
    assert "compaction" in message


async def test_lengths(ask, engine, build):
    app = build()
    counted = (await ask(app=app, url="/v1/messages/count_tokens")).json()["input_tokens"]
    response = await ask(app=app, max_tokens=100_000)
    assert response.status_code == 200
    assert engine.added[-1].params.max_tokens == 4096 - counted
    long = [{"role": "user", "content": "x" * 5000}]
    counted = await ask(app=app, url="/v1/messages/count_tokens", messages=long)
    response = await ask(app=app, messages=long)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    num_tokens = counted.json()["input_tokens"]
    assert f"prompt is too long: {num_tokens} tokens > 4095 maximum" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_computed_in_advance(ask, engine, events_of, stream):
    response = await ask(max_tokens=0, stream=stream)
    assert response.status_code == 200, response.text
    assert engine.added[-1].params.max_tokens == 0
    if stream:
        start, *_, delta, _ = events_of(response.text)
        body = start["message"] | delta["delta"] | {"usage": delta["usage"]}
    else:
        body = response.json()
    assert (body["content"], body["stop_reason"]) == ([], "max_tokens")
    usage = body["usage"]
    assert usage["output_tokens"] == 0
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert total == len(engine.added[-1].token_ids)


async def test_usage_counts_each_token_of_the_prompt_once(ask, engine, events_of):
    engine.cached_tokens = 5
    usages = [(await ask()).json()["usage"]]
    events = events_of((await ask(stream=True)).text)
    usages += [events[0]["message"]["usage"] | {"output_tokens": 0}, events[-2]["usage"]]
    for usage in usages:
        assert usage["input_tokens"] == len(engine.added[-1].token_ids) - 5
        assert usage["cache_read_input_tokens"] == 5
        assert usage["cache_creation_input_tokens"] == 0
    assert usages[0] == usages[2]


async def test_answers_carry_their_id(ask, engine, build):
    app = build()
    sent = {"x-request-id": "abc"}
    answers = [
        await ask(app=app, headers=sent),
        await ask(app=app, headers=sent, stream=True),
        await ask(app=app, headers=sent, url="/v1/messages/count_tokens"),
        await ask(app=app, headers=sent, model="other"),
    ]
    for answer in answers:
        assert answer.headers["request-id"] == answer.headers["x-request-id"] == "abc"
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404]
    engine.fail_after = (0, RuntimeError("secret"))
    answer = await ask(app=app)
    assert answer.status_code == 500
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_other_answers_have_openais_alone(client):
    answer = await client.get("/v1/models")
    assert "x-request-id" in answer.headers
    assert "request-id" not in answer.headers


async def test_the_engines_own_words_have_anthropics_shape(ask, engine, monkeypatch):
    def add(*args, **kwargs):
        raise RequestError("no room", "messages")

    monkeypatch.setattr(engine, "add", add)
    response = await ask()
    assert response.status_code == 400
    assert response.json()["error"] == {"type": "invalid_request_error", "message": "no room"}


async def test_models(client):
    listed = (await client.get("/v1/models", headers=VERSION)).json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "also-tiny"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (
        False,
        "tiny",
        "also-tiny",
    )
    model = listed["data"][0]
    assert (model["type"], model["display_name"]) == ("model", "tiny")
    assert model["max_input_tokens"] == 256
    assert (await client.get("/v1/models/tiny", headers=VERSION)).json() == model
    assert (await client.get("/v1/models/other", headers=VERSION)).status_code == 404
    assert (await client.get("/v1/models/tiny")).json()["object"] == "model"


@pytest.mark.parametrize(
    ("query", "ids", "more"),
    [
        ("limit=1", ["tiny"], True),
        ("limit=1&after_id=tiny", ["also-tiny"], False),
        ("before_id=also-tiny", ["tiny"], False),
        ("after_id=also-tiny", [], False),
    ],
)
async def test_pages_of_models(client, query, ids, more):
    listed = (await client.get(f"/v1/models?{query}", headers=VERSION)).json()
    assert ([model["id"] for model in listed["data"]], listed["has_more"]) == (ids, more)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999", "after_id=other"])
async def test_pages_that_there_are_not(client, query):
    response = await client.get(f"/v1/models?{query}", headers=VERSION)
    assert response.status_code in (400, 404)
    assert query.partition("=")[0] == response.json()["error"]["param"]


async def test_the_official_client_lists_models(app, app_saying, anthropic):
    client = anthropic.AsyncAnthropic(
        base_url="http://test", api_key="none", max_retries=0, http_client=app_saying(app, "x")
    )
    assert [model.id async for model in client.models.list(limit=1)] == ["tiny", "also-tiny"]
    model = await client.models.retrieve("tiny")
    assert (model.type, model.lifecycle) == ("model", "active")
    assert model.created_at.tzinfo is not None
