"""Processes that end: by kill -9, and by signals that ask for it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest


def gone(process: psutil.Process, limit: float) -> float:
    """Seconds until the process has ended."""
    begin = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - begin < limit, "the process is still there"
        time.sleep(0.01)
    return time.monotonic() - begin


def start_streams(server, text, count: int, max_tokens: int):
    streams = [server.open_stream(text(30, i), max_tokens) for i in range(count)]
    for stream in streams:
        stream.wait_for_text()
    return streams


def read_all(streams):
    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(lambda stream: stream.read(), streams))


@pytest.fixture(scope="module")
def flags(default_flags):
    return [*default_flags, "--max-model-len", "4096"]


def test_engine_killed_under_load_then_while_loading(start_server, default_flags, text):
    server = start_server(*default_flags)
    waiting = server.open_stream(text(3000, 50), 5)
    streams = start_streams(server, text, 8, 4000)
    statuses = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            statuses.add(server.health())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    killed = time.monotonic()
    engine = server.engine
    engine.kill()
    for status, events in read_all(streams):
        assert status == 200
        assert "signal 9" in events[-1]["error"]["message"]
        assert events[-1]["error"]["type"] == "service_unavailable_error"
    status, events = waiting.read()
    assert status == 503 or "error" in events[-1]
    all_ended = time.monotonic() - killed
    assert all_ended < 2
    refused = httpx.post(
        f"{server.url}/v1/completions", json={"model": server.model, "prompt": "a"}, timeout=10
    )
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    server.wait_for(lambda m: m["engine_up"] == 1, 15)
    served_again = time.monotonic() - killed
    stop.set()
    watcher.join()
    assert 503 in statuses
    assert server.metrics()["engine_restarts_total"] == 1
    with server.client() as client:
        answer = client.completions.create(model=server.model, prompt="Hi", max_tokens=3)
    assert answer.usage.completion_tokens <= 3
    server.wait_idle()

    # Once more, and the next one while it loads.
    server.engine.kill()
    deadline = time.monotonic() + 10
    loading = None
    while loading is None or loading == engine:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        with contextlib.suppress(ValueError):
            loading = server.engine
    time.sleep(0.3)
    loading.kill()
    begin = time.monotonic()
    server.wait_for(lambda m: m["engine_restarts_total"] == 3 and m["engine_up"] == 1, 20)
    assert server.health() == 200
    print(
        f"engine killed: streams ended after {all_ended:.2f} s, served again after "
        f"{served_again:.2f} s; killed while loading: again after {time.monotonic() - begin:.2f} s"
    )


def test_engine_killed_at_the_first_start(start_server, flags):
    server = start_server(*flags, ready=False)
    deadline = time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(ValueError):
            server.engine.kill()
            break
        time.sleep(0.01)
    assert server.process.wait(10) == 1
    last = server.log.splitlines()[-1]
    assert last == "headstart: error: the engine ended while starting (signal 9)"
    assert "Traceback" not in server.log


def test_server_killed_under_load(start_server, flags, text):
    server = start_server(*flags)
    streams = start_streams(server, text, 4, 3000)
    engine = server.engine
    server.process.kill()
    seconds = gone(engine, 5)
    for stream in streams:
        stream.close()
    print(f"server killed: the engine was gone after {seconds:.2f} s")


def test_server_killed_while_the_engine_loads(start_server, flags):
    server = start_server(*flags, ready=False)
    engine = None
    while engine is None:
        time.sleep(0.01)
        with contextlib.suppress(ValueError):
            engine = server.engine
    server.process.kill()
    gone(engine, 15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start_server, flags, text, number):
    server = start_server(*flags)
    engine = server.engine
    streams = start_streams(server, text, 4, 400)
    kept_open = httpx.Client(base_url=server.url)
    assert kept_open.get("/health").status_code == 200
    server.signal(number)
    time.sleep(0.3)
    with contextlib.suppress(httpx.TransportError):  # the socket may be closed already
        assert (
            kept_open.post(
                "/v1/completions", json={"model": server.model, "prompt": "late", "max_tokens": 1}
            ).status_code
            == 503
        )
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health").raise_for_status()
    kept_open.close()
    for status, events in read_all(streams):
        assert status == 200
        assert events[-1]["usage"]["completion_tokens"] == 400
        assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0
    gone(engine, 1)
    assert "Traceback" not in server.log


def test_a_second_signal_ends_at_once(start_server, flags, text):
    server = start_server(*flags)
    engine = server.engine
    streams = start_streams(server, text, 4, 4000)
    server.signal(signal.SIGTERM)
    time.sleep(0.3)
    begin = time.monotonic()
    server.signal(signal.SIGINT)
    for status, events in read_all(streams):
        assert status == 200
        assert "shutting down" in events[-1]["error"]["message"]
    assert server.process.wait(5) == 0
    seconds = time.monotonic() - begin
    gone(engine, 1)
    assert seconds < 3
    assert "Traceback" not in server.log
    print(f"second signal: ended after {seconds:.2f} s")


def test_a_signal_while_the_engine_loads(start_server, flags):
    server = start_server(*flags, ready=False)
    assert server.health() == 503
    begin = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log
    print(f"SIGTERM while loading: ended after {time.monotonic() - begin:.2f} s")
