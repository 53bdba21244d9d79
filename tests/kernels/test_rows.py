"""Operations that go row by row, and the int8 linear layer, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.kernels import _cpu
from headstart.kernels.backend import AttentionShape, RopeTable
from headstart.kernels.cpu.tensors import Rows
from headstart.kernels.devices import load_backend
from headstart.kernels.packing import pack_int8, panels_shape
from headstart.kernels.ranges import KVRanges

pytestmark = pytest.mark.covering(2)

FORMATS = ["f32", "bf16", "int8"]
# A vector is 4, 8 or 16 elements: below, on and between its multiples, and enough for threads.
SIZES = [1, 3, 16, 17, 36, 64, 100, 576]
ROUNDING = {"f32": 2e-6, "bf16": 2**-8, "int8": 0.5001 / 127}


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


@pytest.fixture
def backend(isa, weights):
    return load_backend("cpu", isa=isa, weights=weights, threads=2)


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator)


def values_of(rows):
    """What a backend's Rows mean, as float32."""
    if rows.data.dtype is torch.uint8:
        return (rows.data.float() - 128) * rows.scales
    return rows.data.float()


def close(weights, rows, expected):
    """Within one rounding to the format of what was computed in float32."""
    result = values_of(rows)
    assert torch.isfinite(result).all()
    if weights == "bf16":
        most = expected.abs() * ROUNDING["bf16"] + 1e-6
    else:
        most = expected.abs().amax(dim=1, keepdim=True) * ROUNDING[weights] + 1e-6
        if weights == "int8":
            most = most + expected.abs() * 1e-5
    assert ((result - expected).abs() <= most).all()


def quantised(x):
    """Rows of ``x`` as uint8 with zero point 128 and their scales, as the kernels define them."""
    top = x.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(top > 0, 127 / top, torch.zeros(()))
    return (x * inverse).round() + 128, top / 127


# ---------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("delta_type", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_norm(backend, oracle, weights, random, size, delta_type, rows):
    residual, weight = random(rows, size) * 3, random(size)
    delta = None if delta_type is None else random(rows, size).to(delta_type)
    expected_residual = residual.clone()
    # + works across types as the kernel must: the delta is widened first.
    expected = oracle.norm(
        expected_residual, None if delta is None else delta.float(), weight, 1e-5
    )
    result = backend.norm(residual, delta, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    close(weights, result, expected)


def test_norm_of_zero_and_of_large_rows(backend, weights, oracle):
    residual = torch.zeros(3, 64)
    residual[1], residual[2, 5] = 1e15, -1e18
    expected = oracle.norm(residual.clone(), None, torch.ones(64), 1e-6)
    result = backend.norm(residual, None, torch.ones(64), 1e-6)
    close(weights, result, expected)
    assert (values_of(result)[0] == 0).all()


def test_a_row_that_overflowed_does_not_become_numbers(backend, random):
    """NaN must reach the logits, where it ends the request; the other rows are unharmed."""
    for bad in (math.inf, math.nan):
        for column in (0, 40, 63, 69):
            residual = random(3, 70)
            clean = values_of(backend.norm(residual.clone(), None, torch.ones(70), 1e-6)).clone()
            residual[1, column] = bad
            result = values_of(backend.norm(residual, None, torch.ones(70), 1e-6))
            assert result[1].isnan().any()
            assert torch.equal(result[[0, 2]], clean[[0, 2]])


# ---------------------------------------------------------------------------------- silu


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
def test_silu_mul(backend, oracle, weights, random, size, dtype, rows):
    gate_up = (random(rows, 2 * size) * 4).to(dtype)
    close(weights, backend.silu_mul(gate_up), oracle.silu_mul(gate_up.float()))


def test_silu_far_from_zero(isa):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=1)
    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 1e30]])
    gate = gate.repeat(1, 4)
    result = backend.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1)).data
    exact = (gate.double() * torch.sigmoid(gate.double())).float()
    assert torch.allclose(result, exact, rtol=2e-6, atol=1e-5)


# ---------------------------------------------------------------------------------- quantisation


def quantise(backend, x):
    """``x`` quantised: with weight 1/rms undone, a norm is the only way in, so use silu(x) * 1."""
    # silu(g) = g for large g: 40 * (x / 40) goes through unchanged but for float32 rounding.
    return backend.silu_mul(torch.cat([torch.full_like(x, 40.0), x / 40], dim=1))


