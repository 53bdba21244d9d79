"""Ranks of a chain are killed under load: `python -m headstart.bench.runahead_faults`.

One server without a chain says what the answers are. Another with `--runahead N` is asked the same,
long prompts and short ones, by several clients at once, while at random moments a random prefill
rank is killed (`--signal KILL`) or stopped (`--signal STOP`: it hangs). No request may be lost, no
token may differ, and the chain has to be whole again WHOLE_LIMIT seconds after the rank's return.

One JSON line on stdout; exit status 1 for any violation, or if nothing ran ahead.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import psutil
import uvloop

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError
from headstart.bench.server_process import start_headstart
from headstart.bench.soak import read_metrics

MODEL = "smollm2-135m"
WHOLE_LIMIT = 10.0
RETURN_LIMIT = 60.0
REQUEST_LIMIT = 120.0
OUTPUT_TOKENS = 16
SHORT, LONG = (5, 60), (600, 1800)  # tokens
FLAGS = ("--max-model-len", "2048", "--kv-memory", "1GiB", "--log-level", "warning")


@dataclass(slots=True)
class Findings:
    """``whole_seconds``: from each return of a rank until the chain was whole."""

    requests: int = 0
    violations: list[str] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)

    def wrong(self, message: str) -> None:
        self.violations.append(message)
        print(f"violation: {message}", file=sys.stderr, flush=True)


def rank_processes() -> dict[int, psutil.Process]:
    """The prefill ranks this process's servers have started, by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "headstart.engine.runahead.rank" in process.cmdline():
                found[process.pid] = process
        except psutil.Error:  # it has just ended
            continue
    return found


async def answer(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], salt: str
) -> list[str]:
    """The answer's tokens; raises BenchError for anything but a complete one."""
    body = {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "cache_salt": salt,
    }
    async with asyncio.timeout(REQUEST_LIMIT):
        async with session.post(f"{url}/v1/completions", json=body) as response:
            text = await response.text()
    if response.status != 200:
        raise BenchError(f"status {response.status}: {text[:200]}")
    choice = json.loads(text)["choices"][0]
    tokens: list[str] = choice["logprobs"]["tokens"]
    if len(tokens) != OUTPUT_TOKENS:
        raise BenchError(f"{len(tokens)} tokens of {OUTPUT_TOKENS}")
    return tokens


async def client(
    url: str,
    prompts: list[list[int]],
    expected: list[list[str]],
    findings: Findings,
    draw: random.Random,
    ended: asyncio.Event,
) -> None:
    """One request after another, each with KV of its own."""
    async with aiohttp.ClientSession() as session:
        while not ended.is_set():
            which = draw.randrange(len(prompts))
            findings.requests += 1
            try:
                got = await answer(session, url, prompts[which], f"{draw.random()}")
            except (BenchError, aiohttp.ClientError, TimeoutError, KeyError) as error:
                findings.wrong(f"a request was lost: {error!r}")
                await asyncio.sleep(1)
                continue
            if got != expected[which]:
                findings.wrong(f"{len(prompts[which])} tokens: {got}, not {expected[which]}")


async def until_whole(session: aiohttp.ClientSession, url: str, limit: float) -> None:
    """Wait until every rank takes part; raises BenchError."""
    deadline = time.monotonic() + limit
    while True:
        metrics = await read_metrics(session, url)
        if metrics["runahead_ranks"] == metrics["runahead_ranks_live"] > 1:
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the chain was not whole within {limit:g} s")
        await asyncio.sleep(0.05)


async def kill_one(
    session: aiohttp.ClientSession,
    url: str,
    how: signal.Signals,
    draw: random.Random,
    findings: Findings,
) -> None:
    """Kill or stop a rank at some moment, and see it come back."""
    await until_whole(session, url, RETURN_LIMIT)
    await asyncio.sleep(draw.uniform(0.0, 3.0))
    before = rank_processes()
    victim = before[draw.choice(sorted(before))]
    victim.send_signal(how)
    deadline = time.monotonic() + RETURN_LIMIT
    while not (new := rank_processes().keys() - before.keys()):
        if time.monotonic() > deadline:
            raise BenchError(f"a rank was not started again within {RETURN_LIMIT:g} s")
        await asyncio.sleep(0.05)
    returned = time.monotonic()
    await until_whole(session, url, RETURN_LIMIT)
    took = time.monotonic() - returned
    findings.whole_seconds.append(took)
    print(f"rank {victim.pid} back as {new.pop()}: whole after {took:.1f} s", file=sys.stderr)
    if took > WHOLE_LIMIT:
        findings.wrong(f"the chain was whole {took:.1f} s after the rank's return")


async def run(args: argparse.Namespace) -> bool:
    draw = random.Random(args.seed)
    lengths = [draw.randint(*LONG) for _ in range(args.prompts)]
    lengths += [draw.randint(*SHORT) for _ in range(args.prompts // 2)]
    prompts = [[draw.randrange(1000, 40_000) for _ in range(length)] for length in lengths]
    async with start_headstart([MODEL, *FLAGS]) as url, aiohttp.ClientSession() as session:
        expected = [await answer(session, url, prompt, "expected") for prompt in prompts]
    findings = Findings()
    flags = ["--runahead", str(args.ranks), "--runahead-min", "256", "--threads", "1"]
    flags += ["--runahead-timeout", str(args.timeout)]
    how = signal.Signals[f"SIG{args.signal}"]
    begin = time.monotonic()
    async with start_headstart([MODEL, *FLAGS, *flags]) as url, aiohttp.ClientSession() as session:
        await until_whole(session, url, RETURN_LIMIT)
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for i in range(args.clients):
                own = random.Random(f"{args.seed} {i}")
                clients.create_task(client(url, prompts, expected, findings, own, ended))
            try:
                for _ in range(args.kills):
                    await kill_one(session, url, how, draw, findings)
            finally:
                ended.set()
        metrics = await read_metrics(session, url)
    if not metrics["runahead_prompts_total"]:
        findings.wrong("no prompt ran ahead")
    result = {
        "ranks": args.ranks,
        "signal": args.signal,
        "kills": args.kills,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "requests": findings.requests,
        "ran_ahead": metrics["runahead_prompts_total"],
        "computed_alone": metrics["runahead_failed_total"],
        "whole_seconds_median": round(statistics.median(findings.whole_seconds), 2),
        "whole_seconds_max": round(max(findings.whole_seconds), 2),
        "violations": findings.violations,
    }
    print(json.dumps(result))
    return bool(findings.violations)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=3, help="processes of the chain")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24, help="different long prompts")
    parser.add_argument("--timeout", type=float, default=3.0, help="--runahead-timeout")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    return exit_status(lambda: int(uvloop.run(run(args))), (BenchError, OSError))


if __name__ == "__main__":
    sys.exit(main())
