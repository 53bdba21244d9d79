"""A stream is never silent for long: head, pings, a prompt's progress. The clock is the test's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from headstart.engine.errors import RequestError
from headstart.engine.process.messages import Output
from headstart.server.http.app import create_app
from headstart.server.http.deadline import BEGUN, Pings
from headstart.server.settings import ServerSettings

OPENAI_PING = b": ping\n\n"
ANTHROPIC_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
MESSAGES = [{"role": "user", "content": "hi"}]
STREAMS = [
    pytest.param("/v1/chat/completions", {"messages": MESSAGES}, OPENAI_PING, id="chat"),
    pytest.param("/v1/completions", {"prompt": "hi"}, OPENAI_PING, id="completions"),
    pytest.param("/v1/responses", {"input": "hi"}, OPENAI_PING, id="responses"),
    pytest.param(
        "/v1/messages", {"messages": MESSAGES, "max_tokens": 9}, ANTHROPIC_PING, id="messages"
    ),
]
DONE = object()


class Hands:
    """A clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, woken))
        await woken

    def call_later(self, seconds: float, callback) -> asyncio.Future[None]:
        due = asyncio.get_running_loop().create_future()
        due.add_done_callback(lambda due: due.cancelled() or callback())
        self._sleepers.append((self.now + seconds, due))
        return due

    async def move(self, seconds: float) -> None:
        end = self.now + seconds
        await settle()
        while due := [entry for entry in self._sleepers if entry[0] <= end]:
            first = min(due, key=lambda entry: entry[0])
            self._sleepers.remove(first)
            self.now = max(self.now, first[0])
            if not first[1].done():
                first[1].set_result(None)
            await settle()
        self.now = end


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class Told:
    """A stream that says what the test puts into it."""

    queue: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    aborted: int = 0

    async def __aiter__(self) -> AsyncIterator[Output]:
        while (item := await self.queue.get()) is not DONE:
            if isinstance(item, Exception):
                raise item
            yield item

    reported = True

    def abort(self) -> None:
        self.aborted += 1


@dataclass
class Asked:
    """A request on its way through the app, and what has been sent of its answer."""

    task: asyncio.Task[None]
    sent: list[dict[str, Any]]

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    def taken(self) -> bytes:
        """The body since the last call."""
        body = self.body
        del self.sent[1:]
        return body


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def told(engine, monkeypatch) -> list[Told]:
    """The streams of all that was asked of the engine, in order."""
    streams: list[Told] = []

    def add(token_ids, params, **_) -> Told:
        streams.append(Told())
        engine.added.append((token_ids, params))
        return streams[-1]

    monkeypatch.setattr(engine, "add", add)
    return streams


