"""Parameters: a decoder's tensors in the shape it computes with, whatever file they come from.

Matrices that read the same rows are stacked, so that they are one product:

    qkv      [ q_proj ; k_proj ; v_proj ]     gate_up  [ gate_proj ; up_proj ]

``read_float`` takes them from Hugging Face safetensors or a GGUF file, formats/int8.py reads int8
ones. Layers are read one at a time, as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import GGUF_LINK, Weights
from headstart.kernels.packing import Int8Panels

if TYPE_CHECKING:
    from headstart.engine.models.files.gguf_weights import GGUFWeights


@dataclass(slots=True)
class Matrix:
    """``weight [out, in]``, float; float32 ``bias [out]``."""

    weight: Tensor
    bias: Tensor | None = None


AnyMatrix = Matrix | Int8Panels


@dataclass(slots=True)
class LayerParameters:
    """One decoder layer. Norm weights are float32."""

    input_norm: Tensor
    qkv: AnyMatrix
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: AnyMatrix
    post_norm: Tensor
    gate_up: AnyMatrix
    down: AnyMatrix


@dataclass(slots=True)
class Parameters:
    """A whole decoder; ``layers`` can be iterated once.

    ``head``: None where the checkpoint has none. ``hidden_norm``: of the hidden states themselves,
    where ``final_norm`` makes other inputs of the head than these.
    """

    embedding: Tensor
    layers: Iterator[LayerParameters]
    final_norm: Tensor
    head: AnyMatrix | None
    hidden_norm: Tensor | None = None


class Checkpoint:
    """The float parameters of ``folder``, read piece by piece as stored.

    Raises ModelError naming a wrong tensor. Tensors nobody asked for are an error, raised when the
    last layer has been read.
    """

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config = config
        self._weights: Weights | GGUFWeights
        if (folder / GGUF_LINK).is_symlink():
            # Loaded where there is such a file only.
            from headstart.engine.models.files.gguf_weights import GGUFWeights

            self._weights = GGUFWeights.linked(folder, config)
        else:
            self._weights = Weights.open(folder)
        self._trunk = trunk_prefix(self._weights)
        self._table = (config.vocab_size, config.hidden_size)
        self._embedding = f"{self._trunk}embed_tokens.weight"

    @property
    def has_head(self) -> bool:
        return self.config.tie_word_embeddings or "lm_head.weight" in self._weights.names()

    def embedding(self) -> Tensor:
        return self._weights.take(self._embedding, self._table)

    def embedding_rows(self) -> Iterator[Tensor]:
        """The same in runs of rows."""
        return self._weights.rows(self._embedding, self._table)

    def head(self) -> Tensor | None:
        """None where there is none, or where it is the embedding."""
        return self._weights.take("lm_head.weight", self._table, optional=True)

    def head_rows(self) -> Iterator[Tensor]:
        tied = self.config.tie_word_embeddings
        return self._weights.rows(self._embedding if tied else "lm_head.weight", self._table)

    def final_norm(self) -> Tensor:
        return self._weights.take(f"{self._trunk}norm.weight", (self.config.hidden_size,)).float()

    def layers(self) -> Iterator[LayerParameters]:
        for index in range(self.config.num_layers):
            yield _read_layer(self.config, self._weights, f"{self._trunk}layers.{index}.")
        self._weights.finish()


def read_float(config: ModelConfig, folder: Path) -> Parameters:
    """The float parameters of ``folder`` as stored, for a decoder (see ``Checkpoint``)."""
    checkpoint = Checkpoint(config, folder)
    embedding = checkpoint.embedding()
    final_norm = checkpoint.final_norm()
    head = checkpoint.head()
    if config.tie_word_embeddings:
        head = embedding
    return Parameters(
        embedding, checkpoint.layers(), final_norm, None if head is None else Matrix(head)
    )


def trunk_prefix(weights: Weights | GGUFWeights) -> str:
    """What the names of all tensors but the head's begin with: nothing where the checkpoint was
    saved without one."""
    names = weights.names()
    bare = "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names
    return "" if bare else "model."


def _read_layer(
    config: ModelConfig, weights: Weights | GGUFWeights, prefix: str
) -> LayerParameters:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim

    def vector(name: str, size: int) -> Tensor:
        return weights.take(prefix + name, (size,)).float()

    def stacked(names: dict[str, int], in_features: int, has_bias: bool) -> Matrix:
        parts = [
            weights.take(f"{prefix}{name}.weight", (size, in_features))
            for name, size in names.items()
        ]
        biases = [vector(f"{name}.bias", size) for name, size in names.items() if has_bias]
        return Matrix(
            torch.cat(parts) if len(parts) > 1 else parts[0], torch.cat(biases) if biases else None
        )

    attention = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size}
    attention["self_attn.v_proj"] = kv_size
    return LayerParameters(
        input_norm=vector("input_layernorm.weight", hidden),
        qkv=stacked(attention, hidden, config.qkv_bias),
        q_norm=vector("self_attn.q_norm.weight", config.head_dim) if config.qk_norm else None,
        k_norm=vector("self_attn.k_norm.weight", config.head_dim) if config.qk_norm else None,
        o=stacked({"self_attn.o_proj": hidden}, q_size, config.o_bias),
        post_norm=vector("post_attention_layernorm.weight", hidden),
        gate_up=stacked({"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, config.mlp_bias),
        down=stacked({"mlp.down_proj": hidden}, inner, config.mlp_bias),
    )
