"""Row kernels: RMSNorm with residual, RoPE with the KV write, SiLU and multiply.

All are bound by memory: each reads what it needs once, computes in float32 and writes once. One
program computes one row, or one head of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headstart.kernels.backend import AttentionShape, RopeTable
from headstart.kernels.gpu.device import Config, Device
from headstart.kernels.gpu.kv import KVLayer, PageLayout

SILU_BLOCK = 1024


@triton.jit
def add_norm(
    residual,
    delta,
    weight,
    out,
    residual_stride,
    delta_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """Grid (rows). ``residual += delta``, and its RMSNorm times ``weight`` to ``out``.

        residual  float32  ░░░░░░░░  read, written      delta   ░░░░░░░░  read, if there is one
        out                ░░░░░░░░  written            weight  ░░░░░░░░  read (from a cache)

    Bytes of a row: size * (8 + 2 * width); FLOPs: 5 * size.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    x = tl.load(residual + row * residual_stride + i, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + row * delta_stride + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * residual_stride + i, x, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + eps)
    w = tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + row * SIZE + i, (x * inverse * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def nearest(x):
    """The nearest whole number, halves to even, of numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: its last bit is worth 1


@triton.jit
def e4m3(x):
    """The bytes of float8_e4m3fn (OCP 8-bit floating point, 5.2.1): nearest, halves to even.

    x: finite float32; what is beyond 448 becomes 448. In software, since no device before 8.9
    has the type.
    """
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Three bits of mantissa are kept; exponents are 120 less than float32's.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = nearest(size * 512.0).to(tl.int32)  # below 2^-6: multiples of 2^-9
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def _scaled(a, b, weight, i, inside, eps, HEAD_DIM: tl.constexpr):
    """RMSNorm of heads given as their halves ``[rows, BLOCK]``."""
    inverse = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)
    a *= inverse[:, None] * tl.load(weight + i, mask=inside, other=0.0)[None, :]
    b *= inverse[:, None] * tl.load(weight + HEAD_DIM // 2 + i, mask=inside, other=0.0)[None, :]
    return a, b


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_store(
    qkv,
    q_norm,
    k_norm,
    cos_ptr,
    sin_ptr,
    positions,
    slots,
    q_out,
    kv,
    scales,
    num_rows,
    qkv_stride,
    page_stride,
    scale_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    MOST: tl.constexpr,
):
    """Grid (blocks of ROWS rows, heads + 2 * KV heads): one head of some rows, as two halves.

        qkv  [ q0 q1 q2 q3 | k0 k1 | v0 v1 ]
               norm, rotate  norm,   │
               ↓             rotate  ↓
        q_out [row]          ↓    pages, at the row's slot (none if it is -1)

    Bytes of a row: 2 * width * (heads + 2 * KV heads) * head_dim; FLOPs: up to 10 an element.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    mask = is_row[:, None] & inside[None, :]
    at = qkv + (row.to(tl.int64) * qkv_stride + head * HEAD_DIM)[:, None] + i[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if head < HEADS:
        if Q_NORM:
            a, b = _scaled(a, b, q_norm, i, inside, eps, HEAD_DIM)
    elif head < HEADS + KV_HEADS:  # noqa: SIM102 (K_NORM is decided when it is compiled)
        if K_NORM:
            a, b = _scaled(a, b, k_norm, i, inside, eps, HEAD_DIM)
    if head < HEADS + KV_HEADS:
        position = tl.load(positions + row, mask=is_row, other=0).to(tl.int64)
        angle = (position * HALF)[:, None] + i[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        first = a * cos - b * sin
        b = b * cos + a * sin
        a = first
    if head < HEADS:
        out = q_out + ((row.to(tl.int64) * HEADS + head) * HEAD_DIM)[:, None] + i[None, :]
        tl.store(out, a.to(q_out.dtype.element_ty), mask=mask)
        tl.store(out + HALF, b.to(q_out.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots + row, mask=is_row, other=-1)
        is_row = slot >= 0
        mask = is_row[:, None] & inside[None, :]
        # A hidden key still meets its value as 0 * v: what is stored is a number.
        a = tl.minimum(tl.maximum(tl.where(a == a, a, 0.0), -MOST), MOST)
        b = tl.minimum(tl.maximum(tl.where(b == b, b, 0.0), -MOST), MOST)
        page = (slot // PAGE).to(tl.int64)
        token = (head - HEADS) * PAGE + slot % PAGE  # values come after all keys
        target = kv + (page * page_stride + token * HEAD_DIM)[:, None] + i[None, :]
        if FORMAT == "same":
            tl.store(target, a.to(kv.dtype.element_ty), mask=mask)
            tl.store(target + HALF, b.to(kv.dtype.element_ty), mask=mask)
        else:
            LARGEST_CODE: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
            largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
            # Rounded as torch does, not approximated: devices write the same bytes.
            scale = tl.div_rn(largest, tl.full((ROWS,), LARGEST_CODE, tl.float32))
            tl.store(scales + page * scale_stride + token, scale, mask=is_row)
            divisor = tl.where(scale > 0.0, scale, 1.0)[:, None] + tl.zeros_like(a)
            is_zero = (scale == 0.0)[:, None]
            a = tl.where(is_zero, 0.0, tl.div_rn(a, divisor))
            b = tl.where(is_zero, 0.0, tl.div_rn(b, divisor))
            if FORMAT == "int8":
                code_a = tl.minimum(tl.maximum(nearest(a), -127.0), 127.0).to(tl.int8)
                code_b = tl.minimum(tl.maximum(nearest(b), -127.0), 127.0).to(tl.int8)
            else:
                code_a = e4m3(a)
                code_b = e4m3(b)
            tl.store(target, code_a, mask=mask)
            tl.store(target + HALF, code_b, mask=mask)


@triton.jit
def silu_multiply(gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks of columns). ``silu(gate) * up``.

        gate_up  [ gate ░░ | up ░░ ]  read         out  [ ░░ ]  written

    Bytes of a row: 3 * size * width; FLOPs: 5 * size.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate = tl.load(gate_up + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + i, result.to(out.dtype.element_ty), mask=inside)


def power_of_two(size: int) -> int:
    """The least one that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def row_config(size: int) -> Config:
    """A program for ``size`` elements: about 16 of them a thread."""
    return Config(1, power_of_two(size), warps=min(max(power_of_two(size) // 512, 1), 16))


def norm(
    device: Device,
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """RMSNorm of ``residual += delta`` ``[rows, size]``, as ``dtype``. Residual is float32."""
    rows, size = residual.shape
    out = torch.empty(rows, size, dtype=dtype, device=residual.device)
    config = row_config(size)
    device.launch(
        add_norm, (rows,), config,
        residual, residual if delta is None else delta, weight, out,
        residual.stride(0), 0 if delta is None else delta.stride(0), eps,
        SIZE=size, BLOCK=config.block_n, HAS_DELTA=delta is not None,
    )  # fmt: skip
    return out


def rope_and_store(
    device: Device,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rope: RopeTable,
    positions: Tensor,
    slots: Tensor,
    shape: AttentionShape,
    layer: KVLayer,
    layout: PageLayout,
) -> Tensor:
    """See Backend.rope_and_store: q ``[rows, heads, head_dim]``. A slot of -1 writes nothing."""
    rows = len(qkv)
    q = torch.empty(rows, shape.heads, shape.head_dim, dtype=layout.dtype, device=qkv.device)
    block = power_of_two(shape.head_dim // 2)
    config = Config(4 if rows <= 64 else 16, block, warps=1 if rows <= 64 else 4)
    most = torch.finfo(layout.dtype).max
    if layout.format != "same":
        most = min(most, 1e38)  # code * scale may round up
    device.launch(
        rope_store, (-(-rows // config.block_m), shape.heads + 2 * shape.kv_heads), config,
        qkv, rope.cos if q_norm is None else q_norm, rope.cos if k_norm is None else k_norm,
        rope.cos, rope.sin, positions, slots, q, layer.elements, layer.scales,
        rows, qkv.stride(0), layer.page_stride, layer.scale_stride, eps,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, HEAD_DIM=shape.head_dim,
        ROWS=config.block_m, BLOCK=block, PAGE=layout.page_size,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None,
        FORMAT=layout.format, MOST=most,
    )  # fmt: skip
    return q


def silu_mul(device: Device, gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[rows, 2 * size]``: ``[rows, size]`` of the same type."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(SILU_BLOCK, power_of_two(size))
    device.launch(
        silu_multiply, (rows, -(-size // block)), row_config(block),
        gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=block,
    )  # fmt: skip
    return out
