"""PagesAhead: KV memory that is ready before it is needed."""

from __future__ import annotations

from headstart.engine.kv.pool import PagePool
from headstart.engine.models.runner import ModelRunner

MEMORY_AHEAD = 256 << 20
"""Bytes of KV memory kept ready beyond what has been used."""


class PagesAhead:
    """The system zeroes memory when it is first touched, which costs a cold prompt a quarter of its
    time: better done while there is nothing to compute.
    """

    def __init__(self, runner: ModelRunner, pool: PagePool, page_bytes: int) -> None:
        self._runner = runner
        self._pool = pool
        self._ahead = MEMORY_AHEAD // page_bytes  # pages
        self._prepared = 0

    def prepare(self) -> bool:
        """Make the next slice of untouched memory ready, in some 20 ms; False if enough is."""
        first = max(self._prepared, self._pool.high_water)
        wanted = min(self._pool.high_water + self._ahead, self._pool.num_pages)
        last = min(first + self._ahead // 8 + 1, wanted)
        if first >= last:
            return False
        self._runner.prepare_pages(first, last)
        self._prepared = last
        return True
