"""What the CPU kernels take and leave: rows, weights, pages, plans, and scratch.

Tensors cross to C++ as addresses: whoever has one of these holds the memory they point into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import _cpu
from headstart.kernels.backend import AttentionShape
from headstart.kernels.memory import PrivateMemory, SharedMemory
from headstart.kernels.packing import Int8Panels

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""``Type`` of kernels.h."""
PARTIALS = 64
"""Partial results are held in multiples of it."""


class Rows(NamedTuple):
    """Rows on their way into ``linear``; ``scales [rows]`` only for uint8 (zero point 128)."""

    data: Tensor
    scales: Tensor
    data_ptr: int
    scales_ptr: int
    rows: int


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """An int8 weight and the addresses of what it consists of (linear.h)."""

    panels: Int8Panels
    weight_ptr: int
    scale_ptr: int
    sums_ptr: int
    bias_ptr: int
    in_features: int
    out_features: int


class KVPool(NamedTuple):
    """All layers' pages, the address of each layer's first, and the memory they lie in."""

    data: Tensor
    layer_ptrs: list[int]
    memory: SharedMemory | PrivateMemory
    page_bytes: int

    @property
    def layer_bytes(self) -> int:
        """From a layer's pages to the next one's."""
        return self.data.shape[1] * self.data.element_size()


class AttentionPlan(NamedTuple):
    """``pieces``: runs of rows, the first row of each and its plan (plan.h)."""

    num_rows: int
    shape: AttentionShape
    pieces: list[tuple[int, _cpu.AttentionPlan]]


class Query(NamedTuple):
    data: Tensor
    ptr: int


def partial_bytes(shape: AttentionShape) -> int:
    """Of a row's partial result: the output, its lse and the lanes of its sum."""
    return shape.heads * (shape.head_dim + 1 + _cpu.SUM_LANES) * 4


def held_partials(count: int) -> int:
    """``count`` and what is held beside it: buffers of few different sizes are kept then."""
    return -(-count // PARTIALS) * PARTIALS


class Scratch:
    """Memory that operations write their results into, by name: each is valid until the next one
    of its name. ``rows_dtype``: of what is handed to ``linear``."""

    def __init__(self, rows_dtype: torch.dtype) -> None:
        self._rows_dtype = rows_dtype
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], tuple[Tensor, int]] = {}

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """``[rows, columns]`` of scratch called ``name``, and its address; its content is stale."""
        key = (name, rows, columns)
        view = self._views.get(key)
        if view is not None:
            return view
        base = self._buffers.get(name)
        if base is None or base.numel() < rows * columns:
            base = torch.empty(rows * columns, dtype=dtype)
            self._buffers[name] = base
            self._views = {k: v for k, v in self._views.items() if k[0] != name}
        tensor = base[: rows * columns].view(rows, columns)
        view = (tensor, tensor.data_ptr())
        self._views[key] = view
        return view

    def rows(self, name: str, rows: int, columns: int) -> Rows:
        data, data_ptr = self.buffer(name, rows, columns, self._rows_dtype)
        scales, scales_ptr = self.buffer(name + ".scales", rows, 1, torch.float32)
        return Rows(data, scales, data_ptr, scales_ptr, rows)

    def partials(self, plan: _cpu.AttentionPlan, shape: AttentionShape) -> tuple[int, int, int]:
        """Addresses of a plan's partial results: outputs, their lse, the lanes of their sums."""
        count, heads = held_partials(plan.num_partials), shape.heads
        columns = {"": heads * shape.head_dim, ".lse": heads, ".sum": heads * _cpu.SUM_LANES}
        out, lse, sums = (
            self.buffer("partial" + name, count, size, torch.float32)[1]
            for name, size in columns.items()
        )
        return out, lse, sums