@pytest.mark.parametrize("size", SIZES)
def test_quantised_rows(isa, random, size):
    backend = load_backend("cpu", isa=isa, weights="int8", threads=2)
    x = random(40, size) * torch.logspace(-20, 20, 40)[:, None]
    x[7] = 0
    result = quantise(backend, x)
    data, scales = quantised(40 * (x / 40))
    assert torch.allclose(result.scales, scales, rtol=1e-6, atol=0)
    # A value on the border of two integers may go either way; the largest is always +-127.
    assert (result.data.float() - data).abs().max() <= 1
    assert ((result.data.float() - data) != 0).float().mean() < 0.01
    assert (result.data[7] == 128).all()
    assert result.scales[7] == 0
    largest = result.data.int().sub(128).abs().amax(dim=1)
    assert (largest[torch.arange(40) != 7] == 127).all()


def test_huge_and_tiny_values_are_quantised(isa):
    backend = load_backend("cpu", isa=isa, weights="int8", threads=1)
    for scale in (1e-30, 1e-10, 1e37):
        x = torch.linspace(-1, 1, 37)[None] * scale
        assert ((values_of(quantise(backend, x)) - x).abs() <= 0.51 * scale / 127).all()
    # Too small for 127 / x to be a number: what comes out is still as good as nothing.
    assert (values_of(quantise(backend, torch.full((1, 20), 1e-38))).abs() < 1e-35).all()


