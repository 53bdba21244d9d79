"""What following a schema costs a token: ``python -m headstart.bench.structured``.

Starts a server, and lets ``--streams`` chats generate ``--tokens`` tokens each, in turn free and
following a JSON schema that never lets an answer end (A B A B ...). Prints one JSON line: the
time per token of both, the ratio of their medians, and the server process's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from typing import Any

import aiohttp
import psutil

from headstart.bench.server_process import start_headstart

ENTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "price": {"type": "number"},
        "kind": {"enum": ["book", "tool", "toy", "garment"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "price", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ENTRY, "minItems": 10_000}
QUESTION = "List the goods of a large shop as JSON: name, price, kind, tags."


async def _generate(session: aiohttp.ClientSession, fields: dict[str, Any], seed: int) -> float:
    """Seconds from the first to the last text of an answer."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "seed": seed,
        **fields,
    }
    first = last = 0.0
    async with session.post("/v1/chat/completions", json=body) as reply:
        if reply.status != 200:
            raise ValueError(await reply.text())
        async for line in reply.content:
            if line.startswith(b'data: {"id"'):
                last = time.perf_counter()
                first = first or last
    return last - first


async def _round(session: aiohttp.ClientSession, streams: int, fields: dict[str, Any]) -> float:
    """Milliseconds per token of ``streams`` streams at a time; their median."""
    each = await asyncio.gather(*(_generate(session, fields, i) for i in range(streams)))
    tokens: int = fields["max_tokens"]
    return statistics.median(each) / (tokens - 1) * 1e3


async def measure(streams: int, tokens: int, rounds: int, serve: list[str]) -> dict[str, Any]:
    """The figures of the JSON line."""
    free = {"max_tokens": tokens, "ignore_eos": True}
    schema = {"name": "goods", "schema": SCHEMA}
    bound = {
        "max_tokens": tokens,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    times: dict[str, list[float]] = {"free": [], "schema": []}
    argv = ["smollm2-135m", "--served-model-name", "default", *serve]
    connections = aiohttp.TCPConnector(limit=0)
    async with (
        start_headstart(argv) as url,
        aiohttp.ClientSession(url, connector=connections) as session,
    ):
        for fields in (free, bound):  # caches, and the grammar's compilation
            await _round(session, streams, fields | {"max_tokens": 8})
        server = _server_of(url)
        cpu, begin = sum(server.cpu_times()[:2]), time.perf_counter()
        for _ in range(rounds):
            times["free"].append(await _round(session, streams, free))
            times["schema"].append(await _round(session, streams, bound))
        cpu, wall = sum(server.cpu_times()[:2]) - cpu, time.perf_counter() - begin
    made = 2 * rounds * streams * tokens
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "streams": streams,
        "tokens": tokens,
        "ms_per_token": {name: round(value, 2) for name, value in medians.items()},
        "rounds": {name: [round(v, 2) for v in values] for name, values in times.items()},
        "ratio": round(medians["schema"] / medians["free"], 3),
        "tokens_per_second": round(made / wall, 1),
        "server_cpu_us_per_token": round(cpu / made * 1e6, 1),
    }


def _server_of(url: str) -> psutil.Process:
    """The process that listens there, one of this one's children."""
    port = int(url.rpartition(":")[2])
    for child in psutil.Process().children(recursive=True):
        if any(c.laddr and c.laddr.port == port for c in child.net_connections("tcp")):
            return child
    raise ProcessLookupError(f"no child of this process listens on port {port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("serve", nargs="*", help="further flags of headstart serve, after --")
    args = parser.parse_args()
    figures = asyncio.run(measure(args.streams, args.tokens, args.rounds, args.serve))
    print(json.dumps({"bench": "structured"} | figures))


if __name__ == "__main__":
    main()
