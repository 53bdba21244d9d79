"""What segment masks gain: `python -m headstart.bench.segments`.

Trains pairs of LoRA adapters, one under the causal mask and one under the segment mask, with equal
first weights, examples, order and steps, on questions whose answer depends on text that comes after
it in the user turn (segment_task.py, segment_training.py). Then serves all of them with headstart
and asks each the same held-out questions, over HTTP. The segment adapters are asked a second time
under the causal mask they were not trained for.

Markdown tables on stdout, one JSON line appended to --out, progress on stderr. bench/README.md
defines every figure. Exit status: 0, whichever mask is ahead; 1 if the server cannot be used or a
request failed; 2 for wrong arguments.
"""

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

import aiohttp
import numpy as np
import numpy.typing as npt
import uvloop

from headstart.bench import segment_training as training
from headstart.bench.command import exit_status
from headstart.bench.http_client import BenchError
from headstart.bench.report import markdown
from headstart.bench.segment_task import CHANCE, Question, questions
from headstart.bench.serve import at_least, now, positive
from headstart.bench.server_process import start_headstart
from headstart.engine.config import default_home
from headstart.engine.errors import HeadstartError
from headstart.engine.models.store import resolve

MASKS = {"causal": "causal", "segments": "turns"}
"""What an adapter is called here, and the `segment_mask` it declares."""

MISMATCH = "segments, served causal"
STREAMS = 16  # requests at once
ANSWER_TOKENS = 8
RESAMPLES = 5000
HELD_OUT_SEED = 0

