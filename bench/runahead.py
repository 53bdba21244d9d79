"""What KV-Runahead gains (arXiv 2405.05329): `python -m headstart.bench.runahead`.

Time to the first token of a prompt that is in no cache, computed by one process or by ranks, each
a process, joined by emulated links (bench/links.py). For each link, number of ranks and prompt
length all methods take turns, A B C C B A ..., with new prompts of random tokens each time:

    local            one process with the threads of one rank
    threads          one process with the threads of all ranks
    allgather        the paper's baseline, with causal attention (bench/allgather.py)
    allgather-dense  the same with dense attention, as the paper counts it
    even             runs ahead, with equal chunks
    searched         ... cut where it was fastest in a search made before
    predicted        ... cut by a table of what was searched for the other lengths
    modelled         ... cut by the engine's model of times

Markdown tables on stdout, one JSON line per method and point with --json, progress on stderr.
bench/README.md defines every figure. Exit status: 0, 1 if something cannot run or first tokens
differ, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headstart.bench.allgather import DENSE, start_gathering
from headstart.bench.command import exit_status
from headstart.bench.links import Link, Place, linked, parse_link, require_namespaces
from headstart.bench.prefill_run import Contestant, PrefillRun
from headstart.bench.runahead_report import (
    BASELINES,
    METHODS,
    NOT_THE_MODEL,
    SEARCHING,
    Row,
    tables,
)
from headstart.bench.runahead_worker import (
    Chain,
    predicted_bounds,
    searched_bounds,
    start_chain,
)
from headstart.bench.serve import at_least, fresh_seed, now, positive
from headstart.engine.config import default_home
from headstart.engine.models.store import resolve

LINKS = ("loopback", "10gbit", "1gbit", "1gbit+jitter", "0.5gbit", "0.5gbit+jitter")
RANKS = (2, 4)
LENGTHS = (1024, 2048, 4096, 8176)
PAUSE = 0.05
"""Seconds before a prompt: what the last one left to do is done."""


# ------------------------------------------------------------------ measuring


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same at every point. ``timeout``: seconds an answer may take."""

    model: str
    model_path: str
    weights: str
    threads: int
    methods: list[str]
    repeats: int
    seed: int
    max_tokens: int
    timeout: float


@contextmanager
def contestants(setup: Setup, places: Sequence[Place]) -> Iterator[dict[str, Contestant]]:
    """The methods, with processes in ``places``. Those that wait for their turn compute nothing."""
    methods, ranks = setup.methods, len(places)
    found: dict[str, Contestant] = {}
    with ExitStack() as stack:

        def chain(places: Sequence[Place], cuts: str, threads: int) -> Chain:
            return stack.enter_context(
                start_chain(
                    places,
                    setup.model_path,
                    max_tokens=setup.max_tokens,
                    cuts=cuts,
                    weights=setup.weights,
                    threads=threads,
                    timeout=setup.timeout,
                )
            )

        if "local" in methods:
            found["local"] = chain(places[-1:], "even", setup.threads)
        if ranks > 1 and "threads" in methods:
            found["threads"] = chain(places[-1:], "even", setup.threads * ranks)
        if ranks > 1 and set(methods) & set(BASELINES):
            gathering = stack.enter_context(
                start_gathering(
                    places,
                    setup.model_path,
                    max_tokens=setup.max_tokens,
                    weights=setup.weights,
                    threads=setup.threads,
                    timeout=setup.timeout,
                )
            )
            found["allgather"] = gathering
            found["allgather-dense"] = gathering.with_attention(DENSE)
        if ranks > 1 and {"even", *SEARCHING} & set(methods):
            found |= dict.fromkeys(("even", *SEARCHING), chain(places, "even", setup.threads))
        if ranks > 1 and "modelled" in methods:
            found["modelled"] = chain(places, "modelled", setup.threads)
        yield {method: found[method] for method in METHODS if method in methods and method in found}


def time_to_first_token(contestant: Contestant, tokens: Sequence[int]) -> tuple[float, PrefillRun]:
    """Seconds from the start signal to the first token, all processes ready for it."""
    contestant.prepare(tokens)
    time.sleep(PAUSE)
    begin = time.perf_counter()
    run = contestant.start()
    return run.end - begin, run


def random_prompt(chance: random.Random, tokens: int, vocab_size: int) -> list[int]:
    """Token ids nobody has seen before."""
    return chance.choices(range(vocab_size), k=tokens)


def measure_point(
    setup: Setup,
    link: str,
    ranks: int,
    tokens: int,
    methods: Mapping[str, Contestant],
    chance: random.Random,
    vocab_size: int,
) -> list[Row]:
    """All methods in turn at one prompt length, after a prompt each that does not count."""
    runs: dict[str, list[tuple[float, PrefillRun]]] = {method: [] for method in methods}
    differing = dict.fromkeys(methods, 0)
    for repeat in range(-1, setup.repeats):
        prompt = random_prompt(chance, tokens, vocab_size)
        for method in list(methods)[:: -1 if repeat % 2 else 1]:
            timed = time_to_first_token(methods[method], prompt)
            if repeat >= 0:
                runs[method].append(timed)
        if repeat >= 0:
            expected = runs[next(iter(methods))][-1][1].token
            for method in methods:
                wrong = method != NOT_THE_MODEL and runs[method][-1][1].token != expected
                differing[method] += wrong
    return [
        Row(
            link=link,
            ranks=ranks,
            prompt_tokens=tokens,
            method=method,
            threads=setup.threads,
            cores=len(os.sched_getaffinity(0)),
            model=setup.model,
            date=now(),
            seed=setup.seed,
            ttft_s=[seconds for seconds, _ in timed_runs],
            idle_s=_medians([run.idle_s for _, run in timed_runs]),
            sent_bytes=timed_runs[-1][1].sent_bytes,
            bounds=timed_runs[-1][1].bounds,
            predicted_s=_median(run.predicted_s for _, run in timed_runs),
            differing=differing[method],
        )
        for method, timed_runs in runs.items()
    ]


