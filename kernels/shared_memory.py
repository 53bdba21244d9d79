"""SharedMemory: zeroed memory that other processes can map, once they are handed its descriptor."""

from __future__ import annotations

import contextlib
import mmap
import os


class SharedMemory:
    """``num_bytes`` of memory, the system's until first use. It lives as long as it is mapped.

    ``buffer``: the memory here. ``descriptor``: to be sent to another process (SCM_RIGHTS), which
    maps it with ``attach``; None where the system has no such memory (no Linux).
    """

    def __init__(self, num_bytes: int) -> None:
        self.descriptor: int | None = None
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("headstart-kv")
            os.ftruncate(self.descriptor, num_bytes)
        self.buffer = mmap.mmap(-1 if self.descriptor is None else self.descriptor, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without huge pages
                self.buffer.madvise(mmap.MADV_HUGEPAGE)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def attach(descriptor: int) -> mmap.mmap:
    """The memory of another process, to be read; raises OSError. The descriptor stays open."""
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
