"""Row kernels of the gpu backend against the float32 oracle, and 8-bit formats against torch's."""

from __future__ import annotations

import math
import random as random_module

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from headstart.kernels.backend import AttentionShape, RopeTable
from headstart.kernels.gpu import kv, rows
from headstart.kernels.gpu.device import Config
from headstart.kernels.reference import ReferenceBackend, rms_norm, rotate

# The interpreter is numpy, which mentions infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SIZES = [1, 3, 16, 17, 100, 576]
PAGES = 8
POSITIONS = 100


@pytest.fixture
def random(device):
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device.torch_device)


def in_wider_rows(x):
    """The same numbers as a view whose rows are further apart, with NaN between them."""
    wide = x.new_full((len(x), x.shape[1] + 24), math.nan)
    wide[:, 8:-16] = x
    return wide[:, 8:-16]


def ones(device, size):
    return torch.ones(size, device=device.torch_device)


def close(result, expected, dtype):
    """Within one rounding to ``dtype`` of what was computed in float32."""
    most = expected.abs() * ROUNDING[dtype] + 2e-6
    assert ((result.float() - expected).abs() <= most).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.smoke
def test_norm(device, dtype, random, size, has_delta, count):
    residual, weight = random(count, size) * 3, random(size)
    delta = random(count, size).to(dtype) if has_delta else None
    expected = residual + delta.float() if has_delta else residual.clone()
    result = rows.norm(device, residual, delta, weight, 1e-5, dtype)
    assert result.dtype is dtype
    assert torch.equal(residual, expected)
    close(result, rms_norm(expected, weight, 1e-5), dtype)


def test_norm_of_strided_rows(device, dtype, random):
    wide, deltas = random(4, 90), random(4, 80).to(dtype)
    before = wide.clone()
    expected = wide[:, 10:74] + deltas[:, :64].float()
    result = rows.norm(device, wide[:, 10:74], deltas[:, :64], ones(device, 64), 1e-5, dtype)
    close(result, rms_norm(expected, ones(device, 64), 1e-5), dtype)
    assert torch.equal(wide[:, :10], before[:, :10])
    assert torch.equal(wide[:, 74:], before[:, 74:])


def test_a_row_that_overflowed_does_not_become_numbers(device, dtype, random):
    """NaN must reach the logits, where it ends the request; the other rows are unharmed."""
    for bad in (math.inf, math.nan):
        residual = random(3, 70)
        clean = rows.norm(device, residual.clone(), None, ones(device, 70), 1e-6, dtype)
        residual[1, 40] = bad
        result = rows.norm(device, residual, None, ones(device, 70), 1e-6, dtype)
        assert result[1].isnan().any()
        assert torch.equal(result[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("size", [*SIZES, 1500])
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.smoke
def test_silu_mul(device, dtype, random, size, count):
    gate_up = (random(count, 2 * size) * 4).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    close(rows.silu_mul(device, gate_up), torch.nn.functional.silu(gate) * up, dtype)


def test_silu_far_from_zero(device):
    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 1e30]])
    gate = gate.to(device.torch_device)
    result = rows.silu_mul(device, torch.cat([gate, torch.ones_like(gate)], dim=1))
    exact = (gate.double() * torch.sigmoid(gate.double())).float()
    assert torch.allclose(result, exact, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_random_rows(device, dtype, seed):
    """Any number and size of rows, apart in memory; whole rows of zeros and tiny numbers."""
    rng = random_module.Random(seed)
    count, size = rng.randint(1, 70), rng.randint(1, 1300)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator) * 4
    x *= torch.tensor([rng.choice([0.0, 1e-20, 1e-4, 1.0, 100.0]) for _ in range(count)])[:, None]
    residual, weight = in_wider_rows(x.to(device.torch_device)), ones(device, size) * 1.5
    delta = in_wider_rows(torch.randn(count, size, generator=generator).to(dtype) / 8)
    delta = delta.to(device.torch_device) * (residual != 0).to(dtype)
    expected = residual + delta.float()
    result = rows.norm(device, residual, delta, weight, 1e-6, dtype)
    assert torch.equal(residual, expected)
    close(result, rms_norm(expected, weight, 1e-6), dtype)

    gate_up = in_wider_rows(torch.cat([expected, expected.flip(1)], dim=1).to(dtype))
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate) * up
    inside = product.abs() < torch.finfo(dtype).max
    close(rows.silu_mul(device, gate_up)[inside], product[inside], dtype)