# ---------------------------------------------------------------------------------- rope and store


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 64), (3, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("kv_type", ["f32", "bf16"])
def test_rope_and_store(isa, oracle, random, heads, kv_heads, head_dim, dtype, has_norm, kv_type):
    """q as returned, v read back through one visible key, k through two that compete for a row."""
    backend = load_backend("cpu", isa=isa, weights=kv_type, threads=2)
    shape, rows = AttentionShape(heads, kv_heads, head_dim), 40
    tolerance = 1e-5 if kv_type == "f32" else 2e-2
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q_norm, k_norm = (random(head_dim), random(head_dim)) if has_norm else (None, None)
    angle = torch.rand(100, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    rope = RopeTable(angle.cos(), angle.sin())
    positions = torch.tensor([(7 * r) % 100 for r in range(rows)], dtype=torch.int32)
    # Every key opens a page or follows another one: 40 rows over 20 pages in descending order.
    slots = torch.tensor([(19 - r // 2) * 32 + (r % 2) * 1 for r in range(rows)], dtype=torch.int32)
    results = []
    for b, data in ((backend, qkv), (oracle, qkv.float())):
        kv = b.allocate_kv(shape, 3, 20)
        q = b.rope_and_store(data, q_norm, k_norm, 1e-5, rope, positions, slots, shape, kv, 1)
        query = q if b is oracle else q.data.float() * math.sqrt(head_dim) * math.log(2)
        reads = []
        for visible in (1, 2):
            ranges = single_pages(range(20), visible)
            plan = b.plan_attention(rows, ranges, shape)
            out = b.attend(q, kv, 1, plan)
            reads.append((out if b is oracle else out.data.float()).clone())
        results.append((query.reshape(rows, -1).clone(), *reads))
    for ours, theirs in zip(*results, strict=True):
        # One float32 rounding of q is scaled by the largest element of a row.
        assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())
    # The first key of a page alone is its value, whatever the query.
    values = qkv.float()[::2, (heads + kv_heads) * head_dim :].view(20, kv_heads, 1, head_dim)
    expected = values.expand(20, kv_heads, heads // kv_heads, head_dim).reshape(20, -1).flip(0)
    assert (results[0][1][:20] - expected).abs().max() <= tolerance


def single_pages(pages, visible):
    """Row i reads the first keys of page i."""
    import numpy as np

    n = len(pages)
    ints = np.arange(n + 1, dtype=np.int32)
    return KVRanges(
        ints,
        np.array(pages, dtype=np.int32),
        np.zeros(n, dtype=np.int32),
        ints,
        ints[:n],
        np.full(n, visible, dtype=np.int32),
    )


def test_storing_touches_its_slots_alone(isa, random):
    for kv_type in ("f32", "bf16"):
        backend = load_backend("cpu", isa=isa, weights=kv_type, threads=2)
        shape = AttentionShape(4, 2, 32)
        kv = backend.allocate_kv(shape, 2, 3)
        kv.data.fill_(5)
        rope = RopeTable(torch.ones(1, 16), torch.zeros(1, 16))
        where = torch.zeros(1, dtype=torch.int32)
        qkv = random(1, 8 * 32)
        backend.rope_and_store(qkv, None, None, 1e-5, rope, where, where + 32 + 31, shape, kv, 1)
        changed = (kv.data != 5).nonzero()
        assert len(changed) == 2 * 2 * 32  # key and value of two heads
        page = 32 * 2 * 2 * 32
        assert (changed[:, 0] == 1).all()
        assert ((changed[:, 1] >= page) & (changed[:, 1] < 2 * page)).all()


# ---------------------------------------------------------------------------------- linear


def int8_linear(backend, x, weight, scale, bias):
    """(result, integer oracle) of the same quantised rows."""
    rows = backend.silu_mul(torch.cat([torch.full_like(x, 30.0), x], dim=1))
    layer = backend.packed_weight(pack_int8(weight, scale, bias))
    product = (rows.data.double() - 128) @ weight.double().T  # exact: far below 2^53
    expected = product * (scale.double() * rows.scales.double())
    if bias is not None:
        expected = expected + bias.double()
    return backend.linear(rows, layer).clone(), expected


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (4, 1), (100, 33), (36, 31), (1540, 65)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_linear(isa, random, threads, inputs, outputs, has_bias):
    backend = load_backend("cpu", isa=isa, weights="int8", threads=threads)
    weight = (random(outputs, inputs) * 50).round().clamp(-127, 127).to(torch.int8)
    scale, bias = random(outputs).abs() / 50, random(outputs) if has_bias else None
    for rows in range(1, 41):
        result, expected = int8_linear(backend, random(rows, inputs), weight, scale, bias)
        assert result.shape == (rows, outputs)
        # The integers are exact; three roundings to float32 remain.
        most = 4e-7 * (expected.abs() + (0 if bias is None else 2 * bias.abs()))
        assert ((result - expected).abs() <= most + 1e-12).all(), rows


@pytest.mark.parametrize("rows", [191, 192, 193, 512])
def test_int8_linear_of_many_rows_and_panels(isa, random, rows):
    """Row blocks and panel groups, each with a rest."""
    backend = load_backend("cpu", isa=isa, weights="int8", threads=2)
    weight = (random(1000, 64) * 50).round().clamp(-127, 127).to(torch.int8)
    result, expected = int8_linear(backend, random(rows, 64), weight, torch.ones(1000), None)
    assert ((result - expected).abs() <= 4e-7 * expected.abs() + 1e-12).all()


@pytest.mark.parametrize("rows", [3, 40])
def test_int8_linear_at_the_ends_of_its_range(isa, rows):
    """All products of the largest size and one sign: nothing saturates on the way."""
    backend = load_backend("cpu", isa=isa, weights="int8", threads=1)
    for sign in (1, -1):
        weight = torch.full((40, 4096), 127 * sign, dtype=torch.int8)
        for value in (1.0, -1.0):
            result, expected = int8_linear(
                backend, torch.full((rows, 4096), value), weight, torch.ones(40), None
            )
            assert torch.allclose(result.double(), expected, rtol=4e-7)


def test_int8_linear_has_the_same_bits_on_every_instruction_set(random):
    """Whatever rows hold, and however many there are: both ways through a panel (linear.h)."""
    weight = (random(70, 1540) * 50).round().clamp(-127, 127).to(torch.int8)
    scale, bias = random(70).abs() / 50, random(70)
    for rows in (1, 2, 4, 8, 9, 24, 25, 97, 200):
        data = torch.randint(0, 256, (rows, 1540), dtype=torch.int16).to(torch.uint8)
        scales = random(rows, 1).abs()
        results = []
        for isa in _cpu.supported():
            backend = load_backend("cpu", isa=isa, weights="int8", threads=2)
            x = Rows(data, scales, data.data_ptr(), scales.data_ptr(), rows)
            results.append(
                backend.linear(x, backend.packed_weight(pack_int8(weight, scale, bias))).clone()
            )
        assert all(torch.equal(results[0], result) for result in results), rows


def test_a_weight_of_minus_128_is_refused():
    """Its sign cannot be changed, which instruction sets without VNNI do."""
    weight = torch.full((8, 64), -128, dtype=torch.int8)
    with pytest.raises(ValueError, match="-128"):
        pack_int8(weight, torch.ones(8), None)


def test_no_rows_are_no_work(isa, weights):
    """kernels.h promises it of every function."""
    backend = load_backend("cpu", isa=isa, weights=weights, threads=2)
    empty = torch.empty(0, 64)
    rows = backend.norm(empty, None, torch.ones(64), 1e-5)
    assert backend.silu_mul(empty).data.shape == (0, 32)
    if weights == "int8":
        panels = pack_int8(torch.ones(8, 64, dtype=torch.int8), torch.ones(8), None)
        layer = backend.packed_weight(panels)
    else:
        layer = backend.linear_weight(torch.ones(8, 64), None)
    assert backend.linear(rows, layer).shape == (0, 8)
    assert backend.argmax(empty) == []


def test_an_input_size_no_word_fits_is_refused():
    with pytest.raises(ValueError, match="divisible by 4, got 30"):
        pack_int8(torch.ones(8, 30, dtype=torch.int8), torch.ones(8), None)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 4), (33, 36), (96, 64)])
def test_panels_hold_the_whole_weight(random, outputs, inputs):
    weight = (random(outputs, inputs) * 50).round().clamp(-127, 127).to(torch.int8)
    panels = pack_int8(weight, random(outputs).abs(), None)
    assert panels.data.shape == panels_shape(outputs, inputs)
    assert torch.equal(panels.weight(), weight)
    assert torch.equal(panels.sums[:outputs], 128 * weight.sum(dim=1, dtype=torch.int32))
    assert not panels.sums[outputs:].any()


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_float_linear_has_its_bias(isa, random, form):
    backend = load_backend("cpu", isa=isa, weights=form, threads=2)
    weight, bias, x = random(24, 64), random(24), random(5, 64)
    rows = backend.norm(x.clone(), None, torch.ones(64), 1e-5)
    result = backend.linear(rows, backend.linear_weight(weight, bias)).float()
    expected = torch.nn.functional.linear(values_of(rows), weight, bias)
    assert (result - expected).abs().max() < (1e-4 if form == "f32" else 0.2)


# ---------------------------------------------------------------------------------- argmax


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 33, 320, 1003])
def test_argmax(isa, random, size):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=2)
    logits = random(40, size)
    assert backend.argmax(logits) == logits.argmax(dim=-1).tolist()
    # Ties: the first, wherever the two are.
    for first in range(0, size, 7):
        for second in range(first, size, 5):
            row = random(1, size).clamp(max=2)
            row[0, [first, second]] = 3.0
            assert backend.argmax(row) == [first]
    assert backend.argmax(torch.full((2, size), -math.inf)) == [0, 0]
    row = torch.full((1, size), -math.inf)
    row[0, -1] = -1e38
    assert backend.argmax(row) == [size - 1]


