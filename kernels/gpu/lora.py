"""LoRA terms of rows that belong to different adapters, in two launches (Punica, arXiv 2310.18547).

    rows of adapter A     ┌ tile 0 ┐ ┌ tile 1 ┐      16 rows at most, of one adapter
    rows of adapter B                          ┌ tile 2 ┐
                            │ shrink: hidden = x[rows] down^T     for each part (q, k, v of qkv)
                            │ expand: y[rows, first...] += hidden up^T

An adapter keeps a table of addresses; a plan has the address of each adapter's table. So a launch
reads adapters of any number, rank and layout, and none has to be copied beside another.

The compiler cannot know where an address from a table points: it is told that matrices begin at
16 bytes, and ranks are padded to multiples of 8 with zeros, so that rows do as well. Else weights
would be read 2 bytes at a time, and not ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from headstart.kernels.backend import LoraPart
from headstart.kernels.gpu.device import Config, Device
from headstart.kernels.ranges import IntArray

MOST_PARTS = 3
"""Of one dense layer: q, k and v."""

TILE_ROWS = 16
SHRINK = Config(TILE_ROWS, 256, warps=4, stages=3)
"""One program goes through all of an input's columns: wide steps, several of them under way."""
SHRINK_FLOAT32 = Config(TILE_ROWS, 64, warps=4, stages=3)
"""float32 products are three of tf32, whose wide steps would spill registers."""
EXPAND = Config(TILE_ROWS, 64, warps=4, stages=2)
RANKS = 16
"""Ranks a program computes at a time."""
RANK_STEP = 8
"""Ranks are padded to a multiple of it: 16 bytes of a 16-bit type."""


