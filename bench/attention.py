"""The attention of one decoding step over a shared prefix: plain, read once, and torch's own.

    python -m headstart.bench.attention [--shape smollm2 ...] [--batch 1 4 ...] [--prefix 64 ...]

The table of the RelayAttention paper (arXiv 2402.14808): batch by prefix length, 128 tokens of its
own for every sequence, for a model with a KV head per query head, one with a KV head for four, and
the default model. One layer's operation alone, keys and values of random numbers; the pool holds as
many layers as make it larger than caches, and each call takes the next one, as in a model.

    copies   every sequence reads a copy of the prefix of its own: the paper's baseline
    plain    every sequence reads the same pages by itself: what a prefix cache alone gives
    relay    one full range for the prefix, and a range for each sequence's own tokens
    auto     plain or relay, as the planner decides from the machine's cost table
    sdpa     torch's scaled_dot_product_attention over contiguous copies

In turn, several times; the least of each. Tables on stdout; --out appends JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from headstart.bench.steps import attention_peak, measure_peaks, progress
from headstart.engine.batch import SharedRange, build_batch
from headstart.engine.costs.attention import QUERIES, filled_pool, load_costs
from headstart.engine.kv.tree import Node
from headstart.engine.ranges.shared import Relay
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence
from headstart.engine.sequence import Sequence as EngineSequence
from headstart.kernels.backend import AttentionShape, Backend
from headstart.kernels.devices import instruction_sets, load_backend
from headstart.kernels.ranges import KVRanges

SHAPES = {
    "multi-head": AttentionShape(32, 32, 128),
    "grouped": AttentionShape(32, 8, 128),
    "smollm2": AttentionShape(9, 3, 64),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PREFIXES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OWN = 128
CACHES = 96 << 20
"""Bytes the pool's layers have together, at least: more than a last-level cache holds."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None where a variant was left out for want of memory.

    relay_read_bytes: of keys and values, once a range. ideal_bytes: each page once. peak: of the
    relay variant's arithmetic, as a share of what matrix products of float32
    reach, or of bf16 where the instruction set has them.
    """

    batch: int
    prefix: int
    copies_ms: float | None
    plain_ms: float
    relay_ms: float
    auto_ms: float
    auto_relay: bool
    sdpa_ms: float | None
    predicted_plain_ms: float
    predicted_relay_ms: float
    relay_gb_s: float
    relay_gflop_s: float
    relay_read_bytes: int
    ideal_bytes: int
    peak: float

    @property
    def ratio(self) -> float:
        return self.plain_ms / self.relay_ms

    @property
    def auto_ratio(self) -> float:
        return self.plain_ms / self.auto_ms


class Pool(NamedTuple):
    """Keys and values, queries, and which layer the next call is to take."""

    kv: Any
    query: Any
    layer: Iterator[int]


class Bench:
    """One shape on one backend, with a pool for the largest point."""

    def __init__(self, backend: Backend, shape: AttentionShape, memory: int) -> None:
        self.backend, self.shape, self.memory = backend, shape, memory
        self.key_bytes = backend.kv_bytes_per_page(shape, 1) // backend.page_size
        costs = load_costs(backend, shape, None)
        self.auto, self.on = (
            Relay(mode, backend.page_size, backend.range_step, lambda: costs)
            for mode in ("auto", "on")
        )

    def point(self, batch: int, prefix: int, own: int, repeats: int, peak: float) -> Row:
        """Measure one line."""
        scheduled, pages = self._sequences(batch, prefix, own, shared=True)
        plan, auto = self.on.plan(scheduled), self.auto.plan(scheduled)
        ranges = plan.ranges if plan else []
        pool = self._pool(pages)
        variants = {
            "plain": self._attend(pool, scheduled, ()),
            "relay": self._attend(pool, scheduled, ranges),
        }
        if batch * (prefix + own) * self.key_bytes <= self.memory:
            apart, more_pages = self._sequences(batch, prefix, own, shared=False)
            variants["copies"] = self._attend(self._pool(more_pages), apart, ())
            variants["sdpa"] = self._torch(batch, prefix + own)
        best = in_turn(variants, repeats)
        chosen = bool(auto and auto.ranges)
        flops = 4 * batch * (prefix + own) * self.shape.heads * self.shape.head_dim
        read = (plan.pages_read if plan else pages) * self.backend.page_size * self.key_bytes
        ideal = (plan.pages_distinct if plan else pages) * self.backend.page_size * self.key_bytes
        return Row(
            batch=batch,
            prefix=prefix,
            copies_ms=_ms(best.get("copies")),
            plain_ms=best["plain"] * 1e3,
            relay_ms=best["relay"] * 1e3,
            auto_ms=best["relay" if chosen else "plain"] * 1e3,
            auto_relay=chosen,
            sdpa_ms=_ms(best.get("sdpa")),
            predicted_plain_ms=plan.plain_seconds * 1e3 if plan else 0.0,
            predicted_relay_ms=plan.seconds * 1e3 if plan else 0.0,
            relay_gb_s=read / best["relay"] / 1e9,
            relay_gflop_s=flops / best["relay"] / 1e9,
            relay_read_bytes=read,
            ideal_bytes=ideal,
            peak=flops / best["relay"] / 1e9 / peak,
        )

    def _pool(self, num_pages: int) -> Pool:
        """Layers of ``num_pages`` pages, together more than caches hold."""
        num_pages = max(num_pages, QUERIES // self.backend.page_size)
        layers = -(-CACHES // (num_pages * self.backend.page_size * self.key_bytes))
        kv, query = filled_pool(self.backend, self.shape, layers, num_pages)
        return Pool(kv, query, itertools.cycle(range(layers)))

    def _attend(
        self, pool: Pool, scheduled: list[ScheduledSequence], shared: Sequence[SharedRange]
    ) -> Callable[[], object]:
        batch = build_batch(scheduled, self.backend.page_size, shared)
        plan = self.backend.plan_attention(batch.num_rows, batch.kv_ranges, self.shape)
        return lambda: self.backend.attend(pool.query, pool.kv, next(pool.layer), plan)

    def _sequences(
        self, batch: int, prefix: int, own: int, *, shared: bool
    ) -> tuple[list[ScheduledSequence], int]:
        """Sequences that decode at position prefix + own - 1, and how many pages they have."""
        page_size = self.backend.page_size
        in_common = prefix // page_size if shared else 0
        each = -(-(prefix + own) // page_size) - in_common
        root = Node(b"", None, b"", [], 0)
        node = Node(b"", root, b"", list(range(in_common)), in_common * page_size)
        entries = []
        for i in range(batch):
            tokens = array("i", bytes(4 * (prefix + own)))
            seq = EngineSequence(i, tokens, len(tokens), SamplingParams(max_tokens=1))
            first = in_common + i * each
            seq.pages = [*node.pages, *range(first, first + each)]
            seq.node = node if shared else root
            entries.append(ScheduledSequence(seq, prefix + own - 1, 1, True))
        return entries, in_common + batch * each

    def _torch(self, batch: int, keys: int) -> Callable[[], object]:
        shape = self.shape
        q = torch.randn(batch, shape.heads, 1, shape.head_dim, dtype=torch.bfloat16)
        k, v = torch.randn(
            2, batch, shape.kv_heads, keys, shape.head_dim, dtype=torch.bfloat16
        ).unbind()
        attend = torch.nn.functional.scaled_dot_product_attention
        grouped = shape.group > 1
        return lambda: attend(q, k, v, enable_gqa=grouped)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def in_turn(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each variant, the least of several turns A B C A B C; a first turn warms up."""
    best = dict.fromkeys(variants, float("inf"))
    begin = time.perf_counter()
    turn = 0
    while turn <= repeats or (time.perf_counter() - begin < 0.25 and turn < 10 * repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


HEAD = (
    "batch", "prefix", "copies ms", "plain ms", "relay ms", "auto", "copies/relay", "plain/relay",
    "plain/auto", "predicted", "relay GB/s", "read/ideal", "GFLOP/s", "of peak", "sdpa ms",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---:|" * len(HEAD)]
    for row in rows:
        predicted = "–"
        if row.predicted_relay_ms:
            predicted = f"{row.predicted_plain_ms / row.predicted_relay_ms:.2f}"
        cells = [
            f"{row.batch}",
            f"{row.prefix}",
            number(row.copies_ms),
            number(row.plain_ms),
            number(row.relay_ms),
            "relay" if row.auto_relay else "plain",
            "–" if row.copies_ms is None else f"{row.copies_ms / row.relay_ms:.2f}",
            f"{row.ratio:.2f}",
            f"{row.auto_ratio:.2f}",
            predicted,
            f"{row.relay_gb_s:.1f}",
            f"{row.relay_read_bytes / row.ideal_bytes:.2f}",
            f"{row.relay_gflop_s:.0f}",
            f"{row.peak:.0%}",
            number(row.sdpa_ms),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full_range(backend: Backend, shape: AttentionShape, rows: int, keys: int) -> float:
    """GFLOP/s of one full range alone, rows by keys."""
    pages = keys // backend.page_size
    kv, query = filled_pool(backend, shape, 1, max(pages, QUERIES // backend.page_size))
    ends = np.array([0, pages], dtype=np.int32)
    ranges = KVRanges(
        page_start=ends,
        pages=np.arange(pages, dtype=np.int32),
        first_key=ends[:1],
        row_start=np.array([0, rows], dtype=np.int32),
        rows=np.arange(rows, dtype=np.int32),
        visible=np.full(rows, keys, dtype=np.int32),
    )
    plan = backend.plan_attention(rows, ranges, shape)
    best = in_turn({"range": lambda: backend.attend(query, kv, 0, plan)}, 10)["range"]
    return 4 * rows * keys * shape.heads * shape.head_dim / best / 1e9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    add("--batch", nargs="+", type=int, default=list(BATCHES), metavar="N")
    add("--prefix", nargs="+", type=int, default=list(PREFIXES), metavar="TOKENS")
    add("--own", type=int, default=OWN, metavar="TOKENS", help="of each sequence (%(default)s)")
    add("--kv-format", choices=("f32", "bf16"), default="bf16", help="of keys and values")
    add("--isa", default="auto", help="instruction set (%(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--repeats", type=int, default=3, help="turns, at least (%(default)s)")
    add("--memory", type=float, default=3.0, help="GiB of KV for a point (%(default)s)")
    add("--out", type=Path, help="append a JSON line per point to this file")
    add("--plot", type=Path, metavar="FOLDER", help="write attention-SHAPE.svg and .png there")
    return command


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = parser()
    args = command.parse_args(argv)
    if min(*args.batch, *args.prefix, args.own, args.repeats, args.threads) < 1:
        command.error("numbers must be above 0")
    if max(args.batch) > QUERIES:
        command.error(f"--batch goes to {QUERIES}")
    try:
        backend = load_backend(
            "cpu", isa=args.isa, weights="f32", threads=args.threads, kv_format=args.kv_format
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with progress("measuring the machine"):
        peaks = measure_peaks(args.threads)
    peak = attention_peak(peaks, instruction_sets()[0] if args.isa == "auto" else args.isa)
    print(f"{backend.device}: memory {peaks['read_gb_s']:.0f} GB/s, {peak:.0f} GFLOP/s\n")
    for name in args.shape:
        shape = SHAPES[name]
        bench = Bench(backend, shape, int(args.memory * 2**30))
        rows = []
        for prefix in args.prefix:
            for batch in args.batch:
                if (prefix + batch * args.own) * bench.key_bytes > bench.memory:
                    continue
                with progress(f"{name} {batch} x {prefix}"):
                    rows.append(bench.point(batch, prefix, args.own, args.repeats, peak))
        title = f"{name}: {shape.heads} heads, {shape.kv_heads} KV heads of {shape.head_dim}"
        print(f"**{title}**, {args.own} tokens of its own for each sequence\n\n{table(rows)}\n")
        reached = full_range(backend, shape, 64, 2048)
        print(f"full range alone, 64 rows x 2,048 keys: {reached:.0f} GFLOP/s, ", end="")
        print(f"{reached / peak:.0%} of the peak of products\n")
        if args.out:
            with args.out.open("a") as out:
                for row in rows:
                    about = {"shape": name, "own": args.own, "device": backend.device}
                    out.write(json.dumps({**about, **peaks, **asdict(row)}) + "\n")
        if args.plot:
            from headstart.bench.plots import attention_plot

            lines = [{**asdict(row), "ratio": row.ratio} for row in rows]
            attention_plot(args.plot, f"attention-{name}", f"{title}\n{backend.device}", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
