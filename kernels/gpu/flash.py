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

from headstart.kernels.gpu.kv import KVPool, PageLayout
from headstart.kernels.ranges import KVRanges, starts

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


def split(ranges: KVRanges, least_rows: int) -> tuple[list[tuple[bool, KVRanges]], KVRanges]:
    """The ranges that flash-attn computes, in one call for full ones and one for staircases
    (causal), and the rest: those of another form, and those of fewer rows than ``least_rows``.

    Below that its kernels, of 64 rows at least, have less to win than copying rows costs.
    """
    full: list[int] = []
    stairs: list[int] = []
    rest: list[int] = []
    for i in range(len(ranges)):
        visible = ranges[i].visible
        steps = np.diff(visible)
        if len(visible) < least_rows or min(visible) == 0:
            rest.append(i)
        elif (steps == 0).all():
            full.append(i)
        elif (steps == 1).all():
            stairs.append(i)
        else:
            rest.append(i)
    calls = [
        (causal, ranges.chosen(some)) for some, causal in ((full, False), (stairs, True)) if some
    ]
    return calls, ranges.chosen(rest)


class FlashCall(NamedTuple):
    """Ranges that go into one call, as arguments of ``flash_attn_varlen_func`` on the device: made
    once a step, for all layers.

    rows int64 ``[total]``: of the batch, in the order of q. cu_q, cu_k: int32 ``[ranges + 1]``.
    table: int32 ``[ranges, pages]``, where pages are read as they lie; None: they are copied, from
    ``page`` and ``at`` (int64 ``[keys]``) of each key.
    """

    causal: bool
    rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    table: Tensor | None
    page: Tensor
    at: Tensor


def place(
    causal: bool, ranges: KVRanges, layout: PageLayout, upload: Callable[[Tensor], Tensor]
) -> FlashCall:
    """The call of some of ``split``'s ranges."""
    each = [ranges[i] for i in range(len(ranges))]
    keys = [max(one.visible) for one in each]
    size = layout.page_size
    table, slots = None, np.zeros(0, np.int64)
    if layout.format == "same" and size % PAGE_MULTIPLE == 0:
        padded = np.zeros((len(each), max(len(one.pages) for one in each)), np.int32)
        for line, one in zip(padded, each, strict=True):
            line[: len(one.pages)] = one.pages
        table = upload(torch.from_numpy(padded))
    else:
        slots = np.concatenate(
            [
                (np.asarray(one.pages, np.int64)[:, None] * size + np.arange(size)).ravel()[:length]
                for one, length in zip(each, keys, strict=True)
            ]
        )
    page, at = (upload(torch.from_numpy(part)) for part in np.divmod(slots, size))
    return FlashCall(
        causal,
        upload(torch.from_numpy(ranges.rows.astype(np.int64))),
        upload(torch.from_numpy(ranges.row_start)),
        upload(torch.from_numpy(starts(keys))),
        int(np.diff(ranges.row_start).max()),
        int(max(keys)),
        table,
        page,
        at,
    )


def attend(
    flash: Callable[..., Any], q: Tensor, kv: KVPool, layer: int, call: FlashCall
) -> tuple[Tensor, Tensor]:
    """(out ``[total, heads, head_dim]``, lse ``[total, heads]``) of the call's rows, in order."""
    keys, values = _keys_and_values(kv, layer, call, q.dtype)
    out, lse, _ = flash(
        q[call.rows].contiguous(),
        keys,
        values,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        dropout_p=0.0,
        softmax_scale=1 / math.sqrt(q.shape[-1]),
        causal=call.causal,
        return_attn_probs=True,
        block_table=call.table,
    )
    lse = lse.T.contiguous()
    return out, torch.where(lse == math.inf, -math.inf, lse)


def _keys_and_values(
    kv: KVPool, layer: int, call: FlashCall, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Pages as they lie, for the block table; or copied side by side, without."""
    layout, shape = kv.layout, kv.layout.shape
    elements, scales, _, _ = kv.layers[layer]
    # [pages, 2, page, kv_heads, head_dim]: strides are all that flash-attn asks for.
    halves = elements[:, : layout.values]
    halves = halves.view(-1, 2, shape.kv_heads, layout.page_size, shape.head_dim).transpose(2, 3)
    if call.table is not None:
        return halves[:, 0], halves[:, 1]
    found = halves[call.page, :, call.at]  # [keys, 2, kv_heads, head_dim]
    if layout.format == "fp8":
        found = found.view(torch.float8_e4m3fn)
    if layout.format != "same":
        each = scales.view(-1, 2, shape.kv_heads, layout.page_size)[call.page, :, :, call.at]
        found = (found.float() * each[..., None]).to(dtype)
    keys, values = found.unbind(1)
    return keys.contiguous(), values.contiguous()


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
