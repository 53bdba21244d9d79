"""int8 linear layers: our kernel against oneDNN's, in turn, on one model's matrices.

    python -m headstart.bench.linear [--threads 2]

All matrices of one step of SmolLM2-135M (30 layers; the head up to 64 rows), so that weights come
from memory as they do in a model. A B A B: each figure is the best of the alternating runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from headstart.kernels.cpu.backend import CpuBackend, Rows
from headstart.kernels.devices import instruction_sets

HIDDEN, INNER, QKV, VOCAB, LAYERS = 576, 1536, 960, 49152, 30
SHAPES = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
ROWS = (1, 4, 16, 64, 512)
ROUNDS = 7


def alternate(a: Callable[[], object], b: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the best run of each, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, into in zip((a, b), times, strict=True):
            begin = time.perf_counter()
            run()
            into.append(time.perf_counter() - begin)
    return min(times[0][1:]), min(times[1][1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headstart.bench.linear")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    isa = instruction_sets()[0]
    backend = CpuBackend(isa=isa, weights="int8", threads=threads, page_size=32)

    def random_weight(shape: tuple[int, int]) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    shapes = [shape for _ in range(LAYERS) for shape in SHAPES] + [(VOCAB, HIDDEN)]
    ours = [backend.quantized_weight(random_weight(s), torch.rand(s[0]), None) for s in shapes]
    theirs = [
        (torch.ops.onednn.qlinear_prepack(random_weight(s), None), torch.rand(s[0])) for s in shapes
    ]
    zeros = {s[0]: torch.zeros(s[0], dtype=torch.int32) for s in shapes}
    print(f"{threads} threads, {backend.isa}\n")
    print("| rows | headstart ms | GB/s | Gop/s | oneDNN ms | ratio |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        count = len(shapes) - (rows > 64)  # nobody wants the logits of every prompt token
        # A result is valid until the next call, so each size gets a backend of its own.
        inputs = {
            size: CpuBackend(isa=isa, weights="int8", threads=threads, page_size=32).norm(
                torch.randn(rows, size), None, torch.ones(size), 1e-5
            )
            for size in (HIDDEN, INNER)
        }
        raw = {size: torch.randint(0, 256, (rows, size), dtype=torch.uint8) for size in inputs}

        def run_ours(count: int = count, inputs: dict[int, Rows] = inputs) -> None:
            for weight, (_, size) in zip(ours[:count], shapes, strict=False):
                backend.linear(inputs[size], weight)

        def run_theirs(count: int = count, raw: dict[int, Tensor] = raw) -> None:
            for (weight, scale), (out, size) in zip(theirs[:count], shapes, strict=False):
                torch.ops.onednn.qlinear_pointwise(
                    raw[size], 1.0, 128, weight, scale, zeros[out],
                    None, 1.0, 0, torch.float32, "none", [], "",
                )  # fmt: skip

        a, b = alternate(run_ours, run_theirs)
        elements = sum(n * k for n, k in shapes[:count])
        print(
            f"| {rows} | {a * 1e3:.2f} | {elements / a / 1e9:.1f} | "
            f"{2 * rows * elements / a / 1e9:.0f} | {b * 1e3:.2f} | {b / a:.2f} |"
        )


if __name__ == "__main__":
    main()
