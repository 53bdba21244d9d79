"""The gpu backend's device: a CUDA one where there is one, else Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from headstart.kernels.gpu.device import Device, find_device


@pytest.fixture(scope="session")
def device() -> Device:
    return find_device()


ON_DEVICE = [torch.bfloat16] if torch.cuda.is_available() else []


@pytest.fixture(params=[torch.float32, torch.float16, *ON_DEVICE], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Activations. bfloat16 only on a device: the interpreter computes it wrongly (stores
    truncate, dot products are garbage) and is not given it."""
    assert isinstance(request.param, torch.dtype)
    return request.param
