"""Row kernels of the gpu backend against the float32 oracle, and 8-bit formats against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.kernels.backend import AttentionShape, RopeTable
from headstart.kernels.gpu import kv, rows
from headstart.kernels.reference import ReferenceBackend, rms_norm, rotate

# The interpreter is numpy, which mentions infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SIZES = [1, 3, 16, 17, 100, 576]


@pytest.fixture
def random(device):
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device.torch_device)


def ones(device, size):
    return torch.ones(size, device=device.torch_device)


def close(result, expected, dtype):
    """Within one rounding to ``dtype`` of what was computed in float32."""
    most = expected.abs() * ROUNDING[dtype] + 2e-6
    assert ((result.float() - expected).abs() <= most).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("count", [1, 5])
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


# ---------------------------------------------------------------------------- rope and KV


class Writing:
    """Rows with random slots, written by the kernel and by the oracle."""

    def __init__(self, device, dtype, random, shape, *, count=9, page=32, format="same"):
        self.device, self.dtype, self.shape, self.page = device, dtype, shape, page
        self.layout = kv.PageLayout(shape, page, dtype, format)
        self.pool = kv.allocate(self.layout, 2, 4, device.torch_device)
        self.qkv = random(count, (shape.heads + 2 * shape.kv_heads) * shape.head_dim).to(dtype)
        angle = random(50, shape.head_dim // 2) * 3
        self.rope = RopeTable(angle.cos(), angle.sin())
        chosen = torch.Generator().manual_seed(count)
        self.positions = torch.randperm(50, generator=chosen)[:count].int()
        self.slots = torch.randperm(4 * page, generator=chosen)[:count].int()

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
        values = values.view(4, 2, shape.kv_heads, self.page, shape.head_dim)
        page, at = self.slots.long() // self.page, self.slots.long() % self.page
        codes = values[page, :, :, at].movedim(1, 0)
        if layout.format == "same":
            return codes.float(), codes
        scales = data[:, layout.values :].contiguous().view(torch.float32)
        scales = scales.view(4, 2, shape.kv_heads, self.page)[page, :, :, at].movedim(1, 0)
        return codes.float() * scales[..., None], codes

    def expected(self, q_norm=None, k_norm=None):
        oracle, shape = ReferenceBackend(page_size=self.page), self.shape
        pool = oracle.allocate_kv(shape, 1, 4)
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


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_eight_bits(device, dtype, random, format, head_dim):
    """Codes are torch's own of the same numbers, scales their largest magnitude / 127 or / 448."""
    scene = Writing(device, dtype, random, AttentionShape(6, 3, head_dim), format=format, count=20)
    scene.qkv[3] = 0
    scene.qkv[4] *= 2.0**-10
    scene.write()
    stored, codes = scene.stored()
    _, exact = scene.expected()
    most = 127.0 if format == "int8" else 448.0
    scale = exact.abs().amax(-1, keepdim=True) / most
    scaled = torch.where(scale > 0, exact / scale, 0.0)
    wanted = scaled.round().to(torch.int8) if format == "int8" else scaled.to(torch.float8_e4m3fn)
    # Rotation may differ in the last bit, which is seen where a number lies between two codes.
    same = codes.view(torch.uint8) == wanted.view(torch.uint8)
    assert same.float().mean() > 0.995
    step = scale * (0.5 if format == "int8" else 16.0) + exact.abs() * 1e-5
    assert ((stored - exact).abs() <= step).all()
    assert (stored[:, 3] == 0).all()


def test_every_code_of_fp8_is_reached_as_torch_reaches_it(device, random):
    """All 2^16 float16 numbers in reach, values and subnormals, against torch's conversion: rows
    whose largest element is 448 have scale 1, so that codes are of the numbers themselves."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.isfinite() & (every.abs() <= 448)]
    count = -(-len(every) // 63)
    table = torch.zeros(count, 64)
    table[:, 0] = 448.0
    table[:, 1:] = torch.nn.functional.pad(every, (0, count * 63 - len(every))).view(count, 63)
    table = table[:: max(count // 300, 1)]  # a thousandth of a number apart is enough
    count = len(table)
    shape = AttentionShape(1, 1, 64)
    layout = kv.PageLayout(shape, 256, torch.float32, "fp8")
    pages = -(-count // 256)
    pool = kv.allocate(layout, 1, pages, device.torch_device)
    qkv = torch.zeros(count, 3 * 64)
    qkv[:, 128:] = table
    where = device.torch_device
    none = torch.ones(1, 32, device=where)
    slots = torch.arange(count, dtype=torch.int32, device=where)
    rows.rope_and_store(
        device, qkv.to(where), None, None, 1e-5, RopeTable(none, none * 0),
        torch.zeros_like(slots), slots, shape, pool.layers[0], layout,
    )  # fmt: skip
    values = pool.data[0].cpu()[:, 256 * 64 : 2 * 256 * 64].reshape(-1, 64)[:count]
    assert torch.equal(values, table.to(torch.float8_e4m3fn).view(torch.uint8))


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
