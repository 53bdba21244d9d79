"""The client that adds phases up: what it asks, reads and finds beyond the limit."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web

from headstart.bench import ledger
from headstart.bench.http_client import BenchError


def timings(first_token: float) -> dict[str, Any]:
    phases = {"queue": 250 * first_token, "prefill": 750 * first_token}
    return {"first_token_ms": 1000 * first_token, "phases_ms": phases}


def answer(first_token: float, told: float, path: str = "/v1/messages") -> ledger.Answer:
    return ledger.Answer(2, path, first_token, timings(told))


@contextmanager
def streaming(*pieces: bytes) -> Iterator[str]:
    """A server that answers everything with these pieces of a stream; its address."""
    loop = asyncio.new_event_loop()

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_post("/{path:.*}", stream)
    runner = web.AppRunner(app)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    url = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield url
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def test_requests_are_mixed_and_the_same_for_a_seed() -> None:
    asks = ledger.asks(60, 7, "m")
    assert asks == ledger.asks(60, 7, "m")
    assert asks != ledger.asks(60, 8, "m")
    assert {ask.path for ask in asks} == set(ledger.PATHS)
    assert all(ask.body["stream"] and ask.body["timings"] for ask in asks)
    assert any("response_format" in ask.body for ask in asks)
    sizes = [len(json.dumps(ask.body)) for ask in asks]
    assert max(sizes) > 10 * min(sizes)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_all_are_asked_each_once(at_a_time: int) -> None:
    asks = ledger.asks(10, 1, "m")
    with streaming(b": ping\n\n", event(choices=[]), event(timings=timings(0.25))) as url:
        answers = ledger.run(url, asks, at_a_time)
    assert sorted(found.path for found in answers) == sorted(ask.path for ask in asks)
    assert all(found.timings == timings(0.25) for found in answers)
    assert all(found.first_token > 0 for found in answers)


def test_pings_are_no_tokens() -> None:
    said = b'event: ping\ndata: {"type":"ping"}\n\n: ping\n\n'
    assert not ledger.FIRST_EVENT.search(said)
    assert ledger.FIRST_EVENT.search(said + event(type="message_start"))


def test_an_answer_without_timings_is_an_error() -> None:
    with (
        streaming(event(choices=[])) as url,
        pytest.raises(BenchError, match="no timings"),
    ):
        ledger.run(url, ledger.asks(1, 1, "m"), 1)


def test_what_is_beyond_the_sum() -> None:
    found = answer(2.0, 1.9)
    assert found.difference == pytest.approx(0.1)
    assert found.share == answer(2.0, 2.1).share == pytest.approx(0.05)
    table = ledger.report([answer(2.0, 1.9), answer(1.0, 1.0), answer(4.0, 4.0)])
    [line] = [line for line in table.splitlines() if line.startswith("2 at a time")]
    assert line.split()[-2:] == ["0.00%", "5.00%"]
    assert "prefill       73.93%" in table
    assert "beyond         1.43%" in table


@pytest.mark.parametrize(("told", "status"), [(0.995, 0), (0.97, 1), (1.03, 1)])
def test_the_median_decides(
    told: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(url: str, work: Any, at_a_time: int) -> list[ledger.Answer]:
        return [ledger.Answer(at_a_time, ask.path, 1.0, timings(told)) for ask in work]

    class Started:
        async def __aenter__(self) -> str:
            return "http://127.0.0.1:1"

        async def __aexit__(self, *_: object) -> None:
            """Nothing was started."""

    monkeypatch.setattr(ledger, "start_headstart", lambda argv: Started())
    monkeypatch.setattr(ledger, "run", run)
    monkeypatch.setattr("sys.argv", ["ledger", "--requests", "12"])
    assert ledger.main() == status
    assert ("within 2%" if status == 0 else "beyond 2%") in capsys.readouterr().out
