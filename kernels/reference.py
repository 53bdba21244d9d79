"""The meaning of every operation, in plain torch float32. Slow on purpose: it is the oracle.

Attention over a set of keys can be computed in parts and merged exactly. For one query and head,
part j gives a normalised ``out_j`` and ``lse_j = log sum exp(score)`` over its keys; then

    m   = max_j lse_j
    lse = m + log sum_j exp(lse_j - m)
    out = sum_j exp(lse_j - lse) * out_j

An empty part has ``out = 0, lse = -inf``; merging only empty parts stays that, never NaN. The
same algebra serves chunked prefill, RelayAttention (arXiv 2402.14808, eq. 4-6), KV-Runahead
(arXiv 2405.05329) and segment masks (arXiv 2412.18487). lse is float32, natural logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.kernels.backend import (
    AttentionShape,
    DenseLinear,
    Draws,
    HostMemory,
    LoraPart,
    RopeTable,
    Top,
)
from headstart.kernels.packing import Int8Panels
from headstart.kernels.processor import processor_name
from headstart.kernels.ranges import IntArray, KVRanges


def attend(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of rows over one KV range: row i sees keys ``[0, visible[i])``.

    q ``[rows, heads, head_dim]``; keys, values ``[keys, kv_heads, head_dim]``; visible ``[rows]``.
    Returns out ``[rows, heads, head_dim]``, normalised, and lse ``[rows, heads]``. A row that
    sees nothing gets out = 0, lse = -inf.
    """
    group = q.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(group, dim=1)
    v = values.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,khd->rhk", q.float(), k) * scale
    hidden = torch.arange(len(keys))[None, :] >= visible[:, None]
    scores = scores.masked_fill(hidden[:, None, :], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("rhk,khd->rhd", weights, v), lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge partial ``(out [rows, heads, head_dim], lse [rows, heads])`` of the same rows."""
    out = torch.stack([part[0] for part in parts])
    each = torch.stack([part[1] for part in parts])
    lse = torch.logsumexp(each, dim=0)
    weights = torch.exp(each - lse.masked_fill(lse == -math.inf, 0.0))
    return (weights[..., None] * out).sum(dim=0), lse


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """A batch's ranges, and the number of its rows."""

    num_rows: int
    ranges: KVRanges
    shape: AttentionShape


ReferenceLoraPlan = list[tuple[list[list[LoraPart]], Tensor]]
"""Adapters, each with the rows it changes, int64."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves: x ``[rows, heads, head_dim]``, cos and sin ``[rows, head_dim / 2]``."""
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis."""
    normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return normed


class ReferenceBackend(HostMemory):
    """Every operation of Backend in torch float32.

    Pool: ``[layers, pages * page_size, 2 (key, value), kv_heads, head_dim]``.
    """

    name = "reference"

    def __init__(self, *, page_size: int) -> None:
        self.page_size = self.range_step = page_size
        self.device = f"{processor_name()}, reference"

    def linear_weight(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        return DenseLinear(weight.float(), None if bias is None else bias.float())

    def packed_weight(self, panels: Int8Panels) -> DenseLinear:
        scale = panels.scale[: panels.out_features, None]
        return self.linear_weight(panels.weight().float() * scale, panels.bias)

    def kv_bytes_per_page(self, shape: AttentionShape, layers: int) -> int:
        return layers * self.page_size * 2 * shape.kv_heads * shape.head_dim * 4

    def allocate_kv(self, shape: AttentionShape, layers: int, num_pages: int) -> Tensor:
        return torch.zeros(layers, num_pages * self.page_size, 2, shape.kv_heads, shape.head_dim)

    def kv_layout(self, shape: AttentionShape) -> str:
        return f"reference {shape.kv_heads}x{shape.head_dim}"

    def kv_pages(self, kv: Tensor) -> Tensor:
        page_floats = self.page_size * kv[0, 0].numel()
        return kv.view(len(kv), -1, page_floats).view(torch.uint8)

    def kv_memory(self, kv: Tensor) -> None:
        """Torch's own, which other processes cannot map."""

    def prepare_pages(self, kv: Tensor, first: int, last: int) -> None:
        """Nothing to do: torch has written the zeros."""

    def plan_attention(
        self, num_rows: int, ranges: KVRanges, shape: AttentionShape
    ) -> ReferencePlan:
        return ReferencePlan(num_rows, ranges, shape)

    def attention_scratch(self, rows: int, keys: int, shape: AttentionShape) -> int:
        """Not counted: it copies whole ranges, and is there to be compared with."""
        return 0

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        return table.index_select(0, token_ids).float()

    def norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            residual += delta
        return rms_norm(residual, weight, eps)

    def linear(self, x: Tensor, weight: DenseLinear) -> Tensor:
        return torch.nn.functional.linear(x, weight.weight, weight.bias)

    def lora_adapter(self, layers: Sequence[Sequence[LoraPart]]) -> list[list[LoraPart]]:
        return [list(parts) for parts in layers]

    def plan_lora(
        self, adapters: Sequence[list[list[LoraPart]]], rows: Sequence[IntArray]
    ) -> ReferenceLoraPlan:
        indices = (torch.from_numpy(some.astype(np.int64)) for some in rows)
        return list(zip(adapters, indices, strict=True))

    def add_lora(self, x: Tensor, y: Tensor, plan: ReferenceLoraPlan, layer: int) -> None:
        for adapter, rows in plan:
            for part in adapter[layer]:
                columns = slice(part.first, part.first + len(part.up))
                y[rows, columns] += x[rows] @ part.down.T @ part.up.T

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
        kv: Tensor,
        layer: int,
        tile: int = 0,
    ) -> Tensor:
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        if q_norm is not None:
            q = rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm, eps)
        cos, sin = rope.cos[positions.long()], rope.sin[positions.long()]
        kv[layer, slots.long()] = torch.stack([rotate(k, cos, sin), v], dim=1)
        return rotate(q, cos, sin)

    def attend(self, q: Tensor, kv: Tensor, layer: int, plan: ReferencePlan) -> Tensor:
        shape, ranges = plan.shape, plan.ranges
        out = torch.zeros(plan.num_rows, shape.heads, shape.head_dim)
        lse = torch.full((plan.num_rows, shape.heads), -math.inf)
        offsets = np.arange(self.page_size)
        for i in range(len(ranges)):
            pages = ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]]
            entries = slice(ranges.row_start[i], ranges.row_start[i + 1])
            rows = torch.from_numpy(ranges.rows[entries].astype(np.int64))
            slots = torch.from_numpy((pages[:, None] * self.page_size + offsets).ravel())
            keys, values = kv[layer, slots.long()].unbind(dim=1)
            part = attend(
                q[rows],
                keys,
                values,
                torch.from_numpy(ranges.visible[entries]),
                1 / math.sqrt(shape.head_dim),
            )
            out[rows], lse[rows] = merge([(out[rows], lse[rows]), part])
        return out.view(plan.num_rows, -1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def argmax(self, logits: Tensor) -> list[int]:
        return torch_argmax(logits)

    def sample(self, logits: Tensor, draws: Draws) -> list[int]:
        return sample(logits, draws)

    def top(self, logits: Tensor, rows: Sequence[int], count: int) -> Top:
        return top(logits, rows, count)


def torch_argmax(logits: Tensor) -> list[int]:
    """Position of the largest value of each row, or of a NaN if there is one."""
    ids: list[int] = logits.argmax(-1).tolist()
    return ids


def sample(logits: Tensor, draws: Draws) -> list[int]:
    """See Backend. Each filter keeps the tokens whose weight ``exp((logit - max) / temperature)``
    reaches a threshold, so equally likely tokens at the cut are all kept, whatever their order:

        min_p   min_p itself: the best token has weight 1
        top_k   the k-th largest weight
        top_p   the weight at which the sum from the largest down reaches top_p of the whole
    """
    tokens = []
    for row, temperature, min_p, top_k, top_p, uniform in zip(*draws, strict=True):
        values = logits[row].float().cpu().numpy()
        best = values.max()
        if not np.isfinite(best):
            tokens.append(-1)
            continue
        weights = np.exp((values - best) / np.float32(temperature))
        weights[weights < np.float32(threshold(weights, min_p, top_k, top_p))] = 0
        tokens.append(_inverse_cdf(weights, uniform))
    return tokens


def top(logits: Tensor, rows: Sequence[int], count: int) -> Top:
    """See Backend."""
    chosen = logits[list(rows)].float()
    values, ids = chosen.sort(dim=-1, descending=True, stable=True)
    return Top(
        ids[:, :count].int().cpu().numpy(),
        values[:, :count].cpu().numpy(),
        chosen.logsumexp(-1).cpu().numpy(),
    )


def threshold(weights: npt.NDArray[np.float32], min_p: float, top_k: int, top_p: float) -> float:
    """The smallest weight that min_p, top_k and top_p keep; 0 if they keep all.

    weights: [vocab], the largest 1. Of those above (1 - top_p) * whole / count alone are sums made
    by size: those below add up to less than 1 - top_p, so the cut cannot be among them.
    """
    least = min_p
    if top_k < len(weights):
        position = len(weights) - top_k
        least = max(least, float(np.partition(weights, position)[position]))
    if top_p >= 1.0:
        return least
    kept = weights if least == 0.0 else weights[weights >= np.float32(least)]
    total = float(kept.sum(dtype=np.float64))
    large = kept[kept >= np.float32((1.0 - top_p) * total / len(kept) * 0.999)]
    descending = np.sort(large)[::-1]
    sums = np.cumsum(descending, dtype=np.float64)
    last = int(np.searchsorted(sums, top_p * total))
    return max(least, float(descending[min(last, len(descending) - 1)]))


def _inverse_cdf(weights: npt.NDArray[np.float32], uniform: float) -> int:
    """The first token at which the running sum exceeds ``uniform`` times the whole; at most the
    last one that has a weight, since rounding may put the target at the very end."""
    sums = np.cumsum(weights, dtype=np.float64)
    first = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return min(first, int(np.flatnonzero(weights)[-1]))