def test_numbers_of_bfloat16(device, random):
    """The interpreter is not given bfloat16, so its numbers go through the float32 kernels: what
    differs on a device is loads and stores, which are the compiler's."""

    def rounded(x):
        return x.bfloat16().float()

    residual, delta, weight = random(20, 200), rounded(random(20, 200)), random(200)
    expected = rms_norm(residual + delta, weight, 1e-5)
    result = rows.norm(device, residual, delta, weight, 1e-5, torch.float32)
    close(result.bfloat16(), expected, torch.bfloat16)
    gate_up = rounded(random(20, 400) * 4)
    gate, up = gate_up.chunk(2, dim=-1)
    result = rows.silu_mul(device, gate_up).bfloat16()
    close(result, torch.nn.functional.silu(gate) * up, torch.bfloat16)
    scene = Writing(device, torch.float32, random, AttentionShape(6, 2, 64))
    scene.qkv = rounded(scene.qkv)
    q, (expected_q, expected) = scene.write(), scene.expected()
    close(q.cpu().bfloat16(), expected_q, torch.bfloat16)
    close(scene.stored()[0].bfloat16(), expected, torch.bfloat16)


# ---------------------------------------------------------------------------- rope and KV


class Writing:
    """Rows with random slots, written by the kernel and by the oracle."""

    def __init__(self, device, dtype, random, shape, *, count=9, page=32, format="same"):
        self.device, self.dtype, self.shape, self.page = device, dtype, shape, page
        self.layout = kv.PageLayout(shape, page, dtype, format)
        self.pool = kv.allocate(self.layout, 2, PAGES, device.torch_device)
        self.qkv = random(count, (shape.heads + 2 * shape.kv_heads) * shape.head_dim).to(dtype)
        angle = random(POSITIONS, shape.head_dim // 2) * 3
        self.rope = RopeTable(angle.cos(), angle.sin())
        chosen = torch.Generator().manual_seed(count)
        self.positions = torch.randperm(POSITIONS, generator=chosen)[:count].int()
        self.slots = torch.randperm(PAGES * page, generator=chosen)[:count].int()

    def write(self, q_norm=None, k_norm=None):
        where = self.device.torch_device
        return rows.rope_and_store(
            self.device, self.qkv, q_norm, k_norm, 1e-5, self.rope, self.positions.to(where),
            self.slots.to(where), self.shape, self.pool.layers[1], self.layout,
        )  # fmt: skip

    def stored(self):
        """What the slots hold, float32 ``[2 (key, value), rows, kv_heads, head_dim]``, by the
        layout's description; and the codes it was made of."""
        layout, shape = self.layout, self.shape
        data = self.pool.data[1].cpu()
        values = data[:, : layout.values * layout.element.itemsize].contiguous()
        values = values.view(torch.float8_e4m3fn if layout.format == "fp8" else layout.element)
        values = values.view(PAGES, 2, shape.kv_heads, self.page, shape.head_dim)
        page, at = self.slots.long() // self.page, self.slots.long() % self.page
        codes = values[page, :, :, at].movedim(1, 0)
        if layout.format == "same":
            return codes.float(), codes
        scales = data[:, layout.values :].contiguous().view(torch.float32)
        scales = scales.view(PAGES, 2, shape.kv_heads, self.page)[page, :, :, at].movedim(1, 0)
        return codes.float() * scales[..., None], codes

    def expected(self, q_norm=None, k_norm=None):
        oracle, shape = ReferenceBackend(page_size=self.page), self.shape
        pool = oracle.allocate_kv(shape, 1, PAGES)
        rope = RopeTable(self.rope.cos.cpu(), self.rope.sin.cpu())
        norms = [None if norm is None else norm.cpu() for norm in (q_norm, k_norm)]
        q = oracle.rope_and_store(
            self.qkv.float().cpu(), *norms, 1e-5, rope, self.positions, self.slots, shape, pool, 0
        )
        return q, pool[0, self.slots.long()].movedim(1, 0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 16), (8, 1, 128), (6, 3, 80), (2, 2, 256), (4, 2, 96)],
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.smoke
def test_rope_and_store(device, dtype, random, heads, kv_heads, head_dim, normed):
    scene = Writing(device, dtype, random, AttentionShape(heads, kv_heads, head_dim))
    norms = (random(head_dim), random(head_dim)) if normed else (None, None)
    q = scene.write(*norms)
    expected_q, expected = scene.expected(*norms)
    close(q.cpu(), expected_q, dtype)
    close(scene.stored()[0], expected, dtype)
    # Nothing else is touched: not the other layer, not other slots.
    assert (scene.pool.data[0] == 0).all()
    per_slot = 2 * kv_heads * head_dim
    assert int((scene.pool.layers[1].elements != 0).sum()) <= len(scene.qkv) * per_slot


