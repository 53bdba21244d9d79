"""What RelayAttention gains from end to end: `python -m headstart.bench.relay`.

Two headstart servers, one with `--relay auto` and one with `--relay off`, get the same bursts in
turn (A B B A ...); the one that waits computes nothing. One burst for each length of the shared
system turn and each number of streams: the system turn is warm, the user turns are 24 words
nobody shares, decoding is greedy. At prefix 0 every stream has a short system turn of its own.

Markdown tables on stdout, one JSON line per pair appended to --out, progress on stderr.
bench/README.md defines every figure. Exit status: 0, 1 if a server cannot be used or a request
failed, 2 for wrong arguments.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType

import uvloop

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError, connect
from headstart.bench.prompts import USER_WORDS, Calibration, PromptSource
from headstart.bench.relay_report import Point, tables
from headstart.bench.report import print_header, print_result
from headstart.bench.samples import Result, Target, summarise
from headstart.bench.serve import at_least, fresh_seed, now, positive
from headstart.bench.server_process import start_headstart
from headstart.bench.workloads import Workload, alternate, calibrate, check

PREFIXES = (0, 512, 1024, 2048, 4096, 6048)
STREAMS = (1, 2, 4, 8, 16, 32)
MAX_RUNNING = 64  # the default of `headstart serve`; raised with --streams
PAUSE = 0.3
"""Seconds between bursts: the server that just ran touches KV memory for later while it is idle."""


def workload(
    prefix: int, streams: int, output_tokens: int, repetitions: int, calibration: Calibration
) -> Workload:
    """The bursts of one point. Nothing shared means a system turn as long as the user turn."""
    shared = prefix > 0
    return Workload(
        name=f"relay-{prefix}x{streams}",
        headline="output_tokens_per_s",
        streams=streams,
        prompt_tokens=calibration.prompt_tokens(prefix if shared else USER_WORDS),
        output_tokens=output_tokens,
        warm=shared,
        repetitions=repetitions,
        shared=shared,
    )


async def measure(
    targets: Sequence[Target], load: Workload, prompts: PromptSource, calibration: Calibration
) -> list[Result]:
    """One point on every target, in turn; a result per target."""
    bursts = await alternate(targets, load, prompts, calibration, math.inf, PAUSE)
    return [
        summarise(
            mine,
            target=target,
            workload=load.name,
            streams=load.streams,
            seed=prompts.seed,
            date=now(),
            notes=check(load, mine),
        )
        for target, mine in zip(targets, bursts, strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.relay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2-135m", help="what `headstart serve` gets (%(default)s)")
    add(
        "--serve-args",
        default="",
        metavar="'FLAG ...'",
        help="further arguments of `headstart serve`, for both servers, as one string: "
        "--serve-args='--kv-memory 2GiB'",
    )
    add(
        "--prefix",
        nargs="+",
        type=at_least(0, 10_000_000),
        default=list(PREFIXES),
        metavar="N",
        help=f"tokens of the shared system turn ({_listed(PREFIXES)}); 0: nothing shared",
    )
    add(
        "--streams",
        nargs="+",
        type=at_least(1),
        default=list(STREAMS),
        metavar="N",
        help=f"requests at once ({_listed(STREAMS)})",
    )
    add(
        "--output-tokens",
        type=at_least(1, 1_000_000),
        default=64,
        metavar="N",
        help="tokens each request generates (%(default)s)",
    )
    add(
        "--repetitions",
        type=at_least(1),
        default=2,
        metavar="N",
        help="bursts per point and server (%(default)s)",
    )
    add("--seed", type=int, help="of the prompts (default: new for every run)")
    add("--timeout", type=positive, default=600.0, help="seconds for one request (%(default)s)")
    add("--out", type=Path, help="append one JSON line per point to this file")
    add(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="draw relay-throughput and relay-latency there, as SVG and PNG (needs matplotlib)",
    )
    return command


def _listed(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _check_arguments(command: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Wrong --serve-args are told before a server starts; equal points would warm one another."""
    try:
        flags = shlex.split(args.serve_args)
    except ValueError as error:
        command.error(f"--serve-args: {error}")
    if any(flag.split("=")[0] == "--relay" for flag in flags):
        command.error("--serve-args: --relay is what the two servers differ in")
    args.prefix = list(dict.fromkeys(args.prefix))
    args.streams = list(dict.fromkeys(args.streams))


def _load_plots() -> ModuleType:
    """The drawing code; only --plot needs matplotlib."""
    try:
        from headstart.bench import plots
    except ModuleNotFoundError as error:
        raise BenchError(f"--plot: {error}; it is in the extra `bench`") from error
    return plots


async def _start(stack: AsyncExitStack, args: argparse.Namespace) -> list[Target]:
    """Both servers, one after the other: the first may have to fetch the model."""
    targets: list[Target] = []
    for mode in ("auto", "off"):
        flags = ["--relay", mode, "--max-running", str(max(MAX_RUNNING, *args.streams))]
        url = await stack.enter_async_context(
            start_headstart([args.model, *flags, *shlex.split(args.serve_args)])
        )
        client = connect(url, None, timeout=args.timeout, name=f"relay-{mode}")
        targets.append(await stack.enter_async_context(client))
    return targets


async def run(args: argparse.Namespace) -> int:
    """Measure, print and draw; the number of failed requests."""
    # What may fail for want of a package or a permission does so before minutes are spent.
    plots = _load_plots() if args.plot else None
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
    if args.out:
        args.out.open("a").close()
    prompts = PromptSource(fresh_seed() if args.seed is None else args.seed)
    threads = len(os.sched_getaffinity(0))
    points: list[Point] = []
    async with AsyncExitStack() as stack:
        targets = await _start(stack, args)
        # Every target answers before the clock matters; one model, so one calibration.
        calibration, *_ = [await calibrate(target, prompts) for target in targets]
        print(f"model {targets[0].model}  seed {prompts.seed}", file=sys.stderr)
        print_header()
        for prefix in args.prefix:
            for streams in args.streams:
                load = workload(prefix, streams, args.output_tokens, args.repetitions, calibration)
                auto, off = await measure(targets, load, prompts, calibration)
                print_result(auto)
                print_result(off)
                points.append(Point(prefix, streams, auto, off))
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(points[-1].as_json(threads, args.serve_args) + "\n")
    title = (
        f"{targets[0].model}, machine with {threads} threads, {args.output_tokens} output tokens"
    )
    title += f", {args.serve_args}" if args.serve_args else ""
    print(tables(points, title))
    if plots is not None:
        for path in plots.relay_plots(args.plot, title, points):
            print(f"wrote {path}", file=sys.stderr)
    return sum(side.errors for point in points for side in (point.auto, point.off))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = parser()
    args = command.parse_args(argv)
    _check_arguments(command, args)
    return exit_status(lambda: uvloop.run(run(args)))


if __name__ == "__main__":
    sys.exit(main())
