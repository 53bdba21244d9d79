"""Timeline: what became of a request in the engine's process, until its first output.

    arrived      ready       scheduled                                       computed      made
       |  grammar  |   queue   |  prefill  |  yielded  |  prefill  |  sample  |
                                 a chunk    what others    a chunk
                                            have of steps

Moments are of ``time.monotonic``, which on one machine is the same in all processes. A phase is the
time from one moment to the next, so that nothing lies between two phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from headstart.engine.process.messages import QueueAhead, Times

MOST_CHUNKS = 64
"""Of which it is kept when they were computed; of more, their sums."""


class Timeline:
    """A sequence has one until its first output. ``ahead``: what was there when it came."""

    __slots__ = (
        "_chunks",
        "_clock",
        "_computed",
        "_num_chunks",
        "_num_tokens",
        "_seconds",
        "ahead",
        "arrived",
        "ready",
    )

    def __init__(self, ahead: QueueAhead, clock: Callable[[], float] = time.monotonic) -> None:
        self.ahead = ahead
        self._clock = clock
        self.arrived = self.ready = clock()
        self._chunks: list[tuple[float, float]] = []
        self._num_chunks = self._num_tokens = 0
        self._seconds = 0.0
        self._computed = 0.0

    def compiled(self) -> None:
        """Its grammar is; from now on it waits to be scheduled."""
        self.ready = self._clock()

    def chunk(self, begin: float, end: float, num_tokens: int, scheduled: float) -> None:
        """Tokens of its prompt were computed in a step from ``begin`` to ``end``. 0 tokens: some
        layers of a chunk that takes several steps. ``scheduled``: when it first was."""
        # A step has begun before it is decided who is in it, and steps may overlap.
        begin = max(begin, self._computed, scheduled)
        end = max(begin, end)
        self._seconds += end - begin
        self._computed = end
        if num_tokens:
            self._num_chunks += 1
            self._num_tokens += num_tokens
        if len(self._chunks) < MOST_CHUNKS:
            self._chunks.append((begin, end))

    def times(self, scheduled: float) -> Times:
        """Until now, where its first output is made."""
        return Times(
            arrived=self.arrived,
            ready=self.ready,
            scheduled=scheduled,
            computed=max(self._computed, scheduled),
            made=self._clock(),
            seconds=self._seconds,
            num_chunks=self._num_chunks,
            num_tokens=self._num_tokens,
            chunks=self._chunks,
            ahead=self.ahead,
        )
