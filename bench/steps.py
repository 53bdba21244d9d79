"""What a step costs, op by op, against what this machine was measured to give.

    python -m headstart.bench.steps [MODEL] [--weights int8] [--kv-format bf16] [--isa avx2]
        [--threads 2] [--json FILE]

Two tables: decode steps over batch size and context (every sequence with pages of its own, nothing
shared), and prefill chunks over their start. For each, the time of the step: its layers in one call
where the backend has that (kernels/cpu/layers.py), and one by one. Then of its parts, and for the
two that matter the rate reached:

    linear   bytes of weights read and multiply-adds done, one pass over all matrices
    attend   bytes of KV read and multiply-adds done

Peaks are measured first: reading memory, float32 and bf16 products (torch), int8 products (torch's
oneDNN).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headstart.engine.batch import Batch, build_batch
from headstart.engine.config import default_home
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.runner import ModelRunner, attention_shape, load_decoder
from headstart.engine.models.store import resolve
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.backend import Backend
from headstart.kernels.devices import instruction_sets, load_backend

BATCHES = (1, 4, 16, 64)
CONTEXTS = (256, 1024, 2048, 4096, 8192)
CHUNK_STARTS = (0, 512, 1536, 3584, 7680)
CHUNK = 512
REPEATS = 5


class TimedBackend:
    """A backend that adds up the time of each of its operations."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.seconds: dict[str, float] = defaultdict(float)

    def fuse(self, *args: object) -> None:
        """Its operations are to be called one by one."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if not callable(value):
            return value

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = value(*args)
            self.seconds[name] += time.perf_counter() - begin
            return result

        # Found on the instance from now on, so that the look-up costs nothing.
        setattr(self, name, timed)
        return timed


def best(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The quickest of some runs, in seconds: what the machine can do, noise aside."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def reading_speed() -> float:
    """Bytes a second that torch's threads read from memory."""
    words = torch.ones(1 << 26)
    return 4 * words.numel() / best(lambda: words.sum())


def measure_peaks(threads: int) -> dict[str, float]:
    """GB/s of reading memory, GFLOP/s of float32 and bf16 products, Gop/s of int8 ones."""
    torch.set_num_threads(threads)
    size = 2048
    f = torch.randn(size, size)
    a = torch.randn(size, size, dtype=torch.bfloat16)
    x = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    w = torch.ops.onednn.qlinear_prepack(
        torch.randint(-127, 127, (size, size), dtype=torch.int8), None
    )
    scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)

    def int8_product() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, w, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    flops = 2 * size**3
    return {
        "read_gb_s": reading_speed() / 1e9,
        "f32_gflop_s": flops / best(lambda: f @ f.T) / 1e9,
        "bf16_gflop_s": flops / best(lambda: a @ a.T) / 1e9,
        "int8_gop_s": flops / best(int8_product) / 1e9,
    }


def attention_peak(peaks: dict[str, float], isa: str) -> float:
    """GFLOP/s that attention's arithmetic is limited to: float32's, but with units for bf16."""
    return peaks["bf16_gflop_s" if isa == "avx512_bf16" else "f32_gflop_s"]


