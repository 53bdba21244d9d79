"""int8 linear layers: our kernels of every instruction set here, and oneDNN's, in turn.

    python -m headstart.bench.linear [--isa avx2 ...] [--threads 2] [--rows 1 16 512]

All matrices of one step of SmolLM2-135M (30 layers; the head up to 64 rows), so that weights come
from memory as they do in a model. A B C A B C: each figure is the best of the alternating runs.
Beside them the machine: memory's speed, which limits one row, and float32 products by torch, of
which instruction sets without VNNI reach twice as many in int8 (linear.h).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from headstart.bench.steps import best, reading_speed
from headstart.engine.process.cores import usable_cores
from headstart.kernels import _cpu
from headstart.kernels.cpu.backend import CpuBackend
from headstart.kernels.cpu.tensors import Rows
from headstart.kernels.devices import instruction_sets
from headstart.kernels.packing import pack_int8
from headstart.kernels.processor import processor_name

HIDDEN, INNER, QKV, VOCAB, LAYERS = 576, 1536, 960, 49152, 30
SHAPES = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
ROWS = (1, 2, 4, 8, 16, 64, 512)
ROUNDS = 5


def alternate(runs: list[Callable[[], object]]) -> list[float]:
    """Seconds of the best run of each, run in turn; the first of each does not count."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, into in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            into.append(time.perf_counter() - begin)
    return [min(seconds[1:]) for seconds in times]


class Ours:
    """The matrices of a step as one instruction set's kernels have them."""

    def __init__(self, isa: str, threads: int, shapes: list[tuple[int, int]]) -> None:
        self.name = isa
        self._backend = CpuBackend(isa=isa, weights="int8", threads=threads, page_size=32)
        self._weights = [
            self._backend.packed_weight(pack_int8(_random_weight(s), torch.rand(s[0]), None))
            for s in shapes
        ]

    def step(self, rows: int, count: int) -> Callable[[], object]:
        inputs = {}
        for size in (HIDDEN, INNER):
            data = torch.randint(1, 256, (rows, size), dtype=torch.int16).to(torch.uint8)
            scales = torch.rand(rows, 1)
            inputs[size] = Rows(data, scales, data.data_ptr(), scales.data_ptr(), rows)

        def run() -> None:
            for weight in self._weights[:count]:
                self._backend.linear(inputs[weight.in_features], weight)

        return run


class OneDnn:
    name = "oneDNN"

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self._shapes = shapes
        self._weights = [
            (torch.ops.onednn.qlinear_prepack(_random_weight(s), None), torch.rand(s[0]))
            for s in shapes
        ]
        self._zeros = {s[0]: torch.zeros(s[0], dtype=torch.int32) for s in shapes}

    def step(self, rows: int, count: int) -> Callable[[], object]:
        inputs = {
            size: torch.randint(0, 256, (rows, size), dtype=torch.uint8) for size in (HIDDEN, INNER)
        }

        def run() -> None:
            some = zip(self._weights[:count], self._shapes, strict=False)
            for (weight, scale), (out, size) in some:
                torch.ops.onednn.qlinear_pointwise(
                    inputs[size], 1.0, 128, weight, scale, self._zeros[out],
                    None, 1.0, 0, torch.float32, "none", [], "",
                )  # fmt: skip

        return run


def _random_weight(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headstart.bench.linear")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", nargs="+", choices=_cpu.supported(), default=instruction_sets())
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    a = torch.randn(2048, 2048)
    read = reading_speed() / 1e9
    flops = 2 * 2048**3 / best(lambda: a @ a.T) / 1e9
    # avx512_bf16 takes its int8 products from avx512_vnni.
    sets = [isa for isa in args.isa if isa != "avx512_bf16" or "avx512_vnni" not in args.isa]
    shapes = [shape for _ in range(LAYERS) for shape in SHAPES] + [(VOCAB, HIDDEN)]
    ours = [Ours(isa, args.threads, shapes) for isa in sets]
    every: list[Ours | OneDnn] = [*ours, OneDnn(shapes)]
    print(f"{processor_name()}, {args.threads} threads: memory {read:.1f} GB/s, ", end="")
    print(f"float32 {flops:.0f} GFLOP/s\n")
    print("| rows | who | ms | GB/s | of memory | Gop/s | of float32 | over oneDNN |")
    print("|---:|:--|---:|---:|---:|---:|---:|---:|")
    for rows in args.rows:
        count = len(shapes) - (rows > 64)  # nobody wants the logits of every prompt token
        elements = sum(n * k for n, k in shapes[:count])
        times = alternate([one.step(rows, count) for one in every])
        for one, seconds in zip(every, times, strict=True):
            speed, products = elements / seconds / 1e9, 2 * rows * elements / seconds / 1e9
            print(
                f"| {rows} | {one.name} | {seconds * 1e3:.2f} | {speed:.1f} | {speed / read:.0%} | "
                f"{products:.0f} | {products / flops:.2f} | {times[-1] / seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
