"""A small OpenAI server in a thread: answers are counted out at a fixed pace, nothing is computed.

It keeps the system turns it has seen, so `cached_tokens` tells cold from warm, and its pace is
known, so the figures of the load generator can be checked.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

OVERHEAD = 11  # tokens of the template


@dataclass
class FakeServer:
    """Prefill takes `prefill` seconds for a system turn not seen before, a token `pace` seconds."""

    prefill: float = 0.05
    pace: float = 0.005
    fail_every: int | None = None
    hang_up: bool = False
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    open_streams: int = 0
    most_open: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fail_every is not None and len(self.bodies) % self.fail_every == 0:
            return web.json_response({"error": {"message": "no room"}}, status=400)
        system, user = (message["content"] for message in body["messages"])
        prompt = OVERHEAD + len(system.split()) + len(user.split())
        cached = prompt - OVERHEAD if system in self.seen else 0
        if not cached:
            await asyncio.sleep(self.prefill)
        self.seen.add(system)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if not body["stream"]:
            return web.json_response({"choices": [], "usage": usage})
        return await self.stream(request, body["max_tokens"], usage)

    async def stream(
        self, request: web.Request, count: int, usage: dict[str, Any]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open_streams += 1
        self.most_open = max(self.most_open, self.open_streams)

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def choice(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

        await send(choice({"role": "assistant", "content": ""}))
        for i in range(count):
            if i:
                await asyncio.sleep(self.pace)
            await send(choice({"content": " ä"}))
            if self.hang_up:
                break
        self.open_streams -= 1
        if not self.hang_up:
            await send(choice({}, "length"))
            await send({"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def running() -> Iterator[FakeServer]:
    """A fake server on a free port, in a thread."""
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/chat/completions", fake.chat)
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield fake
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


@pytest.fixture
def other_server() -> Iterator[FakeServer]:
    """A second one, for what compares two."""
    with running() as fake:
        yield fake
