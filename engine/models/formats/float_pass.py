"""FloatPass: windows of text through a model in float32, one layer in memory at a time.

    text = FloatPass(config, windows, calibrating=2)
    final_norm = checkpoint.final_norm()
    for rows in checkpoint.embedding_rows(): text.embed(rows)
    for layer in checkpoint.layers(): ranges = text.layer(layer)
    text.finish(final_norm)
    for rows in checkpoint.head_rows(): text.head(rows)
    text.losses()

It is there for conversion: the inputs of every matrix are seen in the order in which the model's
file is read, so that a model of any size needs no more memory than its largest layer. Serving is
decoder.py's; a test holds the two to the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from headstart.engine.models.config import ModelConfig
from headstart.engine.models.parameters import LayerParameters, Matrix
from headstart.engine.models.rope import rope_tables

HEAD_ROWS = 512
"""Tokens whose logits are in memory at a time."""


class FloatPass:
    """``windows``: token ids of each. The first ``calibrating`` of them are what ranges are taken
    from, the others what losses are."""

    def __init__(self, config: ModelConfig, windows: list[list[int]], calibrating: int) -> None:
        self._config = config
        self._lengths = [len(window) for window in windows]
        self._calibrating = sum(self._lengths[:calibrating])
        self._ids = torch.tensor([token for window in windows for token in window])
        self._hidden = torch.zeros(len(self._ids), config.hidden_size)
        self._embedded = 0
        cos, sin = rope_tables(config, max(self._lengths))
        self._cos, self._sin = cos[:, None], sin[:, None]  # of every head
        self._judge = _Judge(windows[calibrating:])

    @torch.inference_mode()
    def embed(self, rows: Tensor) -> None:
        """The next rows of the embedding, ``[rows, hidden]``."""
        ids = self._ids - self._embedded
        there = ((ids >= 0) & (ids < len(rows))).nonzero()[:, 0]
        self._hidden[there] = rows[ids[there]].float()
        self._embedded += len(rows)

    @torch.inference_mode()
    def layer(self, layer: LayerParameters) -> dict[str, Tensor]:
        """The next layer. Returns the largest |x| of every input of its four matrices, by name."""
        config, eps = self._config, self._config.rms_norm_eps
        size, head_dim = (config.hidden_size,), config.head_dim
        ranges = {}

        def product(name: str, x: Tensor, matrix: Matrix) -> Tensor:
            ranges[name] = largest(x[: self._calibrating], dim=0)
            return torch.nn.functional.linear(x, matrix.weight.float(), matrix.bias)

        x = rms_norm(self._hidden, size, layer.input_norm, eps)
        qkv = product("qkv", x, _float(layer.qkv)).view(len(x), -1, head_dim)
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(qkv, heads, dim=1)
        if layer.q_norm is not None:
            q = rms_norm(q, (head_dim,), layer.q_norm, eps)
        if layer.k_norm is not None:
            k = rms_norm(k, (head_dim,), layer.k_norm, eps)
        windows = [torch.split(part, self._lengths) for part in (q, k, v)]
        x = torch.cat([self._attend(*window) for window in zip(*windows, strict=True)])
        self._hidden += product("o", x, _float(layer.o))
        x = rms_norm(self._hidden, size, layer.post_norm, eps)
        gate, up = product("gate_up", x, _float(layer.gate_up)).chunk(2, dim=1)
        self._hidden += product("down", silu(gate) * up, _float(layer.down))
        return ranges

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[tokens, heads * head_dim]`` of one window, whose tokens see those before them."""
        q, k = self._rotated(q), self._rotated(k)
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = self._cos[: len(x)], self._sin[: len(x)]
        first, second = x.chunk(2, dim=2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)

    @torch.inference_mode()
    def finish(self, final_norm: Tensor) -> Tensor:
        """Behind the last layer. Returns the largest |x| of every input of the head."""
        size, eps = (self._config.hidden_size,), self._config.rms_norm_eps
        self._hidden = rms_norm(self._hidden, size, final_norm, eps)
        return largest(self._hidden[: self._calibrating], dim=0)

    @torch.inference_mode()
    def head(self, rows: Tensor) -> None:
        """The next rows of the head, ``[rows, hidden]``."""
        judged = self._hidden[self._calibrating :]
        for start in range(0, len(judged), HEAD_ROWS):
            self._judge.add(start, judged[start : start + HEAD_ROWS] @ rows.float().T)
        self._judge.advance(len(rows))

    def losses(self) -> list[float]:
        """-log p(token | tokens before it) of all but the first token of each judged window."""
        return self._judge.losses()


def largest(x: Tensor, dim: int) -> Tensor:
    """The largest magnitudes along ``dim``, without a copy of all."""
    return torch.maximum(x.amax(dim=dim), -x.amin(dim=dim))


class _Judge:
    """Losses of windows whose logits come some words of the vocabulary at a time."""

    def __init__(self, windows: list[list[int]]) -> None:
        predicted = [[*window[1:], -1] for window in windows]  # -1: behind the last token
        self._targets = torch.tensor([token for window in predicted for token in window])
        self._largest = torch.full(self._targets.shape, -torch.inf, dtype=torch.float64)
        self._sums = torch.zeros_like(self._largest)
        self._chosen = torch.zeros_like(self._largest)
        self._words = 0

    def add(self, first: int, logits: Tensor) -> None:
        """Of tokens from ``first`` on, ``[tokens, words]``, of the next words."""
        tokens = slice(first, first + len(logits))
        before, sums = self._largest[tokens], self._sums[tokens]
        largest = torch.maximum(before, logits.amax(dim=1))
        sums *= torch.exp(before - largest)
        sums += torch.exp(logits - largest[:, None].float()).sum(dim=1)
        before.copy_(largest)
        places = self._targets[tokens] - self._words
        there = ((places >= 0) & (places < logits.shape[1])).nonzero()[:, 0]
        self._chosen[tokens][there] = logits[there, places[there]].double()

    def advance(self, words: int) -> None:
        """These words are done with."""
        self._words += words

    def losses(self) -> list[float]:
        losses = self._sums.log() + self._largest - self._chosen
        kept: list[float] = losses[self._targets >= 0].tolist()
        return kept


def _float(matrix: object) -> Matrix:
    assert isinstance(matrix, Matrix)
    return matrix
