"""PrefillCosts: how long tokens of prompts take, from what such chunks have taken.

    seconds(start, num) = fixed + per_token * num + per_pair * num * (start + num / 2)

KV-Runahead cuts prompts by it (engine/runahead), the scheduler decides by it what fits into a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import numpy as np


def check_costs(*costs: float) -> None:
    """Raise ValueError for what is no cost."""
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs are numbers of 0 or more, not {costs}")


class PrefillCosts(msgspec.Struct, frozen=True):
    """What prefill costs a process, in seconds for all layers together.

    fixed:      of a chunk, however short
    per_token:  of the linear layers
    per_pair:   of a query and a key that it sees
    """

    fixed: float
    per_token: float
    per_pair: float

    def __post_init__(self) -> None:
        check_costs(self.fixed, self.per_token, self.per_pair)

    def linear(self, num: int) -> float:
        """Seconds of ``num`` tokens without attention."""
        return self.fixed + self.per_token * num if num else 0.0

    def attention(self, start: int, num: int) -> float:
        """Seconds in which tokens ``[start, start + num)`` attend to all before and themselves."""
        return self.per_pair * num * (start + num / 2)

    def seconds(self, start: int, num: int) -> float:
        """Seconds of the whole chunk ``[start, start + num)``, alone; 0 for an empty one."""
        return self.linear(num) + self.attention(start, num)

    def times(self, factor: float) -> PrefillCosts:
        """Those of a process that takes ``factor`` times as long."""
        return PrefillCosts(self.fixed * factor, self.per_token * factor, self.per_pair * factor)

    def tokens(self, start: float, seconds: float) -> float:
        """How many tokens from ``start`` on take ``seconds``: the inverse of ``seconds``."""
        seconds -= self.fixed
        rate = self.per_token + self.per_pair * start
        if seconds <= 0:
            return 0.0
        # (rate + per_pair / 2 * num) * num = seconds, solved so that nothing cancels
        root = rate + math.sqrt(rate * rate + 2 * self.per_pair * seconds)
        return 2 * seconds / root if root else math.inf

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, int, float]]) -> PrefillCosts:
        """The costs nearest to measured (start, num, seconds), in squared relative errors.

        None is below 0. What few samples leave open is 0: first ``fixed``, then ``per_pair``.
        Raises ValueError without samples, or for one that is not of tokens and time.
        """
        if not samples or any(num <= 0 or not seconds > 0 for _, num, seconds in samples):
            raise ValueError("costs are fitted to samples of some tokens and some seconds")
        rows = [
            (num / seconds, num * (start + num / 2) / seconds, 1 / seconds)
            for start, num, seconds in samples
        ]
        design = np.array(rows)
        scale = np.linalg.norm(design, axis=0)
        ones = np.ones(len(rows))
        best, error = np.zeros(3), float("inf")
        # The best under "none below 0" is the plain fit of some columns: with three, try them all.
        for size in range(1, min(3, len(rows)) + 1):
            for columns in map(list, itertools.combinations(range(3), size)):
                solved = np.linalg.lstsq(design[:, columns] / scale[columns], ones, rcond=None)[0]
                found = np.zeros(3)
                found[columns] = solved / scale[columns]
                rest = float(np.square(design @ found - ones).sum())
                if solved.min() >= 0 and rest < error - 1e-12:
                    best, error = found, rest
        per_token, per_pair, fixed = map(float, best)
        return cls(fixed, per_token, per_pair)
