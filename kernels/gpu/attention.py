"""Ranged attention: items of (vectors of a range) x (keys of a split), then a merge.

A *vector* is one query head of one row; the rows of a range and the heads that share a KV head
(the group) lie in one tile, so that keys are read once for all of them:

                          keys of the split, BLOCK_N at a time, from pages
                         ┌────────────┬────────────┬────────────┐
      row 7, head 0      │            │            │        ░░░░│
      row 7, head 1      │   q k^T    │            │        ░░░░│ ░ hidden: key >= visible
      row 8, head 0      │            │            │          ░░│
      row 8, head 1      │            │            │          ░░│
      ...    BLOCK_M     └────────────┴────────────┴────────────┘
                         unmasked loop ───────────> masked loop

One program computes one item for one KV head. Its running maximum and sum are per vector (online
softmax; FlashAttention-2, arXiv 2307.08691, algorithm 1). With one split a row is done; with more,
each leaves ``(out, lse)`` in a slot and ``merge`` adds them up (kernels/reference.py has the
algebra; Flash-Decoding's splits and RelayAttention's fusion, arXiv 2402.14808 eq. 4-6, are the
same thing). Which method emitted a range is not known here.

Keys and values are as wide as queries, or int8 or fp8 (e4m3) with a float32 scale per token and KV
head, which multiplies scores and probabilities: tiles stay in 8 bits until they meet the dot
product.

A head size that is no power of two is computed in two parts, 80 = 64 + 16 and 96 = 64 + 32:
nothing is padded.

Bytes of an item and KV head: 2 * keys * head_dim * width (+ 8 * keys of scales), and
2 * vectors * head_dim * width; FLOPs: 4 * vectors * keys * head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headstart.kernels.gpu.device import Config, Device
from headstart.kernels.gpu.rows import power_of_two

MERGE = Config(block_m=1, block_n=1, warps=1)

ITEM_FIELDS = 6
"""Of an item, int32: first page, keys, first entry, entries, key offset in its range, slot (or -1:
its rows have no other item, and are done)."""


def head_parts(head_dim: int) -> tuple[int, int]:
    """A head size as two tiles: a power of two, and the rest, a smaller one of 16 on or 0.

    Raises ValueError for sizes that are not such a sum up to 256.
    """
    main = 1 << (head_dim.bit_length() - 1)
    tail = head_dim - main
    if not 16 <= head_dim <= 256 or (tail and (tail & (tail - 1) or tail < 16)):
        raise ValueError(
            f"head size {head_dim} is not supported by the gpu backend: it has to be a power of "
            "two from 16 to 256, or the sum of two from 16 on"
        )
    return main, tail


@triton.jit
def widen(tile, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of keys or values as the dot product takes it.

    FORMAT: "same", "int8", "fp8" (e4m3 in software: any device) or "fp8_native" (from 8.9 on).
    """
    if FORMAT == "same":
        return tile
    if FORMAT == "int8":
        return tile.to(DTYPE)
    if FORMAT == "fp8_native":
        return tile.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    # The bits of e4m3 are those of a float16 256 times smaller, subnormals included.
    bits = tile.to(tl.int32)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (half.to(tl.int16).to(tl.float16, bitcast=True) * 256.0).to(DTYPE)


