"""What a long prompt costs others: ``python -m headstart.bench.interference``.

Streams run; a cold prompt of 7,000 tokens comes, and while it is computed three short chats come,
one after the other. Each is measured alone before, and then all together:

    stream      . . . . . . .  .  .  .  .  .  .  .  .  .  . . . . .     longest gap
    long                    |----------------------------|              first token, against alone
    short chats                 |--|     |--|      |--|                 first token, against alone

``--segment``: the long prompt is one segment, whose rows go through each layer together.
``--serve-args '--runahead 2'``: it is computed by two processes in a chain. Prints a row for each
repetition and their medians beside the goals; exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import statistics
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError, HttpTarget, connect
from headstart.bench.prompts import Calibration, Messages, PromptSource
from headstart.bench.report import markdown
from headstart.bench.samples import Sample
from headstart.bench.serve import at_least
from headstart.bench.server_process import start_headstart

SHORT_GOAL, GAP_GOAL, LONG_GOAL = 3.0, 0.25, 1.3
"""First token of a short chat and of the long prompt, as multiples of alone; seconds of a gap."""
SHORT_WORDS, SHORT_TOKENS = 40, 8
ALONE = 5
"""Short chats that are measured alone."""
HEAD_START = 1.0
"""Seconds for which the streams run before the long prompt comes, and it before the first chat."""


@dataclass(frozen=True, slots=True)
class Together:
    """One repetition. Seconds: the streams' longest gap while the long prompt was computed, first
    tokens of the long prompt and of the short chats."""

    gap: float
    long: float
    shorts: list[float]


class Interference:
    """Prompts are of words drawn anew each time: none is cached, however often this runs."""

    def __init__(self, target: HttpTarget, calibration: Calibration, args: argparse.Namespace):
        self._target = target
        self._calibration = calibration
        self._args = args
        self._source = PromptSource(uuid.uuid4().int)
        self._count = 0

    def _prompt(self, words: int) -> Messages:
        self._count += 1
        text = self._source.text(f"prompt/{self._count}", words)
        return [{"role": "user", "content": text}]

    def _story(self) -> Messages:
        """What is answered in plain words: each token has a text of its own, and is sent."""
        [message] = self._prompt(6)
        about = "Tell me a very long story, in plain English, about these things: "
        return [message | {"content": about + message["content"]}]

    async def short(self) -> float:
        return _good(await self._target.ask(self._prompt(SHORT_WORDS), SHORT_TOKENS)).ttft

    async def long(self) -> float:
        words = self._calibration.system_words(self._args.prompt)
        fields: dict[str, Any] = {"segment_mask": "turns"} if self._args.segment else {}
        return _good(await self._target.ask(self._prompt(words), 1, **fields)).ttft

    async def together(self, seconds: float) -> Together:
        """``seconds``: that the long prompt takes alone."""
        streams = [
            asyncio.create_task(self._target.ask(self._story(), self._args.tokens))
            for _ in range(self._args.streams)
        ]
        await asyncio.sleep(HEAD_START)
        begin = time.perf_counter()
        long = asyncio.create_task(self.long())
        shorts = []
        for i in range(self._args.shorts):
            due = begin + seconds * (i + 0.5) / self._args.shorts
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            shorts.append(await self.short())
        first = await long
        samples = [_good(await stream) for stream in streams]
        gaps = [_longest_gap(sample, begin, begin + first) for sample in samples]
        return Together(max(gaps), first, shorts)


def _good(sample: Sample) -> Sample:
    if sample.error is not None or not sample.times:
        raise BenchError(f"a request failed: {sample.error or 'no token came'}")
    return sample


def _longest_gap(sample: Sample, begin: float, end: float) -> float:
    """Between two tokens, one of them between ``begin`` and ``end``."""
    gaps = [
        later - earlier
        for earlier, later in zip(sample.times, sample.times[1:], strict=False)
        if later > begin and earlier < end
    ]
    if not gaps or sample.times[-1] < end:
        raise BenchError("a stream ended before the long prompt did: use more --tokens")
    return max(gaps)


async def _measure(args: argparse.Namespace) -> int:
    serve_args = [args.model, *shlex.split(args.serve_args)]
    async with (
        start_headstart(serve_args) as url,
        connect(url, None, timeout=args.timeout) as target,
    ):
        source = PromptSource(uuid.uuid4().int)
        counts = [
            await target.count([{"role": "user", "content": source.text("c", words)}])
            for words in (Calibration.SHORT, Calibration.LONG)
        ]
        bench = Interference(target, Calibration.from_counts(*counts), args)
        shorts = [await bench.short() for _ in range(ALONE)]
        longs = [await bench.long() for _ in range(args.repeats)]
        short, long = statistics.median(shorts), statistics.median(longs)
        runs = [await bench.together(long) for _ in range(args.repeats)]
    rows = [
        [
            f"{run.gap * 1e3:.0f} ms",
            f"{run.long:.2f} s",
            f"{run.long / long:.2f}",
            " ".join(f"{seconds * 1e3:.0f}" for seconds in run.shorts) + " ms",
            f"{statistics.median(run.shorts) / short:.2f}",
        ]
        for run in runs
    ]
    print(f"alone: short chat {short * 1e3:.0f} ms, {args.prompt} tokens {long:.2f} s\n")
    heads = ["longest gap", "long prompt", "x alone", "short chats", "x alone (median)"]
    print(markdown(heads, rows))
    gap = statistics.median(run.gap for run in runs)
    longer = statistics.median(run.long / long for run in runs)
    slower = statistics.median(s / short for run in runs for s in run.shorts)
    goals = (
        ("longest gap of a stream, s", gap, GAP_GOAL),
        ("long prompt, times alone", longer, LONG_GOAL),
        ("short chats' median first token, times alone", slower, SHORT_GOAL),
    )
    print()
    for name, value, goal in goals:
        print(f"{name}: {value:.2f} (goal {goal}){'' if value <= goal else ', MISSED'}")
    return sum(value > goal for _, value, goal in goals)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="interference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=at_least(1), default=7000, help="its tokens (%(default)s)")
    parser.add_argument("--streams", type=at_least(1), default=1)
    parser.add_argument("--shorts", type=at_least(1), default=3, help="short chats (%(default)s)")
    parser.add_argument("--segment", action="store_true", help="the prompt is one segment")
    parser.add_argument(
        "--tokens", type=at_least(1), default=600, help="of each stream (%(default)s)"
    )
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--serve-args", default="", metavar="'ARGS'")
    parser.add_argument("--timeout", type=float, default=600.0, help="of a request (%(default)s)")
    args = parser.parse_args()
    sys.exit(exit_status(lambda: asyncio.run(_measure(args))))


if __name__ == "__main__":
    main()