@pytest.mark.parametrize("page", [16, 256])
def test_pages_of_other_sizes(device, dtype, random, page):
    scene = Writing(device, dtype, random, AttentionShape(4, 2, 64), page=page, count=12)
    scene.write()
    close(scene.stored()[0], scene.expected()[1], dtype)


@pytest.mark.parametrize("seed", range(10))
def test_random_writing(device, dtype, random, seed):
    """Shapes, page sizes and formats in any combination; rows apart in memory, some without a
    slot; enough rows for both sizes of a program."""
    rng = random_module.Random(seed)
    kv_heads, group = rng.randint(1, 3), rng.randint(1, 8)
    shape = AttentionShape(kv_heads * group, kv_heads, rng.choice([16, 40, 48, 64, 72, 80, 128]))
    count, page = rng.choice([rng.randint(1, 64), rng.randint(65, 70)]), rng.choice([16, 32, 256])
    format = ("same", "int8", "fp8")[seed % 3]
    scene = Writing(device, dtype, random, shape, count=count, page=page, format=format)
    scene.qkv = in_wider_rows(scene.qkv)
    slots = scene.slots.clone()
    spare = torch.tensor([rng.random() < 0.2 for _ in range(count)])
    scene.slots[spare] = -1
    norms = [random(shape.head_dim) if rng.random() < 0.5 else None for _ in range(2)]
    q = scene.write(*norms)
    scene.slots = slots
    expected_q, expected = scene.expected(*norms)
    close(q.cpu(), expected_q, dtype)
    stored, _ = scene.stored()
    assert (stored[:, spare] == 0).all()
    stored, expected = stored[:, ~spare], expected[:, ~spare]
    if format == "same":
        close(stored, expected, dtype)
    else:
        scale = expected.abs().amax(-1, keepdim=True) / (127 if format == "int8" else 448)
        step = scale * (0.501 if format == "int8" else 16.01)
        assert ((stored - expected).abs() <= step).all()
    per_row = 2 * kv_heads * shape.head_dim
    assert int((scene.pool.layers[1].elements != 0).sum()) <= int((~spare).sum()) * (
        per_row + (0 if format == "same" else 8 * kv_heads)
    )
    assert (scene.pool.data[0] == 0).all()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.smoke
def test_eight_bits_are_those_of_torch(device, dtype, random, format, head_dim):
    """Byte for byte, scales too. Rotation by nothing, so that keys are known exactly."""
    scene = Writing(device, dtype, random, AttentionShape(6, 3, head_dim), format=format, count=68)
    scene.rope = RopeTable(torch.ones_like(scene.rope.cos), torch.zeros_like(scene.rope.sin))
    scene.qkv *= 0.75
    largest = 9e37 if dtype is not torch.float16 else 65504.0
    scene.qkv[3] = 0
    scene.qkv[4] *= 2.0**-10
    scene.qkv[5] = scene.qkv[5].sign() * largest
    scene.qkv[6] *= largest / 8
    scene.qkv[7] *= torch.finfo(dtype).smallest_normal  # subnormal
    scene.qkv[8, 1:] = 0
    scene.write()
    exact = scene.qkv.float().cpu().view(68, -1, head_dim)[:, 6:].view(68, 2, 3, head_dim)
    exact = exact.movedim(1, 0)
    assert exact.isfinite().all()
    scale = exact.abs().amax(-1, keepdim=True) / (127.0 if format == "int8" else 448.0)
    scaled = torch.where(scale > 0, exact / scale, 0.0)
    if format == "int8":
        wanted = scaled.round().clamp(-127, 127).to(torch.int8)
    else:
        wanted = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    stored, codes = scene.stored()
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(stored, codes.float() * scale)


@triton.jit
def encode(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, rows.e4m3(tl.load(x + i)))


