"""The load of a soak test: requests of mixed lengths, some with deadlines, some that hang up.

    closed loop   so many clients, each with one request after the other: what the server can do
    open loop     requests come at a rate, whatever becomes of those before them: overload

Each request has one Outcome, which is all that is kept of it.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from headstart.bench.prompts import PromptSource
from headstart.bench.soak_traffic import SHARED_PREFIXES, Answer, WrongAnswer

OWN_WORDS = (10, 10, 50, 50, 200, 200, 1500)
POOL_WORDS = 200_000
"""From which prompts are cut."""
OUTPUT_TOKENS = (4, 16, 64)
REQUEST_LIMIT = 600.0
"""Seconds after which a request counts as lost."""
REFUSED = frozenset({"overloaded", "rate_limit_exceeded"})
"""Codes of the requests that were not let in."""

Kind = Literal["answered", "refused", "late", "hung up", "lost"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: ``deadline`` is told to the server, ``patience`` is not; seconds."""

    body: Json
    deadline: float | None = None
    patience: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request, from ``sent`` to ``ended`` by ``time.monotonic``.

    answered   whole, with the ``tokens`` that were asked for
    refused    not let in, and told so
    late       let in, and ended by its own deadline
    hung up    its client has gone
    lost       anything else; ``reason`` says what
    """

    kind: Kind
    sent: float
    ended: float
    tokens: int = 0
    reason: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


class Load:
    """Draws requests and sends them to one server."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, source: PromptSource
    ) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._model = model
        # Made once: at overload, drawing every word would take longer than being refused.
        self._words = source.text("load", POOL_WORDS).split()
        self._shared = [source.text(f"shared/{words}", words) for words in SHARED_PREFIXES]

    def draw(self, draw: random.Random) -> Asked:
        """A random request."""
        count = draw.choice(OWN_WORDS)
        first = draw.randrange(POOL_WORDS - count)
        own = " ".join(self._words[first : first + count])
        if draw.random() < 0.4:
            own = f"{draw.choice(self._shared)} {own}"
        body = {
            "model": self._model,
            "prompt": own,
            "max_tokens": draw.choice(OUTPUT_TOKENS),
            "ignore_eos": True,
            "stream": draw.random() < 0.5,
        }
        deadline = draw.uniform(1, 30) if draw.random() < 0.1 else None
        patience = draw.uniform(0, 20) if draw.random() < 0.1 else None
        return Asked(body, deadline, patience)

    async def send(self, asked: Asked) -> Outcome:
        """Send a request, and see what becomes of it."""
        sent = time.monotonic()
        kind: Kind
        tokens, reason = 0, ""
        try:
            async with asyncio.timeout(REQUEST_LIMIT), asyncio.timeout(asked.patience) as patience:
                kind, reason = await self._answered(asked)
                tokens = asked.body["max_tokens"] if kind == "answered" else 0
        except TimeoutError:
            kind = "hung up" if patience.expired() else "lost"
            reason = "" if patience.expired() else f"no end within {REQUEST_LIMIT:.0f} s"
        except (aiohttp.ClientError, OSError, ValueError, KeyError, WrongAnswer) as error:
            kind, reason = "lost", repr(error)
        return Outcome(kind, sent, time.monotonic(), tokens, reason)

    async def _answered(self, asked: Asked) -> tuple[Kind, str]:
        headers = {} if asked.deadline is None else {"x-request-timeout": f"{asked.deadline:.3f}"}
        async with self._session.post(self._url, json=asked.body, headers=headers) as response:
            if response.status != 200:
                return _without_answer(response.status, await response.read())
            answer = Answer()
            if not asked.body["stream"]:
                answer.add(await response.json())
                return _whole(answer)
            last = b""
            async for line in response.content:
                if line.startswith(b"data: "):
                    last = line.removeprefix(b"data: ").strip()
                    if last == b"[DONE]":
                        continue
                    event = json.loads(last)
                    if "error" in event:
                        return _without_answer(0, last)
                    answer.add(event)
            return _whole(answer) if last == b"[DONE]" else ("lost", "the stream broke off")


def _without_answer(status: int, body: bytes) -> tuple[Kind, str]:
    """What an error says. ``status``: 0 within a stream, which was let in."""
    error = json.loads(body)["error"]
    if error["code"] == "timeout":
        return "late", ""
    if status and error["code"] in REFUSED:
        return "refused", ""
    return "lost", f"status {status}: {error['message']}"


def _whole(answer: Answer) -> tuple[Kind, str]:
    if answer.reasons == {0: "length"}:
        return "answered", ""
    return "lost", f"finish reasons {answer.reasons}"


async def closed_loop(load: Load, clients: int, seconds: float, seed: str) -> list[Outcome]:
    """``clients`` at a time, for ``seconds``; a client that is refused waits a little."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        while time.monotonic() < end:
            outcomes.append(await load.send(load.draw(draw)))
            if outcomes[-1].kind == "refused":
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


async def open_loop(load: Load, rate: float, seconds: float, seed: str) -> list[Outcome]:
    """Requests come at random times, ``rate`` a second on average; all are seen to their end."""
    draw = random.Random(seed)
    end = time.monotonic() + seconds
    tasks: set[asyncio.Task[Outcome]] = set()
    outcomes: list[Outcome] = []

    def ended(task: asyncio.Task[Outcome]) -> None:
        tasks.discard(task)
        outcomes.append(task.result())

    due = time.monotonic()
    while (due := due + draw.expovariate(rate)) < end:
        asked = load.draw(draw)
        await asyncio.sleep(max(due - time.monotonic(), 0))
        task = asyncio.create_task(load.send(asked))
        tasks.add(task)
        task.add_done_callback(ended)
    if tasks:
        await asyncio.wait(tasks)
        await asyncio.sleep(0)  # the last of them is noted
    return outcomes
