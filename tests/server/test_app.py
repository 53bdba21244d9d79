"""Health, metrics, models, start-up, the access log, the OpenAPI document."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys

import httpx
import msgspec
import pytest

from headstart.engine.errors import ModelError
from headstart.engine.process.messages import RelayStats, Stats
from headstart.server.http.app import create_app
from headstart.server.http.keys import Keys
from headstart.server.settings import ServerSettings


async def test_health_and_version(client, engine):
    assert (await client.get("/health")).status_code == 200
    assert set((await client.get("/version")).json()) == {"version"}
    engine.ready = False
    assert (await client.get("/health")).status_code == 503


async def test_live_and_ready(app, client, engine):
    async def statuses():
        return [(await client.get(path)).status_code for path in ("/live", "/ready", "/load")]

    assert (await client.get("/ready")).json() == {"status": "ready"}
    assert await statuses() == [200, 200, 200]
    engine.ready = False
    assert await statuses() == [200, 503, 503]
    engine.ready = True
    app.state.runtime.draining = True
    assert await statuses() == [200, 503, 503]


@pytest.mark.parametrize(
    "path",
    [
        *("/health", "/live", "/ready", "/load", "/version", "/metrics", "/openapi.json"),
        *("/v1/models", "/v1/models/tiny"),
    ],
)
async def test_head_is_get_without_a_body(live_url, path):
    async with httpx.AsyncClient(base_url=live_url) as client:
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, get.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        if path not in ("/metrics", "/load"):
            assert head.headers["content-length"] == str(len(get.content))


async def test_head_of_what_is_not_there(client, engine):
    engine.ready = False
    assert (await client.head("/health")).status_code == 503
    assert (await client.head("/v1/models/gone")).status_code == 404
    assert (await client.head("/v1/responses/resp_1")).status_code == 404


async def test_a_slash_at_the_end_of_a_path(client, chat_body, caplog):
    caplog.set_level(logging.INFO, "headstart.access")
    response = await client.post("/v1/chat/completions/", json=chat_body())
    assert response.status_code == 200
    assert (await client.get("/v1/models/")).json() == (await client.get("/v1/models")).json()
    assert (await client.head("/health//")).status_code == 200
    assert (await client.get("/nothing/")).status_code == 404
    assert "POST /v1/chat/completions status=200" in caplog.text
    anthropic = await client.post("/v1/messages/", json={})
    assert anthropic.json()["type"] == "error"


async def test_a_slash_opens_no_door(engine, tokenizer, connect_to):
    keys = Keys.of(["a" * 20], ["b" * 20])
    settings = ServerSettings(keys=keys)
    client = connect_to(create_app(engine, tokenizer, model_names=["a"], settings=settings))
    for path in ("/metrics", "/metrics/"):
        for key, status in (("", 401), ("a" * 20, 403), ("b" * 20, 200)):
            response = await client.get(path, headers={"x-api-key": key})
            assert response.status_code == status
    assert (await client.head("/v1/models/")).status_code == 401
    assert (await client.get("/health/")).status_code == 200


async def test_load(client, engine):
    engine.stats = Stats(running=2, waiting=1, pages_total=64, pages_used=40, pages_cached=24)
    assert (await client.get("/load")).json() == {
        "running": 2,
        "waiting": 1,
        "in_flight": 0,
        "in_flight_limit": 64 + 256,
        "without_first_token": 0,
        "predicted_seconds": None,
        "kv_used": 0.25,
        "kv_pages_total": 64,
        "kv_pages_used": 16,
        "kv_pages_cached": 24,
    }
    engine.stats = Stats()  # no step has been made
    idle = (await client.get("/load")).json()
    assert (idle["kv_used"], idle["kv_pages_total"]) == (0, 64)


async def test_models(client):
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "also-tiny"]
    assert listed["data"][0]["max_model_len"] == 256
    assert listed["data"][0]["owned_by"] == "headstart"
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]


async def test_metrics(client, engine, chat_body):
    engine.stats = Stats(running=2, waiting=1, pages_total=100, pages_used=60, pages_cached=35)
    engine.restarts = 4
    await client.post("/v1/chat/completions", json=chat_body())
    await client.post("/v1/chat/completions", json=chat_body(max_tokens=1))
    text = (await client.get("/metrics")).text
    label = '{model_name="tiny"}'
    for line in (
        f"headstart:num_requests_running{label} 2.0",
        f"headstart:num_requests_waiting{label} 1.0",
        f"headstart:kv_cache_usage_perc{label} 0.25",
        f"headstart:kv_cache_cached_perc{label} 0.35",
        f"headstart:prompt_tokens_total{label} 0.0",
        f"headstart:generation_tokens_total{label} 0.0",
        f"headstart:prefix_cache_queries_total{label} 0.0",
        f"headstart:prefix_cache_hits_total{label} 0.0",
        f"headstart:engine_restarts_total{label} 4.0",
        f"headstart:time_to_first_token_seconds_count{label} 2.0",
        f"headstart:e2e_request_latency_seconds_count{label} 2.0",
        'headstart:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'headstart:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
    ):
        assert line in text.splitlines()
    assert "headstart:inter_token_latency_seconds_bucket" in text


async def test_metrics_of_relay(client, engine):
    names = {
        "enabled": ("relay_enabled", "gauge"),
        "refused": ("relay_refused", "gauge"),
        "steps": ("relay_steps_total", "counter"),
        "ranges": ("relay_ranges_total", "counter"),
        "seconds": ("relay_attention_seconds_total", "counter"),
        "predicted_seconds": ("relay_predicted_attention_seconds_total", "counter"),
        "predicted_plain_seconds": ("relay_predicted_plain_attention_seconds_total", "counter"),
        "bytes_read": ("relay_kv_read_bytes_total", "counter"),
        "bytes_distinct": ("relay_kv_distinct_bytes_total", "counter"),
        "checks": ("relay_checks_total", "counter"),
        "largest_difference": ("relay_check_largest_difference", "gauge"),
    }
    assert list(names) == [field.name for field in msgspec.structs.fields(RelayStats)]
    values = (True, False, 3, 5, 0.5, 0.25, 0.75, 4096, 1024, 7, 0.125)
    for numbers in (
        values,
        (False, True, *values[2:-1], math.inf),
        msgspec.structs.astuple(RelayStats()),
    ):
        engine.stats = Stats(relay=RelayStats(*numbers))
        lines = (await client.get("/metrics")).text.splitlines()
        for (name, kind), number in zip(names.values(), numbers, strict=True):
            text = "+Inf" if number == math.inf else str(float(number))
            assert f"# TYPE headstart:{name} {kind}" in lines
            assert f'headstart:{name}{{model_name="tiny"}} {text}' in lines
        shown = {line.split("{")[0] for line in lines if line.startswith("headstart:relay_")}
        assert shown == {f"headstart:{name}" for name, _ in names.values()}


async def test_two_apps_do_not_know_each_other(engine, tokenizer):
    first, second = (create_app(engine, tokenizer, model_names=[name]) for name in ("a", "b"))
    first.state.runtime.draining = True
    assert not second.state.runtime.draining


async def test_the_engine_starts_and_stops_with_the_app(app, engine):
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0)
        assert (engine.started, engine.stopped) == (1, 0)
    assert engine.stopped == 1


async def test_a_failed_start_is_told(engine, tokenizer):
    async def start():
        raise ModelError("no such model")

    engine.start = start
    failures = []
    app = create_app(engine, tokenizer, model_names=["a"], on_start_failure=failures.append)
    async with app.router.lifespan_context(app):
        await asyncio.sleep(0.01)
    assert [str(error) for error in failures] == ["no such model"]


async def test_access_log_is_one_line_without_text(client, chat_body, caplog):
    caplog.set_level(logging.INFO, "headstart.access")
    secret = chat_body(messages=[{"role": "user", "content": "secret"}])
    await client.post("/v1/chat/completions?x=secret", json=secret)
    await client.get("/v1/evil%0aPOST%20/admin status=200")
    await client.get("/health")
    lines = [r.getMessage() for r in caplog.records if r.name == "headstart.access"]
    assert len(lines) == 2
    assert not any("\n" in line or "secret" in line or "hello" in line for line in lines)
    assert lines[0].startswith("POST /v1/chat/completions status=200 ms=")
    assert "completion_tokens=" in lines[0]
    assert lines[1].startswith('GET "/v1/evil\\nPOST /admin status=200" status=404')


async def test_openapi_describes_the_bodies(client):
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"ChatBody", "ChatMessage", "CompletionBody", "StreamOptions"} <= set(schemas)
    for path, name in (
        ("/v1/chat/completions", "ChatBody"),
        ("/v1/load_lora_adapter", "LoadAdapterBody"),
        ("/v1/unload_lora_adapter", "UnloadAdapterBody"),
        ("/tokenize", "TokenizeBody"),
        ("/detokenize", "DetokenizeBody"),
        ("/apply-template", "ApplyTemplateBody"),
    ):
        body = document["paths"][path]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
    chat, text = (
        schemas[name]["properties"]["segment_mask"] for name in ("ChatBody", "CompletionBody")
    )
    assert chat["enum"] == ["causal", "turns", None]
    assert [list(kind.get("properties", ())) for kind in text["anyOf"]] == [
        [],
        ["characters"],
        ["tokens"],
    ]


async def test_whatever_may_be_left_out_may_be_null(client):
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name, field in (("ResponsesBody", "tools"), ("ConversationCreateBody", "items")):
        assert {"type": "null"} in schemas[name]["properties"][field]["anyOf"]
    response = await client.post("/v1/conversations", json={"items": None, "metadata": None})
    assert response.status_code == 200, response.text


async def test_methods_are_those_of_the_path_itself(client):
    response = await client.options("/v1/responses/input_tokens")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    response = await client.options("/v1/responses/resp_1")
    assert response.headers["allow"] == "DELETE, GET, HEAD"


def test_the_server_imports_no_torch():
    code = (
        "import sys, headstart.server.http.app, headstart.server.cli.main;"
        "import headstart.server.http.serving;"
        "bad = {'torch', 'numpy.testing'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_no_pages_that_load_scripts(client, path):
    assert (await client.get(path)).status_code == 404
