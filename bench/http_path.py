"""What the HTTP layer costs: ``python -m headstart.bench.http_path``.

An engine that computes nothing stands behind the real app and a real uvicorn; a client in another
process reads the streams, all the time, and beside them asks for one token now and then, which the
engine has at once. Prints one JSON line:

    cpu_us_per_token       CPU time of this process for a streamed token, everything from the
                           engine's Output to the socket included, and what the askers cost
    cores_at_1000          the share of a core that 1,000 of them a second take
    first_byte_ms          from the request of a single token to the first byte of its answer
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import tokenizers
import uvicorn
import uvloop
from tokenizers import decoders, models, pre_tokenizers, trainers

from headstart.engine.errors import RequestError
from headstart.engine.process.messages import AdapterInfo, ModelInfo, Output, Stats
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.server.http.app import create_app
from headstart.server.text.tokenizer import Tokenizer

ASK_SECONDS = 0.01
"""Pause between two that ask for a single token."""

PATIENCE = 600.0

Queue = Any  # of multiprocessing: a list of seconds comes out of it


class SteadyStream:
    """One token per tick of the engine, as a step hands them out."""

    def __init__(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        self._num_tokens = num_tokens
        self._token_ids = token_ids
        self.queue: asyncio.Queue[Output] = asyncio.Queue()
        self._sent = 0

    @property
    def reported(self) -> bool:
        return True

    def tick(self) -> bool:
        """Hand out a token; False after the last."""
        self._sent += 1
        token_id = self._token_ids[self._sent % len(self._token_ids)]
        last = self._sent >= self._num_tokens
        self.queue.put_nowait(Output(0, [token_id], "length" if last else None))
        return not last

    async def __aiter__(self) -> AsyncIterator[Output]:
        while True:
            yield await self.queue.get()

    def abort(self) -> None:
        self._sent = self._num_tokens


class SteadyEngine:
    """Hands every running stream one token each ``step_seconds``."""

    def __init__(self, token_ids: Sequence[int], step_seconds: float) -> None:
        self.ready = True
        self.stats = Stats()
        self.restarts = 0
        self.adapters: dict[str, AdapterInfo] = {}
        self.model: ModelInfo | None = ModelInfo(
            max_model_len=10**6,
            vocab_size=10**6,
            hidden_size=1,
            page_size=16,
            num_pages=1,
            eos_token_ids=[],
            backend="none",
            weights="none",
            version="0",
        )
        self._token_ids = token_ids
        self._step_seconds = step_seconds
        self._streams: list[SteadyStream] = []

    async def start(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            self._streams = [stream for stream in self._streams if stream.tick()]

    def add(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        *,
        salt: bytes = b"",
        segments: Sequence[Span] = (),
        adapter: str | None = None,
        priority: int = 0,
        owner: bytes = b"",
    ) -> SteadyStream:
        assert isinstance(params, SamplingParams)
        stream = SteadyStream(params.max_tokens, self._token_ids)
        if params.max_tokens == 1:
            stream.tick()
        else:
            self._streams.append(stream)
        return stream

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        raise RequestError("this engine computes nothing")

    async def unload_adapter(self, name: str) -> None:
        raise RequestError("this engine computes nothing")

    async def stop(self) -> None:
        self._streams = []


def request(num_tokens: int) -> bytes:
    """A chat that is streamed."""
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": "go"}],
            "max_tokens": num_tokens,
            "stream": True,
            "stop": ["never said", "neither"],
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_streams(port: int, num_streams: int, num_tokens: int, first_bytes: Queue) -> None:
    """The client's process: opens the streams and reads them to their ends; meanwhile asks for
    single tokens, and puts the seconds to the first byte of each into ``first_bytes``."""

    async def read_one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(num_tokens))
        data = bytearray()
        while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            chunk = await reader.read(65536)
            if not chunk:
                raise ConnectionError("the stream ended early")
            data += chunk
        writer.close()
        texts = data.count(b'"delta":{"content":')
        if texts != num_tokens:
            raise ValueError(f"{texts} texts came, {num_tokens} were asked for")

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            await asyncio.sleep(ASK_SECONDS)
            begin = time.perf_counter()
            writer.write(request(1))
            data = await reader.read(1)
            seconds.append(time.perf_counter() - begin)
            while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                data += await reader.read(65536)

    async def read_all() -> None:
        asking = asyncio.create_task(ask())
        async with asyncio.TaskGroup() as group:
            for _ in range(num_streams):
                group.create_task(read_one())
        asking.cancel()

    seconds: list[float] = []
    uvloop.run(read_all())
    first_bytes.put(seconds)


def bench_tokenizer() -> Tokenizer:
    """A byte-level tokenizer made on the spot; decoding does not depend on its size."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([__doc__ or ""], trainer)
    return Tokenizer(backend, chat_template="{{ messages[0]['content'] }}")


async def measure(num_streams: int, num_tokens: int, step_seconds: float) -> dict[str, Any]:
    """Serve ``num_streams`` streams of ``num_tokens``; the figures of the JSON line."""
    tokenizer = bench_tokenizer()
    token_ids = tokenizer.encode(
        "the process reads the streams of one token ", add_special_tokens=False
    )
    app = create_app(SteadyEngine(token_ids, step_seconds), tokenizer, model_names=["bench"])
    config = uvicorn.Config(app, http="httptools", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        port = listener.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        first_bytes: Queue = spawn.Queue()
        client = spawn.Process(
            target=read_streams, args=(port, num_streams, num_tokens, first_bytes)
        )
        gc.collect()
        gc.freeze()  # as serve does
        wall, cpu = time.perf_counter(), time.process_time()
        client.start()
        seconds = sorted(await asyncio.to_thread(first_bytes.get, True, PATIENCE))
        await asyncio.to_thread(client.join)
        if client.exitcode != 0:
            raise ChildProcessError("the client failed; its message is above")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        server.should_exit = True
        await serving
    tokens = num_streams * num_tokens
    return {
        "streams": num_streams,
        "tokens": tokens,
        "tokens_per_second": round(tokens / wall, 1),
        "cpu_us_per_token": round(cpu / tokens * 1e6, 1),
        "cores_at_1000": round(cpu / tokens * 1000, 3),
        "first_bytes": len(seconds),
        "first_byte_ms": {
            f"p{share}": round(seconds[len(seconds) * share // 100] * 1e3, 2)
            for share in (50, 90, 99)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="per stream")
    parser.add_argument("--step-ms", type=float, default=16.0, help="time of an engine step")
    args = parser.parse_args()
    figures = uvloop.run(measure(args.streams, args.tokens, args.step_ms / 1000))
    print(json.dumps({"bench": "http_path"} | figures))


if __name__ == "__main__":
    main()
