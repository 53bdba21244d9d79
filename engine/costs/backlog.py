"""Backlog: what the prompts that have no first token yet still take, as the server is told of it.

    seconds left   0.05    0.1    0.2   ...   102.4    more
    their sum     | 0.12 | 0.30 | 0    ...  | 61.0   | 0   |

By sums in classes, since it goes with every step: the scheduler lets those come first that are
sooner done, and so a newcomer waits for the classes up to its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import msgspec

CLASSES = tuple(0.05 * 2**i for i in range(12))
"""The most seconds of each class but the last."""


class Backlog(msgspec.Struct, array_like=True, frozen=True):
    """``seconds``: of each class, the sum; empty: nothing waits.

    ``pace``: seconds that pass for one second of prompts, beside those that decode.
    ``long_share``: of the time for prompts, what longer ones get while shorter ones wait.
    """

    seconds: list[float] = []
    pace: float = 1.0
    long_share: float = 0.0

    @classmethod
    def of(cls, left: Iterable[float], pace: float, long_share: float) -> Backlog:
        """Of prompts that have so many seconds ``left``."""
        sums = [0.0] * (len(CLASSES) + 1)
        for seconds in left:
            sums[bisect_left(CLASSES, seconds)] += seconds
        return cls(sums if any(sums) else [], pace, long_share)

    @property
    def total(self) -> float:
        """Seconds until all of them have their first token."""
        return self.pace * sum(self.seconds)

    def first_token(self, seconds: float) -> float:
        """Seconds until a newcomer has its first token, whose own prompt takes ``seconds``."""
        if not self.seconds:
            return self.pace * seconds
        at = bisect_left(CLASSES, seconds)
        before, behind = sum(self.seconds[: at + 1]), sum(self.seconds[at + 1 :])
        mine = before + seconds
        # Longer ones get their share meanwhile, and no more than they take.
        share = mine * self.long_share / (1 - self.long_share) if self.long_share < 1 else behind
        return self.pace * (mine + min(share, behind))
