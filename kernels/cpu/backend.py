"""CpuBackend: the operations of Backend on the C++ kernels.

float32 and bf16 matrix products are torch's (oneDNN); int8 ones are ours (linear.h says how, and
bench/results/README.md why). Everything is called from one thread, so that torch and the kernels
share one OpenMP team. Tensors cross as addresses: this class keeps every buffer they point into.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart.kernels import _cpu
from headstart.kernels.backend import (
    AttentionShape,
    DenseLinear,
    Draws,
    HostMemory,
    LayerWeights,
    LoraPart,
    RopeTable,
    Top,
)
from headstart.kernels.cpu.layers import FusedLayers, q_scale
from headstart.kernels.cpu.tensors import (
    PARTIALS,
    TYPES,
    AttentionPlan,
    KVPool,
    PackedLinear,
    Query,
    Rows,
    Scratch,
    held_partials,
    partial_bytes,
)
from headstart.kernels.memory import Arena, PrivateMemory, SharedMemory
from headstart.kernels.packing import Int8Panels
from headstart.kernels.processor import processor_name
from headstart.kernels.ranges import IntArray, KVRanges, in_pieces

_DRAW_TYPES = (np.int32, np.float32, np.float32, np.int32, np.float64, np.float64)
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module has no name for it
_SPLIT_PAGES = 32  # pages whose keys leave one partial result of a row (plan.h)
_TILE_VECTORS = 96  # query heads that go through keys together (plan.cpp)

SCRATCH_BYTES = 64 << 20
"""Of partial results, beyond which the rows of a batch are attended to one run after the other: at
128k keys a row of an 8B model leaves 2.4 MB of them."""


@dataclass(frozen=True, slots=True)
class PackedLora:
    """An adapter's low-rank terms (lora_plan.h); the tensors are kept for their addresses."""

    adapter: _cpu.LoraAdapter
    tensors: list[Tensor]


class LoraPlan(NamedTuple):
    """Which rows get the terms of which adapter, and those adapters, which it points into."""

    plan: _cpu.LoraPlan
    adapters: Sequence[PackedLora]


