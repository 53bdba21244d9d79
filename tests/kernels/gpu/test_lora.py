"""LoRA terms of the gpu backend: random adapters, parts and rows against the float32 oracle."""

from __future__ import annotations

import random as random_module

import numpy as np
import pytest
import torch

from headstart.kernels.backend import LoraPart
from headstart.kernels.gpu import lora
from headstart.kernels.reference import ReferenceBackend

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
