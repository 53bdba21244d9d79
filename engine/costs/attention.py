"""AttentionCosts: what reading a KV range costs on this machine, measured once and kept on disk.

A range of ``rows`` rows and ``keys`` keys is taken to cost

    seconds(rows, keys) = fixed(rows) + per_key(rows) * keys        in one layer, all heads

where both terms are interpolated between measured numbers of rows. With few rows per_key is the
price of reading keys and values, and hardly grows with the rows; with many it is arithmetic, and
grows in proportion. Where the one becomes the other decides how many sequences must share a
prefix before reading it once pays (engine/ranges/shared.py).

Reading has two prices. *cold*: from memory. *hot*: pages that another range of the same batch has
just read, from a cache, if all that is read in between fits there. Plain attention over a shared
prefix reads it cold once and then hot, so a processor with a large cache leaves less to gain:

    per key, one row          cold ───────────────────────────────────────────  from memory
                                                           ╭──────────────
                              hot  ────────────────────────╯                    bytes in between
                                          2 MiB       L3 size       64 MiB

The measurement goes through the backend's own ``attend``, with as many ranges at a time as a batch
has: per_key is the throughput of all threads together.
"""

from __future__ import annotations

import itertools
import logging
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from headstart.engine.costs.measurements import keep, load_kept
from headstart.kernels.backend import AttentionShape, Backend, RopeTable
from headstart.kernels.ranges import KVRanges

logger = logging.getLogger(__name__)

VERSION = 6
"""Of the measurement and its file: raise it when kernels change enough that old tables mislead."""
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LENGTHS = (128, 1024)
FOOTPRINTS = tuple(2**i << 20 for i in range(1, 7))
MEASURE_SECONDS = 0.6
"""Time the measurement may take; where it is not enough, rows beyond are extrapolated."""
_POOL_BYTES = FOOTPRINTS[-1]  # twice the last-level cache of a large core complex
_POOL_KEYS = 1 << 17  # of very small models: filling the pool takes time, too
QUERIES = 512
"""Rows of one measured batch, at most."""
_REPEATS = 3
_POINT_SECONDS = 0.004  # a batch this long is measured well


class AttentionCosts(msgspec.Struct, frozen=True):
    """What one range costs by its rows, and how cold a page is by what was read since.

    rows, fixed, cold, hot:  at ``rows[i]`` rows ``fixed[i]`` seconds a range, and ``cold[i]`` or
                             ``hot[i]`` seconds a key
    footprints, coldness:    after ``footprints[i]`` bytes a page is read at
                             ``hot + coldness[i] * (cold - hot)``; coldness is 0 to 1
    key_bytes:               of one key and its value in one layer
    """

    rows: list[int]
    fixed: list[float]
    cold: list[float]
    hot: list[float]
    footprints: list[int]
    coldness: list[float]
    key_bytes: int

    def __post_init__(self) -> None:
        same = len(self.rows) == len(self.fixed) == len(self.cold) == len(self.hot) > 0
        same &= len(self.footprints) == len(self.coldness) > 0
        if not (same and _rising(self.rows) and _rising(self.footprints) and self.key_bytes > 0):
            raise ValueError("not a table of attention costs")
        if min(self.fixed + self.coldness) < 0 or min(self.cold + self.hot) <= 0:
            raise ValueError("attention costs below zero")

    def of(self, rows: int) -> tuple[float, float, float]:
        """(fixed, cold, hot) at any number of rows, linear in between and beyond."""
        known = self.rows
        at = bisect_left(known, rows)
        columns = (self.fixed, self.cold, self.hot)
        if at == len(known):
            scale = rows / known[-1]
            fixed, cold, hot = (column[-1] * scale for column in columns)
        elif known[at] == rows or at == 0:
            fixed, cold, hot = (column[at] for column in columns)
        else:
            share = (rows - known[at - 1]) / (known[at] - known[at - 1])
            fixed, cold, hot = (c[at - 1] + share * (c[at] - c[at - 1]) for c in columns)
        return fixed, cold, hot

    def coldness_after(self, keys: int) -> float:
        """How cold a page is, 0 to 1, after ``keys`` other keys of the layer were read."""
        size = keys * self.key_bytes
        at = bisect_left(self.footprints, size)
        if at == len(self.footprints):
            return self.coldness[-1]
        if at == 0:
            return self.coldness[0]
        low, high = self.footprints[at - 1 : at + 1]
        share = (size - low) / (high - low)
        return self.coldness[at - 1] + share * (self.coldness[at] - self.coldness[at - 1])

    def seconds(self, rows: int, keys: float) -> float:
        """Predicted time of one range in one layer, read from memory."""
        fixed, cold, _ = self.of(rows)
        return fixed + cold * keys