def pack_lora(weight: Tensor, panel: int, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` to panels ``[out / panel][words of in][panel]``, zero-padded (lora_plan.h)."""
    word = 4 // dtype.itemsize
    pad = (0, -weight.shape[1] % word, 0, -weight.shape[0] % panel)
    padded = torch.nn.functional.pad(weight, pad).to(dtype)
    rows, columns = padded.shape
    panels = padded.view(rows // panel, panel, columns // word, word)
    return panels.permute(0, 2, 1, 3).contiguous()


ACTIVATIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
"""By the weight formats there are on this backend."""
KV_FORMATS = ("auto", "f32", "bf16")


def _tile_rows(shape: AttentionShape) -> int:
    return max(_TILE_VECTORS // shape.group, 1)


class CpuBackend(HostMemory):
    """See Backend. ``weights``: "f32", "bf16" or "int8". ``kv_format``: "f32", "bf16" or "auto",
    which is float32 for f32 weights, else bf16. ``shared``: whether other processes of this machine
    map its KV memory and have the same int8 weights mapped."""

    name = "cpu"

    def __init__(
        self,
        *,
        isa: str,
        weights: str,
        threads: int,
        page_size: int,
        kv_format: str = "auto",
        shared: bool = False,
    ) -> None:
        if page_size < 32 or page_size % 32:
            raise ValueError(
                f"page_size must be a positive multiple of 32 on this backend, got {page_size}"
            )
        if weights not in ACTIVATIONS:
            raise ValueError(
                f"the cpu backend has weights in {', '.join(ACTIVATIONS)}, not in {weights}"
            )
        if kv_format not in KV_FORMATS:
            raise ValueError(
                f"the cpu backend has KV in {', '.join(KV_FORMATS)}, not in {kv_format}"
            )
        self.page_size = page_size
        self.range_step = page_size * _cpu.BLOCK_PAGES
        self.isa = isa
        self.threads = threads
        kv = kv_format if kv_format != "auto" else "f32" if weights == "f32" else "bf16"
        self.kv_dtype = torch.float32 if kv == "f32" else torch.bfloat16
        self._lora_dtype = torch.float32 if weights == "f32" else torch.bfloat16
        self.device = f"{processor_name()}, {isa}, {kv} KV, {threads} threads"
        self._kernels = _cpu.Kernels(isa, threads)
        self._rows_dtype = ACTIVATIONS[weights]
        self._scratch = Scratch(self._rows_dtype)
        self._arena = None if shared else Arena()

    def linear_weight(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        dtype = torch.bfloat16 if self._rows_dtype is torch.bfloat16 else torch.float32
        return DenseLinear(
            weight.to(dtype).contiguous(),
            None if bias is None else bias.to(dtype),
        )

    def packed_weight(self, panels: Int8Panels) -> PackedLinear:
        if self._arena:
            panels = replace(panels, data=self._arena.place(panels.data))
        return PackedLinear(
            panels,
            panels.data.data_ptr(),
            panels.scale.data_ptr(),
            panels.sums.data_ptr(),
            0 if panels.bias is None else panels.bias.data_ptr(),
            panels.in_features,
            panels.out_features,
        )

    def kv_bytes_per_page(self, shape: AttentionShape, layers: int) -> int:
        tokens = layers * self.page_size
        return tokens * 2 * shape.kv_heads * shape.head_dim * self.kv_dtype.itemsize

    def allocate_kv(self, shape: AttentionShape, layers: int, num_pages: int) -> KVPool:
        if shape.head_dim % 16 or not 16 <= shape.head_dim <= 256:
            raise ValueError(
                f"head size {shape.head_dim} is not a multiple of 16 up to 256: "
                "use --backend reference"
            )
        page_bytes = self.page_size * 2 * shape.kv_heads * shape.head_dim * self.kv_dtype.itemsize
        # Mapped memory is zero, and the system's until it is used; torch would write the zeros.
        size = layers * num_pages * page_bytes
        memory = PrivateMemory(size) if self._arena else SharedMemory(size)
        elements = size // self.kv_dtype.itemsize
        data = torch.frombuffer(memory.buffer, dtype=self.kv_dtype, count=elements).view(layers, -1)
        return KVPool(data, [layer.data_ptr() for layer in data], memory, page_bytes)

    def kv_layout(self, shape: AttentionShape) -> str:
        dtype = "f32" if self.kv_dtype is torch.float32 else "bf16"
        return f"cpu {dtype} {shape.kv_heads}x{shape.head_dim}"

    def kv_pages(self, kv: KVPool) -> Tensor:
        return kv.data.view(torch.uint8).view(len(kv.layer_ptrs), -1, kv.page_bytes)

    def kv_memory(self, kv: KVPool) -> SharedMemory | None:
        return kv.memory if isinstance(kv.memory, SharedMemory) else None

    def prepare_pages(self, kv: KVPool, first: int, last: int) -> None:
        memory = kv.memory.buffer
        layer_bytes = kv.layer_bytes
        for layer in range(len(kv.layer_ptrs)):
            begin = layer * layer_bytes + first * kv.page_bytes
            end = layer * layer_bytes + last * kv.page_bytes
            begin -= begin % mmap.PAGESIZE
            with contextlib.suppress(OSError):  # Linux before 5.14: first use will do it
                memory.madvise(_MADV_POPULATE_WRITE, begin, end - begin)

    def plan_attention(
        self, num_rows: int, ranges: KVRanges, shape: AttentionShape
    ) -> AttentionPlan:
        most = SCRATCH_BYTES // partial_bytes(shape) // PARTIALS * PARTIALS

        def piece(first: int, last: int) -> _cpu.AttentionPlan:
            own = ranges if last - first == num_rows else ranges.of_rows(first, last)
            return _cpu.AttentionPlan(
                last - first,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                self.page_size,
                own.page_start,
                own.pages,
                own.first_key,
                own.row_start,
                own.rows,
                own.visible,
            )

        # What a row's sums are does not depend on the rows beside it.
        pieces = in_pieces(num_rows, _tile_rows(shape), piece, lambda p: p.num_partials <= most)
        return AttentionPlan(num_rows, shape, pieces)

    def attention_scratch(self, rows: int, keys: int, shape: AttentionShape) -> int:
        splits, size = -(-keys // (_SPLIT_PAGES * self.page_size)), partial_bytes(shape)
        of_tile = min(rows, _tile_rows(shape)) * splits
        partials = held_partials(min(rows * splits, max(SCRATCH_BYTES // size, of_tile)))
        # And what the threads keep of the vectors they compute (carve_scratch in attention.h).
        vectors = max(_TILE_VECTORS, shape.group)
        return partials * size + self.threads * (vectors * (8 * shape.head_dim + 128) + (64 << 10))

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        return table.index_select(0, token_ids).float()

    def norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Rows:
        rows, size = residual.shape
        out = self._scratch.rows("norm", rows, size)
        delta_ptr, delta_type = (0, 0) if delta is None else (delta.data_ptr(), TYPES[delta.dtype])
        self._kernels.norm(
            rows,
            size,
            residual.data_ptr(),
            delta_ptr,
            delta_type,
            weight.data_ptr(),
            eps,
            TYPES[self._rows_dtype],
            out.data_ptr,
            out.scales_ptr,
        )
        return out

    def linear(self, x: Rows, weight: DenseLinear | PackedLinear) -> Tensor:
        if isinstance(weight, DenseLinear):
            return torch.nn.functional.linear(x.data, weight.weight, weight.bias)
        size = weight.out_features
        out, out_ptr = self._scratch.buffer(f"linear{size}", x.rows, size, torch.float32)
        self._kernels.linear(
            x.rows,
            weight.in_features,
            size,
            x.data_ptr,
            x.scales_ptr,
            weight.weight_ptr,
            weight.scale_ptr,
            weight.sums_ptr,
            weight.bias_ptr,
            out_ptr,
        )
        return out

    def lora_adapter(self, layers: Sequence[Sequence[LoraPart]]) -> PackedLora:
        packed = PackedLora(_cpu.LoraAdapter(), [])
        for parts in layers:
            packed.adapter.add_layer()
            for part in parts:
                down = pack_lora(part.down, _cpu.DOWN_PANEL, self._lora_dtype)
                up = pack_lora(part.up, _cpu.UP_PANEL, self._lora_dtype)
                packed.tensors.extend((down, up))
                packed.adapter.add_part(
                    part.first, len(part.up), len(part.down), down.data_ptr(), up.data_ptr()
                )
        return packed

    def plan_lora(self, adapters: Sequence[PackedLora], rows: Sequence[IntArray]) -> LoraPlan:
        plan = _cpu.LoraPlan()
        for packed, some in zip(adapters, rows, strict=True):
            plan.add(packed.adapter, some)
        return LoraPlan(plan, adapters)

    def add_lora(self, x: Rows, y: Tensor, plan: LoraPlan, layer: int) -> None:
        self._kernels.lora(
            plan.plan,
            layer,
            TYPES[self._lora_dtype],
            x.data.shape[1],
            y.shape[1],
            TYPES[x.data.dtype],
            x.data_ptr,
            x.scales_ptr,
            TYPES[y.dtype],
            y.data_ptr(),
        )

    def rope_and_store(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope: RopeTable,
        positions: Tensor,
        slots: Tensor,
        shape: AttentionShape,
        kv: KVPool,
        layer: int,
        tile: int = 0,
    ) -> Query:
        rows = len(qkv)
        q, q_ptr = self._scratch.buffer(
            f"q{tile}", rows, shape.heads * shape.head_dim, self.kv_dtype
        )
        self._kernels.rope(
            rows,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            self.page_size,
            qkv.data_ptr(),
            TYPES[qkv.dtype],
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            eps,
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            q_scale(shape),
            TYPES[self.kv_dtype],
            q_ptr,
            kv.layer_ptrs[layer],
        )
        return Query(q, q_ptr)

    def attend(self, q: Query, kv: KVPool, layer: int, plan: AttentionPlan) -> Rows:
        return self._attend(q, kv, layer, plan, None)

    def _attend(
        self, q: Query, kv: KVPool, layer: int, plan: AttentionPlan, lse: Tensor | None
    ) -> Rows:
        size = plan.shape.heads * plan.shape.head_dim
        out = self._scratch.rows("attend", plan.num_rows, size)
        for first, piece in plan.pieces:
            partial_ptr, lses_ptr, sums_ptr = self._scratch.partials(piece, plan.shape)
            self._kernels.attend(
                piece,
                TYPES[self.kv_dtype],
                q.ptr + first * size * self.kv_dtype.itemsize,
                kv.layer_ptrs[layer],
                partial_ptr,
                lses_ptr,
                sums_ptr,
                TYPES[self._rows_dtype],
                out.data_ptr + first * size * self._rows_dtype.itemsize,
                out.scales_ptr + first * out.scales.itemsize,
                0 if lse is None else lse[first:].data_ptr(),
            )
        return out

    def attend_with_lse(
        self, q: Query, kv: KVPool, layer: int, plan: AttentionPlan
    ) -> tuple[Rows, Tensor]:
        """As ``attend``, and the merged lse, float32 natural logarithm ``[rows, heads]``."""
        lse = torch.empty(plan.num_rows, plan.shape.heads)
        return self._attend(q, kv, layer, plan, lse), lse

    def silu_mul(self, gate_up: Tensor) -> Rows:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._scratch.rows("silu", rows, size)
        self._kernels.silu(
            rows,
            size,
            gate_up.data_ptr(),
            TYPES[gate_up.dtype],
            TYPES[self._rows_dtype],
            out.data_ptr,
            out.scales_ptr,
        )
        return out

    def fuse(
        self, layers: Sequence[LayerWeights], rope: RopeTable, shape: AttentionShape, eps: float
    ) -> FusedLayers | None:
        if self._rows_dtype is not torch.uint8:
            return None
        return FusedLayers(
            self._kernels,
            self._scratch,
            self.kv_dtype,
            self.page_size,
            layers,
            rope,
            shape,
            eps,
        )

    def argmax(self, logits: Tensor) -> list[int]:
        rows, size = logits.shape
        logits = logits.float().contiguous()
        out = torch.empty(rows, dtype=torch.int32)
        self._kernels.argmax(logits.data_ptr(), rows, size, out.data_ptr())
        best: list[int] = out.tolist()
        return best

    def sample(self, logits: Tensor, draws: Draws) -> list[int]:
        rows, size = len(draws.rows), logits.shape[1]
        if logits.dtype is not torch.float32 or not logits.is_contiguous():
            logits = logits.float().contiguous()
        out = np.empty(rows, np.int32)
        row, temperature, min_p, top_k, top_p, uniform = (
            np.ascontiguousarray(values, kind)
            for values, kind in zip(draws, _DRAW_TYPES, strict=True)
        )
        self._kernels.sample(
            rows,
            size,
            logits.data_ptr(),
            row.ctypes.data,
            temperature.ctypes.data,
            min_p.ctypes.data,
            top_k.ctypes.data,
            top_p.ctypes.data,
            uniform.ctypes.data,
            out.ctypes.data,
        )
        tokens: list[int] = out.tolist()
        return tokens

    def top(self, logits: Tensor, rows: Sequence[int], count: int) -> Top:
        if logits.dtype is not torch.float32 or not logits.is_contiguous():
            logits = logits.float().contiguous()
        row = np.array(rows, np.int32)
        found = Top(
            np.empty((len(rows), count), np.int32),
            np.empty((len(rows), count), np.float32),
            np.empty(len(rows), np.float32),
        )
        self._kernels.top(
            len(rows),
            logits.shape[1],
            count,
            logits.data_ptr(),
            row.ctypes.data,
            found.ids.ctypes.data,
            found.values.ctypes.data,
            found.total.ctypes.data,
        )
        return found
