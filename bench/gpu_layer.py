"""The kernels of a layer beside attention: what each moves and computes, and how to run it.

Sizes are those of Llama 3 8B. Bytes are what a kernel reads and writes if it reads everything once
(LoRA weights: once a tile of rows), FLOPs as its file counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from headstart.kernels.backend import AttentionShape, LoraPart, RopeTable

if TYPE_CHECKING:
    from headstart.kernels.gpu.backend import GpuBackend


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel has to move and to compute."""

    bytes: int
    flops: int


class Sizes(NamedTuple):
    """Of a model's layer; ``rank`` and ``adapters`` of its LoRA."""

    hidden: int = 4096
    inner: int = 14336
    shape: AttentionShape = AttentionShape(32, 8, 128)
    rank: int = 16
    adapters: int = 8
    parts: int = 8  # of a row's attention, to be merged


class LayerCase(NamedTuple):
    """``ready(backend)`` makes the tensors, and returns what is to be timed."""

    name: str
    work: Work
    ready: Callable[[GpuBackend], Callable[[], Any]]
    kv_format: str = "auto"


def layer_cases(
    rows: int, width: int, sizes: Sizes | None = None, kv_format: str = "auto"
) -> Iterator[LayerCase]:
    """Of ``rows`` rows, activations being ``width`` bytes an element."""
    sizes = sizes or Sizes()
    yield _norm(rows, width, sizes)
    yield _rope(rows, width, sizes, kv_format)
    yield _silu(rows, width, sizes)
    yield _merge(rows, width, sizes)
    yield _lora(rows, width, sizes)


def _norm(rows: int, width: int, sizes: Sizes) -> LayerCase:
    size = sizes.hidden

    def ready(backend: GpuBackend) -> Callable[[], Any]:
        residual, weight = _random(backend, rows, size).float(), _random(backend, size).float()
        delta = _random(backend, rows, size)
        return lambda: backend.norm(residual, delta, weight, 1e-5)

    # The residual is float32, read and written.
    work = Work(rows * size * (8 + 2 * width) + 4 * size, 5 * rows * size)
    return LayerCase(f"residual and norm, {rows} rows", work, ready)


def _rope(rows: int, width: int, sizes: Sizes, kv_format: str) -> LayerCase:
    shape = sizes.shape
    written = width if kv_format == "auto" else 1
    scale = 0 if kv_format == "auto" else 4
    elements = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    kv_bytes = 2 * shape.kv_heads * (written * shape.head_dim + scale)

    def ready(backend: GpuBackend) -> Callable[[], Any]:
        qkv = _random(backend, rows, elements)
        angles = [_random(backend, rows, shape.head_dim // 2).float() for _ in range(2)]
        rope = RopeTable(*angles)
        places = torch.arange(rows, dtype=torch.int32, device=qkv.device)
        kv = backend.allocate_kv(shape, 1, -(-rows // backend.page_size))
        return lambda: backend.rope_and_store(
            qkv, None, None, 1e-5, rope, places, places, shape, kv, 0
        )

    # A row's cosines and sines serve all of its heads.
    moved = width * (elements + shape.heads * shape.head_dim) + kv_bytes + 4 * shape.head_dim + 8
    name = f"rope and KV write ({kv_format.replace('auto', '16 bits')}), {rows} rows"
    return LayerCase(name, Work(rows * moved, 10 * rows * elements), ready, kv_format)


def _silu(rows: int, width: int, sizes: Sizes) -> LayerCase:
    size = sizes.inner

    def ready(backend: GpuBackend) -> Callable[[], Any]:
        gate_up = _random(backend, rows, 2 * size)
        return lambda: backend.silu_mul(gate_up)

    work = Work(3 * rows * size * width, 5 * rows * size)
    return LayerCase(f"SiLU and multiply, {rows} rows", work, ready)


def _merge(rows: int, width: int, sizes: Sizes) -> LayerCase:
    heads, head_dim, count = sizes.shape.heads, sizes.shape.head_dim, sizes.parts

    def ready(backend: GpuBackend) -> Callable[[], Any]:
        # Here, not above: who only counts needs no Triton.
        from headstart.kernels.gpu.attention import merge_parts

        parts = _random(backend, rows * count, heads, head_dim).float()
        lse = _random(backend, rows * count, heads).float()
        out = _random(backend, rows, heads * head_dim)
        merged = torch.empty(rows, heads, device=out.device)
        places = torch.arange(rows + 1, dtype=torch.int32, device=out.device)
        slots = torch.arange(rows * count, dtype=torch.int32, device=out.device)

        def run() -> torch.Tensor:
            merge_parts(backend.on, parts, lse, places[:rows], places * count, slots, out, merged)
            return out

        return run

    moved = 4 * count * (head_dim + 1) + width * head_dim + 4
    work = Work(rows * heads * moved, 4 * rows * heads * count * head_dim)
    return LayerCase(f"merge of {count} parts, {rows} rows", work, ready)


def _lora(rows: int, width: int, sizes: Sizes) -> LayerCase:
    """q, k and v of a layer, the rows in runs of one adapter."""
    shape, rank = sizes.shape, sizes.rank
    outputs = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    each = -(-rows // sizes.adapters)
    runs = [range(first, min(first + each, rows)) for first in range(0, rows, each)]

    def ready(backend: GpuBackend) -> Callable[[], Any]:
        firsts = np.cumsum([0, *outputs])[:-1].tolist()
        adapters = []
        for _ in runs:
            parts = [
                LoraPart(first, torch.randn(rank, sizes.hidden), torch.randn(size, rank))
                for first, size in zip(firsts, outputs, strict=True)
            ]
            adapters.append(backend.lora_adapter([parts]))
        plan = backend.plan_lora(
            adapters, [np.arange(r.start, r.stop, dtype=np.int32) for r in runs]
        )
        x, y = _random(backend, rows, sizes.hidden), _random(backend, rows, sum(outputs))

        def run() -> torch.Tensor:
            backend.add_lora(x, y, plan, 0)
            return y

        return run

    tiles = sum(-(-len(r) // 16) for r in runs)  # lora.TILE_ROWS
    weights = tiles * rank * (3 * sizes.hidden + sum(outputs)) * width
    # x once a part, what is between twice, y read and written.
    between = 2 * 3 * rank * 4
    moved = weights + rows * (3 * sizes.hidden * width + between + 2 * sum(outputs) * width)
    flops = 2 * rows * rank * (3 * sizes.hidden + sum(outputs))
    name = f"LoRA of q, k, v, rank {rank}, {len(runs)} adapters, {rows} rows"
    return LayerCase(name, Work(moved, flops), ready)


def _random(backend: GpuBackend, *size: int) -> torch.Tensor:
    return torch.randn(size, device=backend.on.torch_device).to(backend.dtype)
