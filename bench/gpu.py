"""Kernels of the gpu backend: time on this card, beside what its memory and cores allow.

    python -m headstart.bench.gpu               needs a GPU; writes bench/results/gpu-CARD.md
    python -m headstart.bench.gpu --roofline    needs none: the least times of an H100

Five questions, each of one layer in bf16:

    relay     the table of RelayAttention's authors (arXiv 2402.14808): own context 128, prefixes of
              64 to 16,384 tokens, 1 to 64 requests, 32 heads of 128; speed-up of reading the prefix
              once over a copy for each request
    prefill   a causal prompt: TFLOP/s, of Triton's kernel and of flash-attn where it is installed
    decode    64 sequences, grouped heads: GB/s against the card's own copy speed
    formats   the same with KV in fp8 and int8
    layer     every other kernel of ours, with 64 and 8,192 rows (bench/gpu_layer.py)

Bytes and FLOPs are counted from the ranges: a range is read once a KV head, 4 FLOPs a query head,
visible key and dimension. The card's peaks are measured (a copy, a matrix product), or an H100's
(SXM data sheet: 989 TFLOP/s dense bf16, 3.35 TB/s).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from headstart.bench.gpu_layer import LayerCase, Work, layer_cases
from headstart.kernels.backend import AttentionShape
from headstart.kernels.gpu.kv import PageLayout
from headstart.kernels.ranges import KVRanges, Range

if TYPE_CHECKING:
    from headstart.kernels.gpu.backend import GpuBackend

RESULTS = Path(__file__).with_name("results")
MULTI_HEAD = AttentionShape(32, 32, 128)
GROUPED = AttentionShape(32, 8, 128)
OWN = 128
PREFIXES = (64, 512, 2048, 16384)
BATCHES = (1, 4, 8, 32, 64)
AUTHORS = {
    1: (0.85, 0.73, 0.85, 0.97),
    4: (1.01, 1.88, 2.64, 3.79),
    8: (1.20, 2.44, 4.64, 7.36),
    32: (1.42, 3.63, 9.56, 24.1),
    64: (1.36, 4.00, 11.6, 40.0),
}
"""What the authors measured on an A40, by batch and PREFIXES (their repository's raw tables)."""


class Card(NamedTuple):
    """flops, bytes: a second."""

    name: str
    flops: float
    bytes: float


H100 = Card("H100 SXM (data sheet)", 989e12, 3.35e12)


def least_seconds(work: Work, card: Card) -> float:
    """The roofline: whichever takes longer."""
    return max(work.bytes / card.bytes, work.flops / card.flops)


def work_of(ranges: KVRanges, shape: AttentionShape, page_bytes: int, page_size: int) -> Work:
    """Of ranges over pages of ``page_bytes`` in one layer; queries and results are of bf16."""
    counts = np.diff(ranges.row_start)
    seen = [0, *np.maximum.reduceat(ranges.visible, ranges.row_start[:-1][counts > 0])]
    keys = int(np.sum(seen, dtype=np.int64))
    rows = len(np.unique(ranges.rows))
    moved = keys * page_bytes // page_size + 2 * rows * shape.heads * shape.head_dim * 2
    visible = int(ranges.visible.sum(dtype=np.int64))
    return Work(moved, 4 * visible * shape.heads * shape.head_dim)


def sharing(count: int, prefix: int, own: int, page_size: int) -> KVRanges:
    """One full range over ``prefix`` keys for all, and ``own`` keys of each."""
    shared = prefix // page_size
    pages = own // page_size
    all_rows = Range(range(shared), range(count), [prefix] * count)
    apart = [
        Range(range(shared + i * pages, shared + (i + 1) * pages), [i], [own], prefix)
        for i in range(count)
    ]
    return KVRanges.of([all_rows, *apart])


class Case(NamedTuple):
    """A layer's attention to be timed."""

    name: str
    shape: AttentionShape
    ranges: KVRanges
    kv_format: str

    def ready(self, backend: GpuBackend) -> Callable[[], Any]:
        """What is to be timed, in a pool of its own."""
        pool = backend.allocate_kv(self.shape, 1, int(self.ranges.pages.max()) + 1)
        rows = int(self.ranges.rows.max()) + 1
        size = (rows, self.shape.heads, self.shape.head_dim)
        q = torch.randn(size, device=backend.on.torch_device).to(backend.dtype)
        plan = backend.plan_attention(rows, self.ranges, self.shape)
        return lambda: backend.attend(q, pool, 0, plan)


def relay_cases(page_size: int) -> Iterator[tuple[int, int, Case, Case]]:
    """(batch, prefix, plain, shared)."""
    for batch in BATCHES:
        for prefix in PREFIXES:
            plain = KVRanges.of_sequences(batch, prefix + OWN, 1, page_size)
            shared = sharing(batch, prefix, OWN, page_size)
            name = f"{batch} x ({prefix} + {OWN})"
            yield (
                batch,
                prefix,
                Case(f"{name}, each its own", MULTI_HEAD, plain, "auto"),
                Case(f"{name}, read once", MULTI_HEAD, shared, "auto"),
            )


def other_cases(page_size: int) -> Iterator[Case]:
    for tokens in (4096, 16384):
        prompt = KVRanges.of_sequences(1, tokens, tokens, page_size)
        yield Case(f"prefill of {tokens}", GROUPED, prompt, "auto")
    for kv_format in ("auto", "fp8", "int8"):
        name = f"decode 64 x 4096, {kv_format.replace('auto', 'bf16')} KV"
        yield Case(name, GROUPED, KVRanges.of_sequences(64, 4096, 1, page_size), kv_format)


def work_in(case: Case, page_size: int) -> Work:
    kv_format = "same" if case.kv_format == "auto" else case.kv_format
    layout = PageLayout(case.shape, page_size, torch.bfloat16, kv_format)
    return work_of(case.ranges, case.shape, layout.num_bytes, page_size)


Timer = Callable[[Case | LayerCase], float]


def report(card: Card, seconds: Timer | None, page_size: int = 32) -> str:
    """Markdown. Without ``seconds``, the least time on ``card`` stands for it."""
    timed = "measured" if seconds else "least time by the roofline"
    lines = [
        f"# Attention on {card.name}",
        "",
        f"Speed-up of reading a prefix once ({timed}); in brackets what RelayAttention's authors "
        "measured on an A40.",
        "",
    ]
    lines += ["| batch | " + " | ".join(f"s={s}" for s in PREFIXES) + " |"]
    lines += ["|---" * (len(PREFIXES) + 1) + "|"]

    def time_of(case: Case) -> float:
        return seconds(case) if seconds else least_seconds(work_in(case, page_size), card)

    cells: dict[int, list[str]] = {}
    for batch, prefix, plain, shared in relay_cases(page_size):
        known = AUTHORS[batch][PREFIXES.index(prefix)]
        cells.setdefault(batch, []).append(f"{time_of(plain) / time_of(shared):.2f} ({known})")
    lines += [f"| {batch} | " + " | ".join(line) + " |" for batch, line in cells.items()]
    lines += ["", f"Peaks: {card.flops / 1e12:.0f} TFLOP/s, {card.bytes / 1e12:.2f} TB/s.", ""]
    lines += ["| case | MB | GFLOP | least us | us | of the limit | TFLOP/s | GB/s |"]
    lines += ["|---" * 8 + "|"]
    layer = [
        *layer_cases(64, 2),
        *(case for case in layer_cases(64, 2, kv_format="fp8") if "KV write" in case.name),
        *layer_cases(8192, 2),
    ]
    cases: list[tuple[Case | LayerCase, Work]] = [
        *((case, work_in(case, page_size)) for case in other_cases(page_size)),
        *((case, case.work) for case in layer),
    ]
    for case, work in cases:
        least = least_seconds(work, card)
        taken = seconds(case) if seconds else least
        lines.append(
            f"| {case.name} | {_short(work.bytes / 1e6)} | {_short(work.flops / 1e9)} "
            f"| {_short(least * 1e6)} | {_short(taken * 1e6)} | {least / taken:.0%} "
            f"| {_short(work.flops / taken / 1e12)} | {work.bytes / taken / 1e9:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def measure_card(backend: Any) -> Card:
    """Peaks of the card at hand: a large copy, a large matrix product."""
    where = backend.on.torch_device
    block = torch.empty(1 << 30, dtype=torch.uint8, device=where)
    target = torch.empty_like(block)
    copied = 2 * block.numel() / backend.on.seconds(lambda: target.copy_(block))
    size = 8192
    a = torch.randn(size, size, device=where).to(torch.bfloat16)
    product = 2 * size**3 / backend.on.seconds(lambda: a @ a)
    return Card(backend.on.name, product, copied)


def timer(page_size: int, flash: bool) -> Timer:
    """Times cases on the card, each in a pool of its own."""
    from headstart.kernels.gpu.backend import GpuBackend
    from headstart.kernels.gpu.device import find_device
    from headstart.kernels.gpu.flash import find_flash
    from headstart.kernels.gpu.tuning import Tuner

    device = find_device()
    tuner = Tuner(device)

    def seconds(case: Case | LayerCase) -> float:
        backend = GpuBackend(
            device,
            tuner,
            weights="bf16",
            kv_format=case.kv_format,
            page_size=page_size,
            flash_attn=find_flash() if flash else None,
        )
        return device.seconds(case.ready(backend))

    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--roofline", action="store_true", help="no measuring: an H100's limits")
    parser.add_argument("--page-size", type=int, default=32, help="tokens of a KV page")
    parser.add_argument("--flash", action="store_true", help="with flash-attn where it is faster")
    args = parser.parse_args(argv)
    if args.roofline:
        print(report(H100, None, args.page_size), end="")
        return 0
    from headstart.kernels.devices import load_backend

    try:
        backend = load_backend("gpu", isa="auto", weights="bf16", threads=1)
    except ValueError as error:
        print(f"error: {error} (--roofline needs none)", file=sys.stderr)
        return 1
    card = measure_card(backend)
    text = report(card, timer(args.page_size, args.flash), args.page_size)
    name = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")
    path = RESULTS / f"gpu-{name}{'-flash' if args.flash else ''}.md"
    path.write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
