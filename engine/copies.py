"""Copies between host and device that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def upload(
    values: Items[int | float | tuple[float, ...]] | npt.NDArray[Any],
    dtype: torch.dtype,
    like: Tensor,
) -> Tensor:
    """``values`` on the device of ``like``. From pinned memory, which alone is copied without
    the host waiting; torch gives a pinned block out again only when its copies are done."""
    pinned = like.device.type == "cuda"
    host = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return host.to(like.device, non_blocking=True)


def copy_to_host(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Queue copies of tensors of one device; the result waits for them, and returns them."""
    if tensors[0].device.type != "cuda":
        return lambda: tensors
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for host, tensor in zip(copies, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def arrive() -> list[Tensor]:
        copied.synchronize()
        return copies

    return arrive