Right = npt.NDArray[np.bool_]
"""Which answers are right, ``[seeds, questions]``."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One adapter. ``right``: its held-out answers by transformers, before it is served."""

    mask: str
    seed: int
    folder: Path
    losses: list[float]
    right: list[bool]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.mask}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and questions, and its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> "Estimate":
        """By a bootstrap of both seeds and questions: ``values`` is ``[seeds, questions]``.

        Seeds share their questions, so a resample draws rows and columns. With few seeds the
        interval understates what another seed may do; the tables show each seed.
        """
        draw = np.random.default_rng(0)
        seeds, asked = values.shape
        means = [
            values[draw.integers(seeds, size=seeds)][:, draw.integers(asked, size=asked)].mean()
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(means, (0.025, 0.975))
        return cls(float(values.mean()), float(low), float(high))


def train_adapter(
    model: Path, mask: str, seed: int, examples: int, held_out: Sequence[Question], folder: Path
) -> Trained:
    """One adapter, saved below ``folder``; both masks of a seed see the same questions."""
    started = time.perf_counter()
    encoder = training.Encoder(model, MASKS[mask])
    adapted = training.add_adapter(training.load_model(model), seed)
    steps = examples // training.BATCH

    def report(step: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            done = f"{mask}-{seed}: {step * training.BATCH:,} of {examples:,} examples"
            print(f"{done}, loss {loss:.3f}", file=sys.stderr, flush=True)

    stream = map(encoder.example, questions("train", seed))
    losses = training.train(adapted, stream, steps, report)
    right = training.answers_right(adapted, map(encoder.example, held_out))
    seconds = time.perf_counter() - started
    trained = Trained(mask, seed, folder / f"{mask}-{seed}", losses, right, seconds)
    training.save_adapter(adapted, trained.folder, MASKS[mask])
    share = np.mean(right)
    print(f"{trained.name}: {share:.1%} right, {seconds:.0f} s", file=sys.stderr, flush=True)
    return trained


async def ask(
    url: str, adapter: str, held_out: Sequence[Question], timeout: float, mask: str | None = None
) -> list[bool]:
    """Which of the server's answers are right to the letter and end where they should.

    ``mask`` overrides the one the adapter declares. Raises BenchError if a request fails.
    """
    free = asyncio.Semaphore(STREAMS)

    async def one(session: aiohttp.ClientSession, question: Question) -> bool:
        body = {
            "model": adapter,
            "messages": question.messages,
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            **({} if mask is None else {"segment_mask": mask}),
        }
        async with free, session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                text = " ".join((await response.text()).split())[:300]
                raise BenchError(f"{url} answered {response.status}: {text}")
            choice = (await response.json())["choices"][0]
            answer: str = choice["message"]["content"]
            return answer == question.answer and choice["finish_reason"] == "stop"

    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        async with aiohttp.ClientSession(timeout=limit) as session:
            return await asyncio.gather(*(one(session, question) for question in held_out))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchError(f"{url}: {error or 'timed out'}") from error


async def serve(
    args: argparse.Namespace, adapters: Sequence[Trained], held_out: Sequence[Question]
) -> dict[str, Right]:
    """Each mask's answers over HTTP, and those of the segment adapters under the causal mask."""
    flags = [flag for a in adapters for flag in ("--lora", f"{a.name}={a.folder}")]
    found: dict[str, list[list[bool]]] = {name: [] for name in (*MASKS, MISMATCH)}
    async with start_headstart([args.model, *flags, *shlex.split(args.serve_args)]) as url:
        for adapter in adapters:
            found[adapter.mask].append(await ask(url, adapter.name, held_out, args.timeout))
            if adapter.mask == "segments":
                causal = await ask(url, adapter.name, held_out, args.timeout, "causal")
                found[MISMATCH].append(causal)
    return {name: np.array(rows) for name, rows in found.items()}


def gain(served: Mapping[str, Right]) -> npt.NDArray[np.float64]:
    """Per seed and question: 1 where only the segment adapter is right, -1 where only the other."""
    return served["segments"].astype(np.float64) - served["causal"]


def tables(served: Mapping[str, Right], seeds: Sequence[int], title: str) -> str:
    """What the command prints of held-out accuracy: a row per seed, then the mean over all."""
    columns = {
        "causal": served["causal"].astype(np.float64),
        "segments": served["segments"].astype(np.float64),
        "gain": gain(served),
        MISMATCH: served[MISMATCH].astype(np.float64),
    }
    rows = []
    for i, seed in enumerate(seeds):
        cells = [_percent(name, values[i].mean()) for name, values in columns.items()]
        rows.append([str(seed), *cells])
    cells = []
    for name, values in columns.items():
        found = Estimate.of(values)
        mean, low, high = (_percent(name, x) for x in (found.mean, found.low, found.high))
        cells.append(f"{mean} ({low} to {high})")
    rows.append(["all", *cells])
    return f"{title}\n\n{markdown(['seed', *columns], rows)}"


def _percent(column: str, share: float) -> str:
    """A gain is in points and has a sign."""
    return f"{100 * share:+.1f}" if column == "gain" else f"{100 * share:.1f}%"


def as_json(
    args: argparse.Namespace, adapters: Sequence[Trained], served: Mapping[str, Right]
) -> str:
    """The line that --out keeps."""
    found = Estimate.of(gain(served))
    line = {
        "benchmark": "segments",
        "date": now(),
        "model": args.model,
        "threads": len(os.sched_getaffinity(0)),
        "serve_args": args.serve_args,
        "examples": args.examples,
        "questions": args.questions,
        "chance": CHANCE,
        "gain": {"mean": found.mean, "low": found.low, "high": found.high},
        "served": {name: right.mean(1).tolist() for name, right in served.items()},
        "adapters": [
            {
                "name": adapter.name,
                "seed": adapter.seed,
                "train_seconds": round(adapter.seconds, 1),
                "right_by_transformers": float(np.mean(adapter.right)),
                "losses": [round(loss, 4) for loss in adapter.losses],
            }
            for adapter in adapters
        ],
    }
    return json.dumps(line, ensure_ascii=False)


def agreement(adapters: Sequence[Trained], served: Mapping[str, Right]) -> float:
    """How often headstart and transformers agree on whether an answer is right."""
    same = [
        served[mask] == np.array([adapter.right for adapter in adapters if adapter.mask == mask])
        for mask in MASKS
    ]
    return float(np.mean(same))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.segments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2-135m", help="what is adapted and served (%(default)s)")
    add(
        "--seeds",
        type=at_least(1, 16),
        default=3,
        metavar="N",
        help="pairs of adapters (%(default)s)",
    )
    add(
        "--examples",
        type=at_least(training.BATCH, 10_000_000),
        default=1024,
        metavar="N",
        help=f"to train each adapter on, in batches of {training.BATCH} (%(default)s)",
    )
    add(
        "--questions",
        type=at_least(1),
        default=400,
        metavar="N",
        help="held out, to ask each adapter (%(default)s)",
    )
    add(
        "--serve-args",
        default="",
        metavar="'FLAG ...'",
        help="further arguments of `headstart serve`, as one string",
    )
    add("--timeout", type=positive, default=600.0, help="seconds for all questions (%(default)s)")
    add("--adapters", type=Path, metavar="FOLDER", help="keep the adapters there")
    add("--out", type=Path, help="append the result to this file, as one JSON line")
    add(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="draw segments there, as SVG and PNG (needs matplotlib)",
    )
    return command


def _load_plots() -> ModuleType:
    """The drawing code; only --plot needs matplotlib."""
    try:
        from headstart.bench import plots
    except ModuleNotFoundError as error:
        raise BenchError(f"--plot: {error}; it is in the extra `bench`") from error
    return plots


def run(args: argparse.Namespace, folder: Path) -> None:
    """Train, serve, print and draw. ``folder`` takes the adapters."""
    # What may fail for want of a package or a permission does so before minutes are spent.
    plots = _load_plots() if args.plot else None
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
    if args.out:
        args.out.open("a").close()
    model = resolve(args.model, default_home())
    seeds = range(1, args.seeds + 1)
    held_out = list(islice(questions("held-out", HELD_OUT_SEED), args.questions))
    adapters = [
        train_adapter(model, mask, seed, args.examples, held_out, folder)
        for seed in seeds
        for mask in MASKS
    ]
    served = uvloop.run(serve(args, adapters, held_out))
    title = (
        f"{args.model}: {args.questions} held-out questions, {args.examples:,} examples an adapter;"
        f" chance {CHANCE:.0%}"
    )
    print(tables(served, seeds, title))
    print(
        f"\nheadstart and transformers agree on {agreement(adapters, served):.1%} of the answers."
    )
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(as_json(args, adapters, served) + "\n")
    if plots is not None:
        losses = {mask: [a.losses for a in adapters if a.mask == mask] for mask in MASKS}
        accuracy = {}
        for name, right in served.items():
            found = Estimate.of(right.astype(np.float64))
            accuracy[name] = (right.mean(1).tolist(), found.low, found.high)
        for path in plots.segments_plot(args.plot, title, CHANCE, losses, accuracy):
            print(f"wrote {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = parser()
    args = command.parse_args(argv)
    try:
        shlex.split(args.serve_args)
    except ValueError as error:
        command.error(f"--serve-args: {error}")

    def work() -> int:
        with tempfile.TemporaryDirectory() as temporary:
            run(args, args.adapters or Path(temporary))
        return 0

    return exit_status(work, (BenchError, HeadstartError, OSError))


if __name__ == "__main__":
    sys.exit(main())
