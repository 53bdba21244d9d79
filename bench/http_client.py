"""HttpTarget: the load generator, for any server that speaks the OpenAI API.

It shares the machine with the server, so while requests run it does the least: raw chunks are
read and stamped, nothing is decoded. Events are parsed when all answers are complete. The
connections are open before the first request is sent.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from headstart.bench.prompts import Messages
from headstart.bench.samples import Burst, Sample


class BenchError(Exception):
    """The benchmark cannot go on; the message is one line a user can act on."""


Chunks = list[tuple[float, bytes]]


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """A server at `url`; made by `connect`."""

    session: aiohttp.ClientSession
    url: str
    model: str
    name: str

    async def count(self, messages: Messages) -> int:
        """Prompt tokens of the conversation, from the usage of a one-token answer."""
        body = {**self._body(messages, 1), "stream": False}
        del body["stream_options"]
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{self.url}: {_reason(error)}") from error
        if response.status != 200:
            raise BenchError(f"{self.url} answered {response.status}: {_message(text)}")
        try:
            return int(json.loads(text)["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"{self.url}: no usage.prompt_tokens in the answer") from error

    async def burst(self, conversations: list[Messages], output_tokens: int) -> Burst:
        """All conversations at once, over connections opened beforehand."""
        bodies = self._encode(conversations, output_tokens)
        await self._open_connections(len(bodies))
        cpu, wall = time.process_time(), time.perf_counter()
        raw = await asyncio.gather(*(self._stream(body) for body in bodies))
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        return Burst([_parse(*answer) for answer in raw], share)

    async def load(
        self,
        conversations: list[Messages],
        output_tokens: int,
        streams: int,
        rate: float | None,
        seed: int,
    ) -> Burst:
        """At most `streams` at a time; with a rate, arrivals per second are Poisson.

        A request that waits for a free stream counts from its arrival, not from when it was sent.
        """
        bodies = self._encode(conversations, output_tokens)
        await self._open_connections(min(streams, len(bodies)))
        free = asyncio.Semaphore(streams)
        draw = random.Random(seed)

        async def one(body: bytes, arrival: float | None) -> tuple[float, Chunks, str | None]:
            if arrival is not None:
                await asyncio.sleep(arrival - time.perf_counter())
            async with free:
                sent, chunks, error = await self._stream(body)
            return (sent if arrival is None else arrival), chunks, error

        cpu, wall = time.process_time(), time.perf_counter()
        due: float = wall
        jobs = []
        for body in bodies:
            jobs.append(one(body, None if rate is None else due))
            due += draw.expovariate(rate) if rate is not None else 0.0
        raw = await asyncio.gather(*jobs)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        return Burst([_parse(*answer) for answer in raw], share)

    async def ask(self, messages: Messages, output_tokens: int, **fields: Any) -> Sample:
        """One conversation, with further fields of its body, now."""
        body = {**self._body(messages, output_tokens), **fields}
        return _parse(*await self._stream(json.dumps(body).encode()))

    def _body(self, messages: Messages, output_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _encode(self, conversations: list[Messages], output_tokens: int) -> list[bytes]:
        return [json.dumps(self._body(m, output_tokens)).encode() for m in conversations]

    async def _open_connections(self, count: int) -> None:
        """Have `count` idle connections in the pool; the answers do not matter."""

        async def touch() -> None:
            async with self.session.get(f"{self.url}/v1/models") as response:
                await response.read()

        try:
            await asyncio.gather(*(touch() for _ in range(count)))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{self.url}: {_reason(error)}") from error

    async def _stream(self, body: bytes) -> tuple[float, Chunks, str | None]:
        """Send one request; (time sent, stamped raw chunks, error)."""
        chunks: Chunks = []
        sent = time.perf_counter()
        try:
            async with self.session.post(
                f"{self.url}/v1/chat/completions",
                data=body,
                headers={"Content-Type": "application/json"},
            ) as response:
                async for chunk in response.content.iter_any():
                    chunks.append((time.perf_counter(), chunk))
        except (aiohttp.ClientError, TimeoutError) as error:
            return sent, chunks, _reason(error)
        if response.status != 200:
            text = b"".join(chunk for _, chunk in chunks).decode(errors="replace")
            return sent, chunks, f"HTTP {response.status}: {_message(text)}"
        return sent, chunks, None


@asynccontextmanager
async def connect(
    url: str,
    model: str | None,
    *,
    timeout: float,
    api_key: str | None = None,
    name: str = "server",
) -> AsyncIterator[HttpTarget]:
    """A target at `url`, which may end in /v1; without a model name, the first it lists."""
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout),
        headers=headers,
        read_bufsize=2**20,
    ) as session:
        try:
            async with session.get(f"{url}/v1/models") as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise BenchError(f"no server at {url}: {_reason(error)}") from error
        if response.status != 200:
            raise BenchError(f"{url}/v1/models answered {response.status}: {_message(text)}")
        try:
            listed = [str(entry["id"]) for entry in json.loads(text)["data"]]
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"{url}/v1/models is not an OpenAI model list") from error
        if not listed:
            raise BenchError(f"{url} serves no model")
        if model is not None and model not in listed:
            raise BenchError(f"{url} does not serve {model}; it has: {', '.join(listed)}")
        yield HttpTarget(session=session, url=url, model=model or listed[0], name=name)


def _parse(sent: float, chunks: Chunks, error: str | None) -> Sample:
    """Turn stamped chunks of an event stream into a Sample."""
    if error is not None:
        return Sample(sent=sent, error=error)
    times: list[float] = []
    finished = last = None
    usage: dict[str, Any] | None = None
    rest = b""
    for stamp, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            try:
                event = json.loads(data)
            except ValueError:
                return Sample(sent=sent, error=f"not JSON in the event stream: {data[:80]!r}")
            if "error" in event:
                return Sample(sent=sent, error=_message(data.decode(errors="replace")))
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                last = stamp
                finished = choice.get("finish_reason") or finished
                if (choice.get("delta") or {}).get("content"):
                    times.append(stamp)
    if finished is None or last is None:
        return Sample(sent=sent, error="the stream ended without a finish_reason")
    if usage is None:
        return Sample(sent=sent, error="no usage in the stream: include_usage is not supported")
    # Tokens without text (special tokens) come without content; the last one's time still counts.
    if len(times) < usage["completion_tokens"] and (not times or last > times[-1]):
        times.append(last)
    return Sample(
        sent=sent,
        times=tuple(times),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )


def _reason(error: Exception) -> str:
    return "timed out" if isinstance(error, TimeoutError) else (str(error) or type(error).__name__)


def _message(text: str) -> str:
    """The message of an OpenAI error body, or the start of the text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (KeyError, TypeError, ValueError):
        return " ".join(text.split())[:200]
