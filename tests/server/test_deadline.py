"""One clock, one deadline, one watch for hang-ups, from a request's first byte to its last."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from headstart.server.http.app import create_app
from headstart.server.http.deadline import BEGUN
from headstart.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = [
    pytest.param(CHAT, {"messages": MESSAGES}, id="chat"),
    pytest.param(CHAT, {"messages": MESSAGES, "stream": True}, id="stream"),
    pytest.param("/v1/responses", {"input": "hi"}, id="responses"),
    pytest.param("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}, id="messages"),
    pytest.param("/tokenize", {"messages": MESSAGES}, id="tokenize"),
]


class Client:
    """ASGI by hand: what is received comes from ``messages``, and then from ``hang_up``."""

    def __init__(self, path: str, *bodies: bytes, headers: dict[str, str] | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        self._bodies = list(bodies)

    async def receive(self) -> dict[str, Any]:
        if self._bodies:
            body = self._bodies.pop(0)
            return {"type": "http.request", "body": body, "more_body": body.endswith(b" ")}
        self.reading.set()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def ask(self, app) -> None:
        async with asyncio.timeout(300):
            await app(self.scope, self.receive, self.send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.sent[1]["body"])["error"]


def body_of(fields: dict[str, Any]) -> bytes:
    return json.dumps({"model": "tiny"} | fields).encode()


@pytest.fixture
def stuck(app, monkeypatch):
    """Rendering and tokenising that do not end before ``stuck.set()``."""
    ended, runtime = asyncio.Event(), app.state.runtime

    async def wait(size, work):
        await ended.wait()
        return work()

    monkeypatch.setattr(type(runtime), "with_chat", lambda self, size, work: wait(size, work))
    monkeypatch.setattr(type(runtime), "with_text", lambda self, size, work: wait(size, work))
    return ended


@pytest.mark.parametrize(("path", "fields"), ASKED)
async def test_who_hangs_up_while_a_chat_is_rendered_asks_nothing_of_the_engine(
    app, engine, stuck, path, fields
):
    client = Client(path, body_of(fields))
    asking = asyncio.create_task(client.ask(app))
    await client.reading.wait()
    client.gone.set()
    await asking
    stuck.set()
    await asyncio.sleep(0.01)
    assert engine.added == []
    assert client.sent == []
    counted = f'headstart:http_requests_total{{path="{path}",status="499"}} 1.0'
    assert counted in app.state.runtime.metrics.expose().decode()


async def test_who_hangs_up_within_the_body_is_counted_so(app, engine):
    client = Client(CHAT, b'{"model": ')
    client.gone.set()
    await client.ask(app)
    assert client.sent == []
    errors = 'http_errors_total{code="hang_up",path="/v1/chat/completions",status="499"} 1.0'
    assert errors in app.state.runtime.metrics.expose().decode()


@pytest.mark.parametrize(("path", "fields"), ASKED)
async def test_the_deadline_covers_rendering(app, engine, stuck, path, fields):
    client = Client(path, body_of(fields), headers={"x-request-timeout": "0.05"})
    await client.ask(app)
    stuck.set()
    await asyncio.sleep(0)
    assert client.status == 504
    assert engine.added == []
    if path != "/v1/messages":
        assert client.error["code"] == "timeout"
        assert "within 0.05 s" in client.error["message"]


async def test_the_deadline_covers_the_body(engine, tokenizer):
    settings = ServerSettings(request_timeout=0.05)
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    client = Client(CHAT, b'{"model": ')
    await client.ask(app)
    assert client.status == 504


async def test_the_deadline_covers_vectors(app, engine):
    engine.hold = True
    headers = {"x-request-timeout": "0.05"}
    client = Client("/v1/embeddings", body_of({"input": ["a", "b"]}), headers=headers)
    await client.ask(app)
    assert client.status == 504
    assert [added.stream.aborted for added in engine.added] == [1, 1]


async def test_the_clock_starts_at_the_first_byte(engine, tokenizer):
    """However long the head, or a proxy in front, took to be read."""
    settings = ServerSettings(request_timeout=100)
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    for age, status in ((99, 200), (101, 504)):
        client = Client(CHAT, body_of({"messages": MESSAGES}))
        client.scope[BEGUN] = time.monotonic() - age
        await client.ask(app)
        assert client.status == status
    lines = dict(
        line.rsplit(" ", 1)
        for line in app.state.runtime.metrics.expose().decode().splitlines()
        if line.startswith("headstart:") and "_sum{" in line
    )
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert 99 <= float(lines[f'headstart:{name}_sum{{model_name="tiny"}}']) < 120


@pytest.mark.parametrize("timeout", [0.05, 1000])
async def test_the_shortest_time_counts(app, engine, timeout):
    engine.hold = True
    headers = {"x-request-timeout": str(1000.05 - timeout)}
    client = Client(CHAT, body_of({"messages": MESSAGES, "timeout": timeout}), headers=headers)
    await client.ask(app)
    assert client.status == 504
    assert "within 0.05" in client.error["message"]


async def test_drained_while_a_chat_is_rendered(app, engine, stuck):
    client = Client(CHAT, body_of({"messages": MESSAGES}))
    asking = asyncio.create_task(client.ask(app))
    await client.reading.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert client.status == 503
    assert "shutting down" in client.error["message"]
    assert engine.added == []


async def test_a_timeout_of_something_else_is_no_deadline(app, monkeypatch):
    async def late(*_):
        raise TimeoutError("a disk")

    monkeypatch.setattr(type(app.state.runtime), "with_chat", late)
    client = Client(CHAT, body_of({"messages": MESSAGES}))
    with pytest.raises(TimeoutError):
        await client.ask(app)
    assert client.status == 500


async def test_the_end_of_an_answer_is_no_hang_up(live_url, engine, chat_body, app):
    async with httpx.AsyncClient(base_url=live_url) as client:
        for stream in (False, True, False):
            response = await client.post(CHAT, json=chat_body(stream=stream))
            assert response.status_code == 200
    assert [added.stream.aborted for added in engine.added] == [0, 0, 0]
    assert "hang_up" not in app.state.runtime.metrics.expose().decode()


async def test_the_protocol_notes_the_first_byte(live_url, engine, chat_body, app):
    address = urlsplit(live_url)
    body = json.dumps(chat_body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setblocking(False)
        await loop.sock_sendall(connection, head[:20])
        await asyncio.sleep(0.25)
        await loop.sock_sendall(connection, head[20:] + body)
        async with asyncio.timeout(300):
            received = b""
            while not received.endswith(b"}"):
                received += await loop.sock_recv(connection, 65536)
    assert b" 200 " in received
    [line] = [
        line
        for line in app.state.runtime.metrics.expose().decode().splitlines()
        if line.startswith("headstart:time_to_first_token_seconds_sum")
    ]
    assert float(line.rsplit(" ", 1)[1]) >= 0.25
