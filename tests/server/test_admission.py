"""Who is let in and who is not: statuses, headers, what is counted. Clocks and costs are given."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from typing import Any
from urllib.parse import urlsplit

import anthropic
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.costs.backlog import Backlog
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.errors import RequestError
from headstart.engine.process.messages import ModelInfo, Output, Stats
from headstart.server.http.admission import MAX_CALLERS, Admission, Ticket
from headstart.server.http.admission_control import PATHS
from headstart.server.http.app import create_app
from headstart.server.http.errors import APIError
from headstart.server.http.keys import Keys
from headstart.server.http.refusals import LINGER_BYTES, SMALL_BODY
from headstart.server.settings import ServerSettings

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
COSTS = PrefillCosts(0.0, 0.01, 0.0)
"""10 ms a token."""
HI = [{"role": "user", "content": "hi"}]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_app(engine, tokenizer, clock):
    def make(**settings: Any):
        given = ServerSettings(**settings)
        return create_app(engine, tokenizer, model_names=["tiny"], settings=given, clock=clock)

    return make


@pytest.fixture
def two_run(engine):
    """The engine computes two at a time."""
    engine.model = msgspec.structs.replace(engine.model, max_running=2)


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 4} | fields


async def asked(engine, count: int) -> None:
    async with asyncio.timeout(60):
        while len(engine.added) < count:
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def held(client, engine, count: int, **fields: Any):
    """``count`` requests that the engine has and does not answer before the end."""
    engine.hold, before = True, len(engine.added)
    tasks = [asyncio.create_task(client.post(TEXT, json=text(**fields))) for _ in range(count)]
    choices = count * fields.get("n", 1)
    await asked(engine, before + choices)
    engine.hold = False
    yield
    for added in engine.added[before : before + choices]:
        added.stream.gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * count


def refusals(app) -> dict[str, int]:
    return {reason: count for reason, count in app.state.runtime.admission.refused.items() if count}


def shown(app, name: str) -> float | None:
    lines = app.state.runtime.metrics.expose().decode().splitlines()
    found = [line for line in lines if line.startswith(f"headstart:{name}{{")]
    return float(found[0].rsplit(" ", 1)[1]) if found else None


# ---------------------------------------------------------------------------------- places


async def test_no_more_wait_than_may(make_app, connect_to, engine, two_run):
    app = make_app(max_queue=1)
    client = connect_to(app)
    async with held(client, engine, 3):
        load = (await client.get("/load")).json()
        assert (load["in_flight"], load["in_flight_limit"], load["without_first_token"]) == (
            3,
            3,
            3,
        )
        assert shown(app, "queue_depth") == 3
        refused = await client.post(CHAT, json={"model": "tiny", "messages": HI})
        assert refused.status_code == 503
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("overloaded", "service_unavailable_error")
        assert "3 requests run or wait, and 3 may (--max-queue)" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 100
    assert len(engine.added) == 3
    assert (await client.post(TEXT, json=text())).status_code == 200
    assert refusals(app) == {"queue": 1}
    line = 'headstart:requests_refused_total{model_name="tiny",reason="queue"} 1.0'
    assert line in app.state.runtime.metrics.expose().decode()
    assert (shown(app, "requests_in_flight"), shown(app, "queue_depth")) == (0, 0)


async def test_refused_before_the_body_is_read(make_app, connect_to, engine, two_run):
    client = connect_to(make_app(max_queue=1))
    read = []

    async def body():
        read.append(1)
        yield json.dumps(text()).encode()

    async with held(client, engine, 3):
        headers = {"content-length": "57"}
        refused = await client.post(TEXT, content=body(), headers=headers)
        assert refused.status_code == 503
    assert read == []
    assert (await client.post(TEXT, content=body(), headers=headers)).status_code == 200


async def test_by_default_four_wait_for_each_that_runs(make_app, engine):
    for most, limit in ((64, 320), (256, 1280), (1000, 2024)):
        engine.model = msgspec.structs.replace(engine.model, max_running=most)
        assert make_app().state.runtime.admission.limit == limit


@pytest.mark.parametrize("fields", [{"n": 3}, {"prompt": ["a", "b", "c"]}, {"best_of": 3}])
async def test_choices_and_prompts_count_as_many(make_app, connect_to, engine, two_run, fields):
    app = make_app(max_queue=1)
    client = connect_to(app)
    async with held(client, engine, 1):
        refused = await client.post(TEXT, json=text(**fields))
        assert refused.status_code == 503
        assert "1 requests run or wait, and 3 may" in refused.json()["error"]["message"]
        assert len(engine.added) == 1  # none of them
        assert (await client.post(TEXT, json=text(n=2))).status_code == 200
    assert (await client.post(TEXT, json=text(**fields))).status_code == 200
    assert app.state.runtime.admission.in_flight == 0
    # What could never be let in beside another is, alone.
    assert (await client.post(TEXT, json=text(n=8))).status_code == 200
    async with held(client, engine, 1, n=8):
        assert (await client.post(TEXT, json=text())).status_code == 503


async def test_texts_to_embed_count_as_many_as_the_engine_has_at_a_time(
    make_app, connect_to, engine, two_run
):
    engine.vector = [1.0] * 8
    client = connect_to(make_app(max_queue=70))
    body = {"model": "tiny", "input": ["a"] * 200}
    async with held(client, engine, 8):
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
    async with held(client, engine, 9):
        assert (await client.post("/v1/embeddings", json=body)).status_code == 503


async def test_what_is_let_in_is_answered(make_app, connect_to, engine, two_run):
    """However much comes after it, and whatever it is refused for."""
    engine.stats = Stats(prefill=COSTS)
    client = connect_to(make_app(max_queue=6, ttft_slo=100.0))
    async with held(client, engine, 8):  # which checks that all of them get a 200
        engine.stats = Stats(prefill=COSTS, backlog=Backlog.of([1000.0], 1.0, 0.0))
        statuses = [(await client.post(TEXT, json=text())).status_code for _ in range(5)]
        assert statuses == [503] * 5


@pytest.mark.parametrize("fields", [{"n": 0}, {"model": "gone"}, {"prompt": ""}])
async def test_requests_that_are_wrong_give_their_place_back(make_app, connect_to, two_run, fields):
    app = make_app(max_queue=1)
    client = connect_to(app)
    for _ in range(5):
        assert (await client.post(TEXT, json=text(**fields))).status_code in (400, 404)
    assert (app.state.runtime.admission.in_flight, app.state.runtime.admission.waiting) == (0, 0)


async def test_what_the_engine_refuses_gives_its_place_back(make_app, connect_to, engine):
    engine.fail_after = (0, RequestError("no"))
    app = make_app()
    client = connect_to(app)
    assert (await client.post(TEXT, json=text(n=3))).status_code == 400
    assert (app.state.runtime.admission.in_flight, app.state.runtime.admission.waiting) == (0, 0)


@pytest.mark.parametrize("after", ["prompt", "first token"])
async def test_who_hangs_up_gives_the_place_back(make_app, connect_to, engine, two_run, after):
    app = make_app(max_queue=1)
    client, admission = connect_to(app), app.state.runtime.admission
    engine.hold = True
    tasks = [asyncio.create_task(client.post(TEXT, json=text())) for _ in range(3)]
    await asked(engine, 3)
    if after == "first token":
        stream = engine.added[0].stream
        stream.gate.set()
        async with asyncio.timeout(60):
            while not stream.taken:
                await asyncio.sleep(0)
        assert admission.waiting == 2
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    assert (admission.in_flight, admission.waiting) == (2, 2)
    engine.hold = False
    assert (await client.post(TEXT, json=text())).status_code == 200
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.in_flight, admission.waiting) == (0, 0)


async def test_when_to_come_back_is_how_fast_places_become_free(
    make_app, connect_to, engine, two_run, clock
):
    client = connect_to(make_app(max_queue=1))
    async with held(client, engine, 2):
        for _ in range(5):  # one every two seconds
            clock.now += 2
            assert (await client.post(TEXT, json=text())).status_code == 200
        async with held(client, engine, 1):
            refused = await client.post(TEXT, json=text())
            assert refused.headers["retry-after-ms"] == "2000"
            refused = await client.post(TEXT, json=text(n=1, prompt=["a", "b"]))
            assert refused.headers["retry-after"] == "2"  # it is known to be one, as yet
            clock.now += 600  # nothing has ended since
            refused = await client.post(TEXT, json=text())
            assert refused.headers["retry-after"] == "60"


async def test_nothing_else_is_refused(make_app, connect_to, engine, two_run):
    client = connect_to(make_app(max_queue=1, rate_limit=3, ttft_slo=0.001))
    async with held(client, engine, 3):
        engine.stats = Stats(prefill=COSTS, pages_total=64)
        for path in ("/health", "/live", "/ready", "/load", "/metrics", "/v1/models", "/version"):
            for _ in range(5):
                assert (await client.get(path)).status_code == 200, path
        body = {"model": "tiny", "messages": HI}
        for path in ("/tokenize", "/v1/messages/count_tokens"):
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, path
            assert "x-ratelimit-limit-requests" not in answer.headers
        assert (await client.post(TEXT, json=text())).status_code in (429, 503)


async def test_every_path_that_asks_the_engine_is_counted(make_app, connect_to, two_run, engine):
    app = make_app(max_queue=1)
    assert app.state.post_paths >= PATHS
    client = connect_to(app)
    async with held(client, engine, 3):
        for path in (*PATHS, f"{TEXT}/", f"{TEXT}%0a"):
            assert (await client.post(path, json={})).status_code in (503, 529), path


async def test_a_server_that_is_not_ready_says_so(make_app, connect_to, engine):
    engine.ready = False
    refused = await connect_to(make_app(max_queue=1)).post(TEXT, json=text())
    assert refused.json()["error"]["code"] == "service_unavailable"


async def test_bodies_that_do_not_come_take_no_places(make_app, connect_to, engine, two_run, clock):
    app = make_app(max_queue=1)
    client, admission = connect_to(app), app.state.runtime.admission
    begun, end = [], asyncio.Event()

    async def slow():
        yield b'{"model": "tiny", "max_tokens": 4, '
        begun.append(1)
        await end.wait()
        yield b'"prompt": "hello"}'

    late = [asyncio.create_task(client.post(TEXT, content=slow())) for _ in range(3)]
    async with asyncio.timeout(60):
        while len(begun) < 3:
            await asyncio.sleep(0.001)
    assert (await client.post(TEXT, json=text())).status_code == 503
    clock.now += 1.1
    assert (await client.post(TEXT, json=text())).status_code == 200
    assert (admission.in_flight, admission.waiting) == (0, 0)
    async with held(client, engine, 2):
        engine.hold = True
        end.set()
        await asked(engine, 4)  # there is one place left
        done, waiting = await asyncio.wait(late, return_when=asyncio.ALL_COMPLETED, timeout=0.2)
        assert [task.result().status_code for task in done] == [503, 503]
        engine.hold = False
        engine.added[-1].stream.gate.set()
        assert [(await task).status_code for task in waiting] == [200]
    assert (admission.in_flight, admission.waiting) == (0, 0)


async def test_a_body_that_is_there_keeps_its_place(make_app, connect_to, engine, two_run, clock):
    """However long the engine, or a template, takes."""
    client = connect_to(make_app(max_queue=1))
    async with held(client, engine, 3):
        clock.now += 100
        assert (await client.post(TEXT, json=text())).status_code == 503


# ------------------------------------------------------------------------------ predictions


async def test_costs_that_are_not_known_predict_nothing(make_app, connect_to, engine):
    engine.stats = Stats(backlog=Backlog.of([1000.0], 1.0, 0.0))
    app = make_app(ttft_slo=0.001)
    client = connect_to(app)
    headers = {"x-request-timeout": "100"}
    assert (await client.post(TEXT, json=text(), headers=headers)).status_code == 200
    assert (await client.get("/load")).json()["predicted_seconds"] is None
    assert shown(app, "predicted_first_token_seconds") is None
    assert shown(app, "predicted_backlog_seconds") is None
    assert shown(app, "queue_depth") == 0


async def test_a_first_token_that_would_come_too_late(make_app, connect_to, engine):
    engine.stats = Stats(prefill=COSTS, backlog=Backlog.of([0.01] * 500, 2.0, 0.0))
    app = make_app(ttft_slo=4.0)
    client = connect_to(app)
    refused = await client.post(TEXT, json=text())
    assert refused.status_code == 503
    message = refused.json()["error"]["message"]
    assert "predicted in 10 s; 4 s may take here (--ttft-slo)" in message
    assert refused.headers["retry-after-ms"] == "6000"
    assert engine.added == []
    assert refusals(app) == {"ttft_slo": 1}
    load = (await client.get("/load")).json()
    assert load["predicted_seconds"] == pytest.approx(2.0 * (5 + 0.01))
    assert shown(app, "predicted_first_token_seconds") == pytest.approx(10.02)
    assert shown(app, "predicted_backlog_seconds") == pytest.approx(10.0)
    engine.stats = Stats(prefill=COSTS, backlog=Backlog.of([0.01] * 190, 2.0, 0.0))
    assert (await client.post(TEXT, json=text())).status_code == 200


async def test_a_wrong_pace_keeps_nobody_out_of_an_idle_server(make_app, connect_to, engine):
    """It is measured by requests that are let in."""
    engine.cached_tokens = 0
    engine.stats = Stats(prefill=COSTS, backlog=Backlog([], 5000.0, 0.0))
    client = connect_to(make_app(ttft_slo=2.0))
    assert (await client.get("/load")).json()["predicted_seconds"] == pytest.approx(0.01)
    for _ in range(3):
        assert (await client.post(TEXT, json=text())).status_code == 200
    async with held(client, engine, 1):
        assert (await client.post(TEXT, json=text())).status_code == 503


@pytest.mark.parametrize("by", ["header", "body", "server"])
async def test_a_deadline_that_cannot_be_met(make_app, connect_to, engine, by):
    engine.stats = Stats(prefill=COSTS, backlog=Backlog.of([10.0], 1.0, 1.0))
    app = make_app(request_timeout=5.0) if by == "server" else make_app()
    client = connect_to(app)
    headers = {"x-request-timeout": "5"} if by == "header" else {}
    body = text(timeout=5) if by == "body" else text()
    refused = await client.post(TEXT, json=body, headers=headers)
    assert refused.status_code == 503
    assert "are left of the time that the request gives" in refused.json()["error"]["message"]
    assert 4 <= int(refused.headers["retry-after-ms"]) / 1000 <= 6
    assert engine.added == []
    assert refusals(app) == {"deadline": 1}
    if by != "server":
        late = await client.post(TEXT, json=text(timeout=50), headers={"x-request-timeout": "60"})
        assert late.status_code == 200


async def test_what_was_sent_and_is_not_reported_is_ahead(make_app, connect_to, engine):
    engine.stats = Stats(prefill=COSTS)
    client = connect_to(make_app(ttft_slo=1.7))
    prompt = [5] * 80  # 0.8 s
    async with held(client, engine, 1, prompt=prompt):
        engine.added[-1].stream.reported = False
        async with held(client, engine, 1, prompt=prompt):
            engine.added[-1].stream.reported = False
            refused = await client.post(TEXT, json=text(prompt=prompt))
            assert refused.status_code == 503
            assert "predicted in 2.4 s" in refused.json()["error"]["message"]
            engine.added[0].stream.reported = True  # and is in the backlog, or computed
            assert (await client.post(TEXT, json=text(prompt=prompt))).status_code == 200


async def test_tokens_are_estimated_by_the_length_of_the_body(make_app, connect_to, engine):
    """By what earlier bodies had; and the estimate is corrected before the engine is asked."""
    engine.cached_tokens = 0
    engine.stats = Stats(prefill=COSTS)
    app = make_app(ttft_slo=1.5)
    client = connect_to(app)
    for _ in range(4):  # 130 tokens in some 600 bytes, 1.3 s
        assert (await client.post(TEXT, json=text(prompt=[5] * 130))).status_code == 200
    count = len(engine.added)
    size = len(json.dumps(text(prompt=[5] * 130)))
    long = json.dumps(text()).encode() + b" " * (2 * size)
    assert (await client.post(TEXT, content=long)).status_code == 503
    assert (await client.post(TEXT, json=text(prompt=[5] * 140))).status_code == 200
    # As long in bytes, but more tokens than these had: known when they are there.
    dense = json.dumps(text(prompt=[5] * 190), separators=(",", ":"))
    assert len(dense) < size
    assert (await client.post(TEXT, content=dense)).status_code == 503
    assert len(engine.added) == count + 1
    chunked = await client.post(TEXT, content=_in_chunks(dense.encode()))
    assert chunked.status_code == 503  # its length was not told
    assert "predicted in 1.9 s" in chunked.json()["error"]["message"]


async def _in_chunks(body: bytes):
    for i in range(0, len(body), 100):
        yield body[i : i + 100]


async def test_a_prompt_that_is_too_long_by_itself_is_not_to_come_back(
    make_app, connect_to, engine
):
    engine.cached_tokens = 0
    engine.stats = Stats(prefill=COSTS)
    client = connect_to(make_app(ttft_slo=1.0))
    for _ in range(2):
        assert (await client.post(TEXT, json=text(prompt=[5] * 90))).status_code == 200
    refused = await client.post(TEXT, json=text(prompt=[5] * 150))
    assert refused.status_code == 503
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert "cannot be answered in time however long it waits" in refused.json()["error"]["message"]


async def test_what_the_cache_holds_is_learned(make_app, connect_to, engine, clock):
    """Per caller: one whose prompts are cached is let in where another is not."""
    engine.stats = Stats(prefill=COSTS)
    keys = Keys.of(api=["a" * 20, "b" * 20])
    client = connect_to(make_app(ttft_slo=1.0, keys=keys))

    async def ask(key: str, cached: int) -> int:
        engine.cached_tokens = cached
        answer = await client.post(
            TEXT, json=text(prompt=[5] * 200), headers={"x-api-key": key * 20}
        )
        return answer.status_code

    # 2 s if nothing is cached. The first of each says nothing, and the second is learned by.
    assert [await ask("a", cached) for cached in (0, 190, 190, 190)] == [200] * 4
    assert [await ask("b", 0) for _ in range(5)] == [200, 200, 503, 503, 503]
    assert await ask("a", 190) == 200
    clock.now += 61  # the cache may hold it now
    assert [await ask("b", cached) for cached in (190, 190, 190)] == [200] * 3


async def test_one_at_a_time_is_learned_by(make_app, connect_to, engine):
    engine.stats, engine.cached_tokens = Stats(prefill=COSTS), 0
    client = connect_to(make_app(ttft_slo=1.0))
    async with held(client, engine, 1, prompt=[5] * 200):
        assert (await client.post(TEXT, json=text(prompt=[5] * 200))).status_code == 503


async def test_places_in_a_step_are_waited_for(make_app, connect_to, engine, two_run, clock):
    """Where all of them decode, no prompt has to be waited for, and yet none is computed."""
    engine.stats = Stats(prefill=COSTS)
    app = make_app(max_queue=8, ttft_slo=3.0)
    client = connect_to(app)
    async with held(client, engine, 1):
        for _ in range(5):
            clock.now += 2
            assert (await client.post(TEXT, json=text())).status_code == 200
        async with held(client, engine, 1):
            assert app.state.runtime.admission.predicted() == pytest.approx(2.01)
            async with held(client, engine, 1):
                refused = await client.post(TEXT, json=text())
                assert "predicted in 4" in refused.json()["error"]["message"]


# ------------------------------------------------------------------------------------ rates


async def test_requests_a_minute(make_app, connect_to, clock):
    app = make_app(rate_limit=3)
    client = connect_to(app)
    for left in (2, 1, 0):
        answer = await client.post(TEXT, json=text())
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert "x-ratelimit-limit-tokens" not in answer.headers
    assert answer.headers["x-ratelimit-reset-requests"] == "1m0s"
    refused = await client.post(TEXT, json=text(stream=True))
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "its 3 requests a minute" in error["message"]
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("20", "20000")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 19.9
    assert (await client.post(TEXT, json=text())).status_code == 429
    clock.now += 0.2
    assert (await client.post(TEXT, json=text())).status_code == 200
    assert refusals(app) == {"rate_requests": 2}


async def test_tokens_a_minute_are_those_of_prompts_and_answers(
    make_app, connect_to, say, clock, engine
):
    app = make_app(rate_limit_tokens=100)
    client = connect_to(app)
    answer = await client.post(TEXT, json=text(prompt=[5] * 40, max_tokens=60))
    used = answer.json()["usage"]["total_tokens"]
    assert used == 40 + len(say("hello world")) + 1
    caller = app.state.runtime.admission.caller({"headers": [], "client": ("127.0.0.1", 1)})
    assert caller.tokens.level(clock.now) == 100 - used
    wrong = await client.post(TEXT, json=text(prompt=[5] * 40, n=100))
    assert wrong.status_code == 400  # costs nothing
    assert caller.tokens.level(clock.now) == 100 - used
    assert (await client.post(TEXT, json=text(prompt=[5] * 99))).status_code == 429
    assert refusals(app) == {"rate_tokens": 1}
    clock.now += 60
    assert (await client.post(TEXT, json=text(prompt=[5] * 240))).status_code == 200  # owed
    refused = await client.post(TEXT, json=text(prompt="a"))
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "60"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_choices_count_as_requests(make_app, connect_to, clock):
    client = connect_to(make_app(rate_limit=4))
    assert (await client.post(TEXT, json=text(n=3))).status_code == 200
    batch = await client.post(TEXT, json=text(prompt=["a", "b", "c"]))
    assert batch.status_code == 200  # one was left; the others are owed
    refused = await client.post(TEXT, json=text())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "45")


async def test_each_key_has_a_rate_of_its_own(make_app, connect_to):
    keys = Keys.of(api=["a" * 20, "b" * 20])
    client = connect_to(make_app(rate_limit=1, keys=keys))
    statuses = [
        (await client.post(TEXT, json=text(), headers={"authorization": f"Bearer {key * 20}"}))
        for key in "aabbc"
    ]
    assert [answer.status_code for answer in statuses] == [200, 429, 200, 429, 401]


async def test_without_keys_each_address_has(make_app):
    app = make_app(rate_limit=1)
    admission = app.state.runtime.admission

    def scope(host: str, key: str = "") -> dict[str, Any]:
        return {"client": (host, 7), "headers": [(b"x-api-key", key.encode())]}

    first = admission.caller(scope("10.0.0.1"))
    assert admission.caller(scope("10.0.0.1", "sk-anything")) is first
    assert admission.caller(scope("10.0.0.2")) is not first
    for i in range(MAX_CALLERS):
        admission.caller(scope(f"host-{i}"))
    assert admission.caller(scope("10.0.0.1")) is not first  # forgotten, and full again


async def test_what_is_refused_for_other_reasons_costs_no_rate(
    make_app, connect_to, engine, two_run
):
    client = connect_to(make_app(rate_limit=5, max_queue=1))
    async with held(client, engine, 3):
        for _ in range(4):
            assert (await client.post(TEXT, json=text())).status_code == 503
    assert (await client.post(TEXT, json=text())).status_code == 200


# ---------------------------------------------------------------------------------- clients


async def test_anthropics_clients_are_told_in_their_words(make_app, connect_to, engine, two_run):
    client = connect_to(make_app(max_queue=1, rate_limit=4))
    body = {"model": "tiny", "messages": HI, "max_tokens": 4}
    async with held(client, engine, 3):
        refused = await client.post(MESSAGES, json=body)
        assert refused.status_code == 529
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert "retry-after" in refused.headers
    answer = await client.post(MESSAGES, json=body)
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "4"
    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    refused = await client.post(MESSAGES, json=body)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("api", ["openai", "anthropic"])
async def test_official_clients_come_back_by_themselves(
    make_app, app_saying, engine, clock, monkeypatch, api
):
    app = make_app(rate_limit=1)
    http = app_saying(app, "hello world")
    waited = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("anyio.sleep", sleep)
    key, url = "k" * 20, "http://test"
    for _ in range(2):
        if api == "openai":
            sdk = openai.AsyncOpenAI(api_key=key, base_url=f"{url}/v1", http_client=http)
            answer = await sdk.chat.completions.create(model="tiny", messages=HI)
            assert answer.choices[0].message.content == "hello world"
        else:
            sdk = anthropic.AsyncAnthropic(api_key=key, base_url=url, http_client=http)
            message = await sdk.messages.create(model="tiny", messages=HI, max_tokens=50)
            assert message.content[0].text == "hello world"
    assert waited == [60.0]


# ------------------------------------------------------------------------------ connections


class TestBodiesOfTheRefused:
    @pytest.fixture
    def settings(self):
        return ServerSettings(rate_limit=1, max_body_bytes=100 * 1024 * 1024)

    @pytest.fixture
    async def connection(self, live_url, client):
        await client.post(TEXT, json=text())  # the only one of this minute
        address = urlsplit(live_url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        async with asyncio.timeout(60):
            yield reader, writer
        writer.close()

    async def head(self, reader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        return head.lower()

    async def test_a_connection_stays_usable_behind_a_small_one(self, connection):
        reader, writer = connection
        body = b"x" * SMALL_BODY
        for part in (body, body[:10]):
            writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n".encode())
            writer.write(f"Content-Length: {len(part)}\r\n\r\n".encode())
            head = await self.head(reader)  # before any of it is sent
            assert head.startswith(b"http/1.1 429")
            assert b"connection: close" not in head
            writer.write(part)
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await self.head(reader)).startswith(b"http/1.1 200")

    @pytest.mark.parametrize("length", ["Content-Length: 99000000", "Transfer-Encoding: chunked"])
    async def test_a_large_one_is_not_read(self, connection, length):
        reader, writer = connection
        writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
        head = await self.head(reader)
        assert head.startswith(b"http/1.1 429")
        assert b"connection: close" in head
        sent = 0
        piece = b"x" * 65536
        with contextlib.suppress(ConnectionError):
            while sent < 90_000_000:
                writer.write(b"10000\r\n%b\r\n" % piece if "chunked" in length else piece)
                await writer.drain()
                sent += len(piece)
        # What was read, and what buffers hold on both sides.
        assert LINGER_BYTES <= sent < 50_000_000


# ------------------------------------------------------------------------------------ books


class BareEngine:
    """Computes two at a time, and knows no costs."""

    ready, stats, adapters, restarts = True, Stats(), {}, 0
    model = ModelInfo(
        max_model_len=256,
        vocab_size=400,
        hidden_size=8,
        page_size=16,
        num_pages=64,
        eos_token_ids=[0],
        backend="fake",
        weights="f32",
        version="0",
        max_running=2,
    )

    def stream(self):
        return self

    reported = True


class NoDeadline:
    allowed = left = math.inf


class Books:
    """An Admission without a server: requests that come, turn out to be more, begin, and end."""

    def __init__(self, engine, settings: ServerSettings) -> None:
        self.clock = Clock()
        self.admission = Admission(engine, settings, self.clock)

    def scope(self) -> dict[str, Any]:
        return {
            "path": TEXT,
            "headers": [],
            "client": ("10.0.0.1", 1),
            "headstart.watch": NoDeadline(),
        }


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "receive", "settle", "begin", "leave"]),
        st.integers(0, 10**6),
        st.integers(1, 6),
    ),
    max_size=80,
)


@given(moves=MOVES, most=st.integers(1, 6))
def test_the_books_are_right_whatever_happens(moves, most):
    engine = BareEngine()
    books = Books(engine, ServerSettings(max_queue=most))
    admission, limit = books.admission, 2 + most
    alive: list[Ticket] = []
    begun: dict[Ticket, int] = {}
    for move, which, count in moves:
        books.clock.now += 0.2
        ticket = alive[which % len(alive)] if alive else None
        scope = books.scope()
        before = admission.in_flight
        if move == "come":
            caller = admission.caller(scope)
            try:
                alive.append(admission.let_in(scope, caller, which % 1000))
            except APIError:
                assert before + 1 > limit
        elif ticket is not None and move == "receive":
            admission.received(ticket)
        elif ticket is not None and move == "settle" and not ticket.settled:
            admission.received(ticket)
            had = ticket.choices
            try:
                ticket.settle(scope, [5] * count, count)
            except APIError:
                assert before - had + count > limit
                assert before > had
            else:
                ticket.asked(engine.stream())
        elif ticket is not None and move == "begin" and begun.get(ticket, 0) < ticket.choices:
            begun[ticket] = begun.get(ticket, 0) + 1
            ticket.first_token(5, Output(1, [5]))
        elif ticket is not None and move == "leave":
            alive.remove(ticket)
            admission.leave(ticket, count)
        assert admission.in_flight == sum(ticket.choices for ticket in alive)
        assert admission.waiting == sum(t.choices - begun.get(t, 0) for t in alive)
        assert admission.in_flight <= limit or len(alive) == 1 or before > limit
    for ticket in alive:
        admission.leave(ticket, 0)
    assert (admission.in_flight, admission.waiting) == (0, 0)
