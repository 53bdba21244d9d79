"""Whether a request's phases add up to what its client waits: ``python -m headstart.bench.ledger``.

Starts a server with the default model, and asks it over loopback for 200 streams: chats,
completions, responses and messages, prompts of 16 to 600 words, some with a beginning that others
had, some that follow a schema, 1, 2, 4 and 8 at a time. Each asks for ``timings``. The client has
nothing of the server's but sockets and a clock: from before the first byte is sent until the first
event with a part of the answer has been received.

Prints how far the sum of the phases is from that, and where the time went. Exit status 1 if the
median of the difference, relative to what the client measured, is beyond 2%, or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import random
import re
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError
from headstart.bench.prompts import PromptSource
from headstart.bench.server_process import start_headstart

LIMIT = 0.02
"""Of the time to the first token."""

AT_A_TIME = (1, 2, 4, 8)
PATIENCE = 600.0
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "price": {"type": "number"}},
    "required": ["name", "price"],
    "additionalProperties": False,
}
FIRST_EVENT = re.compile(rb'^data: (?!\{"type":"ping"\}).*\n', re.MULTILINE)
"""That of an answer: comments and pings may come before it."""


@dataclass(frozen=True, slots=True)
class Ask:
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """``first_token``: seconds that the client waited for it. ``timings``: the server's."""

    at_a_time: int
    path: str
    first_token: float
    timings: dict[str, Any]

    @property
    def difference(self) -> float:
        """Seconds that the client waited beyond what the phases add up to."""
        phases: dict[str, float] = self.timings["phases_ms"]
        return self.first_token - sum(phases.values()) / 1000

    @property
    def share(self) -> float:
        """Of what it waited, as an amount."""
        return abs(self.difference) / self.first_token


def asks(count: int, seed: int, model: str) -> list[Ask]:
    """Requests of mixed kinds and lengths, the same for the same seed."""
    draw, source = random.Random(seed), PromptSource(seed)
    return [_ask(i, draw, source, model) for i in range(count)]


def _ask(i: int, draw: random.Random, source: PromptSource, model: str) -> Ask:
    path = draw.choice(PATHS)
    words = round(16 * (600 / 16) ** draw.random())
    text = source.text(f"user/{i}", words)
    if draw.random() < 0.3:
        text = source.text("shared", 200) + " " + text
    most = draw.randint(2, 16)
    body: dict[str, Any] = {"model": model, "stream": True, "timings": True, "temperature": 0}
    messages = [{"role": "user", "content": text}]
    match path:
        case "/v1/completions":
            body |= {"prompt": text, "max_tokens": most}
        case "/v1/responses":
            body |= {"input": text, "max_output_tokens": most, "store": False}
        case _:
            body |= {"messages": messages, "max_tokens": most}
    if path == "/v1/chat/completions" and draw.random() < 0.5:
        schema = {"name": f"goods{i}", "schema": SCHEMA}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}}
    return Ask(path, body)