@pytest.fixture
async def ask(engine, tokenizer, hands):
    """``ask(path, fields)``: a request; ``interval``: of pings; ``age``: since its first byte."""
    tasks = []

    async def begin(
        path: str, fields: dict[str, Any], *, interval: float = 10.0, age: float = 0.0
    ) -> Asked:
        pings = Pings(
            interval=interval, clock=hands, sleep=hands.sleep, call_later=hands.call_later
        )
        app = create_app(engine, tokenizer, model_names=["tiny"], pings=pings)
        body = [{"type": "http.request", "body": json.dumps({"model": "tiny"} | fields).encode()}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [],
            BEGUN: hands.now - age,
        }
        before = len(engine.added)
        tasks.append(asyncio.create_task(app(scope, receive, send)))
        async with asyncio.timeout(300):
            while len(engine.added) == before and not sent:
                await asyncio.sleep(0.002)  # templates are rendered in threads
        await settle()
        return Asked(tasks[-1], sent)

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("path", "fields", "ping"), STREAMS)
async def test_the_head_comes_after_two_seconds_and_then_pings(
    ask, hands, told, say, path, fields, ping
):
    asked = await ask(path, fields | {"stream": True})
    await hands.move(1.9)
    assert asked.sent == []
    await hands.move(0.2)
    assert asked.status == 200
    assert dict(asked.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert asked.taken() == ping
    await hands.move(9.8)
    assert asked.taken() == b""
    await hands.move(20)
    assert asked.taken() == 2 * ping
    told[0].queue.put_nowait(Output(0, say("hello")))
    await settle()
    began = asked.taken()
    assert b"hello" in began
    assert not began.startswith(ping)
    await hands.move(9.9)
    assert asked.taken() == b""
    await hands.move(0.2)  # between tokens, too
    assert asked.taken() == ping
    told[0].queue.put_nowait(Output(0, [2], "stop"))
    await asked.task
    assert asked.sent[-1]["more_body"] is False
    assert ping not in asked.taken()


@pytest.mark.parametrize(("path", "fields", "ping"), STREAMS)
async def test_pings_change_nothing_else(ask, hands, told, say, path, fields, ping):
    """Without the pings the stream is that of an engine that was quick."""
    bodies = []
    for wait in (0, 25):
        asked = await ask(path, fields | {"stream": True})
        await hands.move(wait)
        for output in (Output(0, say("hello")), Output(0, [2], "stop")):
            told[-1].queue.put_nowait(output)
        await asked.task
        bodies.append(asked.body)
    kinds = [
        [json.loads(line[6:]).get("type") for line in body.splitlines() if line[:7] == b"data: {"]
        for body in bodies
    ]
    assert [kind for kind in kinds[0] if kind != "ping"] == [k for k in kinds[1] if k != "ping"]
    assert bodies[1].startswith(3 * ping)


async def test_no_pings_but_the_head(ask, hands, told):
    asked = await ask("/v1/completions", {"prompt": "hi", "stream": True}, interval=0)
    await hands.move(1000)
    assert asked.status == 200
    assert asked.body == b""


async def test_whole_answers_wait_for_themselves(ask, hands, told):
    asked = await ask("/v1/completions", {"prompt": "hi"})
    await hands.move(1000)
    assert asked.sent == []


@pytest.mark.parametrize(("path", "fields", "ping"), STREAMS)
async def test_errors_have_their_status_until_the_head_is_sent(
    ask, hands, told, path, fields, ping
):
    asked = await ask(path, fields | {"stream": True})
    await hands.move(1.9)
    told[0].queue.put_nowait(RequestError("it does not fit", "max_tokens"))
    await asked.task
    assert asked.status == 400
    asked = await ask(path, fields | {"stream": True})
    await hands.move(2.1)
    told[1].queue.put_nowait(RequestError("it does not fit", "max_tokens"))
    await asked.task
    assert asked.status == 200
    assert asked.body.startswith(ping)
    assert b"it does not fit" in asked.body


async def test_a_request_that_began_long_ago_gets_its_head_at_once(ask, hands, told):
    asked = await ask("/v1/completions", {"prompt": "hi", "stream": True}, age=60)
    await hands.move(0)
    assert asked.status == 200


async def test_progress(ask, hands, told, engine):
    fields = {"prompt": ["hi there", "you"], "n": 2, "stream": True}
    asked = await ask(
        "/v1/completions",
        fields | {"stream_options": {"include_progress": True, "include_usage": True}},
    )
    assert [params.prompt_progress for _, params in engine.added] == [True, False, True, False]
    total = sum(len(token_ids) for token_ids, _ in engine.added[::2])
    told[0].queue.put_nowait(Output(0, [], None, 2, computed=2))
    await settle()
    [event] = [json.loads(line[6:]) for line in asked.taken().splitlines() if line]
    assert event["prompt_progress"] == {"computed": 2, "cached": 2, "total": total}
    assert (event["choices"], event["usage"], event["object"]) == ([], None, "text_completion")
    told[2].queue.put_nowait(Output(2, [], None, 0, computed=1))
    await settle()
    assert asked.taken() == b""  # too soon
    await hands.move(0.5)
    told[0].queue.put_nowait(Output(0, [], None, 2, computed=4))
    await settle()
    [event] = [json.loads(line[6:]) for line in asked.taken().splitlines() if line]
    assert event["prompt_progress"] == {"computed": 5, "cached": 2, "total": total}


async def test_progress_of_a_chat(ask, told, engine):
    fields = {"messages": MESSAGES, "stream": True, "stream_options": {"include_progress": True}}
    asked = await ask("/v1/chat/completions", fields)
    told[0].queue.put_nowait(Output(0, [], None, 0, computed=3))
    await settle()
    [event] = [json.loads(line[6:]) for line in asked.taken().splitlines() if line]
    assert event["object"] == "chat.completion.chunk"
    assert event["prompt_progress"]["computed"] == 3


async def test_nobody_else_is_told_of_progress(ask, told, engine):
    for fields in ({}, {"stream": True}, {"stream": True, "stream_options": {}}):
        await ask("/v1/completions", {"prompt": "hi"} | fields)
    assert [params.prompt_progress for _, params in engine.added] == [False] * len(engine.added)


# ------------------------------------------------------------------------------ real sockets


@pytest.fixture
def interval() -> float:
    return 0.02


@pytest.fixture
def app(engine, tokenizer, interval):
    pings = Pings(head_after=0.02, interval=interval)
    return create_app(engine, tokenizer, model_names=["tiny"], pings=pings)


async def hold_for(engine, seconds: float) -> None:
    """Let the engine answer so long after it was asked."""
    while not engine.added:
        await asyncio.sleep(0.005)
    await asyncio.sleep(seconds)
    engine.added[-1].stream.gate.set()


async def test_official_clients_pass_over_pings(live_url, engine, anthropic):
    engine.hold = True
    async with (
        openai.AsyncOpenAI(base_url=f"{live_url}/v1", api_key="any", max_retries=0) as client,
        asyncio.timeout(300),
    ):
        for create in (
            lambda: client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True),
            lambda: client.responses.create(model="tiny", input="hi", stream=True),
        ):
            engine.added.clear()
            holding = asyncio.create_task(hold_for(engine, 0.2))
            events = [event async for event in await create()]
            await holding
            assert "hello world" in "".join(map(_text_of, events))
    async with anthropic.AsyncAnthropic(base_url=live_url, api_key="any", max_retries=0) as client:
        engine.added.clear()
        holding = asyncio.create_task(hold_for(engine, 0.2))
        async with client.messages.stream(model="tiny", messages=MESSAGES, max_tokens=99) as stream:
            message = await stream.get_final_message()
        await holding
        assert message.content[0].text == "hello world"
        assert message.usage.cache_read_input_tokens == 3


