"""Soak test: `python -m headstart.bench.soak --minutes 10`. Random traffic, every answer checked.

Streams, hang-ups, aborts, bad requests, stop strings, several choices, shared and fresh prefixes,
against a server of its own (or --url). At the end nothing may be running, the KV pool may hold
cached pages only, and neither process may have grown. One JSON line on stdout.

Exit status: 0, 1 for any violation or a server that cannot be used, 2 for wrong arguments.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
import uvloop

from headstart.bench.http_client import BenchError
from headstart.bench.prompts import PromptSource
from headstart.bench.serve import fresh_seed
from headstart.bench.server_process import start_headstart
from headstart.bench.soak_traffic import Traffic, WrongAnswer

# Small, so that it is soon all touched: what still grows then is a leak. One sequence of the
# longest prompt fits several times; all clients at once do not, so that some are preempted.
KV_FLAGS = ("--kv-memory", "256MiB", "--max-model-len", "4096")
REQUEST_LIMIT = 120.0
"""Seconds after which a request counts as lost."""
SETTLE_LIMIT = 15.0
"""Seconds the server has to drop what clients have left behind."""
GROWTH = 0.05
GROWTH_BYTES = 32e6
"""A process may be this much larger at the end than it was after a third of the time."""
PROBES = 16


@dataclass(slots=True)
class Findings:
    """What a run has seen. ``memory``: resident bytes over time, by process."""

    requests: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)

    def wrong(self, kind: str, message: object) -> None:
        self.violations.append(f"{kind}: {message}")
        print(f"violation: {kind}: {message}", file=sys.stderr, flush=True)


def own_processes() -> dict[str, psutil.Process]:
    """The server and engine this process has started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        for name, module in (("server", "server.cli"), ("engine", "engine.service")):
            if f"headstart.{module}" in command:
                found[name] = process
    return found


async def client(traffic: Traffic, findings: Findings, seed: str, deadline: float) -> None:
    """One request after another until the time is over."""
    draw = random.Random(seed)
    kinds = list(traffic.kinds)
    weights = [weight for weight, _ in traffic.kinds.values()]
    while time.monotonic() < deadline:
        (kind,) = draw.choices(kinds, weights)
        try:
            async with asyncio.timeout(REQUEST_LIMIT):
                await traffic.kinds[kind][1](draw)
        except WrongAnswer as error:
            findings.wrong(kind, error)
        except TimeoutError:
            findings.wrong(kind, f"no end within {REQUEST_LIMIT:.0f} s")
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            findings.wrong(kind, repr(error))
        findings.requests[kind] += 1
        if draw.random() < 0.05:  # a lull, so that batches shrink and grow
            await asyncio.sleep(draw.random())


async def watch_memory(findings: Findings, processes: dict[str, psutil.Process]) -> None:
    while True:
        for name, process in processes.items():
            findings.memory.setdefault(name, []).append(process.memory_info().rss)
        await asyncio.sleep(1)


async def read_metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """headstart's own metrics, without prefix and labels; histograms left out."""
    values = {}
    async with session.get(f"{url}/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("headstart:") and "_bucket{" not in line:
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0].removeprefix("headstart:")] = float(value)
    return values


async def settle(session: aiohttp.ClientSession, url: str, findings: Findings) -> dict[str, float]:
    """Wait until nothing runs and only the cache holds pages; the metrics then."""
    deadline = time.monotonic() + SETTLE_LIMIT
    while True:
        metrics = await read_metrics(session, url)
        busy = {
            name: metrics[name]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if metrics[name]
        }
        if not busy:
            return metrics
        if time.monotonic() > deadline:
            findings.wrong("end", f"still held without a client: {busy}")
            return metrics
        await asyncio.sleep(0.05)


def check_growth(findings: Findings) -> dict[str, dict[str, int]]:
    """Compare the last quarter with the time around a third of the run; figures in MB."""
    report = {}
    for name, values in findings.memory.items():
        third, last = len(values) // 3, max(1, len(values) // 4)
        early = statistics.median(values[third : third + last])
        late = statistics.median(values[-last:])
        if late > early * (1 + GROWTH) + GROWTH_BYTES:
            findings.wrong("memory", f"{name} grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
        figures = {"start": values[0], "third": early, "end": late, "most": max(values)}
        report[name] = {key: round(value / 1e6) for key, value in figures.items()}
    return report


async def soak(url: str, args: argparse.Namespace, findings: Findings) -> dict[str, Any]:
    """Drive the traffic; the result to print."""
    processes = {} if args.url else own_processes()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = str((await response.json())["data"][0]["id"])
        traffic = Traffic(session, url, model, PromptSource(args.seed))
        await traffic.record(PROBES)
        traffic.tokens = 0
        before = await settle(session, url, findings)
        watcher = asyncio.create_task(watch_memory(findings, processes))
        begin = time.monotonic()
        deadline = begin + 60 * args.minutes
        await asyncio.gather(
            *(client(traffic, findings, f"{args.seed}/{i}", deadline) for i in range(args.clients))
        )
        seconds = time.monotonic() - begin
        after = await settle(session, url, findings)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        draw = random.Random(args.seed)
        for _ in range(PROBES):
            try:
                await traffic.probe(draw)
            except (WrongAnswer, aiohttp.ClientError) as error:
                findings.wrong("end", error)
        if after["engine_restarts_total"] != before["engine_restarts_total"]:
            findings.wrong("end", "the engine was restarted")
        for name, process in processes.items():
            if not process.is_running():
                findings.wrong("end", f"the {name} process has gone")
    steps = after["engine_steps_total"] - before["engine_steps_total"]
    return {
        "url": url,
        "model": model,
        "seed": args.seed,
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "requests": dict(sorted(findings.requests.items())),
        "checked_tokens": traffic.tokens,
        "generated_tokens": round(
            after["generation_tokens_total"] - before["generation_tokens_total"]
        ),
        "engine_steps": round(steps),
        "preemptions": round(after["num_preemptions_total"] - before["num_preemptions_total"]),
        "memory_mb": check_growth(findings),
        "violations": len(findings.violations),
        "first_violations": findings.violations[:10],
    }


async def run(args: argparse.Namespace) -> int:
    """The number of violations."""
    findings = Findings()
    async with AsyncExitStack() as stack:
        url = args.url
        if url is None:
            command = (sys.executable, "-m", "headstart.server.cli")
            serve = [args.model, *KV_FLAGS, "--log-level", "warning"]
            if args.threads:
                serve += ["--threads", str(args.threads)]
            url = await stack.enter_async_context(start_headstart(serve, command))
        result = await soak(url.rstrip("/").removesuffix("/v1"), args, findings)
        print(json.dumps(result), flush=True)
    return len(findings.violations)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--minutes", type=_positive, default=10.0)
    command.add_argument("--url", help="a headstart server that runs already (default: start one)")
    command.add_argument("--model", default="smollm2-135m", help="for the server that is started")
    command.add_argument("--clients", type=int, choices=range(1, 257), metavar="N", default=16)
    command.add_argument("--threads", type=int, metavar="N", help="of the server that is started")
    command.add_argument("--seed", type=int, default=fresh_seed(), help="repeats the same requests")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(argv)
    try:
        violations = uvloop.run(run(args))
    except (BenchError, OSError, aiohttp.ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
