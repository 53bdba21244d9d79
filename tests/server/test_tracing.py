"""Requests as spans: what a receiver gets, what becomes of them without one, who asks for them."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from typing import Any

import httpx
import msgspec
import pytest

from headstart.engine.errors import ConfigError, EngineDeadError
from headstart.engine.process.messages import QueueAhead, Times
from headstart.server.cli import main as cli
from headstart.server.cli.configure import server_settings
from headstart.server.http.app import create_app
from headstart.server.http.tracing import MOST_CHUNKS
from headstart.server.settings import ServerSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SECRET = "a-word-nobody-else-says"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch):
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL", "HEADERS"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("SERVICE_NAME", "RESOURCE_ATTRIBUTES", "TRACES_SAMPLER", "SDK_DISABLED"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def chunks():
    """How many parts the engine says that it has computed a prompt in."""
    return 2


@pytest.fixture
def timed(engine, monkeypatch, chunks):
    """The engine says when it did what, as a real one does."""
    outputs = engine._outputs

    def with_times(token_ids, params):
        first, *others = outputs(token_ids, params)
        now = time.monotonic()
        edges = [now + i * 1e-5 for i in range(2 * chunks + 1)]
        times = Times(
            arrived=now,
            ready=now,
            scheduled=edges[1],
            computed=edges[-1],
            made=edges[-1] + 1e-5,
            seconds=chunks * 1e-5,
            num_chunks=chunks,
            num_tokens=9,
            chunks=list(zip(edges[1::2], edges[2::2], strict=True)),
            ahead=QueueAhead(1, 2, 34),
        )
        return [msgspec.structs.replace(first, times=times), *others]

    monkeypatch.setattr(engine, "_outputs", with_times)
    return engine


@pytest.fixture
async def traced(engine, tokenizer, connect_to, span_receiver):
    """``traced(url)``: a client of an app that sends its traces there; ended with the test."""
    ends = []

    async def connect(url: str = "") -> Any:
        settings = ServerSettings(otlp_traces_endpoint=url or f"{span_receiver.url}/v1/traces")
        app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
        ends.append(lifespan)
        return connect_to(app)

    yield connect
    for lifespan in ends:
        await lifespan.__aexit__(None, None, None)


async def come(receiver: Any, count: int = 1) -> list[dict[str, Any]]:
    """The spans of so many requests."""
    spans: list[dict[str, Any]] = await asyncio.to_thread(receiver.wait, count)
    return spans


async def sums(client: Any) -> dict[str, float]:
    """``trace_spans_total`` by outcome."""
    lines = (await client.get("/metrics")).text.splitlines()
    start = "headstart:trace_spans_total{outcome="
    found = [line.removeprefix(start) for line in lines if line.startswith(start)]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_and_its_phases(traced, timed, span_receiver, chat_body, stream) -> None:
    client = await traced()
    messages = [{"role": "user", "content": SECRET}]
    body = chat_body(messages=messages, stream=stream, temperature=0.5, top_p=0.9, max_tokens=40)
    response = await client.post(CHAT, json=body, headers={"x-request-id": "r1"})
    assert response.status_code == 200
    spans = await come(span_receiver)
    assert span_receiver.paths == ["/v1/traces"]
    [root] = [span for span in spans if span["name"] == "llm_request"]
    assert root["parent"] == ""
    children = [span for span in spans if span["parent"] == root["id"]]
    names = [span["name"] for span in sorted(children, key=lambda span: span["begin"])]
    assert names[:4] == ["receive", "template", "tokenise", "hand_over"]
    assert set(names[4:]) >= {"queue", "prefill", "sample"}
    [prefill] = [span for span in children if span["name"] == "prefill"]
    assert [span["name"] for span in spans if span["parent"] == prefill["id"]] == ["chunk"] * 2
    assert all(span["trace"] == root["trace"] for span in spans)
    attributes = root["attributes"]
    latencies = {key for key in attributes if key.startswith("gen_ai.latency.")}
    assert latencies == {
        f"gen_ai.latency.{name}"
        for name in (
            *("e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill"),
            *("time_in_model_decode", "time_in_model_inference"),
        )
    }
    known = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.id": "r1",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.n": 1,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.cached_tokens": 3,
    }
    assert known.items() <= attributes.items()
    assert attributes["gen_ai.usage.prompt_tokens"] > 0
    assert attributes["gen_ai.usage.completion_tokens"] > 0
    assert attributes["gen_ai.response.id"].startswith("chatcmpl-")
    assert prefill["attributes"]["headstart.queue.tokens"] == 34
    assert root["status"] == (0, "")
    assert SECRET not in repr(spans)
    assert "hello" not in repr(spans)


@pytest.mark.parametrize("chunks", [60])
async def test_a_request_has_so_many_spans_at_most(traced, timed, span_receiver, chat_body) -> None:
    client = await traced()
    await client.post(CHAT, json=chat_body())
    spans = await come(span_receiver)
    assert sum(span["name"] == "chunk" for span in spans) == MOST_CHUNKS


async def test_who_asks_may_have_begun_the_trace(traced, timed, span_receiver, chat_body) -> None:
    client = await traced()
    await client.post(CHAT, json=chat_body(), headers={**SAMPLED, "tracestate": "shop=7,x=1"})
    [root] = [span for span in await come(span_receiver) if span["kind"] == 2]
    assert (root["trace"], root["parent"], root["state"]) == (TRACE, PARENT, "shop=7,x=1")


@pytest.mark.parametrize("sent", ["00-zz", f"00-{'0' * 32}-{PARENT}-01", "\xff", "a" * 4000])
async def test_a_parent_that_is_none(traced, timed, span_receiver, chat_body, sent) -> None:
    client = await traced()
    headers = {"traceparent": sent.encode("latin-1")}
    assert (await client.post(CHAT, json=chat_body(), headers=headers)).status_code == 200
    [root] = [span for span in await come(span_receiver) if span["kind"] == 2]
    assert root["parent"] == ""


async def test_who_asks_may_not_want_it(traced, timed, span_receiver, chat_body) -> None:
    client = await traced()
    await client.post(CHAT, json=chat_body(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    await client.post(CHAT, json=chat_body(), headers={"x-request-id": "second"})
    roots = [span for span in await come(span_receiver) if span["kind"] == 2]
    assert [root["attributes"]["gen_ai.request.id"] for root in roots] == ["second"]


async def test_the_environment_decides(
    traced, timed, span_receiver, chat_body, monkeypatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=search")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=7")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    client = await traced()
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body(), headers=SAMPLED)
    roots = [span for span in await come(span_receiver) if span["kind"] == 2]
    assert [root["trace"] for root in roots] == [TRACE]
    resource = span_receiver.resources[0]
    assert (resource["service.name"], resource["team"]) == ("shop", "search")
    assert span_receiver.headers[0]["x-tenant"] == "7"
    assert span_receiver.headers[0]["content-encoding"] == "gzip"


async def test_the_service_has_a_name(traced, timed, span_receiver, chat_body) -> None:
    await (await traced()).post(CHAT, json=chat_body())
    await come(span_receiver)
    assert span_receiver.resources[0]["service.name"] == "headstart"


async def test_what_is_no_answer_of_the_model(traced, engine, span_receiver, chat_body) -> None:
    client = await traced()
    await client.get("/health")
    await client.get("/metrics")
    await client.get("/v1/models")
    await client.post(CHAT, json=chat_body(temperature=9))
    await client.post("/v1/embeddings", json={"model": "tiny", "input": "hi"})
    await client.get("/nothing/here")
    engine.fail_after = (0, EngineDeadError("it ended"))
    await client.post(COMPLETIONS, json={"model": "tiny", "prompt": "hi"})
    roots = [span for span in await come(span_receiver, 5) if span["kind"] == 2]
    found = [
        (
            root["name"],
            root["attributes"]["http.response.status_code"],
            root["attributes"].get("error.type"),
            root["status"],
        )
        for root in roots
    ]
    assert found == [
        ("GET /v1/models", 200, None, (0, "")),
        (f"POST {CHAT}", 400, "invalid_request_error", (0, "")),
        ("POST /v1/embeddings", 200, None, (0, "")),
        ("GET other", 404, "not_found_error", (0, "")),
        ("llm_request", 503, "service_unavailable", (2, "service_unavailable")),
    ]
    [operation] = {root["attributes"].get("gen_ai.operation.name") for root in roots} - {None}
    assert operation == "text_completion"


async def test_a_stream_that_fails_is_an_error(traced, engine, span_receiver, chat_body) -> None:
    engine.fail_after = (1, EngineDeadError("it ended"))
    await (await traced()).post(CHAT, json=chat_body(stream=True))
    [root] = [span for span in await come(span_receiver) if span["kind"] == 2]
    assert root["attributes"]["http.response.status_code"] == 200
    assert root["status"] == (2, "service_unavailable")
    assert root["attributes"]["gen_ai.response.finish_reasons"] == ["abort"]


@pytest.fixture
def settings(span_receiver) -> ServerSettings:
    """Those of the app behind ``live_url``."""
    return ServerSettings(otlp_traces_endpoint=f"{span_receiver.url}/v1/traces")


async def test_who_hangs_up_is_in_the_traces(live_url, engine, span_receiver, chat_body) -> None:
    engine.hold = True
    async with httpx.AsyncClient(base_url=live_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat_body()))
        async with asyncio.timeout(300):
            while not engine.added:
                await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    spans = await come(span_receiver)
    [root] = [span for span in spans if span["kind"] == 2]
    assert root["attributes"]["http.response.status_code"] == 499
    assert root["attributes"]["error.type"] == "hang_up"
    assert root["attributes"]["gen_ai.response.finish_reasons"] == ["abort"]
    assert "gen_ai.latency.time_to_first_token" not in root["attributes"]
    assert {span["name"] for span in spans} == {"llm_request", "receive", "template", "tokenise"}


async def test_what_waits_is_sent_at_the_end(
    engine, timed, tokenizer, connect_to, span_receiver, chat_body, monkeypatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    settings = ServerSettings(otlp_traces_endpoint=f"{span_receiver.url}/v1/traces")
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    async with app.router.lifespan_context(app):
        await connect_to(app).post(CHAT, json=chat_body())
        assert span_receiver.spans == []
    assert len(await come(span_receiver)) > 5


async def test_a_collector_that_is_not_there(
    traced, timed, span_receiver, chat_body, caplog
) -> None:
    caplog.set_level(logging.INFO)
    span_receiver.status = 400  # not one that is tried again
    client = await traced()

    async def until(outcome: str, least: float) -> None:
        async with asyncio.timeout(300):
            while (await sums(client))[outcome] < least:
                await asyncio.sleep(0.01)

    for count in range(1, 4):
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
        await until("failed", 5 * count)
    said = [r.getMessage() for r in caplog.records if "traces cannot be sent" in r.getMessage()]
    assert len(said) == 1
    assert span_receiver.url in said[0]
    assert "400" in said[0]
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")]
    span_receiver.status = 200
    await client.post(CHAT, json=chat_body())
    await until("exported", 5)
    assert [r.getMessage() for r in caplog.records if "are sent to" in r.getMessage()]


async def test_nothing_waits_for_a_collector(
    traced, timed, span_receiver, chat_body, monkeypatch
) -> None:
    """One that takes for ever: the queue fills up, and then requests have no spans."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    take = span_receiver._take

    def slow(handler: Any) -> None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(300)
        take(handler)

    monkeypatch.setattr(span_receiver, "_take", slow)
    client = await traced()
    for _ in range(40):
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
    counted = await sums(client)
    assert counted["dropped"] > 20
    assert counted["exported"] == counted["failed"] == 0
    gate.set()
    roots = [span for span in await come(span_receiver, 3) if span["kind"] == 2]
    assert len(roots) <= 40 - counted["dropped"]