@triton.jit
def _walk(
    acc,
    acc_tail,
    top,
    total,
    q,
    q_tail,
    visible,
    first,
    last,
    pages,
    kv,
    scales,
    page_stride,
    scale_stride,
    key_base,
    value_base,
    scale_base,
    scale,
    MASKED: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [first, last) of an item through the online softmax, in powers of two."""
    d = tl.arange(0, MAIN)
    HEAD_DIM: tl.constexpr = MAIN + TAIL
    for begin in tl.range(first, last, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        if MASKED:
            inside = key < last
            page = tl.load(pages + key // PAGE, mask=inside, other=0).to(tl.int64)
        else:
            page = tl.load(pages + key // PAGE).to(tl.int64)
        at = page * page_stride + (key % PAGE) * HEAD_DIM
        if MASKED:
            k = tl.load(kv + (key_base + at)[:, None] + d[None, :], mask=inside[:, None], other=0)
        else:
            k = tl.load(kv + (key_base + at)[:, None] + d[None, :])
        s = tl.dot(q, tl.trans(widen(k, FORMAT, DTYPE)), input_precision=PRECISION)
        if TAIL:
            e = MAIN + tl.arange(0, TAIL)
            if MASKED:
                k2 = tl.load(
                    kv + (key_base + at)[:, None] + e[None, :], mask=inside[:, None], other=0
                )
            else:
                k2 = tl.load(kv + (key_base + at)[:, None] + e[None, :])
            s = tl.dot(q_tail, tl.trans(widen(k2, FORMAT, DTYPE)), s, input_precision=PRECISION)
        s *= scale
        if FORMAT != "same":
            scale_at = scales + scale_base + page * scale_stride + key % PAGE
            if MASKED:
                s *= tl.load(scale_at, mask=inside, other=0.0)[None, :]
            else:
                s *= tl.load(scale_at)[None, :]
        if MASKED:
            s = tl.where(key[None, :] < visible[:, None], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing seen yet: no NaN
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        if FORMAT != "same":
            # Value scales come after those of all KV heads' keys.
            scale_at += KV_HEADS * PAGE
            if MASKED:
                p *= tl.load(scale_at, mask=inside, other=0.0)[None, :]
            else:
                p *= tl.load(scale_at)[None, :]
        p = p.to(DTYPE)
        acc = acc * shrink[:, None]
        if MASKED:
            v = tl.load(kv + (value_base + at)[:, None] + d[None, :], mask=inside[:, None], other=0)
        else:
            v = tl.load(kv + (value_base + at)[:, None] + d[None, :])
        acc = tl.dot(p, widen(v, FORMAT, DTYPE), acc, input_precision=PRECISION)
        if TAIL:
            acc_tail = acc_tail * shrink[:, None]
            e = MAIN + tl.arange(0, TAIL)
            if MASKED:
                v2 = tl.load(
                    kv + (value_base + at)[:, None] + e[None, :], mask=inside[:, None], other=0
                )
            else:
                v2 = tl.load(kv + (value_base + at)[:, None] + e[None, :])
            acc_tail = tl.dot(p, widen(v2, FORMAT, DTYPE), acc_tail, input_precision=PRECISION)
    return acc, acc_tail, top, total


@triton.jit
def attend_items(
    q_ptr,
    kv,
    scales,
    items,
    pages,
    rows,
    visible_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_stride,
    page_stride,
    scale_stride,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (items, KV heads). q ``[rows, heads, head_dim]`` with a stride between rows; out the
    same, contiguous; lse ``[rows, heads]``; parts ``[slots, heads, head_dim]``, float32.

    ``kv``: a layer's pages, as elements; ``page_stride`` elements apart (``scale_stride`` floats).
    """
    item = items + tl.program_id(0) * 6  # ITEM_FIELDS
    num_entries = tl.load(item + 3)
    if num_entries == 0:  # of a captured graph's spare items
        return
    head = tl.program_id(1)
    page_ptr = pages + tl.load(item)
    num_keys = tl.load(item + 1)
    first_entry = tl.load(item + 2)
    offset = tl.load(item + 4)
    slot = tl.load(item + 5)
    HEAD_DIM: tl.constexpr = MAIN + TAIL
    HEADS: tl.constexpr = GROUP * KV_HEADS
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    vector = tl.arange(0, BLOCK_M)
    entry = vector // GROUP
    is_vector = entry < num_entries
    row = tl.load(rows + first_entry + entry, mask=is_vector, other=0)
    visible = tl.load(visible_ptr + first_entry + entry, mask=is_vector, other=0) - offset
    visible = tl.minimum(tl.maximum(visible, 0), num_keys)
    q_head = head * GROUP + vector % GROUP
    d = tl.arange(0, MAIN)
    q_at = q_ptr + row.to(tl.int64) * q_stride + q_head * HEAD_DIM
    q = tl.load(q_at[:, None] + d[None, :], mask=is_vector[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if TAIL:
        e = MAIN + tl.arange(0, TAIL)
        q_tail = tl.load(q_at[:, None] + e[None, :], mask=is_vector[:, None], other=0.0)
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    else:
        q_tail = total
        acc_tail = total

    last = tl.max(visible, 0)
    # Vectors past the end see nothing; they may not shorten the unmasked loop.
    common = tl.min(tl.where(is_vector, visible, num_keys), 0) // BLOCK_N * BLOCK_N
    key_base = head * PAGE * HEAD_DIM
    value_base = (KV_HEADS + head) * PAGE * HEAD_DIM
    scale_base = head * PAGE
    acc, acc_tail, top, total = _walk(
        acc, acc_tail, top, total, q, q_tail, visible, 0, common, page_ptr, kv, scales,
        page_stride, scale_stride, key_base, value_base, scale_base, scale,
        False, MAIN, TAIL, PAGE, KV_HEADS, BLOCK_N, FORMAT, DTYPE, PRECISION,
    )  # fmt: skip
    acc, acc_tail, top, total = _walk(
        acc, acc_tail, top, total, q, q_tail, visible, common, last, page_ptr, kv, scales,
        page_stride, scale_stride, key_base, value_base, scale_base, scale,
        True, MAIN, TAIL, PAGE, KV_HEADS, BLOCK_N, FORMAT, DTYPE, PRECISION,
    )  # fmt: skip

    seen = is_vector & (visible > 0)
    inverse = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453,
                   -float("inf"))  # fmt: skip
    acc = tl.where(seen[:, None], acc * inverse[:, None], 0.0)
    if TAIL:
        acc_tail = tl.where(seen[:, None], acc_tail * inverse[:, None], 0.0)
    if slot < 0:
        at = row.to(tl.int64) * HEADS + q_head
        tl.store(lse_ptr + at, lse, mask=is_vector)
        at = (at * HEAD_DIM)[:, None]
        tl.store(out_ptr + at + d[None, :], acc.to(DTYPE), mask=is_vector[:, None])
        if TAIL:
            e = MAIN + tl.arange(0, TAIL)
            tl.store(out_ptr + at + e[None, :], acc_tail.to(DTYPE), mask=is_vector[:, None])
    else:
        at = (slot + entry).to(tl.int64) * HEADS + q_head
        tl.store(part_lse_ptr + at, lse, mask=is_vector)
        at = (at * HEAD_DIM)[:, None]
        tl.store(part_ptr + at + d[None, :], acc, mask=is_vector[:, None])
        if TAIL:
            e = MAIN + tl.arange(0, TAIL)
            tl.store(part_ptr + at + e[None, :], acc_tail, mask=is_vector[:, None])


@triton.jit
def merge(
    part_ptr,
    part_lse_ptr,
    rows,
    starts,
    slots,
    out_ptr,
    lse_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows to merge, heads): the parts of one row and head, of any number, to its result.

        rows    [ 3      7 ]        row 3 has its parts in slots 0, 5 and 9, row 7 has none
        starts  [ 0      3  3 ]
        slots   [ 0 5 9 ]

    A row of -1 is one of a captured graph's spare ones. Reads 4 * parts * (head_dim + 1) bytes.
    """
    row = tl.load(rows + tl.program_id(0))
    if row < 0:
        return
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    top = -float("inf")
    total = 0.0
    for i in range(tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)):
        at = tl.load(slots + i).to(tl.int64) * HEADS + head
        lse = tl.load(part_lse_ptr + at)
        part = tl.load(part_ptr + at * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        new_top = tl.maximum(top, lse)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        weight = tl.exp(lse - base)
        acc = acc * shrink + part * weight
        total = total * shrink + weight
        top = new_top
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    at = row.to(tl.int64) * HEADS + head
    tl.store(lse_ptr + at, tl.where(seen, top + tl.log(safe), -float("inf")))
    out = tl.where(seen, acc / safe, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * HEAD_DIM + d, out, mask=d < HEAD_DIM)


def merge_parts(
    device: Device,
    parts: Tensor,
    part_lse: Tensor,
    rows: Tensor,
    starts: Tensor,
    slots: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See ``merge``. parts: float32 ``[slots, heads, head_dim]``; part_lse: ``[slots, heads]``."""
    _, heads, head_dim = parts.shape
    device.launch(
        merge, (len(starts) - 1, heads), MERGE,
        parts, part_lse, rows, starts, slots, out, lse,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=power_of_two(head_dim),
    )  # fmt: skip
