"""Memory of the host that does not come from torch: huge pages, and pages that processes share.

    SharedMemory   other processes can map it (memfd). Linux gives it small pages only
    PrivateMemory  this process's alone, in huge pages where the system has them (MADV_HUGEPAGE)
    Arena          tensors side by side in private memory

Reading keys, values and weights is most of what decoding does. In pages of 4 KB every sixteenth
token's keys begin another page, whose address a virtual machine looks up in two tables: with
pages of 2 MB the same kernels take 2/3 of the time (bench/results/README.md).
"""

from __future__ import annotations

import contextlib
import mmap
import os

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
BLOCK = 64 << 20
"""Bytes that an arena takes at a time; the system's until they are used."""
ALIGNMENT = 64


class SharedMemory:
    """``num_bytes`` of zeros, the system's until first use. It lives as long as it is mapped.

    ``buffer``: the memory here. ``descriptor``: to be sent to another process (SCM_RIGHTS), which
    maps it with ``attach``; None where the system has no such memory (no Linux).
    """

    def __init__(self, num_bytes: int) -> None:
        self.descriptor: int | None = None
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("headstart-kv")
            os.ftruncate(self.descriptor, num_bytes)
        self.buffer = mmap.mmap(-1 if self.descriptor is None else self.descriptor, num_bytes)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class PrivateMemory:
    """``num_bytes`` of zeros for this process alone, the system's until first use."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = _huge(num_bytes)


def attach(descriptor: int) -> mmap.mmap:
    """The memory of another process, to be read; raises OSError. The descriptor stays open."""
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)


class Arena:
    """Keeps copies of tensors in huge pages, which small tensors of their own would not fill."""

    def __init__(self) -> None:
        self._free: Tensor = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, aligned to 64 bytes; the memory lives as long as it does."""
        size = tensor.numel() * tensor.element_size()
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if taken > len(self._free):
            self._free = torch.frombuffer(_huge(max(taken, BLOCK)), dtype=torch.uint8)
        copy = self._free[:size].view(tensor.dtype).view(tensor.shape)
        self._free = self._free[taken:]
        return copy.copy_(tensor)


def _huge(num_bytes: int) -> mmap.mmap:
    """Private zeros, for which the system is asked to take huge pages."""
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
