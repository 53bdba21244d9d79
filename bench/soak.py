"""Soak test: `python -m headstart.bench.soak --minutes 30`. Is a busy server right, and stays so?

    checked traffic   every answer is checked: streams, hang-ups, aborts, bad requests, stop strings
    capacity          a closed loop: the most that the server answers
    overload          three times as many requests as that, with deadlines, and clients that hang up

It shows that no request that was let in is lost, that at overload 0.9 of the peak is still
answered, that refusals come within 20 ms (p99, seen by the client), that neither process grows, and
that at the end nothing runs and the KV pool holds cached pages only. One JSON line on stdout.

The server is this command's own, or --url. Exit status: 0, 1 for anything that is not so or a
server that cannot be used, 2 for wrong arguments.
"""

import argparse
import asyncio
import json
import random
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
from headstart.bench.soak_load import Load, closed_loop, open_loop
from headstart.bench.soak_report import Phase, judge
from headstart.bench.soak_traffic import Traffic, WrongAnswer

# Small, so that it is soon all touched: what still grows then is a leak. One sequence of the
# longest prompt fits several times; all clients at once do not, so that some are preempted.
# Few run and wait, so that an answer does not take minutes at overload.
OWN_FLAGS = (
    *("--kv-memory", "256MiB", "--max-model-len", "4096"),
    *("--max-running", "16", "--max-queue", "16"),
)
SHARES = {"traffic": 0.1, "capacity": 0.3, "overload": 0.6}
"""Of the time; the second half of it, in which memory is looked at, is all overload."""
OVERLOAD = 3.0
"""Requests that come, for each that the server can answer."""
REQUEST_LIMIT = 120.0
"""Seconds after which a request of the checked traffic counts as lost."""
SETTLE_LIMIT = 15.0
"""Seconds the server has to drop what clients have left behind."""
PROBES = 16
IDLE_SECONDS = 2.0
"""After which a connection is not used again: the server may close it then."""


@dataclass(slots=True)
class Findings:
    """What a run has seen. ``memory``: (seconds, resident bytes) by process."""

    requests: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def wrong(self, kind: str, message: object) -> None:
        self.violations.append(f"{kind}: {message}")
        print(f"violation: {kind}: {message}", file=sys.stderr, flush=True)


def own_processes() -> dict[str, psutil.Process]:
    """The server and engine this process has started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        for name, module in (("server", "server.cli"), ("engine", "engine.process.service")):
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
            size = float(process.memory_info().rss)
            findings.memory.setdefault(name, []).append((time.monotonic(), size))
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
    held = (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("requests_in_flight", "queue_depth"),
    )
    while True:
        metrics = await read_metrics(session, url)
        busy = {name: metrics[name] for name in held if metrics[name]}
        if not busy:
            return metrics
        if time.monotonic() > deadline:
            findings.wrong("end", f"still held without a client: {busy}")
            return metrics
        await asyncio.sleep(0.05)


async def checked_traffic(
    traffic: Traffic, findings: Findings, clients: int, seconds: float, seed: int
) -> None:
    """The first phase."""
    deadline = time.monotonic() + seconds
    await asyncio.gather(
        *(client(traffic, findings, f"{seed}/{i}", deadline) for i in range(clients))
    )


async def capacity_phase(load: Load, places: int, seconds: float, seed: int) -> Phase:
    """More clients than can run, and none that is refused."""
    begin = time.monotonic()
    outcomes = await closed_loop(load, max(places * 3 // 4, 1), seconds, f"{seed}/capacity")
    return Phase("capacity", begin, begin + seconds, outcomes)


async def overload_phase(load: Load, rate: float, seconds: float, seed: int) -> Phase:
    """``rate`` requests a second."""
    begin = time.monotonic()
    outcomes = await open_loop(load, rate, seconds, f"{seed}/overload")
    return Phase("overload", begin, begin + seconds, outcomes)


async def soak(url: str, args: argparse.Namespace, findings: Findings) -> dict[str, Any]:
    """All phases; the result to print."""
    processes = {} if args.url else own_processes()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = str((await response.json())["data"][0]["id"])
        async with session.get(f"{url}/load") as response:
            places = int((await response.json())["in_flight_limit"])
        source = PromptSource(args.seed)
        traffic = Traffic(session, url, model, source)
        await traffic.record(PROBES)
        traffic.tokens = 0
        before = await settle(session, url, findings)
        watcher = asyncio.create_task(watch_memory(findings, processes))
        seconds = {name: share * 60 * args.minutes for name, share in SHARES.items()}
        _say(f"checked traffic, {seconds['traffic']:.0f} s")
        # With five choices at most; a request too many would be refused.
        clients = max(min(args.clients, places // 5), 1)
        await checked_traffic(traffic, findings, clients, seconds["traffic"], args.seed)
        await settle(session, url, findings)
        load = Load(session, url, model, source)
        _say(f"capacity, {seconds['capacity']:.0f} s")
        capacity = await capacity_phase(load, places, seconds["capacity"], args.seed)
        rate = OVERLOAD * max(capacity.rate("answered"), 0.1)
        _say(f"overload, {rate:.2f} requests a second, {seconds['overload']:.0f} s")
        overload = await overload_phase(load, rate, seconds["overload"], args.seed)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        after = await settle(session, url, findings)
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
    figures, wrong = judge(capacity, overload, findings.memory)
    for message in wrong:
        findings.wrong("shown", message)
    return {
        "url": url,
        "model": model,
        "seed": args.seed,
        "minutes": args.minutes,
        "places": places,
        "checked_requests": dict(sorted(findings.requests.items())),
        "checked_tokens": traffic.tokens,
        **figures,
        "preemptions": round(after["num_preemptions_total"] - before["num_preemptions_total"]),
        "violations": len(findings.violations),
        "first_violations": findings.violations[:10],
    }


def _say(phase: str) -> None:
    print(f"soak: {phase}", file=sys.stderr, flush=True)


async def run(args: argparse.Namespace) -> int:
    """The number of violations."""
    findings = Findings()
    async with AsyncExitStack() as stack:
        url = args.url
        if url is None:
            command = (sys.executable, "-m", "headstart.server.cli")
            serve = [args.model, *OWN_FLAGS, "--log-level", "warning"]
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
    command.add_argument("--minutes", type=_positive, default=30.0)
    command.add_argument(
        "--url",
        help="a headstart server that runs already, whose memory is not looked at (default: start "
        "one)",
    )
    command.add_argument("--model", default="smollm2-135m", help="for the server that is started")
    command.add_argument(
        "--clients",
        type=int,
        choices=range(1, 257),
        metavar="N",
        default=16,
        help="of the checked traffic, at most",
    )
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
