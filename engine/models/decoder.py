"""Decoder: the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3) over a Backend.

One file for all of them: they differ in biases, in a norm on q and k, and in their sizes. Which
attention method is active is not known here; a batch's KV ranges say what each row may see.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from collections.abc import Sequence as Items
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from headstart.engine.batch import AdapterRows, Batch, Read
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import AnyMatrix, Matrix, Parameters
from headstart.engine.models.ranks import OneRank, Ranks
from headstart.engine.models.spec import DOWN, GATE_UP, MATRICES, QKV, O
from headstart.kernels.backend import AttentionShape, Backend, FixedBatch, Linear, RopeTable

PLACES = 64
"""Batches that are computed in pieces at a time, at most."""
HEAD_ROWS = 64
"""Rows of a prompt whose logits are made at a time, for a reader: they are never all there."""


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
        self._rope = RopeTable(backend.constant(rope.cos), backend.constant(rope.sin))
        self.max_len = len(rope.cos)
        """Tokens of the longest sequence: there are no rotations for positions from here on."""
        self.attention_seconds = 0.0
        """Total time inside ``attend``, for the cost model to be compared with."""
        self.times_attention = not backend.asynchronous
        """Whether it is counted. Where ``attend`` only launches, it has to be waited for."""

        def linear(matrix: AnyMatrix) -> Linear:
            if isinstance(matrix, Matrix):
                return backend.linear_weight(matrix.weight, matrix.bias)
            return backend.packed_weight(matrix)

        def optional(norm: Tensor | None) -> Tensor | None:
            return None if norm is None else backend.constant(norm)

        self.layers = [
            DecoderLayer(
                backend.constant(p.input_norm),
                linear(p.qkv),
                optional(p.q_norm),
                optional(p.k_norm),
                linear(p.o),
                backend.constant(p.post_norm),
                linear(p.gate_up),
                linear(p.down),
            )
            for p in parameters.layers
        ]
        self._fused = (
            backend.fuse(self.layers, self._rope, self.shape, config.rms_norm_eps)
            if isinstance(self._ranks, OneRank)
            else None
        )
        self.head = None if parameters.head is None else linear(parameters.head)
        self._embedding = backend.constant(parameters.embedding)
        self._final_norm = backend.constant(parameters.final_norm)
        norm = parameters.hidden_norm
        self._hidden_norm = self._final_norm if norm is None else backend.constant(norm)

    @property
    def capturable(self) -> bool:
        """Whether ``forward_fixed`` may be part of a CUDA graph."""
        return self._ranks.capturable

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Any) -> Tensor:
        """Logits ``[len(batch.logit_rows), vocab]``, float32; valid until the next call.

        Of a model without a head they are its hidden states.
        """
        tiles = self._tiles(batch, self._backend.tile_rows)
        if len(tiles) == 1 and self._can_fuse(tiles[0]):
            return self._fused_layers(tiles[0], kv)
        return _result(self._layers(tiles, kv))

    @torch.inference_mode()
    def forward_fixed(self, fixed: FixedBatch, kv: Any) -> Tensor:
        """The same of a decoding step that lies in ``fixed``: logits of all of its rows."""
        residual = self._backend.embed(self._embedding, fixed.token_ids)
        tile = _Tile(self._backend, 0, residual, fixed.positions, fixed.slots, fixed.plan, None, [])
        return _result(self._layers([tile], kv))

    @torch.inference_mode()
    def forward_beside(
        self, batch: Batch, kv: Any, tile_rows: int, place: int
    ) -> Generator[int, None, Tensor]:
        """The same in pieces, one layer of ``tile_rows`` rows each: calls of ``forward`` may come
        between them, and pieces of other batches, each in another ``place`` below PLACES.

        Yields the layer whose keys all rows have written and some will now read. Keys of other
        rows of this sequence, computed elsewhere, have to be in their pages by then.
        """
        return (yield from self._layers(self._tiles(batch, tile_rows, place), kv))

    def _tiles(self, batch: Batch, tile_rows: int, place: int | None = None) -> list[_Tile]:
        """The rows of ``batch`` in tiles, uploaded, with numbers of their own for each place beside
        the steps: queries are kept by them."""
        ops = self._backend
        token_ids = ops.upload(batch.token_ids)
        if batch.pending is not None:
            token_ids = token_ids.index_copy(0, *batch.pending.tokens(ops))
        residual = ops.embed(self._embedding, token_ids)
        return [
            _Tile(
                ops,
                i if place is None else ~(i * PLACES + place),
                residual[rows],
                ops.upload(part.positions),
                ops.upload(part.slots),
                ops.plan_attention(part.num_rows, part.kv_ranges, self.shape),
                part.logit_rows,
                part.adapters,
                part.reads,
            )
            for i, (rows, part) in enumerate(batch.tiles(tile_rows))
        ]

    def _layers(self, tiles: list[_Tile], kv: Any) -> Generator[int, None, Tensor]:
        """Yields the layer before each tile's attention, and returns the logits.

        Rows go through a layer in tiles, so that a long segment takes no more room than a chunk:

            tile 0   q k v of layer 0 │ attend, o, mlp of layer 0, q k v of layer 1 │ ...
            tile 1   q k v of layer 0 │ attend, o, mlp of layer 0, q k v of layer 1 │ ...

        All keys of a layer are written before any row reads them.
        """
        for tile in tiles:
            self._write_keys(0, tile, None, kv)
        last = len(self.layers) - 1
        for i in range(last):
            for tile in tiles:
                yield i
                self._write_keys(i + 1, tile, self._mlp(i, tile, self._attend(i, tile, kv)), kv)
        yield last
        return self._last_layer(tiles, kv)

    def _can_fuse(self, tile: _Tile) -> bool:
        fused = self._fused
        return fused is not None and tile.unadapted and fused.takes(tile.plan)

    def _fused_layers(self, tile: _Tile, kv: Any) -> Tensor:
        """The same as ``_layers``: but for the last one, which few rows go through, in one call."""
        assert self._fused is not None
        last, delta = len(self.layers) - 1, None
        if last:
            delta, seconds = self._fused.run(
                last, tile.residual, tile.positions, tile.slots, kv, tile.plan
            )
            self.attention_seconds += seconds
        self._write_keys(last, tile, delta, kv)
        return self._last_layer([tile], kv)

    def _last_layer(self, tiles: Items[_Tile], kv: Any) -> Tensor:
        """From the last layer's attention on. Where nobody wants a tile's rows, the keys that are
        there were all there is to compute."""
        last, logits = len(self.layers) - 1, []
        for tile in tiles:
            wanted = tile.wanted_rows()
            if wanted is None or len(wanted):
                found = self._logits(tile, wanted, self._attend(last, tile, kv))
                if found is not None:
                    logits.append(found if tile is tiles[-1] else found.clone())
        if len(logits) == 1:
            return logits[0]
        return (
            torch.cat(logits) if logits else tiles[0].residual.new_empty(0, self.config.vocab_size)
        )

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
            tile.positions,
            tile.slots,
            self.shape,
            kv,
            i,
            tile.number,
        )

    def _attend(self, i: int, tile: _Tile, kv: Any) -> Tensor:
        if self.times_attention:
            self._backend.synchronize()
            begin = time.perf_counter()
            attended = self._backend.attend(tile.q, kv, i, tile.plan)
            self._backend.synchronize()
            self.attention_seconds += time.perf_counter() - begin
        else:
            attended = self._backend.attend(tile.q, kv, i, tile.plan)
        return self._ranks.sum(tile.linear(attended, self.layers[i].o, i, O))

    def _mlp(self, i: int, tile: _Tile, delta: Tensor) -> Tensor:
        ops, layer = self._backend, self.layers[i]
        rows = ops.norm(tile.residual, delta, layer.post_norm, self.config.rms_norm_eps)
        hidden = ops.silu_mul(tile.linear(rows, layer.gate_up, i, GATE_UP))
        return self._ranks.sum(tile.linear(hidden, layer.down, i, DOWN))

    def _logits(self, tile: _Tile, wanted: Tensor | None, delta: Tensor) -> Tensor | None:
        """The rest of the last layer for the rows that are wanted; those that are read go to their
        readers, and of those whose logits are wanted these are returned, if there are any."""
        if wanted is not None:
            tile, delta = tile.narrowed(wanted, delta)
        delta = self._mlp(len(self.layers) - 1, tile, delta)
        if not tile.reads:
            return self._head(tile.residual, delta)
        tile.residual += delta
        for first, end, reader in tile.reads:
            rows = tile.residual[first:end]
            if reader.needs_logits:
                for part in torch.split(rows, HEAD_ROWS):
                    reader.take(self._head(part, None))
            else:
                reader.take(self._states(rows))
        if tile.logit_rows is None:
            return self._head(tile.residual, None)
        if not len(tile.logit_rows):
            return None
        places = self._backend.upload(tile.logit_rows)
        return self._head(tile.residual.index_select(0, places), None)

    def _states(self, residual: Tensor) -> Tensor:
        """Hidden states behind the final norm."""
        size, eps = (self.config.hidden_size,), self.config.rms_norm_eps
        return rms_norm(residual.float(), size, self._hidden_norm.float(), eps)

    def _head(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        if self.head is None:
            return self._states(residual if delta is None else residual + delta)
        rows = self._backend.norm(residual, delta, self._final_norm, self.config.rms_norm_eps)
        return self._ranks.gather(self._backend.linear(rows, self.head)).float()


class _Tile:
    """Some rows of a batch on their way through the layers; ``residual`` is a view or a copy."""

    __slots__ = (
        "_adapters",
        "_lora",
        "_ops",
        "logit_rows",
        "number",
        "plan",
        "positions",
        "q",
        "reads",
        "residual",
        "slots",
    )

    def __init__(
        self,
        ops: Backend,
        number: int,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        plan: Any,
        logit_rows: Tensor | None,
        adapters: list[AdapterRows],
        reads: Items[Read] = (),
    ) -> None:
        self._ops = ops
        self.number = number
        self.residual = residual
        self.positions = positions
        self.slots = slots
        self.plan = plan
        self.logit_rows = logit_rows
        self.reads = reads
        self.q: Any = None
        self._adapters = adapters
        self._lora = _plan_lora(ops, adapters)

    def linear(self, x: Any, weight: Linear, i: int, matrix: int) -> Tensor:
        """Product with a matrix of layer ``i``, the rows' adapters included."""
        y = self._ops.linear(x, weight)
        if self._lora is not None:
            self._ops.add_lora(x, y, self._lora, i * MATRICES + matrix)
        return y

    @property
    def unadapted(self) -> bool:
        """No row has an adapter."""
        return self._lora is None

    def wanted_rows(self) -> Tensor | None:
        """The rows of which more than keys is wanted, int64 in order; None: every row."""
        if self.logit_rows is None or not self.reads:
            return self.logit_rows
        read = [torch.arange(read.first, read.end) for read in self.reads]
        rows: Tensor = torch.cat([self.logit_rows, *read]).unique()  # type: ignore[no-untyped-call]
        return rows

    def narrowed(self, rows: Tensor, delta: Tensor) -> tuple[_Tile, Tensor]:
        """These rows of the tile and of ``delta`` alone, for what comes after attention; all that
        are wanted are among them."""
        tile, uploaded = copy(self), self._ops.upload(rows)
        tile.residual = self.residual.index_select(0, uploaded)
        if self.reads:  # else the rows are those whose logits are wanted, and nobody asks again
            assert self.logit_rows is not None
            tile.logit_rows = torch.searchsorted(rows, self.logit_rows)
            firsts = torch.searchsorted(rows, torch.tensor([read.first for read in self.reads]))
            tile.reads = [
                Read(first, first + read.end - read.first, read.reader)
                for first, read in zip(firsts.tolist(), self.reads, strict=True)
            ]
        if self._lora is not None:
            tile._lora = _plan_lora(self._ops, [a.narrowed(rows.numpy()) for a in self._adapters])
        return tile, delta.index_select(0, uploaded)


def _result(layers: Generator[int, None, Tensor]) -> Tensor:
    """Run through all layers."""
    while True:
        try:
            next(layers)
        except StopIteration as end:
            logits: Tensor = end.value
            return logits


def _plan_lora(ops: Backend, adapters: list[AdapterRows]) -> Any:
    changed = [entry for entry in adapters if len(entry.rows)]
    if not changed:
        return None
    return ops.plan_lora(
        [entry.adapter.weights for entry in changed], [entry.rows for entry in changed]
    )
