"""Share: the part of a model that one rank of several holds (Megatron-LM, arXiv 1909.08053, 3).

    qkv      rows     [ q q | k | v ]     some heads of each, with their biases
    o        columns                      those that read these heads; the bias is rank 0's alone
    gate_up  rows     [ gate | up ]       the same inner features of both
    down     columns                      those that read these features; the bias is rank 0's alone
    head     rows                         a run of the vocabulary

Norms and the embedding are whole on every rank. int8 scales belong to rows and go with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart.engine.errors import ConfigError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import AnyMatrix, LayerParameters, Matrix, Parameters
from headstart.kernels.packing import pack_int8


@dataclass(frozen=True, slots=True)
class Share:
    """Part ``rank`` of ``ranks`` parts. Sizes that ``ranks`` divides are cut evenly."""

    rank: int
    ranks: int

    def span(self, size: int) -> tuple[int, int]:
        """``[first, end)`` of ``size`` things; shares differ by one where they must."""
        return size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """The rank's part of ``tensor`` along ``dim``, contiguous; a view where that is one."""
        first, end = self.span(tensor.shape[dim])
        return tensor.narrow(dim, first, end - first).contiguous()

    def config(self, model: ModelConfig) -> ModelConfig:
        """The shape of a rank's decoder; the vocabulary stays whole. Raises ConfigError."""
        sizes = {
            "attention heads": model.num_heads,
            "key/value heads": model.num_kv_heads,
            "MLP features": model.intermediate_size,
        }
        for what, size in sizes.items():
            if size % self.ranks:
                most = math.gcd(*sizes.values())
                possible = [str(n) for n in range(1, most + 1) if most % n == 0]
                raise ConfigError(
                    f"--tensor-parallel {self.ranks} does not divide the model's {size} {what}; "
                    f"possible: {', '.join(possible)}"
                )
        return replace(
            model,
            num_heads=model.num_heads // self.ranks,
            num_kv_heads=model.num_kv_heads // self.ranks,
            intermediate_size=model.intermediate_size // self.ranks,
        )

    def parameters(self, whole: Parameters, model: ModelConfig) -> Parameters:
        """The rank's part of ``whole``, which is read a layer at a time as before.

        ``model``: the whole model's shape.
        """
        if self.ranks == 1:  # stacked matrices need no copy
            return whole
        return Parameters(
            whole.embedding,
            self._layers(whole.layers, model),
            whole.final_norm,
            None if whole.head is None else self.rows(whole.head, model.vocab_size),
            whole.hidden_norm,
        )

    def _layers(
        self, layers: Iterator[LayerParameters], model: ModelConfig
    ) -> Iterator[LayerParameters]:
        q, kv = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
        inner = model.intermediate_size
        for layer in layers:
            yield LayerParameters(
                input_norm=layer.input_norm,
                qkv=self.rows(layer.qkv, q, kv, kv),
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                o=self.columns(layer.o),
                post_norm=layer.post_norm,
                gate_up=self.rows(layer.gate_up, inner, inner),
                down=self.columns(layer.down),
            )

    def rows(self, matrix: AnyMatrix, *sizes: int) -> AnyMatrix:
        """The rank's outputs of each of the matrices stacked in ``matrix``, of these sizes."""

        def cut(stacked: Tensor) -> Tensor:
            return torch.cat([self.part(one, 0) for one in torch.split(stacked, list(sizes))])

        bias = None if matrix.bias is None else cut(matrix.bias)
        if isinstance(matrix, Matrix):
            return Matrix(cut(matrix.weight), bias)
        return pack_int8(cut(matrix.weight()), cut(matrix.scale[: matrix.out_features]), bias)

    def columns(self, matrix: AnyMatrix) -> AnyMatrix:
        """What reads the rank's inputs; its outputs are terms of a sum, the bias in one of them."""
        bias = matrix.bias if self.rank == 0 else None
        if isinstance(matrix, Matrix):
            return Matrix(self.part(matrix.weight, 1), bias)
        weight = self.part(matrix.weight(), 1)
        return pack_int8(weight, matrix.scale[: matrix.out_features], bias)


WHOLE = Share(0, 1)