def _text_of(event: Any) -> str:
    if hasattr(event, "choices"):
        return event.choices[0].delta.content or ""
    return event.delta if event.type == "response.output_text.delta" else ""


@contextlib.asynccontextmanager
async def proxy_before(url: str, patience: float) -> AsyncIterator[str]:
    """A proxy that closes the connection when the server says nothing for so long."""
    address = urlsplit(url)

    async def forward(reader, writer) -> None:
        upstream, out = await asyncio.open_connection(address.hostname, address.port)
        with contextlib.suppress(TimeoutError, ConnectionError):
            out.write(await reader.readuntil(b"\r\n\r\n"))
            out.write(await reader.read(65536))
            while data := await asyncio.wait_for(upstream.read(65536), patience):
                writer.write(data)
                await writer.drain()
        for end in (writer, out):
            end.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = await asyncio.start_server(forward, sock=listener)
        async with server:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("interval", "patience", "wait"), [(0.1, 5.0, 6.0), (0.0, 0.5, 300.0)], ids=["pings", "none"]
)
async def test_a_proxy_waits_for_a_slow_engine_thanks_to_pings(
    live_url, engine, chat_body, patience, wait
):
    engine.hold = True
    holding = asyncio.create_task(hold_for(engine, wait))
    async with proxy_before(live_url, patience) as url:
        curl = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--no-buffer", f"{url}/v1/chat/completions"),
            *("-H", "Content-Type: application/json", "-d", json.dumps(chat_body(stream=True))),
            stdout=subprocess.PIPE,
        )
        shown, _ = await asyncio.wait_for(curl.communicate(), 300)
    holding.cancel()
    if wait > 100:
        assert b"[DONE]" not in shown
    else:
        assert shown.endswith(b"data: [DONE]\n\n")
        assert shown.count(OPENAI_PING) > 10


async def test_the_setting_is_the_interval(engine, tokenizer, connect_to, chat_body):
    assert Pings().head_after == 2
    settings = ServerSettings(ping_interval=3.5)
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    [pings] = [entry.kwargs["pings"] for entry in app.user_middleware if "pings" in entry.kwargs]
    assert (pings.interval, pings.head_after) == (3.5, 2)
