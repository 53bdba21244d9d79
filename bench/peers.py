"""headstart beside other engines on the same prompts: `python -m headstart.bench.peers`.

Each repetition of each workload runs on one engine after the other (A B C, C B A, ...), so that
drift of the machine meets all; an engine that is not measured waits and computes nothing.
headstart is started by this command unless --url names a running server. OpenVINO GenAI and
llama.cpp run as libraries in processes of their own, in an environment of their own (`make peers`
creates it). With --beside vllm, on a GPU, it is vLLM's server, which is started from the --python
that has it, on the weights headstart converted.

JSON lines on stdout (or appended to --out), tables and the ratios on stderr. bench/README.md
defines every figure. Exit status: 0, 1 if an engine cannot be used or a request failed, 2 for
wrong arguments.
"""

import argparse
import json
import shlex
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError, connect
from headstart.bench.prompts import PromptSource
from headstart.bench.report import print_comparison, print_header, print_result
from headstart.bench.samples import Result, Target, summarise
from headstart.bench.serve import emit, fresh_seed, now
from headstart.bench.server_process import default_gguf, start_headstart, start_vllm
from headstart.bench.worker_target import WORKERS, start_worker
from headstart.bench.workloads import WORKLOADS, Workload, alternate, by_name, calibrate, check
from headstart.engine.config import default_home
from headstart.engine.models.files.gguf_weights import huggingface_folder
from headstart.engine.models.store import resolve

PEERS = (*WORKERS, "vllm")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    names = ", ".join(w.name for w in WORKLOADS)
    add("--workload", nargs="+", metavar="NAME", help=f"only these (default all): {names}")
    add(
        "--beside",
        choices=PEERS,
        nargs="+",
        default=list(WORKERS),
        help=f"the other engines (default: {' '.join(WORKERS)})",
    )
    add("--only", choices=("headstart", "peer"), help="measure headstart, or the others, alone")
    add("--url", help="a running headstart server; default: start one and stop it at the end")
    add("--model", default="smollm2-135m", help="what `headstart serve` gets (%(default)s)")
    add(
        "--serve-args",
        default="",
        metavar="'FLAG ...'",
        help="further arguments of `headstart serve`, as one string",
    )
    add("--gguf", type=Path, help="GGUF for the others (default: --model's, if it is one file)")
    add(
        "--python",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="interpreter that has the other engines (%(default)s)",
    )
    add(
        "--vllm-args",
        default="",
        metavar="'FLAG ...'",
        help="further arguments of vLLM's server, as one string",
    )
    add(
        "--openvino",
        type=json.loads,
        default={},
        metavar="JSON",
        help="pipeline settings, such as '{\"max_batched_tokens\": 2048}'",
    )
    add(
        "--llama",
        type=json.loads,
        default={},
        metavar="JSON",
        help="settings of its context, such as '{\"ubatch\": 1024}'",
    )
    add("--out", type=Path, help="append the JSON lines to this file instead of printing them")
    add("--seed", type=int, help="of the prompts (default: new for every run)")
    add("--timeout", type=float, default=600.0, help="seconds for one burst (%(default)s)")
    add(
        "--time-limit",
        type=float,
        default=180.0,
        help="start no further round of a workload after this many seconds (%(default)s)",
    )
    return command


async def _targets(stack: AsyncExitStack, args: argparse.Namespace) -> list[Target]:
    """Start what is to be measured, one after the other."""
    targets: list[Target] = []
    if args.only != "peer":
        url = args.url or await stack.enter_async_context(
            start_headstart([args.model, *shlex.split(args.serve_args)])
        )
        client = connect(url, None, timeout=args.timeout, name="headstart")
        targets.append(await stack.enter_async_context(client))
    if args.only == "headstart":
        return targets
    for peer in args.beside:
        if peer == "vllm":
            _check(args.python, "give --python")
            folder = huggingface_folder(resolve(args.model, default_home()))
            server = start_vllm(args.python, folder, shlex.split(args.vllm_args))
            url = await stack.enter_async_context(server)
            client = connect(url, None, timeout=args.timeout, name="vllm")
            targets.append(await stack.enter_async_context(client))
        else:
            own = Path(args.model)
            gguf = args.gguf or (own if own.suffix == ".gguf" else default_gguf())
            _check(args.python, "`make peers` creates it")
            _check(gguf, "give --gguf")
            settings = getattr(args, peer)
            worker = start_worker(peer, args.python, gguf, settings, timeout=args.timeout)
            engine = await stack.enter_async_context(worker)
            print(f"{peer} {engine.version}  {settings or 'default settings'}", file=sys.stderr)
            targets.append(engine)
    return targets


def _check(path: Path, hint: str) -> None:
    if not path.exists():
        raise BenchError(f"{path} does not exist; {hint}")


async def run(args: argparse.Namespace) -> int:
    """Measure; the number of failed requests."""
    prompts = PromptSource(fresh_seed() if args.seed is None else args.seed)
    workloads = [by_name(name) for name in args.workload] if args.workload else list(WORKLOADS)
    pairs: list[tuple[Workload, list[Result]]] = []
    async with AsyncExitStack() as stack:
        targets = await _targets(stack, args)
        # Every target answers before the clock matters; the prompts are sized for the first.
        calibration, *_ = [await calibrate(target, prompts) for target in targets]
        print(f"seed {prompts.seed}", file=sys.stderr)
        print_header()
        for workload in workloads:
            bursts = await alternate(targets, workload, prompts, calibration, args.time_limit)
            results = [
                summarise(
                    mine,
                    target=target,
                    workload=workload.name,
                    streams=workload.streams,
                    seed=prompts.seed,
                    date=now(),
                    notes=check(workload, mine),
                )
                for target, mine in zip(targets, bursts, strict=True)
            ]
            for result in results:
                print_result(result)
                emit(result, args.out)
            pairs.append((workload, results))
    if len(targets) > 1:
        print_comparison([(w.name, w.headline, results) for w, results in pairs])
    return sum(result.errors for _, results in pairs for result in results)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = parser()
    args = command.parse_args(argv)
    if args.only == "peer" and args.url:
        command.error("--url and --only peer exclude each other")
    try:
        for name in args.workload or ():
            by_name(name)
    except ValueError as error:
        command.error(str(error))
    return exit_status(lambda: uvloop.run(run(args)))


if __name__ == "__main__":
    sys.exit(main())
