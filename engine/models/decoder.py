"""Decoder: the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3) over a Backend.

One file for all of them: they differ in biases, in a norm on q and k, and in their sizes. Which
attention method is active is not known here; a batch's KV ranges say what each row may see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.engine.batch import Batch
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import Matrix, Parameters
from headstart.kernels.backend import AttentionShape, Backend, Linear, RopeTable


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights as the backend keeps them."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """``forward(batch, kv)`` computes a batch's rows, writes their KV and returns logits."""

    def __init__(
        self, config: ModelConfig, backend: Backend, parameters: Parameters, rope: RopeTable
    ) -> None:
        self.config = config
        self.shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self._backend = backend
        self._rope = rope
        self.max_len = len(rope.cos)
        """Tokens of the longest sequence: there are no rotations for positions from here on."""
        self.attention_seconds = 0.0
        """Total time inside ``attend``, for the cost model to be compared with."""

        def linear(matrix: Matrix) -> Linear:
            if matrix.scale is None:
                return backend.linear_weight(matrix.weight, matrix.bias)
            return backend.quantized_weight(matrix.weight, matrix.scale, matrix.bias)

        self.layers = [
            DecoderLayer(
                p.input_norm,
                linear(p.qkv),
                p.q_norm,
                p.k_norm,
                linear(p.o),
                p.post_norm,
                linear(p.gate_up),
                linear(p.down),
            )
            for p in parameters.layers
        ]
        self.head = linear(parameters.head)
        self._embedding = parameters.embedding
        self._final_norm = parameters.final_norm

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Any) -> Tensor:
        """Logits ``[len(batch.logit_rows), vocab]``, float32; valid until the next call."""
        ops, shape, eps = self._backend, self.shape, self.config.rms_norm_eps
        plan = ops.plan_attention(batch.num_rows, batch.kv_ranges, shape)
        wanted = batch.logit_rows
        residual = ops.embed(self._embedding, batch.token_ids)
        delta: Tensor | None = None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            rows = ops.norm(residual, delta, layer.input_norm, eps)
            qkv = ops.linear(rows, layer.qkv)
            q = ops.rope_and_store(
                qkv,
                layer.q_norm,
                layer.k_norm,
                eps,
                self._rope,
                batch.positions,
                batch.slots,
                shape,
                kv,
                i,
            )
            if i == last and wanted is not None and not len(wanted):
                break  # the last layer's KV is written, and nobody reads its output
            begin = time.perf_counter()
            attended = ops.attend(q, kv, i, plan)
            self.attention_seconds += time.perf_counter() - begin
            delta = ops.linear(attended, layer.o)
            if i == last and wanted is not None:
                residual, delta = residual.index_select(0, wanted), delta.index_select(0, wanted)
            rows = ops.norm(residual, delta, layer.post_norm, eps)
            delta = ops.linear(ops.silu_mul(ops.linear(rows, layer.gate_up)), layer.down)
        else:
            rows = ops.norm(residual, delta, self._final_norm, eps)
            return ops.linear(rows, self.head).float()
        return torch.empty(0, self.config.vocab_size)
