"""Processes that end: by kill -9, and by signals that ask for it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

GUARD = 300
"""Seconds after which a wait is given up."""

ENDLESS = 30_000
"""Tokens of an answer that nobody lives to see the end of."""


def until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + GUARD
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def wait_gone(process: psutil.Process) -> None:
    until(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE,
        "the process is still there",
    )


def start_streams(server, text, count: int, max_tokens: int):
    streams = [server.open_stream(text(30, i), max_tokens) for i in range(count)]
    for stream in streams:
        stream.wait_for_text()
    return streams


def read_all(streams):
    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(lambda stream: stream.read(), streams))


def engine_of(server, otherwise: str, but: psutil.Process | None = None) -> psutil.Process:
    """The engine's process, as soon as there is one, and another one than ``but``."""
    found = []

    def there() -> bool:
        with contextlib.suppress(ValueError):
            found.append(server.engine)
        return bool(found) and found[-1] != but

    until(there, otherwise)
    return found[-1]


def refuses(server, client: httpx.Client) -> bool:
    """Whether new requests are refused, or nobody listens any more."""
    body = {"model": server.model, "prompt": "late", "max_tokens": 1}
    try:
        return client.post("/v1/completions", json=body).status_code == 503
    except httpx.TransportError:
        return True


@pytest.fixture(scope="module")
def flags(long_folder):
    return [str(long_folder), "--kv-memory", "256MiB", "--threads", "1"]


def test_engine_killed_under_load_then_while_loading(start_server, flags, text):
    server = start_server(*flags)
    waiting = server.open_stream(text(10_000, 50), 5)
    streams = start_streams(server, text, 8, ENDLESS)
    statuses = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            statuses.add(server.health())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine = server.engine
    engine.kill()
    for status, events in read_all(streams):
        assert status == 200
        assert "signal 9" in events[-1]["error"]["message"]
        assert events[-1]["error"]["type"] == "service_unavailable_error"
    status, events = waiting.read()
    assert status == 503 or "error" in events[-1]
    # All of them have ended before there is an engine again.
    refused = httpx.post(
        f"{server.url}/v1/completions", json={"model": server.model, "prompt": "a"}, timeout=GUARD
    )
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    server.wait_for(lambda m: m["engine_up"] == 1)
    stop.set()
    watcher.join()
    assert 503 in statuses
    assert server.metrics()["engine_restarts_total"] == 1
    with server.client() as client:
        answer = client.completions.create(model=server.model, prompt="Hi", max_tokens=3)
    assert answer.usage.completion_tokens <= 3
    server.wait_idle()

    # Once more, and the next one while it loads.
    again = server.engine
    again.kill()
    engine_of(server, "no engine is started", but=again).kill()
    server.wait_for(lambda m: m["engine_restarts_total"] == 3 and m["engine_up"] == 1)
    assert server.health() == 200


def test_engine_killed_at_the_first_start(start_server, flags):
    server = start_server(*flags, ready=False)
    engine_of(server, "no engine is started").kill()
    assert server.process.wait(GUARD) == 1
    last = server.log.splitlines()[-1]
    assert last == "headstart: error: the engine ended while starting (signal 9)"
    assert "Traceback" not in server.log


def test_server_killed_under_load(start_server, flags, text):
    server = start_server(*flags)
    streams = start_streams(server, text, 4, ENDLESS)
    engine = server.engine
    server.process.kill()
    wait_gone(engine)
    for stream in streams:
        stream.close()


def test_server_killed_while_the_engine_loads(start_server, flags):
    server = start_server(*flags, ready=False)
    engine = engine_of(server, "no engine is started")
    server.process.kill()
    wait_gone(engine)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start_server, flags, text, number):
    server = start_server(*flags, "--shutdown-timeout", str(GUARD))
    engine = server.engine
    streams = start_streams(server, text, 4, 2000)
    with httpx.Client(base_url=server.url, timeout=GUARD) as kept_open:
        assert kept_open.get("/health").status_code == 200
        server.signal(number)
        until(lambda: refuses(server, kept_open), "requests are still taken")
    until(lambda: server.health() == 0, "connections are still taken")
    for status, events in read_all(streams):
        assert status == 200
        assert events[-1]["usage"]["completion_tokens"] == 2000
        assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(GUARD) == 0
    wait_gone(engine)
    assert "Traceback" not in server.log


def test_a_second_signal_ends_at_once(start_server, flags, text):
    server = start_server(*flags, "--shutdown-timeout", str(10 * GUARD))
    engine = server.engine
    streams = start_streams(server, text, 4, ENDLESS)
    with httpx.Client(base_url=server.url, timeout=GUARD) as client:
        server.signal(signal.SIGTERM)
        until(lambda: refuses(server, client), "requests are still taken")
    server.signal(signal.SIGINT)
    for status, events in read_all(streams):
        assert status == 200
        assert "shutting down" in events[-1]["error"]["message"]
    assert server.process.wait(GUARD) == 0
    wait_gone(engine)
    assert "Traceback" not in server.log


def test_a_signal_while_the_engine_loads(start_server, flags):
    server = start_server(*flags, ready=False)
    assert server.health() == 503
    server.signal(signal.SIGTERM)
    assert server.process.wait(GUARD) == 0
    assert "Traceback" not in server.log