def _rising(numbers: list[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise([0, *numbers]))


def measure_costs(
    backend: Backend, shape: AttentionShape, budget: float = MEASURE_SECONDS
) -> AttentionCosts:
    """Measure ``attend`` over ROWS, LENGTHS and FOOTPRINTS, in about ``budget`` seconds."""
    page_bytes = backend.kv_bytes_per_page(shape, 1)
    longest = LENGTHS[-1] // backend.page_size
    most = _POOL_KEYS // backend.page_size
    least = max(2 * longest, QUERIES // backend.page_size)
    num_pages = max(min(_POOL_BYTES // page_bytes, most), least)
    bench = _Bench(backend, shape, num_pages)
    deadline = time.perf_counter() + budget
    rows: list[int] = []
    fixed: list[float] = []
    cold: list[float] = []
    hot: list[float] = []
    for count in ROWS:
        if rows and time.perf_counter() > deadline:
            break
        short, long = (bench.seconds(count, keys // backend.page_size) for keys in LENGTHS)
        slope = max((long - short) / (LENGTHS[1] - LENGTHS[0]), long / LENGTHS[1] / 2)
        again = bench.seconds(count, longest, same_pages=True)
        rows.append(count)
        fixed.append(max(short - slope * LENGTHS[0], 0.0))
        cold.append(slope)
        hot.append(min(max((again - fixed[-1]) / LENGTHS[1], slope / 10), slope))
    coldness: list[float] = []
    for size in FOOTPRINTS:
        if coldness and time.perf_counter() > deadline + budget / 4:
            coldness.append(1.0)
            continue
        pages = min(max(size // page_bytes, 1), num_pages)
        per_key = bench.seconds(1, pages, same_pages=True) / (pages * backend.page_size)
        above = (per_key - hot[0]) / (cold[0] - hot[0]) if cold[0] > hot[0] else 0.0
        coldness.append(min(max(above, 0.0), 1.0))
    return AttentionCosts(
        rows, fixed, cold, hot, list(FOOTPRINTS), coldness, page_bytes // backend.page_size
    )


def filled_pool(
    backend: Backend, shape: AttentionShape, layers: int, num_pages: int
) -> tuple[Any, Any]:
    """A KV pool of random keys and values, and QUERIES rows of queries, to time ``attend`` on.

    Zeros would be multiplied at a higher clock. ``num_pages`` pages hold QUERIES tokens at least.
    """
    kv = backend.allocate_kv(shape, layers, num_pages)
    placed = backend.constant
    qkv = placed(torch.randn(QUERIES, (shape.heads + 2 * shape.kv_heads) * shape.head_dim))
    table = placed(torch.ones(1, shape.head_dim // 2))
    rope = RopeTable(table, torch.zeros_like(table))
    first = placed(torch.zeros(QUERIES, dtype=torch.int32))
    slots = placed(torch.arange(num_pages * backend.page_size, dtype=torch.int32))
    query = None
    for layer in range(layers):
        for begin in reversed(range(0, len(slots), QUERIES)):  # all queries in the last call
            some = slots[begin : begin + QUERIES]
            query = backend.rope_and_store(
                qkv[: len(some)], None, None, 1e-5, rope, first[: len(some)], some, shape, kv, layer
            )
    return kv, query


class _Bench:
    """A pool, queries, and the time of ranges over them."""

    def __init__(self, backend: Backend, shape: AttentionShape, num_pages: int) -> None:
        self._backend = backend
        self._shape = shape
        self._num_pages = num_pages
        self._kv, self._query = filled_pool(backend, shape, 1, num_pages)

    def seconds(self, rows: int, pages: int, same_pages: bool = False) -> float:
        """Time of one range among others, the best of some runs.

        The others read the same pages; or each has its own, together more than caches hold, or
        as many as QUERIES and _POINT_SECONDS allow.
        """
        most = QUERIES // rows
        if not same_pages:
            most = min(most, self._num_pages // pages)
        count = min(4, most)
        while True:
            plan = self._plan(rows, pages, count, same_pages)
            best = elapsed = float("inf")
            for _ in range(_REPEATS):
                self._backend.synchronize()
                begin = time.perf_counter()
                self._backend.attend(self._query, self._kv, 0, plan)
                self._backend.synchronize()
                elapsed = time.perf_counter() - begin
                best = min(best, elapsed / count)
            if count == most or elapsed >= _POINT_SECONDS / 2:
                return best
            count = min(most, max(count * 2, int(count * _POINT_SECONDS / max(elapsed, 1e-6))))

    def _plan(self, rows: int, pages: int, count: int, same_pages: bool) -> Any:
        each = np.arange(count + 1, dtype=np.int32)
        read = np.tile(np.arange(pages, dtype=np.int32), count)
        ranges = KVRanges(
            page_start=each * pages,
            pages=read if same_pages else np.arange(count * pages, dtype=np.int32),
            first_key=np.zeros(count, dtype=np.int32),
            row_start=each * rows,
            rows=np.arange(count * rows, dtype=np.int32),
            visible=np.full(count * rows, pages * self._backend.page_size, dtype=np.int32),
        )
        return self._backend.plan_attention(count * rows, ranges, self._shape)


def load_costs(
    backend: Backend, shape: AttentionShape, folder: Path | None = None
) -> AttentionCosts:
    """The table kept in ``folder`` for this machine and shape, measured now if there is none.

    Nothing is kept where ``folder`` is None or cannot be written.
    """
    about = {
        "version": VERSION,
        "device": backend.device,
        "page_size": backend.page_size,
        "shape": [shape.heads, shape.kv_heads, shape.head_dim],
    }
    kept = load_kept(folder, "attention", about, AttentionCosts)
    if kept is not None:
        return kept
    begin = time.perf_counter()
    costs = measure_costs(backend, shape)
    logger.info("attention costs: measured in %.2f s", time.perf_counter() - begin)
    keep(folder, "attention", about, costs)
    return costs
