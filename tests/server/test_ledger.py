"""Where a request's time went: phases that add up, told to those who ask, logged, counted."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import msgspec
import pytest

from headstart.engine.process.messages import QueueAhead, Times
from headstart.server.http.ledger import PHASES, Decoded, Gaps, Ledger
from headstart.server.http.reply import Format

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 50},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": [USER], "max_tokens": 50},
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.fixture
def timed(engine, monkeypatch):
    """The engine says when it did what, as a real one does."""
    outputs = engine._outputs

    def with_times(token_ids, params):
        first, *others = outputs(token_ids, params)
        now = time.monotonic()
        times = Times(now, now, now, now, now, 0.0, 2, 9, [], QueueAhead(1, 2, 34))
        return [msgspec.structs.replace(first, times=times), *others]

    monkeypatch.setattr(engine, "_outputs", with_times)
    return engine


def last_event(body: str) -> dict[str, Any]:
    """The last one that is JSON."""
    lines = [line for line in body.splitlines() if line.startswith("data: {")]
    event: dict[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    return event


def timings_in(path: str, body: str) -> dict[str, Any] | None:
    """Those of a stream, where its usage is."""
    lines = [line for line in body.splitlines() if line.startswith("data: {")]
    if path == MESSAGES:  # message_stop has nothing
        [line] = [line for line in lines if '"type":"message_delta"' in line]
        found: dict[str, Any] = json.loads(line.removeprefix("data: "))
        return found.get("timings")
    event = last_event(body)
    timings: dict[str, Any] | None = event.get("response", event).get("timings")
    return timings


def prove(timings: dict[str, Any]) -> None:
    assert list(timings["phases_ms"]) == list(PHASES)
    assert sum(timings["phases_ms"].values()) == pytest.approx(timings["first_token_ms"], abs=0.01)
    assert timings["first_token_ms"] <= timings["total_ms"]


def test_phases_are_from_one_moment_to_the_next() -> None:
    moments = iter((2.0, 5.0, 9.0, 10.0, 61.0, 70.0))
    ledger = Ledger(1.0, lambda: next(moments))
    for phase in ("receive", "template", "tokenise", "grammar"):
        ledger.mark(phase)
    ledger.begin_answer(
        Times(
            arrived=14.0,
            ready=20.0,
            scheduled=30.0,
            computed=50.0,
            made=55.0,
            seconds=12.0,
            num_chunks=3,
            num_tokens=100,
            ahead=QueueAhead(2, 1, 7),
        )
    )
    ledger.deliver()
    assert ledger.phases() == {
        "receive": 1.0,
        "template": 3.0,
        "tokenise": 4.0,
        "grammar": 1.0 + 6.0,
        "hand_over": 4.0,
        "queue": 10.0,
        "prefill": 12.0,
        "yielded": 8.0,
        "sample": 5.0,
        "deliver": 6.0,
    }
    ledger.num_prompt_tokens, ledger.cached_tokens = 132, 32
    gaps = Gaps()
    gaps.add(1.0, 2)
    gaps.add(4.0, 1)
    ledger.decoded = Decoded(4, 6.0, gaps)
    timings = ledger.timings()
    phases = timings.pop("phases_ms")
    assert phases["prefill"] == 12_000
    assert timings == {
        "first_token_ms": 60_000,
        "ahead": {"running": 2, "waiting": 1, "tokens": 7},
        "chunks": 3,
        "cache_n": 32,
        "prompt_n": 100,
        "prompt_ms": 25_000,
        "prompt_per_token_ms": 250,
        "prompt_per_second": 4,
        "predicted_n": 4,
        "predicted_ms": 6_000,
        "predicted_per_token_ms": 2_000,
        "predicted_per_token_p95_ms": 4_000,
        "predicted_per_second": 0.5,
        "total_ms": 69_000,
    }


@pytest.mark.parametrize(("count", "p95"), [(1, 1.0), (19, 19.0), (20, 19.0), (100, 95.0)])
def test_the_95th_of_a_hundred(count: int, p95: float) -> None:
    gaps = Gaps()
    for i in range(count, 0, -1):
        gaps.add(float(i), 1)
    assert gaps.p95 == p95


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["field", "header"])
async def test_who_asks_is_told(client, timed, path, stream, by) -> None:
    body = {"model": "tiny", "stream": stream, **BODIES[path]}
    headers = {"x-headstart-timings": "1"} if by == "header" else {}
    if by == "field":
        body["timings"] = True
    response = await client.post(path, json=body, headers=headers)
    assert response.status_code == 200
    assert "x-headstart-ignored" not in response.headers
    timings = timings_in(path, response.text) if stream else response.json()["timings"]
    assert timings is not None
    prove(timings)
    assert timings["ahead"] == {"running": 1, "waiting": 2, "tokens": 34}
    assert (timings["cache_n"], timings["prompt_n"], timings["chunks"]) == (3, 9, 2)
    assert timings["predicted_n"] > 1


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [None, False])
async def test_nobody_else_is(client, timed, path, stream, asked) -> None:
    body = {"model": "tiny", "stream": stream, "timings": asked, **BODIES[path]}
    headers = {} if asked is None else {"x-headstart-timings": "1"}
    response = await client.post(path, json=body, headers=headers)
    assert response.status_code == 200
    assert "timings" not in response.text
    assert '"metrics"' not in response.text


async def test_beside_the_usage_of_a_stream(client, timed, chat_body, events) -> None:
    body = chat_body(stream=True, timings=True, stream_options={"include_usage": True})
    *others, last, done = events((await client.post(CHAT, json=body)).text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    prove(last["timings"])
    assert all("timings" not in event for event in others)


async def test_phases_of_this_process(client, timed, chat_body) -> None:
    body = chat_body(timings=True, response_format=SCHEMA)
    phases = (await client.post(CHAT, json=body)).json()["timings"]["phases_ms"]
    assert all(phases[name] > 0 for name in ("receive", "template", "tokenise", "grammar"))
    whole = {"model": "tiny", "timings": True, **BODIES[COMPLETIONS]}
    phases = (await client.post(COMPLETIONS, json=whole)).json()["timings"]["phases_ms"]
    assert phases["tokenise"] > 0
    assert phases["template"] == phases["grammar"] == 0


@pytest.mark.parametrize("path", BODIES)
async def test_vllms_metrics(client, timed, path) -> None:
    body = {"model": "tiny", "include_metrics": True, **BODIES[path]}
    answer = (await client.post(path, json=body)).json()
    assert answer["metrics"].keys() == {
        "time_to_first_token_ms",
        "generation_time_ms",
        "queue_time_ms",
        "mean_itl_ms",
        "tokens_per_second",
    }
    assert "timings" not in answer
    if path in (CHAT, COMPLETIONS):
        several = (await client.post(path, json={**body, "n": 2})).json()
        assert several["metrics"] is None


async def test_what_is_stored_has_no_timings(client, timed) -> None:
    body = {"model": "tiny", "input": "hi", "timings": True}
    answer = (await client.post(RESPONSES, json=body)).json()
    stored = (await client.get(f"{RESPONSES}/{answer['id']}")).json()
    assert "timings" not in stored
    assert answer.pop("timings")
    assert answer == stored


async def test_several_choices_are_told_of_once(client, timed, chat_body, events) -> None:
    for stream in (False, True):
        response = await client.post(CHAT, json=chat_body(n=3, stream=stream, timings=True))
        answer = last_event(response.text) if stream else response.json()
        prove(answer["timings"])
        assert answer["timings"]["predicted_n"] > 1


async def test_the_log_always_says(client, timed, chat_body, caplog) -> None:
    caplog.set_level(logging.DEBUG, "headstart.server.http.reply")
    await client.post(CHAT, json=chat_body(), headers={"x-request-id": "r1"})
    [line] = [r.getMessage() for r in caplog.records if "timings of" in r.getMessage()]
    name, _, timings = line.partition(": ")
    assert name == "timings of r1"
    prove(json.loads(timings))


async def test_phases_are_counted(client, timed, chat_body) -> None:
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body(stream=True, n=2))
    lines = (await client.get("/metrics")).text.splitlines()
    for phase in PHASES:
        label = f'{{model_name="tiny",phase="{phase}"}}'
        assert f"headstart:request_phase_time_seconds_count{label} 2.0" in lines


async def test_an_answer_that_fails_has_no_end_to_tell_in(client, engine, chat_body) -> None:
    engine.fail_after = (1, RuntimeError("gone"))
    response = await client.post(CHAT, json=chat_body(stream=True, timings=True))
    assert "timings" not in response.text
    assert last_event(response.text)["error"]


def test_every_format_says_its_id() -> None:
    formats = Format.__subclasses__()
    assert len(formats) >= 3
    assert all(kind.answer_id is not Format.answer_id for kind in formats)
