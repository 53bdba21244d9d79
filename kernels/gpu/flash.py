"""The flash-attn adapter: KV ranges by FlashAttention-2's own kernels, where the package is there.

flash-attn (2.8, ``flash_attn_varlen_func``) knows full and causal attention of sequences side by
side. A range maps to one of its sequences if its rows are consecutive and either

    full        all of them see the same number of keys            causal=False
    staircase   row i sees one key more than row i - 1             causal=True: with k keys and r
                                                                   rows, row i sees k - r + 1 + i

(its causal mask is aligned to the last row and key). Anything else is left to attention.py, whose
parts are merged with these: both return ``(out, lse)``.

What is converted:

    q, out      the rows of a range, gathered and put back           [rows, heads, head_dim]
    K, V        a view of the pages, by block table; it takes pages of a multiple of 256 tokens
                (flash_api.cpp: "Paged KV cache block size must be divisible by 256"). With
                smaller ones the keys are copied side by side first, which also widens 8 bits
    lse         [heads, rows] -> [rows, heads]; +inf, its mark of rows that see nothing, -> -inf
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart.kernels.backend import IntArray, KVRanges
from headstart.kernels.gpu.kv import KVPool

PAGE_MULTIPLE = 256
LEAST_VERSION = (2, 8)


def find_flash() -> Callable[..., Any] | None:
    """``flash_attn_varlen_func``, if the package is there. Raises ValueError if it is too old."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    version = importlib.metadata.version("flash-attn")
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        raise ValueError(f"flash-attn {version} is installed; 2.8 or later is needed")
    from flash_attn import flash_attn_varlen_func

    found: Callable[..., Any] = flash_attn_varlen_func
    return found


class FlashCall(NamedTuple):
    """Ranges that go into one call, as arrays of ``flash_attn_varlen_func``.

    rows int64 ``[total]``: of the batch, in the order of q. cu_q, cu_k: int32 ``[ranges + 1]``.
    pages: each range's, and how many. keys: of each range.
    """

    causal: bool
    rows: IntArray
    cu_q: IntArray
    cu_k: IntArray
    pages: list[IntArray]

    @property
    def max_q(self) -> int:
        return int(np.diff(self.cu_q).max())

    @property
    def max_k(self) -> int:
        return int(np.diff(self.cu_k).max())


def split(ranges: KVRanges, least_rows: int) -> tuple[list[FlashCall], KVRanges]:
    """The ranges that flash-attn computes, in one call for full ones and one for staircases, and
    the rest: those of another form, and those of fewer rows than ``least_rows``.

    Below that its kernels, of 64 rows at least, have less to win than copying rows costs.
    """
    full: list[int] = []
    stairs: list[int] = []
    rest: list[int] = []
    for i in range(len(ranges)):
        entries = slice(ranges.row_start[i], ranges.row_start[i + 1])
        visible = ranges.visible[entries]
        steps = np.diff(visible)
        if len(visible) < least_rows or visible.min() == 0:
            rest.append(i)
        elif (steps == 0).all():
            full.append(i)
        elif (steps == 1).all():
            stairs.append(i)
        else:
            rest.append(i)
    calls = [
        _call(ranges, some, causal) for some, causal in ((full, False), (stairs, True)) if some
    ]
    return calls, _of(ranges, rest)


def _call(ranges: KVRanges, chosen: list[int], causal: bool) -> FlashCall:
    entries = [slice(ranges.row_start[i], ranges.row_start[i + 1]) for i in chosen]
    return FlashCall(
        causal,
        np.concatenate([ranges.rows[some] for some in entries]),
        _starts([some.stop - some.start for some in entries]),
        _starts([ranges.visible[some].max() for some in entries]),
        [ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]] for i in chosen],
    )


