"""The soak test's verdicts on made-up runs, and what it makes of a server's answers."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from headstart.bench.prompts import PromptSource
from headstart.bench.soak import SHARES
from headstart.bench.soak_load import Asked, Load, Outcome, closed_loop, open_loop
from headstart.bench.soak_report import Phase, growth, judge, percentile

# ---------------------------------------------------------------------------------- verdicts


def phase(name: str, *outcomes: Outcome) -> Phase:
    return Phase(name, 0.0, 100.0, outcomes)


def answers(every: float, tokens: int = 10) -> list[Outcome]:
    """One ends every so many seconds, from 0 to 100."""
    count = int(100 / every)
    return [Outcome("answered", i * every, i * every, tokens) for i in range(count)]


def refusals(*milliseconds: float) -> list[Outcome]:
    return [Outcome("refused", 50.0, 50.0 + ms / 1000) for ms in milliseconds]


FLAT = {"engine": [(float(t), 5e8) for t in range(100)]}
CAPACITY = phase("capacity", *answers(1.0))
GOOD = phase("overload", *answers(1.05), *refusals(*[5.0] * 200))


def test_a_run_in_which_all_is_as_it_has_to_be() -> None:
    figures, wrong = judge(CAPACITY, GOOD, FLAT)
    assert wrong == []
    assert figures["goodput_share"] == pytest.approx(0.95, abs=0.02)
    assert figures["refused_ms"] == {"median": 5.0, "p99": 5.0}
    assert figures["memory_mb"] == {"engine": {"size": 500.0, "grown": 0.0}}
    assert figures["overload"]["outcomes"] == {"answered": 95, "refused": 200}
    assert figures["overload"]["offered_per_s"] == 2.95
    assert figures["capacity"]["goodput_tokens_per_s"] == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize(
    ("overload", "words"),
    [
        (phase("overload", *answers(1.25), *GOOD.of("refused")), "goodput at overload is 0.80"),
        (phase("overload", *answers(1.0), *refusals(*[5.0] * 97, 30.0, 30.0, 30.0)), "30 ms (p99)"),
        (phase("overload", *answers(1.0), *refusals(*[5.0] * 19)), "19 requests were refused"),
        (phase("overload", *answers(6.0), *GOOD.of("refused")), "fewer than 20 answers"),
        (
            phase("overload", *GOOD.outcomes, Outcome("lost", 9.0, 9.5, reason="it broke off")),
            "overload: a request that was let in is lost: it broke off",
        ),
    ],
)
def test_what_is_not_as_it_has_to_be_is_said(overload: Phase, words: str) -> None:
    _, wrong = judge(CAPACITY, overload, FLAT)
    assert len(wrong) == 1
    assert words in wrong[0]


def test_one_late_refusal_of_a_hundred_is_none() -> None:
    overload = phase("overload", *answers(1.0), *refusals(*[5.0] * 199, 500.0))
    assert judge(CAPACITY, overload, FLAT)[1] == []


def test_requests_that_hung_up_or_came_to_their_deadline_are_not_lost() -> None:
    ends = [Outcome("hung up", 1.0, 2.0), Outcome("late", 1.0, 3.0)]
    assert judge(CAPACITY, phase("overload", *GOOD.outcomes, *ends), FLAT)[1] == []


@pytest.mark.parametrize(
    ("size", "grows"),
    [
        (lambda t: 5e8 + 1e6 * t, True),  # a leak of 1 MB a second
        (lambda t: 5e8 + 4e6 * min(t, 50), False),  # all of it before the second half
        (lambda t: 5e8 + (40e6 if t % 10 == 0 else 0), False),  # back and forth
        (lambda t: 5e8 - 1e6 * t, False),
    ],
)
def test_memory_is_looked_at_over_the_second_half(size: Any, grows: bool) -> None:
    memory = {"server": [(float(t), size(t)) for t in range(101)]}
    wrong = judge(CAPACITY, GOOD, memory)[1]
    assert ["server process grew" in message for message in wrong] == [True] * grows


def test_a_line_is_fitted() -> None:
    assert growth([(float(t), 100.0 + 2.0 * t) for t in range(11)]) == pytest.approx((110.0, 10.0))
    assert growth([(0.0, 5.0), (1.0, 7.0)]) == pytest.approx((5.0, 2.0))
    with pytest.raises(ValueError, match="two points"):
        growth([(0.0, 5.0)])


def test_percentiles() -> None:
    values = [float(i) for i in range(100)]
    assert (percentile(values, 0.99), percentile(values, 0.5), percentile(values, 1)) == (
        99,
        50,
        99,
    )
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def test_what_ended_before_places_had_filled_is_not_measured() -> None:
    early = [Outcome("answered", 0.0, 10.0, 1000)] * 30
    late = [Outcome("answered", 90.0, 130.0, 1000)] * 30
    assert phase("overload", *early, *late).goodput == 0


def test_the_second_half_of_a_run_is_overload() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    assert SHARES["overload"] > 0.5


# ---------------------------------------------------------------------------------- requests


def chunk(finish: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "a", "finish_reason": finish}]}


def events(*payloads: object) -> bytes:
    texts = [x if isinstance(x, str) else json.dumps(x) for x in payloads]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": "no", "code": code}}


class Scripted:
    """A server that says what it is told to. ``gone``: it never answers."""

    def __init__(self) -> None:
        self.status, self.body, self.gone = 200, b"", False
        self.headers: list[Any] = []
        self.bodies: list[dict[str, Any]] = []

    async def completions(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        self.bodies.append(await request.json())
        if self.gone:
            request.transport.close()  # type: ignore[union-attr]
        return web.Response(
            status=self.status, body=self.body, headers={"content-type": "application/json"}
        )


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, Load]]:
    script, app = Scripted(), web.Application()
    app.router.add_post("/v1/completions", script.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield script, Load(session, url, "fake", PromptSource(1))
    await runner.cleanup()


@pytest.mark.parametrize(
    ("stream", "status", "body", "kind", "reason"),
    [
        (False, 200, json.dumps(chunk("length")).encode(), "answered", ""),
        (False, 200, json.dumps(chunk("abort")).encode(), "lost", "finish reasons {0: 'abort'}"),
        (True, 200, events(chunk(None), chunk("length"), "[DONE]"), "answered", ""),
        (True, 200, events(chunk(None)), "lost", "the stream broke off"),
        (True, 200, events(chunk(None), "[DONE]"), "lost", "finish reasons {}"),
        (True, 200, events(chunk(None), error("timeout"), "[DONE]"), "late", ""),
        (True, 200, events(chunk(None), error("overloaded"), "[DONE]"), "lost", "status 0: no"),
        (False, 503, json.dumps(error("overloaded")).encode(), "refused", ""),
        (False, 429, json.dumps(error("rate_limit_exceeded")).encode(), "refused", ""),
        (True, 503, json.dumps(error("service_unavailable")).encode(), "lost", "status 503: no"),
        (False, 504, json.dumps(error("timeout")).encode(), "late", ""),
        (False, 500, b"no JSON", "lost", "Expecting value"),
    ],
)
async def test_what_becomes_of_a_request(
    scripted: Any, stream: bool, status: int, body: bytes, kind: str, reason: str
) -> None:
    script, load = scripted
    script.status, script.body = status, body
    outcome = await load.send(Asked({"stream": stream, "max_tokens": 7}, deadline=2.5))
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert outcome.tokens == (7 if kind == "answered" else 0)
    assert outcome.seconds > 0
    assert script.headers[0]["x-request-timeout"] == "2.500"


async def test_a_connection_that_breaks_is_a_lost_request(scripted: Any) -> None:
    script, load = scripted
    script.gone = True
    assert (await load.send(Asked({"stream": False, "max_tokens": 7}))).kind == "lost"


async def test_who_is_not_patient_hangs_up(scripted: Any) -> None:
    _, load = scripted
    assert (
        await load.send(Asked({"stream": True, "max_tokens": 7}, patience=0.0))
    ).kind == "hung up"


async def test_loops(scripted: Any) -> None:
    script, load = scripted
    script.status, script.body = 503, json.dumps(error("overloaded")).encode()
    closed = await closed_loop(load, 3, 0.3, "a")
    assert {outcome.kind for outcome in closed} <= {"refused", "hung up"}
    assert closed
    opened = await open_loop(load, 100.0, 0.3, "b")
    assert len(opened) + len(closed) >= len(script.bodies)
    assert 5 <= len(opened) <= 90
    assert len({body["prompt"] for body in script.bodies}) == len(script.bodies)
    assert {body["stream"] for body in script.bodies} == {True, False}