class Bench:
    """A model with a pool full of something, and batches made by hand."""

    def __init__(self, folder: Path, backend: Backend, weights: str, tokens: int) -> None:
        self.config = ModelConfig.from_folder(folder)
        self.timed = TimedBackend(backend)
        self.page_size = backend.page_size
        decoder = load_decoder(folder, self.config, self.timed, weights, max(CONTEXTS))
        self.served = load_decoder(folder, self.config, backend, weights, max(CONTEXTS))
        self.num_pages = tokens // self.page_size
        self.runner = ModelRunner(decoder, self.timed, self.num_pages)
        # Untouched memory reads from one page of zeros: write it, as KV would have been.
        self.runner.kv.data.view(torch.int16).fill_(0x3C00)
        shape = attention_shape(self.config)
        self.kv_bytes = backend.kv_bytes_per_page(shape, self.config.num_layers) / self.page_size
        assert decoder.head is not None
        linears = [m for layer in decoder.layers for m in _linears(layer)] + [decoder.head]
        size = {"f32": 4, "bf16": 2, "int8": 1}[weights]
        self.weight_elements = sum(m.in_features * m.out_features for m in linears)
        self.head_elements = decoder.head.in_features * decoder.head.out_features
        self.weight_bytes = self.weight_elements * size

    def batch(self, count: int, start: int, num_tokens: int) -> Batch:
        """``count`` sequences with their own pages, each computing ``num_tokens`` at ``start``."""
        each = -(-(start + num_tokens) // self.page_size)
        entries = []
        for i in range(count):
            tokens = array("i", range(start + num_tokens))
            seq = Sequence(i, tokens, len(tokens), SamplingParams(max_tokens=1))
            # Strided, so that neighbours in a sequence are not neighbours in memory.
            seq.pages = [(i + k * count) % self.num_pages for k in range(each)]
            entries.append(ScheduledSequence(seq, start, num_tokens, True))
        return build_batch(entries, self.page_size)

    def measure(self, batch: Batch, visible: int) -> dict[str, float]:
        """Milliseconds of the step and its parts, and the rates of linear layers and attention.

        visible: query-key pairs per head, over all rows.
        """
        self.runner.run(batch)
        times, served = [], []
        parts: dict[str, float] = {}
        for _ in range(REPEATS):
            begin = time.perf_counter()
            self.served.forward(batch, self.runner.kv)
            served.append(time.perf_counter() - begin)
            self.timed.seconds.clear()
            begin = time.perf_counter()
            self.runner.run(batch)
            times.append(time.perf_counter() - begin)
            if times[-1] == min(times):
                parts = dict(self.timed.seconds)
        config, rows = self.config, batch.num_rows
        logits = rows if batch.logit_rows is None else len(batch.logit_rows)
        linear_ops = 2 * (rows * (self.weight_elements - self.head_elements))
        linear_ops += 2 * logits * self.head_elements
        attend_ops = 4 * visible * config.num_heads * config.head_dim * config.num_layers
        step = min(times)
        named = ("linear", "attend", "norm", "silu_mul", "rope_and_store")
        return {
            "step": min(served) * 1e3,
            "one by one": step * 1e3,
            **{name: parts.get(name, 0.0) * 1e3 for name in named},
            "other": (step - sum(parts.get(name, 0.0) for name in named)) * 1e3,
            "linear_gb_s": self.weight_bytes / parts["linear"] / 1e9,
            "linear_gop_s": linear_ops / parts["linear"] / 1e9,
            "attend_gflop_s": attend_ops / parts["attend"] / 1e9,
            "attend_gb_s": sum(self._keys_read(batch)) * self.kv_bytes / parts["attend"] / 1e9,
        }

    def _keys_read(self, batch: Batch) -> Iterator[int]:
        ranges = batch.kv_ranges
        for i in range(len(ranges)):
            yield int(ranges.visible[ranges.row_start[i] : ranges.row_start[i + 1]].max())


def _linears(layer: Any) -> list[Any]:
    return [layer.qkv, layer.o, layer.gate_up, layer.down]


@contextmanager
def progress(what: str) -> Iterator[None]:
    print(what, end="\r", file=sys.stderr, flush=True)
    yield
    print("\033[2K", end="\r", file=sys.stderr, flush=True)


COLUMNS = (
    "step", "one by one", "linear", "attend", "norm", "silu_mul", "rope_and_store", "other",
    "linear_gb_s", "linear_gop_s", "attend_gb_s", "attend_gflop_s",
)  # fmt: skip


def table(title: str, heads: tuple[str, str], rows: list[dict[str, float]]) -> str:
    """A Markdown table; times in milliseconds."""
    names = [
        "step ms", "one by one", "linear", "attend", "norm", "SiLU", "RoPE+KV", "other",
        "linear GB/s", "linear Gop/s", "attend GB/s", "attend GFLOP/s",
    ]  # fmt: skip
    lines = [f"**{title}**", "", "| " + " | ".join([*heads, *names]) + " |"]
    lines.append("|" + "---:|" * (len(names) + 2))
    for row in rows:
        cells = [f"{row[h]:.0f}" for h in heads]
        cells += [f"{row[c]:.2f}" if i < 8 else f"{row[c]:.0f}" for i, c in enumerate(COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--weights", choices=("f32", "bf16", "int8"), default="int8")
    parser.add_argument("--kv-format", choices=("auto", "f32", "bf16"), default="auto")
    parser.add_argument("--isa", choices=instruction_sets(), default=instruction_sets()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-tokens", type=int, default=64 * 8192, help="KV tokens to allocate")
    parser.add_argument("--json", type=Path, help="write everything as one JSON line")
    args = parser.parse_args()
    with progress("measuring the machine"):
        peaks = measure_peaks(args.threads)
    backend = load_backend(
        "cpu",
        isa=args.isa,
        weights=args.weights,
        threads=args.threads,
        kv_format=args.kv_format,
    )
    print(
        f"{backend.device}, weights {args.weights}: memory {peaks['read_gb_s']:.0f} GB/s, "
        f"f32 {peaks['f32_gflop_s']:.0f} and bf16 {peaks['bf16_gflop_s']:.0f} GFLOP/s, "
        f"int8 {peaks['int8_gop_s']:.0f} Gop/s\n"
    )
    bench = Bench(resolve(args.model, default_home()), backend, args.weights, args.max_tokens)
    decode, prefill = [], []
    for count in BATCHES:
        for context in CONTEXTS:
            if count * context > args.max_tokens:
                continue
            with progress(f"decode {count} x {context}"):
                batch = bench.batch(count, context - 1, 1)
                result = bench.measure(batch, count * context)
            decode.append({"batch": count, "context": context, **result})
    for start in CHUNK_STARTS:
        with progress(f"prefill at {start}"):
            batch = bench.batch(1, start, CHUNK)
            result = bench.measure(batch, CHUNK * start + CHUNK * (CHUNK + 1) // 2)
        prefill.append({"rows": CHUNK, "start": start, **result})
    print(table("Decode", ("batch", "context"), decode), end="\n\n")
    print(table("Prefill", ("rows", "start"), prefill))
    if args.json:
        about = {"weights": args.weights, "device": backend.device}
        line = {"peaks": peaks, "decode": decode, "prefill": prefill, **about}
        args.json.write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
