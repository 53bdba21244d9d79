"""What choosing tokens costs: `python -m headstart.bench.sampling`.

The sampler on random logits, with the CPU's kernels and with the reference (torch and numpy), in
turn; medians over the rounds. Beside them: reading the logits once at the memory's speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from typing import Any

import torch

from headstart.bench.report import markdown
from headstart.bench.steps import reading_speed
from headstart.engine.process.cores import usable_cores
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampler
from headstart.engine.sequence import Sequence
from headstart.kernels.devices import instruction_sets, load_backend
from headstart.kernels.processor import processor_name

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 log-probabilities": {"temperature": 0.0, "logprobs": 5},
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50, top_p 0.9, frequency_penalty": {
        "top_k": 50,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headstart.bench.sampling")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", default=instruction_sets()[0])
    args = parser.parse_args()
    cpu = load_backend("cpu", isa=args.isa, weights="f32", threads=args.threads)
    torch.set_num_threads(args.threads)
    samplers = {
        "kernels": Sampler(args.vocabulary, backend=cpu),
        "reference": Sampler(args.vocabulary),
    }
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(args.rows, args.vocabulary, generator=generator) * 3
    limit = logits.numel() * 4 / reading_speed()
    rows = []
    for name, settings in SETTINGS.items():
        sequences = [
            Sequence(
                i, array("i", range(1500)), 1000, SamplingParams(max_tokens=9, seed=i, **settings)
            )
            for i in range(args.rows)
        ]
        times: dict[str, list[float]] = {kind: [] for kind in samplers}
        for _ in range(args.rounds):
            for kind, sampler in samplers.items():
                begin = time.perf_counter()
                sampler.sample(logits, sequences)
                times[kind].append((time.perf_counter() - begin) * 1e3)
        kernels, reference = (statistics.median(times[kind][1:]) for kind in samplers)
        rows.append([name, f"{kernels:.2f}", f"{reference:.2f}", f"{reference / kernels:.1f}"])
    print(f"{processor_name()}, {args.isa}, {args.threads} threads")
    print(f"{args.rows} rows of {args.vocabulary:,}; read once: {limit * 1e3:.2f} ms\n")
    print(markdown(["settings", "kernels ms", "reference ms", "ratio"], rows))


if __name__ == "__main__":
    main()
