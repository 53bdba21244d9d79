"""Against a real uvicorn: the official client, hang-ups, large bodies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from headstart.engine.errors import EngineDeadError


@pytest.fixture
async def official(live_url):
    async with openai.AsyncOpenAI(
        base_url=f"{live_url}/v1", api_key="any", max_retries=0
    ) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_official_client_whole(official):
    answer = await official.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "hello world"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
    text = await official.completions.create(model="tiny", prompt="x", echo=True)
    assert text.choices[0].text == "xhello world"


async def test_official_client_streamed(official):
    stream = await official.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.total_tokens > 0
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "hello world"
    stream = await official.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_official_client_errors(official, engine):
    with pytest.raises(openai.NotFoundError, match="other"):
        await official.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await official.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    engine.fail_after = (2, EngineDeadError("the engine has died"))
    stream = await official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the engine has died"):
        async for _ in stream:
            pass


async def test_official_client_models(official):
    assert [model.id async for model in official.models.list()] == ["tiny", "also-tiny"]
    assert (await official.models.retrieve("also-tiny")).max_model_len == 256


def open_request(url: str, body: dict) -> socket.socket:
    address = urlsplit(url)
    data = json.dumps(body).encode()
    connection = socket.create_connection((address.hostname, address.port))
    head = f"POST {address.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_hang_up_while_waiting(live_url, engine, chat_body, stream, n):
    engine.hold = True
    connection = open_request(f"{live_url}/v1/chat/completions", chat_body(stream=stream, n=n))
    async with asyncio.timeout(300):
        while len(engine.added) < n:
            await asyncio.sleep(0.002)
        connection.close()
        while not all(added.stream.aborted for added in engine.added):
            await asyncio.sleep(0.002)


async def test_hang_up_in_the_middle_of_a_stream(live_url, engine, chat_body):
    engine.hold = True
    url = f"{live_url}/v1/chat/completions"
    async with httpx.AsyncClient() as client, asyncio.timeout(300):

        async def release():
            while not engine.added:
                await asyncio.sleep(0.002)
            gate = engine.added[0].stream.gate
            gate.set()
            await asyncio.sleep(0)
            gate.clear()

        task = asyncio.create_task(release())
        async with client.stream("POST", url, json=chat_body(stream=True)) as response:
            async for line in response.aiter_lines():
                assert line.startswith("data: ")
                break
        await task
        while not engine.added[0].stream.aborted:
            await asyncio.sleep(0.002)
    assert engine.added[0].stream.aborted


async def test_hang_up_within_the_body(live_url, engine):
    address = urlsplit(live_url)
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await asyncio.sleep(0.05)
    connection.close()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{live_url}/health")).status_code == 200
    assert engine.added == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_ten_megabytes(live_url, chunked):
    async def chunks():
        for _ in range(160):
            yield b" " * 65536

    content = chunks() if chunked else b" " * (160 * 65536)
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{live_url}/v1/chat/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port))
    connection.setblocking(False)
    return connection


async def sent_until_closed(connection: socket.socket, data: bytes) -> float:
    """Send ``data`` byte by byte, again and again; seconds until the server closes."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.timeout(300):
        closed = asyncio.create_task(loop.sock_recv(connection, 1))
        for byte in itertools.cycle(data or [None]):
            if byte is not None:
                with contextlib.suppress(ConnectionError):
                    await loop.sock_sendall(connection, bytes([byte]))
            await asyncio.wait([closed], timeout=0.02)
            if closed.done():
                with contextlib.suppress(ConnectionResetError):
                    assert closed.result() == b""
                return loop.time() - start
    raise AssertionError


@pytest.mark.parametrize(
    ("begin", "data"),
    [(b"", b""), (b"", b"\r\n"), (b"GET /", b"a"), (b"GET /live HTTP/1.1\r\n", b"x: y\r\n")],
)
async def test_a_head_that_does_not_end(live_url, begin, data):
    with connect(live_url) as connection:
        await asyncio.get_running_loop().sock_sendall(connection, begin)
        assert await sent_until_closed(connection, data) > 0.35


async def answer_of(connection: socket.socket) -> bytes:
    loop, received = asyncio.get_running_loop(), b""
    async with asyncio.timeout(300):
        while not received.endswith(b"}"):
            received += await loop.sock_recv(connection, 65536)
    return received


@pytest.mark.parametrize(("begin", "data"), [(b"GET /", b"a"), (b"", b"\r\n")])
async def test_a_second_head_that_does_not_end(live_url, begin, data):
    loop = asyncio.get_running_loop()
    with connect(live_url) as connection:
        await loop.sock_sendall(connection, b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await answer_of(connection)
        await asyncio.sleep(0.5)  # the keep-alive time is another one
        await loop.sock_sendall(connection, begin)
        assert await sent_until_closed(connection, data) > 0.35


async def test_heads_have_ended_when_bodies_and_answers_take_long(live_url, engine, chat_body):
    engine.hold = True
    body = json.dumps(chat_body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    with connect(live_url) as connection:
        await loop.sock_sendall(connection, head.encode())
        await asyncio.sleep(0.6)
        await loop.sock_sendall(connection, body)
        while not engine.added:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.6)
        engine.added[0].stream.gate.set()
        assert b" 200 " in await answer_of(connection)