def _of(ranges: KVRanges, chosen: list[int]) -> KVRanges:
    pages = [ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]] for i in chosen]
    entries = [slice(ranges.row_start[i], ranges.row_start[i + 1]) for i in chosen]
    return KVRanges(
        page_start=_starts([len(run) for run in pages]),
        pages=np.concatenate([ranges.pages[:0], *pages]),
        first_key=ranges.first_key[chosen],
        row_start=_starts([some.stop - some.start for some in entries]),
        rows=np.concatenate([ranges.rows[:0], *(ranges.rows[some] for some in entries)]),
        visible=np.concatenate([ranges.visible[:0], *(ranges.visible[some] for some in entries)]),
    )


def _starts(counts: list[Any]) -> IntArray:
    return np.cumsum([0, *counts], dtype=np.int32)


def row_tensor(call: FlashCall, where: torch.device) -> Tensor:
    """The call's rows, int64."""
    return torch.from_numpy(call.rows.astype(np.int64)).to(where)


def attend(
    flash: Callable[..., Any], q: Tensor, kv: KVPool, layer: int, call: FlashCall
) -> tuple[Tensor, Tensor]:
    """(out ``[total, heads, head_dim]``, lse ``[total, heads]``) of the call's rows, in order."""
    where = q.device
    rows = row_tensor(call, where)
    keys, values, table = _keys_and_values(kv, layer, call, q.dtype)
    out, lse, _ = flash(
        q[rows].contiguous(),
        keys,
        values,
        torch.from_numpy(call.cu_q).to(where),
        torch.from_numpy(call.cu_k).to(where),
        call.max_q,
        call.max_k,
        dropout_p=0.0,
        softmax_scale=1 / math.sqrt(q.shape[-1]),
        causal=call.causal,
        return_attn_probs=True,
        block_table=table,
    )
    lse = lse.T.contiguous()
    return out, torch.where(lse == math.inf, -math.inf, lse)


def _keys_and_values(
    kv: KVPool, layer: int, call: FlashCall, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pages as they lie, with a block table; or copied side by side, without."""
    layout, shape = kv.layout, kv.layout.shape
    pages, size = kv.layers[layer].elements, layout.page_size
    where = pages.device
    # [pages, 2, page, kv_heads, head_dim]: strides are all that flash-attn asks for.
    halves = pages[:, : layout.values].view(-1, 2, shape.kv_heads, size, shape.head_dim)
    halves = halves.transpose(2, 3)
    if layout.format == "same" and size % PAGE_MULTIPLE == 0:
        longest = max(len(run) for run in call.pages)
        table = np.zeros((len(call.pages), longest), np.int32)
        for line, run in zip(table, call.pages, strict=True):
            line[: len(run)] = run
        keys, values = halves[:, 0], halves[:, 1]
        return keys, values, torch.from_numpy(table).to(where)
    lengths = np.diff(call.cu_k)
    slots = np.concatenate(
        [
            (run[:, None].astype(np.int64) * size + np.arange(size)).ravel()[:length]
            for run, length in zip(call.pages, lengths, strict=True)
        ]
    )
    page, at = (torch.from_numpy(part).to(where) for part in np.divmod(slots, size))
    found = halves[page, :, at]  # [keys, 2, kv_heads, head_dim]
    if layout.format == "same":
        keys, values = found.unbind(1)
        return keys.contiguous(), values.contiguous(), None
    if layout.format == "fp8":
        found = found.view(torch.float8_e4m3fn)
    scales = kv.layers[layer].scales.view(-1, 2, shape.kv_heads, size)[page, :, :, at]
    keys, values = (found.float() * scales[..., None]).to(dtype).unbind(1)
    return keys.contiguous(), values.contiguous(), None


def merge_into(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a call's parts to results ``out [batch rows, heads, head_dim]``, ``lse [.., heads]``, in
    place (kernels/reference.py has the algebra)."""
    before, known = lse[rows], out[rows].float()
    both = torch.logaddexp(before, part_lse)
    base = torch.where(both == -math.inf, 0.0, both)
    merged = known * (before - base).exp()[..., None]
    merged += part.float() * (part_lse - base).exp()[..., None]
    out[rows] = merged.to(out.dtype)
    lse[rows] = both
