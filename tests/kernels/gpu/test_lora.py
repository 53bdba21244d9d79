"""LoRA terms of the gpu backend: random adapters, parts and rows against the float32 oracle."""

from __future__ import annotations

import random as random_module

import numpy as np
import pytest
import torch

from headstart.kernels.backend import LoraPart
from headstart.kernels.gpu import lora
from headstart.kernels.reference import ReferenceBackend

# The interpreter is numpy, which mentions infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_adapter(rng, generator, size, outputs, layers):
    """Parts at any place of the outputs, of any rank; some layers have none."""
    made = []
    for _ in range(layers):
        parts = []
        cuts = sorted(rng.sample(range(1, outputs), 2))
        for first, last in ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], outputs)):
            if rng.random() < 0.7:
                rank = rng.choice([1, 3, 8, 16, 17, 40])
                down = torch.randn(rank, size, generator=generator) / size**0.5
                up = torch.randn(last - first, rank, generator=generator) / rank**0.5
                parts.append(LoraPart(first, down, up))
        made.append(parts)
    return made


@pytest.mark.parametrize("seed", range(8))
def test_random_scenes(device, dtype, seed):
    rng = random_module.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    size, outputs = rng.choice([16, 65, 200]), rng.choice([20, 97, 192])
    count = rng.choice([1, 4, 50])
    adapters = [make_adapter(rng, generator, size, outputs, 3) for _ in range(rng.randint(1, 4))]
    owner = [rng.randrange(-1, len(adapters)) for _ in range(count)]
    rows = [
        np.array([r for r in range(count) if owner[r] == a], dtype=np.int32)
        for a in range(len(adapters))
    ]
    kept = [(a, r) for a, r in zip(adapters, rows, strict=True) if len(r)]
    if not kept:
        kept = [(adapters[0], np.array([0], dtype=np.int32))]
    x = torch.randn(count, size, generator=generator).to(dtype)
    y = torch.randn(count, outputs, generator=generator).to(dtype)
    where = device.torch_device
    ours = [lora.GpuAdapter(a, dtype, where) for a, _ in kept]
    plan = lora.plan_lora(device, ours, [r for _, r in kept])
    oracle = ReferenceBackend(page_size=32)
    rounded = [
        [[LoraPart(p.first, p.down.to(dtype).float(), p.up.to(dtype).float()) for p in parts]
         for parts in adapter]
        for adapter, _ in kept
    ]  # fmt: skip
    expected_plan = oracle.plan_lora(rounded, [r for _, r in kept])
    for layer in range(3):
        expected = y.float().clone()
        oracle.add_lora(x.float(), expected, expected_plan, layer)
        result = y.clone().to(where)
        lora.add_lora(device, x.to(where), result, plan, layer)
        error = (result.cpu().float() - expected).abs().max()
        assert error <= TOLERANCE[dtype] * max(1, expected.abs().max())
        untouched = sorted(set(range(count)) - {int(r) for _, some in kept for r in some})
        assert torch.equal(result.cpu()[untouched], y[untouched])