def search(chain: Chain, ranks: int, tokens: int, chance: random.Random) -> list[int]:
    """The cuts that are fastest for prompts of this length."""

    def seconds(bounds: list[int]) -> float:
        prompt = random_prompt(chance, tokens, chain.vocab_size)
        return time_to_first_token(chain.with_bounds(bounds), prompt)[0]

    return searched_bounds(chain, seconds, tokens, ranks)


def measure(setup: Setup, link: Link, ranks: int, lengths: Sequence[int]) -> Iterator[Row]:
    """All lengths on one link with one number of ranks."""
    chance = random.Random(f"{setup.seed} {link.name} {ranks}")
    with linked(link, ranks) as places, contestants(setup, places) as methods:
        chains = [c for c in methods.values() if isinstance(c, Chain)]
        # Every vocabulary of a model served begins with bytes and special tokens.
        vocab_size = chains[0].vocab_size if chains else 256
        searching = next((methods[m] for m in SEARCHING if m in methods), None)
        searched: dict[int, list[int]] = {}
        if isinstance(searching, Chain):
            searched = {n: search(searching, ranks, n, chance) for n in lengths}
        for tokens in lengths:
            cut = _with_cuts(methods, searched, ranks, tokens)
            yield from measure_point(setup, link.name, ranks, tokens, cut, chance, vocab_size)


def _with_cuts(
    methods: Mapping[str, Contestant], searched: Mapping[int, list[int]], ranks: int, tokens: int
) -> dict[str, Contestant]:
    """The methods for prompts of ``tokens`` tokens; none is predicted from its own search."""
    cut = dict(methods)
    if isinstance(chain := methods.get("searched"), Chain):
        cut["searched"] = chain.with_bounds(searched[tokens])
    if isinstance(chain := methods.get("predicted"), Chain):
        others = [bounds for length, bounds in searched.items() if length != tokens]
        bounds = predicted_bounds(chain, others, tokens, ranks)
        if bounds is None:
            print("note: one length alone predicts nothing", file=sys.stderr)
            del cut["predicted"]
        else:
            cut["predicted"] = chain.with_bounds(bounds)
    return cut


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each rank. A prompt may be cut for fewer ranks: those cut as the last one was count."""
    alike = [row for row in rows if len(row) == len(rows[-1])]
    return [statistics.median(column) for column in zip(*alike, strict=True)]


# ------------------------------------------------------------------ the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.runahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="smollm2-135m", help="as `headstart pull` knows it (%(default)s)")
    add("--weights", default="auto", help="weight format (%(default)s)")
    add("--links", nargs="+", default=list(LINKS), metavar="LINK", help=" ".join(LINKS))
    add("--ranks", nargs="+", type=at_least(1, 64), default=list(RANKS), metavar="N")
    add("--lengths", nargs="+", type=at_least(2), default=list(LENGTHS), metavar="N")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--repeats", type=at_least(1), default=5, metavar="N", help="per method (%(default)s)")
    add("--threads", type=at_least(1), default=1, metavar="N", help="of a rank (%(default)s)")
    add("--seed", type=int, help="of the prompts (default: new for every run)")
    add("--timeout", type=positive, default=600.0, help="seconds for an answer (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="append one JSON line per method and point")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    add("--plot", type=Path, metavar="FOLDER", help="draw SVG and PNG there (needs matplotlib)")
    add("--plot-only", type=Path, metavar="FILE", help="measure nothing: rows of an earlier --json")
    return command


def measure_all(args: argparse.Namespace) -> list[Row]:
    """The rows of every point, told and kept as they end."""
    links = [parse_link(name) for name in dict.fromkeys(args.links)]
    if any(link.gbit is not None for link in links):
        require_namespaces()  # told before minutes are spent
    setup = Setup(
        model=args.model,
        model_path=str(resolve(args.model, default_home())),
        weights=args.weights,
        threads=args.threads,
        methods=args.methods,
        repeats=args.repeats,
        seed=fresh_seed() if args.seed is None else args.seed,
        max_tokens=max(args.lengths),
        timeout=args.timeout,
    )
    rows: list[Row] = []
    for link in links:
        for ranks in dict.fromkeys(args.ranks):
            for row in measure(setup, link, ranks, list(dict.fromkeys(args.lengths))):
                rows.append(row)
                spread = f"{1000 * min(row.ttft_s):.0f}–{1000 * max(row.ttft_s):.0f}"
                print(
                    f"{link.name:16}{ranks:2} ranks{row.prompt_tokens:6} tokens  "
                    f"{row.method:16}{1000 * row.ttft:8.0f} ms ({spread})",
                    file=sys.stderr,
                    flush=True,
                )
                if args.json:
                    with args.json.open("ab") as file:
                        file.write(msgspec.json.encode(row) + b"\n")
    return rows


def run(args: argparse.Namespace) -> int:
    """Measure or read, print and draw; the number of first tokens that differ."""
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
    for file in (args.json, args.markdown):
        if file:
            file.open("a").close()
    if args.plot_only:
        lines = args.plot_only.read_bytes().splitlines()
        rows = [msgspec.json.decode(line, type=Row) for line in lines]
    else:
        rows = measure_all(args)
    if not rows:
        raise ValueError("nothing was measured: one rank has no methods but `local`")
    text = tables(rows)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        from headstart.bench.plots import runahead_plots

        for path in runahead_plots(args.plot, rows):
            print(f"wrote {path}", file=sys.stderr)
    return sum(row.differing for row in rows)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parser().parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
