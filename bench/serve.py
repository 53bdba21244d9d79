"""Load test of any server with the OpenAI API: `python -m headstart.bench.serve --url URL`.

Without further flags: the standard workloads. With --requests: a load of one's own choice, at
most --streams at a time, or arriving at --rate per second. One JSON line per workload on stdout
(or appended to --out), a table on stderr. bench/README.md defines every figure.

Exit status: 0, 1 if the server cannot be used or a request failed, 2 for wrong arguments.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from headstart.bench.command import exit_status
from headstart.bench.http_client import HttpTarget, connect
from headstart.bench.prompts import Calibration, PromptSource
from headstart.bench.report import print_header, print_result
from headstart.bench.samples import Result, summarise
from headstart.bench.workloads import WORKLOADS, by_name, calibrate, check, run_workload

MAX_REQUESTS = 100_000


def now() -> str:
    """The time of a result, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fresh_seed() -> int:
    """A seed no earlier run had: cold prompts stay cold on a server that was tested before."""
    return time.time_ns() // 1_000_000


def emit(result: Result, out: Path | None) -> None:
    """The JSON line to stdout, or to the end of the file."""
    line = json.dumps(dataclasses.asdict(result), ensure_ascii=False)
    if out is None:
        print(line, flush=True)
    else:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def at_least(low: int, high: int = MAX_REQUESTS) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, got {value}")
        return value

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m headstart.bench.serve", description=__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add = command.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server, with or without /v1 (%(default)s)")
    add("--model", help="model name in requests (default: the first the server lists)")
    add("--api-key", help="sent as a bearer token")
    add("--name", default="server", help="what the result lines call the server (%(default)s)")
    add("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    add("--seed", type=int, help="of prompts and arrivals (default: new for every run)")
    add("--timeout", type=positive, default=300.0, help="seconds for one request (%(default)s)")
    standard = command.add_argument_group("standard workloads")
    standard.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"only these (default all): {', '.join(w.name for w in WORKLOADS)}",
    )
    standard.add_argument(
        "--time-limit",
        type=positive,
        default=120.0,
        help="start no further repetition of a workload after this many seconds (%(default)s)",
    )
    load = command.add_argument_group("a load of your own (one shared system prompt)")
    load.add_argument("--requests", type=at_least(1), help="how many; switches to this mode")
    load.add_argument("--streams", type=at_least(1), help="at most this many at a time")
    load.add_argument("--rate", type=positive, help="arrivals per second, Poisson")
    load.add_argument("--prompt-tokens", type=at_least(1, 10_000_000), help="default 1748")
    load.add_argument("--output-tokens", type=at_least(1, 1_000_000), help="default 128")
    return command


def _check_arguments(command: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Flags of one mode given in the other are errors, not ignored."""
    own = ("streams", "rate", "prompt_tokens", "output_tokens")
    if args.requests is None:
        for flag in own:
            if getattr(args, flag) is not None:
                command.error(f"--{flag.replace('_', '-')} needs --requests")
    elif args.workload is not None:
        command.error("--workload and --requests exclude each other")
    try:
        for name in args.workload or ():
            by_name(name)
    except ValueError as error:
        command.error(str(error))


async def _standard(target: HttpTarget, args: argparse.Namespace, prompts: PromptSource) -> int:
    calibration = await calibrate(target, prompts)
    failed = 0
    workloads = [by_name(name) for name in args.workload] if args.workload else WORKLOADS
    for workload in workloads:
        bursts = await run_workload(target, workload, prompts, calibration, args.time_limit)
        result = summarise(
            bursts,
            target=target,
            workload=workload.name,
            streams=workload.streams,
            seed=prompts.seed,
            date=now(),
            notes=check(workload, bursts),
        )
        print_result(result)
        emit(result, args.out)
        failed += result.errors
    return failed


async def _own_load(target: HttpTarget, args: argparse.Namespace, prompts: PromptSource) -> int:
    calibration: Calibration = await calibrate(target, prompts)
    size = calibration.system_words(args.prompt_tokens or 1748)
    streams = args.streams or (args.requests if args.rate else 1)
    burst = await target.load(
        [prompts.conversation("load", size, f"load/{i}") for i in range(args.requests)],
        args.output_tokens or 128,
        streams,
        args.rate,
        prompts.seed,
    )
    result = summarise(
        [burst],
        target=target,
        workload="load" if args.rate is None else f"load at {args.rate:g}/s",
        streams=streams,
        seed=prompts.seed,
        date=now(),
    )
    print_result(result)
    emit(result, args.out)
    return result.errors


async def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the number of failed requests."""
    prompts = PromptSource(fresh_seed() if args.seed is None else args.seed)
    async with connect(
        args.url, args.model, timeout=args.timeout, api_key=args.api_key, name=args.name
    ) as target:
        print(f"{args.url}  model {target.model}  seed {prompts.seed}", file=sys.stderr)
        print_header()
        if args.requests is None:
            return await _standard(target, args, prompts)
        return await _own_load(target, args, prompts)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = parser()
    args = command.parse_args(argv)
    _check_arguments(command, args)
    return exit_status(lambda: uvloop.run(run(args)))


if __name__ == "__main__":
    sys.exit(main())