@triton.jit(do_not_specialize_on_alignment=["tiles", "rows"])
def shrink(
    x, hidden, tables, tiles, rows, x_stride, table_at, hidden_stride,
    SIZE: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, parts, blocks of ranks): hidden ``[entries, parts, ranks]``, float32.

        x [rows of the tile, SIZE]  ·  down [BLOCK_R, SIZE]^T   in steps of BLOCK_K

    Bytes: down once a tile, x once a block of ranks; FLOPs: 2 * rows * rank * size.
    """
    tile = tiles + tl.program_id(0) * 3
    part = tl.program_id(1)
    adapter = tl.load(tables + tl.load(tile)).to(tl.pointer_type(tl.int64))
    fields = adapter + table_at + part * 5
    rank = tl.multiple_of(tl.load(fields + 2).to(tl.int32), 8)  # RANK_STEP
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    down = tl.multiple_of(tl.load(fields).to(tl.pointer_type(x.dtype.element_ty)), 16)
    first = tl.load(tile + 1)
    i = tl.arange(0, TILE)
    inside = i < tl.load(tile + 2)
    row = tl.load(rows + first + i, mask=inside, other=0).to(tl.int64)
    acc = tl.zeros((TILE, BLOCK_R), tl.float32)
    for begin in tl.range(0, SIZE, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        within = k < SIZE
        a = tl.load(x + row[:, None] * x_stride + k[None, :],
                    mask=inside[:, None] & within[None, :], other=0.0)  # fmt: skip
        b = tl.load(down + r[:, None] * SIZE + k[None, :],
                    mask=(r < rank)[:, None] & within[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    at = ((first + i) * PARTS + part)[:, None] * hidden_stride + r[None, :]
    tl.store(hidden + at, acc, mask=inside[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize_on_alignment=["tiles", "rows"])
def expand(
    y, hidden, tables, tiles, rows, y_stride, table_at, hidden_stride,
    PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, parts, blocks of outputs): ``y[rows, first + n] += hidden up^T``.

        hidden [rows of the tile, rank]  ·  up [BLOCK_N, rank]^T   in steps of BLOCK_R

    Bytes: up once a tile, y twice; FLOPs: 2 * rows * rank * outputs.
    """
    tile = tiles + tl.program_id(0) * 3
    part = tl.program_id(1)
    adapter = tl.load(tables + tl.load(tile)).to(tl.pointer_type(tl.int64))
    fields = adapter + table_at + part * 5
    rank = tl.multiple_of(tl.load(fields + 2).to(tl.int32), 8)  # RANK_STEP
    outputs = tl.load(fields + 4).to(tl.int32)
    if rank == 0 or tl.program_id(2) * BLOCK_N >= outputs:
        return
    DTYPE: tl.constexpr = y.dtype.element_ty
    up = tl.multiple_of(tl.load(fields + 1).to(tl.pointer_type(DTYPE)), 16)
    first = tl.load(tile + 1)
    i = tl.arange(0, TILE)
    inside = i < tl.load(tile + 2)
    row = tl.load(rows + first + i, mask=inside, other=0).to(tl.int64)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((TILE, BLOCK_N), tl.float32)
    for begin in tl.range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        at = ((first + i) * PARTS + part)[:, None] * hidden_stride + r[None, :]
        a = tl.load(hidden + at, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        b = tl.load(up + n[:, None] * rank + r[None, :],
                    mask=(n < outputs)[:, None] & (r < rank)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(a.to(DTYPE), tl.trans(b), acc, input_precision=PRECISION)
    column = tl.load(fields + 3) + n
    at = y + row[:, None] * y_stride + column[None, :]
    mask = inside[:, None] & (n < outputs)[None, :]
    before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (before + acc).to(DTYPE), mask=mask)


class GpuAdapter:
    """An adapter's terms on the device, and a table of them: int64 ``[layers, MOST_PARTS, 5]``
    of down's address, up's address, padded rank, first output and outputs. Rank 0: no such part.

    Raises ValueError for a layer of more parts.
    """

    def __init__(
        self, layers: Sequence[Sequence[LoraPart]], dtype: torch.dtype, where: torch.device
    ) -> None:
        self._tensors: list[Tensor] = []  # kept for their addresses
        table = torch.zeros(len(layers), MOST_PARTS, 5, dtype=torch.int64)
        self.rank = self.outputs = 0
        for layer, parts in zip(table, layers, strict=True):
            if len(parts) > MOST_PARTS:
                raise ValueError(f"a dense layer has {len(parts)} LoRA parts; {MOST_PARTS} may be")
            for entry, part in zip(layer, parts, strict=False):
                (rank, size), outputs = part.down.shape, len(part.up)
                padded = -(-rank // RANK_STEP) * RANK_STEP
                down = torch.zeros(padded, size, dtype=dtype, device=where)
                up = torch.zeros(outputs, padded, dtype=dtype, device=where)
                down[:rank], up[:, :rank] = part.down, part.up
                self._tensors += (down, up)
                fields = (down.data_ptr(), up.data_ptr(), padded, part.first, outputs)
                entry.copy_(torch.tensor(fields))
                self.rank = max(self.rank, padded)
                self.outputs = max(self.outputs, outputs)
        self.table = table.to(where)


class LoraPlan(NamedTuple):
    """tables int64 ``[adapters]``: addresses; tiles int32 ``[tiles, 3]``: adapter, first entry,
    entries; rows int32 ``[entries]``. ``adapters`` are kept for their addresses."""

    tables: Tensor
    tiles: Tensor
    rows: Tensor
    num_tiles: int
    rank: int
    outputs: int
    adapters: Sequence[GpuAdapter]


def plan_lora(device: Device, adapters: Sequence[GpuAdapter], rows: Sequence[IntArray]) -> LoraPlan:
    """``rows[i]`` get the terms of ``adapters[i]``."""
    tiles, first = [], 0
    for index, some in enumerate(rows):
        tiles += [
            (index, first + begin, min(TILE_ROWS, len(some) - begin))
            for begin in range(0, len(some), TILE_ROWS)
        ]
        first += len(some)
    flat = np.array(tiles, dtype=np.int32).ravel()
    both = device.upload(torch.from_numpy(np.concatenate([flat, *rows]).astype(np.int32)))
    addresses = [adapter.table.data_ptr() for adapter in adapters]
    tables = device.upload(torch.tensor(addresses, dtype=torch.int64))
    return LoraPlan(
        tables,
        both[: len(flat)],
        both[len(flat) :],
        len(tiles),
        max((adapter.rank for adapter in adapters), default=0),
        max((adapter.outputs for adapter in adapters), default=0),
        adapters,
    )


def add_lora(device: Device, x: Tensor, y: Tensor, plan: LoraPlan, layer: int) -> None:
    """Add the terms of dense layer ``layer`` to ``y [rows, out]``, of x's type, in place."""
    if not plan.num_tiles or not plan.rank:
        return
    ranks = -(-plan.rank // RANKS) * RANKS
    hidden = torch.empty(len(plan.rows), MOST_PARTS, ranks, device=x.device)
    precision = "tf32x3" if x.dtype is torch.float32 else "tf32"
    table_at = layer * MOST_PARTS * 5
    config = SHRINK_FLOAT32 if x.dtype is torch.float32 else SHRINK
    device.launch(
        shrink, (plan.num_tiles, MOST_PARTS, ranks // RANKS), config,
        x, hidden, plan.tables, plan.tiles, plan.rows, x.stride(0), table_at, ranks,
        SIZE=x.shape[1], PARTS=MOST_PARTS, TILE=TILE_ROWS, BLOCK_K=config.block_n,
        BLOCK_R=RANKS, PRECISION=precision,
    )  # fmt: skip
    outputs = min(plan.outputs, y.shape[1])
    device.launch(
        expand, (plan.num_tiles, MOST_PARTS, -(-outputs // EXPAND.block_n)), EXPAND,
        y, hidden, plan.tables, plan.tiles, plan.rows, y.stride(0), table_at, ranks,
        PARTS=MOST_PARTS, TILE=TILE_ROWS, BLOCK_N=EXPAND.block_n, BLOCK_R=RANKS,
        PRECISION=precision,
    )  # fmt: skip
