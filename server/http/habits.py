"""What requests have been like: what their bodies say of their tokens, and caches of their prompts.

Habits    one caller's: tokens in a byte of its bodies, and the share of its prompts that no cache
          held
Endings   how fast requests end, and so give their places to others

Both are learned from requests that were answered. Until then nothing is known, which is not the
same as nothing: who decides by it says what it does then.
"""

from __future__ import annotations

from collections import deque

TOKENS_PER_BYTE = 0.25
"""Before anything is known: about four bytes of text are a token."""

MOST_PER_BYTE = 0.5
"""A body that has more of them names prompts that are kept here, and says nothing of others."""

FRESH = 60.0
"""Seconds for which it is believed what share of a caller's prompts the cache held."""

_DECAY = 0.8
"""What an observation still counts when the next has come."""


class Average:
    """A ratio of sums in which older parts count ever less."""

    __slots__ = ("_above", "_below")

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def add(self, above: float, below: float) -> None:
        self._above = self._above * _DECAY + above
        self._below = self._below * _DECAY + below

    @property
    def value(self) -> float | None:
        """None before the first."""
        return self._above / self._below if self._below else None


class Habits:
    """Of one caller, or of all of them."""

    __slots__ = ("_at", "_prompts", "_tokens", "_uncached", "trial")

    def __init__(self) -> None:
        self._tokens = Average()
        self._uncached = Average()
        self._prompts = 0
        self._at = 0.0
        self.trial = False
        """A request is on its way by which the share is to be learned."""

    @property
    def tokens_per_byte(self) -> float | None:
        return self._tokens.value

    def uncached(self, now: float) -> float | None:
        """The share of prompts that was computed; None: not known, or not any more.

        What is not believed for long keeps nobody out for ever: a caller whose prompts were all
        refused, since they were new to the cache, would not get them into it.
        """
        return self._uncached.value if now - self._at <= FRESH else None

    def saw_tokens(self, tokens: int, size: int) -> None:
        """A body of ``size`` bytes has had so many tokens of prompts."""
        if size > 0:
            self._tokens.add(min(tokens, MOST_PER_BYTE * size), size)

    def saw_prompt(self, tokens: int, cached: int, now: float) -> None:
        """Of a prompt of ``tokens``, ``cached`` were found in the cache. The very first one says
        nothing: it is new to the cache whatever comes after it."""
        self._prompts += 1
        self.trial = False
        if self._prompts > 1 and tokens > 0:
            self._uncached.add(max(tokens - cached, 0), tokens)
            self._at = now


class Endings:
    """``rate``: places given back in a second, while there were any taken."""

    def __init__(self, kept: int = 64) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=kept)

    def add(self, places: int, now: float) -> None:
        self._ends.append((now, places))

    def clear(self) -> None:
        """Nothing runs: the time from now on says nothing of how fast requests end."""
        self._ends.clear()

    def rate(self, now: float) -> float | None:
        """None where too few have ended to know."""
        if len(self._ends) < 2 or (span := now - self._ends[0][0]) <= 0:
            return None
        return (sum(places for _, places in self._ends) - self._ends[0][1]) / span