@pytest.mark.parametrize("size", [1, 5, 16, 33, 100])
def test_argmax_finds_nan(isa, random, size):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=1)
    for where in range(size):
        row = random(1, size)
        row[0, where] = math.nan
        assert backend.argmax(row) == [where]
        row[0, 0] = math.inf
        assert backend.argmax(row) == [where if where else 0]
    row[0, :] = math.nan
    assert backend.argmax(row) == [0]


def test_argmax_of_rows_that_are_not_contiguous(isa, random):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=1)
    logits = random(6, 50)
    assert backend.argmax(logits[:, :30]) == logits[:, :30].argmax(dim=-1).tolist()
    assert backend.argmax(logits[::2]) == logits[::2].argmax(dim=-1).tolist()


def test_one_thread_and_many_agree(isa, random):
    """Large enough for a parallel region."""
    residual, weight = random(200, 576), random(576)
    one, two = (load_backend("cpu", isa=isa, weights="f32", threads=n) for n in (1, 2))
    results = [
        (b.norm(residual.clone(), None, weight, 1e-5).data.clone(), b.argmax(residual))
        for b in (one, two)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_kernels_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="'z80'"):
        _cpu.Kernels("z80", 1)
    with pytest.raises(ValueError, match="threads"):
        _cpu.Kernels(_cpu.supported()[0], 0)
