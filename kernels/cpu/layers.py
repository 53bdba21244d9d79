"""FusedLayers: whole layers of an int8 model in one call (operations.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.kernels import _cpu
from headstart.kernels.backend import AttentionShape, LayerWeights, RopeTable
from headstart.kernels.cpu.tensors import TYPES, AttentionPlan, KVPool, PackedLinear, Scratch

_LOG2E = 1.4426950408889634


def q_scale(shape: AttentionShape) -> float:
    """What q is stored with: the softmax's scale, and scores in powers of two."""
    return _LOG2E / math.sqrt(shape.head_dim)


class FusedLayers:
    """See ``kernels.backend.FusedLayers``."""

    def __init__(
        self,
        kernels: _cpu.Kernels,
        scratch: Scratch,
        kv_dtype: torch.dtype,
        page_size: int,
        layers: Sequence[LayerWeights],
        rope: RopeTable,
        shape: AttentionShape,
        eps: float,
    ) -> None:
        self._kernels, self._scratch, self._kv_dtype = kernels, scratch, kv_dtype
        self._shape = shape
        self._kept = layers, rope  # for their addresses
        self._hidden = layers[0].qkv.in_features
        self._inner = layers[0].down.in_features
        self._layers = _cpu.Layers(
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            page_size,
            eps,
            q_scale(shape),
            TYPES[kv_dtype],
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
        )
        for layer in layers:
            self._layers.add(
                self._hidden,
                self._inner,
                layer.input_norm.data_ptr(),
                _addresses(layer.qkv),
                _address(layer.q_norm),
                _address(layer.k_norm),
                _addresses(layer.o),
                layer.post_norm.data_ptr(),
                _addresses(layer.gate_up),
                _addresses(layer.down),
            )

    def takes(self, plan: AttentionPlan) -> bool:
        return len(plan.pieces) == 1

    def run(
        self,
        count: int,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv: KVPool,
        plan: AttentionPlan,
    ) -> tuple[Tensor, float]:
        rows, hidden, shape, scratch = len(residual), self._hidden, self._shape, self._scratch
        q_size = shape.heads * shape.head_dim
        names = {"norm": hidden, "attend": q_size, "silu": self._inner}
        outs = [scratch.rows(name, rows, size) for name, size in names.items()]

        def floats(size: int) -> tuple[Tensor, int]:
            return scratch.buffer(f"linear{size}", rows, size, torch.float32)

        _, q = scratch.buffer("q0", rows, q_size, self._kv_dtype)
        _, qkv = floats(q_size + 2 * shape.kv_heads * shape.head_dim)
        _, gate_up = floats(2 * self._inner)
        delta, delta_ptr = floats(hidden)
        [(_, piece)] = plan.pieces
        seconds = self._kernels.layers(
            self._layers,
            count,
            rows,
            residual.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            kv.layer_ptrs[0],
            kv.layer_bytes,
            piece,
            [address for out in outs for address in (out.data_ptr, out.scales_ptr)],
            q,
            qkv,
            gate_up,
            scratch.partials(piece, shape),
            delta_ptr,
        )
        return delta, seconds


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(weight: PackedLinear) -> tuple[int, int, int, int]:
    return weight.weight_ptr, weight.scale_ptr, weight.sums_ptr, weight.bias_ptr
