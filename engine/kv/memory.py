"""How much memory there is, and the plan for it: weights, KV pool, activations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil

from headstart.engine.errors import ConfigError

logger = logging.getLogger(__name__)

KV_SHARE = 0.5
"""Share of the available memory the KV pool takes unless told otherwise; it fills up slowly."""

DEVICE_KV_SHARE = 0.9
"""The same of a device's own memory, which nothing else is expected to want."""

SHORTEST_CONTEXT = 2048
"""Tokens of context that a server without --max-model-len has at the least."""


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still use: free memory, or less in a container with a limit.

    Cached files count as free, as they do without a limit: a model just converted leaves many.
    """
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return available
    return max(0, min(available, limit - used + cached))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part, and what the KV pool holds. All of one of ``processes``. ``room``: what
    there was for the pool, a part of a page included."""

    weights: int
    activations: int
    scratch: int
    kv: int
    num_pages: int
    page_size: int
    bytes_per_page: int
    room: int
    processes: int = 1

    @property
    def tokens(self) -> int:
        """That the KV pool holds."""
        return self.num_pages * self.page_size

    def require(self, tokens: int) -> None:
        """Raise ConfigError, with figures, where the pool cannot hold a sequence so long."""
        if self.tokens >= tokens:
            return
        needed = -(-tokens // self.page_size) * self.bytes_per_page
        raise ConfigError(
            f"too little memory: one sequence of {tokens} tokens needs "
            f"{_size(self.processes * needed)} of KV pool and "
            f"{_size(self.processes * self.room)} are there; "
            "use a smaller --max-model-len or a larger --kv-memory"
        )

    def __str__(self) -> str:
        return (
            f"memory: weights {_size(self.weights)}, KV pool {_size(self.kv)} "
            f"({self.tokens} tokens), activations {_size(self.activations)}, "
            f"attention's partial results {_size(self.scratch)}"
        )


def plan_memory(
    *,
    available: int | None,
    weights: int,
    activations: int,
    scratch: int,
    bytes_per_page: int,
    page_size: int,
    kv_memory: int | None,
    processes: int = 1,
) -> MemoryPlan:
    """Size the KV pool. Raises ConfigError where more is asked for than is there.

    Figures are of one process; ``kv_memory`` is for all ``processes``. ``scratch``: what attention
    takes beside activations (``Backend.attention_scratch``). ``available``: free bytes of
    the process's own device, weights in place; None: it is the host's memory, for all of them.
    """
    if available is None:
        available, share = available_memory(), KV_SHARE
    else:
        available, share = available * processes, DEVICE_KV_SHARE
    free = available - processes * (activations + scratch)
    budget = (int(free * share) if kv_memory is None else kv_memory) // processes
    if kv_memory is not None and kv_memory > free:
        raise ConfigError(
            f"--kv-memory asks for {_size(kv_memory)}; {_size(available)} of memory are available"
        )
    room = max(budget, 0)
    num_pages = room // bytes_per_page
    return MemoryPlan(
        weights=weights,
        activations=activations,
        scratch=scratch,
        kv=num_pages * bytes_per_page,
        num_pages=num_pages,
        page_size=page_size,
        bytes_per_page=bytes_per_page,
        room=room,
        processes=processes,
    )


def _size(size: int) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= bytes_ / 10:
            return f"{size / bytes_:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"
