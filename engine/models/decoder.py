"""Decoder: the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3) over a Backend.

One file for all of them: they differ in biases, in a norm on q and k, and in their sizes. Which
attention method is active is not known here; a batch's KV ranges say what each row may see.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.engine.batch import AdapterRows, Batch
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import Matrix, Parameters
from headstart.engine.models.ranks import OneRank, Ranks
from headstart.kernels.backend import AttentionShape, Backend, Linear, RopeTable

TILE_ROWS = 512
"""Rows that go through a layer at a time: their activations stay in the cores' caches."""

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741
MATRICES = 4
"""Dense layers of a decoder layer that adapters change, in this order: layer i's matrix m is
number i * MATRICES + m of an adapter's weights."""


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
    """``forward(batch, kv)`` computes a batch's rows, writes their KV and returns logits.

    ``config`` and ``parameters`` are of this process's share of the model; ``ranks`` are the
    processes that have the others, if there are any.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        parameters: Parameters,
        rope: RopeTable,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self._ranks = ranks or OneRank()
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
        layers = self._layers(batch, kv, beside=False)
        while True:
            try:
                next(layers)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits

    @torch.inference_mode()
    def forward_beside(self, batch: Batch, kv: Any) -> Generator[int, None, Tensor]:
        """The same in pieces, one layer of TILE_ROWS rows each: calls of ``forward`` may come
        between them. One at a time.

        Yields the layer whose keys all rows have written and some will now read. Keys of other
        rows of this sequence, computed elsewhere, have to be in their pages by then.
        """
        return (yield from self._layers(batch, kv, beside=True))

    def _layers(self, batch: Batch, kv: Any, *, beside: bool) -> Generator[int, None, Tensor]:
        """Yields the layer before each tile's attention, and returns the logits.

        Rows go through a layer in tiles, so that a long segment takes no more room than a chunk:

            tile 0   q k v of layer 0 │ attend, o, mlp of layer 0, q k v of layer 1 │ ...
            tile 1   q k v of layer 0 │ attend, o, mlp of layer 0, q k v of layer 1 │ ...

        All keys of a layer are written before any row reads them.
        """
        residual = self._backend.embed(self._embedding, batch.token_ids)
        tiles = [
            # Numbers of their own for what is computed beside: queries are kept by them.
            _Tile(self._backend, self.shape, ~i if beside else i, part, residual[rows])
            for i, (rows, part) in enumerate(batch.tiles(TILE_ROWS))
        ]
        for tile in tiles:
            self._write_keys(0, tile, None, kv)
        last = len(self.layers) - 1
        for i in range(last):
            for tile in tiles:
                yield i
                self._write_keys(i + 1, tile, self._mlp(i, tile, self._attend(i, tile, kv)), kv)
        yield last
        # Where nobody wants a tile's logits, the last layer's keys are all there is to compute.
        logits = []
        for tile in tiles:
            if tile.batch.logit_rows is None or len(tile.batch.logit_rows):
                found = self._logits(tile, self._attend(last, tile, kv))
                logits.append(found if tile is tiles[-1] else found.clone())
        if len(logits) == 1:
            return logits[0]
        return torch.cat(logits) if logits else torch.empty(0, self.config.vocab_size)

    def _write_keys(self, i: int, tile: _Tile, delta: Tensor | None, kv: Any) -> None:
        """Layer ``i`` up to attention: its keys and values are written, the queries kept."""
        layer, eps = self.layers[i], self.config.rms_norm_eps
        rows = self._backend.norm(tile.residual, delta, layer.input_norm, eps)
        tile.q = self._backend.rope_and_store(
            tile.linear(rows, layer.qkv, i, QKV),
            layer.q_norm,
            layer.k_norm,
            eps,
            self._rope,
            tile.batch.positions,
            tile.batch.slots,
            self.shape,
            kv,
            i,
            tile.number,
        )

    def _attend(self, i: int, tile: _Tile, kv: Any) -> Tensor:
        begin = time.perf_counter()
        attended = self._backend.attend(tile.q, kv, i, tile.plan)
        self.attention_seconds += time.perf_counter() - begin
        return self._ranks.sum(tile.linear(attended, self.layers[i].o, i, O))

    def _mlp(self, i: int, tile: _Tile, delta: Tensor) -> Tensor:
        ops, layer = self._backend, self.layers[i]
        rows = ops.norm(tile.residual, delta, layer.post_norm, self.config.rms_norm_eps)
        hidden = ops.silu_mul(tile.linear(rows, layer.gate_up, i, GATE_UP))
        return self._ranks.sum(tile.linear(hidden, layer.down, i, DOWN))

    def _logits(self, tile: _Tile, delta: Tensor) -> Tensor:
        """The rest of the last layer, and the head, for the rows whose logits are wanted."""
        wanted = tile.batch.logit_rows
        if wanted is not None:
            tile, delta = tile.narrowed(wanted), delta.index_select(0, wanted)
        delta = self._mlp(len(self.layers) - 1, tile, delta)
        eps = self.config.rms_norm_eps
        rows = self._backend.norm(tile.residual, delta, self._final_norm, eps)
        return self._ranks.gather(self._backend.linear(rows, self.head)).float()


class _Tile:
    """Some rows of a batch on their way through the layers; ``residual`` is a view or a copy."""

    __slots__ = ("_lora", "_ops", "batch", "number", "plan", "q", "residual")

    def __init__(
        self, ops: Backend, shape: AttentionShape, number: int, batch: Batch, residual: Tensor
    ) -> None:
        self._ops = ops
        self.batch = batch
        self.number = number
        self.residual = residual
        self.plan = ops.plan_attention(batch.num_rows, batch.kv_ranges, shape)
        self.q: Any = None
        self._lora = _plan_lora(ops, batch.adapters)

    def linear(self, x: Any, weight: Linear, i: int, matrix: int) -> Tensor:
        """Product with a matrix of layer ``i``, the rows' adapters included."""
        y = self._ops.linear(x, weight)
        if self._lora is not None:
            self._ops.add_lora(x, y, self._lora, i * MATRICES + matrix)
        return y

    def narrowed(self, rows: Tensor) -> _Tile:
        """These rows of the tile alone, for what comes after attention."""
        tile = copy(self)
        tile.residual = self.residual.index_select(0, rows)
        if self._lora is not None:
            tile._lora = _plan_lora(
                self._ops, [a.narrowed(rows.numpy()) for a in self.batch.adapters]
            )
        return tile


def _plan_lora(ops: Backend, adapters: list[AdapterRows]) -> Any:
    changed = [entry for entry in adapters if len(entry.rows)]
    if not changed:
        return None
    return ops.plan_lora(
        [entry.adapter.weights for entry in changed], [entry.rows for entry in changed]
    )