def test_views_with_larger_strides(device, dtype):
    generator = torch.Generator().manual_seed(0)
    part = LoraPart(4, torch.randn(8, 32, generator=generator) / 6, torch.randn(12, 8))
    wide_x = torch.randn(5, 50, generator=generator).to(dtype)
    wide_y = torch.randn(5, 40, generator=generator).to(dtype)
    before = wide_y.clone()
    where = device.torch_device
    x, y = wide_x.to(where), wide_y.to(where)
    adapter = lora.GpuAdapter([[part]], dtype, where)
    plan = lora.plan_lora(device, [adapter], [np.array([1, 4], dtype=np.int32)])
    lora.add_lora(device, x[:, 9:41], y[:, 3:27], plan, 0)
    rows = [1, 4]
    terms = wide_x[rows, 9:41].float() @ part.down.to(dtype).float().T @ part.up.to(dtype).float().T
    expected = before.float()
    expected[rows, 7:19] += terms
    error = (y.cpu().float() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()


def test_a_layer_of_too_many_parts_is_refused(device):
    part = LoraPart(0, torch.ones(1, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match="4 LoRA parts; 3 may be"):
        lora.GpuAdapter([[part] * 4], torch.float32, device.torch_device)


def some_part(generator, first, outputs, rank, size):
    down = torch.randn(rank, size, generator=generator) / size**0.5
    return LoraPart(first, down, torch.randn(outputs, rank, generator=generator) / rank**0.5)


def added(device, x, y, adapters, rows):
    """Layer 0's terms added to a copy of y."""
    plan = lora.plan_lora(device, adapters, [np.array(some, dtype=np.int32) for some in rows])
    result = y.clone().to(device.torch_device)
    lora.add_lora(device, x.to(device.torch_device), result, plan, 0)
    return result.cpu()


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 33, 100, 511, 512])
@pytest.mark.smoke
def test_every_rank(device, dtype, rank):
    """Beside an adapter of another rank, so that neither is read as the other; inputs of an odd
    size, whose rows are not aligned, too."""
    generator = torch.Generator().manual_seed(rank)
    size = 37 if rank % 2 else 280
    parts = [some_part(generator, 3, 70, r, size) for r in (rank, 16)]
    x = torch.randn(20, size, generator=generator).to(dtype)
    y = torch.randn(20, 80, generator=generator).to(dtype)
    ours = [lora.GpuAdapter([[part]], dtype, device.torch_device) for part in parts]
    owned = [list(range(1, 19)), [19]]
    expected = y.float().clone()
    for part, rows in zip(parts, owned, strict=True):
        down, up = part.down.to(dtype).float(), part.up.to(dtype).float()
        expected[rows, 3:73] += x[rows].float() @ down.T @ up.T
    error = (added(device, x, y, ours, owned).float() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()


def test_numbers_of_bfloat16(device):
    """The interpreter is not given bfloat16: its numbers go through the float32 kernels. Sums are
    then those of a device, but for the low-rank vector, which a device rounds on the way."""
    generator = torch.Generator().manual_seed(1)
    part = some_part(generator, 0, 48, 12, 64)
    part = LoraPart(0, part.down.bfloat16().float(), part.up.bfloat16().float())
    x, y = (torch.randn(30, n, generator=generator).bfloat16().float() for n in (64, 48))
    adapter = lora.GpuAdapter([[part]], torch.float32, device.torch_device)
    result = added(device, x, y, [adapter], [range(30)]).bfloat16().float()
    expected = y + x @ part.down.T @ part.up.T
    assert ((result - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()


def test_nothing_to_add(device, dtype):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.ones(5, 16).to(dtype), torch.ones(5, 8).to(dtype)
    where = device.torch_device
    empty = lora.GpuAdapter([[]], dtype, where)
    full = lora.GpuAdapter([[some_part(generator, 0, 8, 4, 16)]], dtype, where)
    assert torch.equal(added(device, x, y, [], []), y)
    assert torch.equal(added(device, x, y, [full], [[]]), y)
    assert torch.equal(added(device, x, y, [empty], [[0, 3]]), y)
    mixed = added(device, x, y, [empty, full], [[0, 3], [1]])
    assert torch.equal(mixed[[0, 2, 3, 4]], y[[0, 2, 3, 4]])
    assert (mixed[1] != y[1]).any()


def test_a_row_that_overflowed_stays_so_and_harms_no_other(device, dtype):
    generator = torch.Generator().manual_seed(3)
    adapter = lora.GpuAdapter([[some_part(generator, 0, 20, 5, 40)]], dtype, device.torch_device)
    x = torch.randn(18, 40, generator=generator).to(dtype)
    y = torch.randn(18, 20, generator=generator).to(dtype)
    clean = added(device, x, y, [adapter], [range(18)])
    others = [row for row in range(18) if row != 11]
    for bad in (float("nan"), float("inf")):
        x[11, 39] = bad
        result = added(device, x, y, [adapter], [range(18)])
        assert torch.equal(result[others], clean[others])
        assert not result[11].isfinite().any()


def test_a_row_alone_and_beside_others_is_the_same_bits(device, dtype):
    """Whatever its place in a tile, and whatever ranks the others' adapters have."""
    generator = torch.Generator().manual_seed(4)
    where = device.torch_device
    first, second = (
        lora.GpuAdapter([[some_part(generator, 0, 90, rank, 72)]], dtype, where)
        for rank in (11, 130)
    )
    x = torch.randn(40, 72, generator=generator).to(dtype)
    y = torch.randn(40, 90, generator=generator).to(dtype)
    owned = [range(0, 40, 2), range(1, 40, 2)]
    whole = added(device, x, y, [first, second], owned)
    for row in (0, 6, 38):
        alone = added(device, x[row : row + 1], y[row : row + 1], [first], [[0]])
        assert torch.equal(alone[0], whole[row])


def test_adapters_are_copies_and_a_plan_keeps_them(device, dtype):
    """They may be unloaded while the step runs that was planned with them."""
    generator = torch.Generator().manual_seed(5)
    part = some_part(generator, 0, 16, 8, 32)
    x = torch.randn(3, 32, generator=generator).to(device.torch_device, dtype)
    y = torch.zeros(3, 16, device=device.torch_device, dtype=dtype)
    terms = x.float().cpu() @ part.down.T @ part.up.T
    rows = [np.arange(3, dtype=np.int32)]
    plan = lora.plan_lora(device, [lora.GpuAdapter([[part]], dtype, device.torch_device)], rows)
    part.down.zero_()
    others = [torch.full((8, 32), 9.0, device=device.torch_device) for _ in range(8)]
    lora.add_lora(device, x, y, plan, 0)
    assert (y.cpu().float() - terms).abs().max() <= TOLERANCE[dtype] * terms.abs().max()
    assert all((other == 9).all() for other in others)


def test_adding_waits_for_nothing(device):
    """A capture refuses whoever reads a value of the device; what it recorded works on new rows."""
    generator = torch.Generator().manual_seed(6)
    part = some_part(generator, 2, 16, 8, 32)
    where = device.torch_device
    x = torch.randn(5, 32, generator=generator).to(where)
    y = torch.zeros(5, 20, device=where)
    adapter = lora.GpuAdapter([[part]], torch.float32, where)
    plan = lora.plan_lora(device, [adapter], [np.array([0, 2, 4], dtype=np.int32)])

    def work():
        lora.add_lora(device, x, y, plan, 0)
        return y

    work()
    _, replay = device.capture(work)
    x.copy_(torch.randn(5, 32, generator=generator))
    y.zero_()
    replay()
    expected = torch.zeros(5, 20)
    expected[::2, 2:18] = x.cpu()[::2] @ part.down.T @ part.up.T
    assert torch.allclose(y.cpu(), expected, atol=1e-5)