def test_every_code_of_fp8_is_reached_as_torch_reaches_it(device):
    """All finite float16 numbers, which have every border between two codes, float32 numbers just
    beside them, and any others; what is beyond 448 is 448."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.isfinite()]
    above = torch.nextafter(every, torch.tensor(math.inf))
    below = torch.nextafter(every, torch.tensor(-math.inf))
    bits = torch.randint(-(2**31), 2**31, (30000,), generator=torch.Generator().manual_seed(0))
    others = bits.int().view(torch.float32)
    x = torch.cat([every, above, below, others[others.isfinite()]])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096))
    out = torch.empty(len(x), dtype=torch.uint8, device=device.torch_device)
    device.launch(
        encode, (len(x) // 4096,), Config(1, 4096), x.to(device.torch_device), out, BLOCK=4096
    )
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(out.cpu(), wanted)
    assert len(set(out.tolist())) == 254  # all but two NaNs


def test_pages_beyond_the_reach_of_32_bits(device):
    """Slot numbers are int32; where their bytes lie is not. The pool's memory is not touched."""
    shape = AttentionShape(1, 1, 256)
    layout = kv.PageLayout(shape, 16, torch.float32, "int8")
    page = (2**31 + 2**20) // layout.num_bytes
    if device.torch_device.type == "cpu":
        data = torch.from_numpy(np.zeros((page + 1, layout.num_bytes), np.uint8))
    else:
        data = torch.zeros(
            page + 1, layout.num_bytes, dtype=torch.uint8, device=device.torch_device
        )
    layer = kv.KVLayer(
        data.view(torch.int8), data.view(torch.float32)[:, layout.values // 4 :],
        layout.num_bytes, layout.num_bytes // 4,
    )  # fmt: skip
    assert page * layer.page_stride > 2**31
    none = torch.ones(1, 128, device=device.torch_device)
    slots = torch.tensor([page * 16 + 5], dtype=torch.int32, device=device.torch_device)
    qkv = torch.full((1, 768), 3.0, device=device.torch_device)
    rows.rope_and_store(
        device, qkv, None, None, 1e-5, RopeTable(none, none * 0), torch.zeros_like(slots), slots,
        shape, layer, layout,
    )  # fmt: skip
    codes = data[page, : layout.values].view(torch.int8).view(2, 16, 256)
    assert (codes[:, 5] == 127).all()
    assert int((codes != 0).sum()) == 2 * 256
    scales = data[page, layout.values :].view(torch.float32).view(2, 16)
    assert scales[:, 5].cpu().tolist() == pytest.approx([3 / 127] * 2)


def test_a_spare_row_writes_nothing(device, dtype, random):
    """Rows that a captured graph has over have slot -1."""
    scene = Writing(device, dtype, random, AttentionShape(4, 2, 32), count=3)
    scene.slots[1] = -1
    scene.write()
    assert int((scene.pool.layers[1].elements != 0).any(-1).sum()) <= 2 * 2 * 2
    assert int((scene.pool.data != 0).sum()) <= 2 * 2 * 2 * 32 * dtype.itemsize


@pytest.mark.parametrize("format", ["same", "int8", "fp8"])
def test_what_is_written_is_finite(device, dtype, random, format):
    scene = Writing(device, dtype, random, AttentionShape(4, 2, 32), format=format)
    scene.qkv[2, ::3], scene.qkv[2, 1::3] = math.inf, math.nan
    scene.qkv[5] = -math.inf
    scene.write()
    stored, _ = scene.stored()
    assert stored.isfinite().all()
    clean = [0, 1, 3, 4, 6, 7, 8]
    expected = scene.expected()[1]
    assert torch.allclose(stored[:, clean], expected[:, clean], atol=0.2)


def test_strided_qkv(device, dtype, random):
    scene = Writing(device, dtype, random, AttentionShape(4, 2, 32))
    wide = torch.full((9, 300), math.nan, device=device.torch_device).to(dtype)
    wide[:, 20:276] = scene.qkv
    scene.qkv = wide[:, 20:276]
    q = scene.write()
    expected_q, expected = scene.expected()
    close(q.cpu(), expected_q, dtype)
    close(scene.stored()[0], expected, dtype)


def test_rotation_is_of_halves(device, random):
    """Not of neighbours: the oracle's own definition, on one head."""
    scene = Writing(device, torch.float32, random, AttentionShape(1, 1, 32), count=4)
    x = scene.qkv[:, :32].view(4, 1, 32).cpu()
    at = scene.positions.long()
    expected = rotate(x, scene.rope.cos.cpu()[at], scene.rope.sin.cpu()[at])
    assert torch.allclose(scene.write().cpu(), expected, atol=1e-6)