class Connection:
    """One that is kept open, read as bytes: nothing is done between a byte and its moment."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._socket = socket.create_connection((host, port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, ask: Ask, at_a_time: int) -> Answer:
        """The answer to one request. Raises BenchError."""
        body = json.dumps(ask.body).encode()
        head = f"POST {ask.path} HTTP/1.1\r\nHost: {self._host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        request, data = head.encode() + body, b""
        first: float | None = None
        sent = time.perf_counter()
        self._socket.sendall(request)
        while not _ended(data):
            chunk = self._socket.recv(1 << 16)
            now = time.perf_counter()
            if not chunk:
                raise BenchError(f"{ask.path}: the connection was closed")
            data += chunk
            if first is None and FIRST_EVENT.search(data):
                first = now
        if first is None or not data.startswith(b"HTTP/1.1 200 "):
            raise BenchError(f"{ask.path}: {data[:400].decode(errors='replace')}")
        return Answer(at_a_time, ask.path, first - sent, _timings(data))


def _ended(data: bytes) -> bool:
    """Whether that is a whole answer, in chunks or, an error, with a length."""
    head, found, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    if length is not None:
        return bool(found) and len(body) >= int(length[1])
    return body.endswith(b"\r\n0\r\n\r\n")


def _timings(data: bytes) -> dict[str, Any]:
    """Those of the last event that has some."""
    for line in reversed(re.findall(rb"^data: (\{.*\})\r?$", data, re.MULTILINE)):
        event = json.loads(line)
        event = event.get("response", event)
        if "timings" in event:
            found: dict[str, Any] = event["timings"]
            return found
    raise BenchError("an answer has no timings")


def run(url: str, work: Sequence[Ask], at_a_time: int) -> list[Answer]:
    """All of ``work``, so many at a time, each from a connection of its own."""
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    left: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    for ask in work:
        left.put(ask)
    answers: list[Answer] = []
    errors: list[Exception] = []

    def client() -> None:
        try:
            with Connection(host, port) as connection:
                while not errors:
                    answers.append(connection.ask(left.get_nowait(), at_a_time))
        except queue.Empty:
            return
        except (BenchError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(at_a_time)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


def p95(values: Iterable[float]) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[(95 * len(ordered) + 99) // 100 - 1]


def report(answers: Sequence[Answer]) -> str:
    """The distribution of the differences, and the phases' shares of all time."""
    groups: list[tuple[str, list[Answer]]] = [
        (f"{n} at a time", [a for a in answers if a.at_a_time == n]) for n in AT_A_TIME
    ]
    groups += [(path, [a for a in answers if a.path == path]) for path in PATHS]
    groups.append(("all", list(answers)))
    lines = [
        f"{'':22}{'requests':>9}{'first token, ms':>18}{'difference, ms':>17}{'|difference|':>15}",
        f"{'':22}{'':9}{'median      p95':>18}{'median      p95':>17}{'median    p95':>15}",
    ]
    for name, group in groups:
        if not group:
            continue
        first = [1000 * answer.first_token for answer in group]
        difference = [1000 * answer.difference for answer in group]
        share = [100 * answer.share for answer in group]
        lines.append(
            f"{name:22}{len(group):9}{statistics.median(first):10.1f}{p95(first):8.0f}"
            f"{statistics.median(difference):9.2f}{p95(difference):8.2f}"
            f"{statistics.median(share):7.2f}%{p95(share):6.2f}%"
        )
    total: Counter[str] = Counter()
    for answer in answers:
        total.update(answer.timings["phases_ms"])
    whole = sum(1000 * answer.first_token for answer in answers)
    lines += ["", "of all that the clients waited:"]
    lines += [f"  {phase:12}{100 * spent / whole:7.2f}%" for phase, spent in total.items()]
    lines.append(f"  {'beyond':12}{100 * (1 - sum(total.values()) / whole):7.2f}%")
    return "\n".join(lines)


async def measure(args: argparse.Namespace) -> int:
    """Print it all; 1 where the phases do not add up."""
    work = asks(args.requests, args.seed, "default")
    answers: list[Answer] = []
    argv = ["smollm2-135m", "--served-model-name", "default", *args.serve]
    async with start_headstart(argv) as url:
        # What only the first requests of a server wait for is not what is asked about.
        await asyncio.to_thread(run, url, asks(len(PATHS), args.seed + 1, "default"), 1)
        for i, at_a_time in enumerate(AT_A_TIME):
            answers += await asyncio.to_thread(run, url, work[i :: len(AT_A_TIME)], at_a_time)
    print(report(answers))
    median = statistics.median(answer.share for answer in answers)
    beyond = median > LIMIT
    words = "beyond" if beyond else "within"
    print(
        f"\nthe phases add up to the client's time to the first token {words} {LIMIT:.0%}: "
        f"{median:.2%} in the median, p95 {p95(answer.share for answer in answers):.2%}"
    )
    return int(beyond)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of prompts and kinds (%(default)s)")
    parser.add_argument("serve", nargs="*", help="further flags of headstart serve, after --")
    args = parser.parse_args()
    return exit_status(lambda: asyncio.run(measure(args)))


if __name__ == "__main__":
    sys.exit(main())