def parse(*flags: str) -> ServerSettings:
    return server_settings(cli.parse("serve", "m", *flags))


@pytest.mark.parametrize(
    ("flag", "endpoint"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://a.example/api/otel/traces", "https://a.example/api/otel/traces"),
    ],
)
def test_the_flag(flag: str, endpoint: str) -> None:
    assert parse("--otlp-traces-endpoint", flag).otlp_traces_endpoint == endpoint


@pytest.mark.parametrize("flag", ["localhost:4318", "grpc://a:4317", "http://", "http://a b"])
def test_what_is_no_collector(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--otlp-traces-endpoint", flag)
    assert "such as http://localhost:4318" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, None),
        ({"EXPORTER_OTLP_ENDPOINT": "http://a:4318/"}, "http://a:4318/v1/traces"),
        ({"EXPORTER_OTLP_TRACES_ENDPOINT": "http://a:4318/x"}, "http://a:4318/x"),
        ({"EXPORTER_OTLP_ENDPOINT": "http://a:4318", "SDK_DISABLED": "true"}, None),
        ({"EXPORTER_OTLP_ENDPOINT": "http://a:4318", "TRACES_EXPORTER": "none"}, None),
        ({"EXPORTER_OTLP_ENDPOINT": "http://a:4317", "EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
    ],
)
def test_the_environment(monkeypatch, variables, endpoint) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    assert parse().otlp_traces_endpoint == endpoint


def test_a_flag_for_what_cannot_be(monkeypatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="http/protobuf, and OTEL_EXPORTER_OTLP_PROTOCOL is grpc"):
        parse("--otlp-traces-endpoint", "http://a:4317")


def test_without_the_extra(monkeypatch, caplog) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str) -> Any:
        if name == "opentelemetry.sdk.trace":
            raise ModuleNotFoundError(name)
        return find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError) as error:
        parse("--otlp-traces-endpoint", "http://a:4318")
    assert str(error.value) == (
        "--otlp-traces-endpoint: OpenTelemetry is not installed: pip install 'headstart[otel]'"
    )
    # What the environment names may be meant for others.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4318")
    assert parse().otlp_traces_endpoint is None
    assert "no traces are sent to http://a:4318/v1/traces" in caplog.text
