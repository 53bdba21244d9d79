"""Planner: where a prompt is cut, and from what length on it pays, found in a thread of its own.

    engine's thread   ask ─▶ steps of others, aborts, ...     ─▶ take the plan when it is there
    planner           ······ search (cuts.py) ··············

A search takes as long as many steps where there are many ranks, and nobody's token waits for it.
What is asked is answered by what was known when it was asked. Holds no job, no rank and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import msgspec

from headstart.engine.ranges.segments import Segments
from headstart.engine.runahead.costs import Chain, RankCosts, first_token_seconds
from headstart.engine.runahead.cuts import CutTable, Plan, Positions, even_cuts, plan

CUTS = ("auto", "even", "predicted", "modelled")
WORTH = 0.95
"""A prompt runs ahead if that is predicted to take this share of the local time, or less."""


class Prompt(msgspec.Struct, frozen=True):
    """What is to be cut: ``length`` tokens, ``[0, held[i])`` of which are cached by rank i of the
    chain. ``bounds``: the cuts that are wanted, for measurements."""

    length: int
    held: tuple[int, ...]
    segments: Segments
    bounds: tuple[int, ...] | None = None


class Planner:
    """``way``: one of CUTS. ``always``: prompts are cut whether that pays or not. ``local``: what
    chunks cost the engine while no rank computes beside it. ``table``: of searched cuts."""

    def __init__(
        self, way: str, always: bool, page_size: int, local: RankCosts, table: CutTable
    ) -> None:
        self.table = table
        self._way = way
        self._always = always
        self._page_size = page_size
        self._local = local
        self._closing = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def plan(self, chain: Chain, prompt: Prompt) -> Future[Plan]:
        """The cuts of ``prompt``; a plan of one chunk where it is quicker alone."""
        return self._thread.submit(self._plan, chain, prompt, self.table)

    def pays_from(self, chain: Chain, longest: int) -> Future[int]:
        """The shortest prompt that is predicted to be worth it, in tokens; ``longest`` if none."""
        return self._thread.submit(self._pays_from, chain, longest)

    def close(self) -> None:
        """End the thread: what is begun is given up, what waits is cancelled."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _plan(self, chain: Chain, prompt: Prompt, table: CutTable) -> Plan:
        length, segments, cached = prompt.length, prompt.segments, prompt.held[-1]
        found = plan(chain, prompt.held, length, self._page_size, segments)
        local = self._local.seconds(cached, length - cached)
        found = msgspec.structs.replace(found, local_seconds=local)
        ranks = len(prompt.held)
        if found.seconds >= local and not self._always:
            found = Plan(ranks - 1, (cached, length), local, local)
        positions = Positions(cached, length, self._page_size, segments)
        cuts: Sequence[int] | None = None
        if prompt.bounds is not None:
            cuts = prompt.bounds
        elif self._way == "even":
            cuts = even_cuts(positions, ranks)
        elif self._way != "modelled" and not any(prompt.held):
            cuts = table.predict(ranks, positions)
        if cuts is None:
            if len(found.bounds) > 2 or not self._always:
                return found
            cuts = even_cuts(positions, ranks)
        first = ranks - (len(cuts) - 1)
        some = chain.last(len(cuts) - 1)
        seconds = first_token_seconds(some, prompt.held[first:], cuts) if len(cuts) > 2 else 0.0
        return Plan(first, tuple(cuts), seconds, found.local_seconds)

    def _pays_from(self, chain: Chain, longest: int) -> int:
        nothing = [0] * len(chain.ranks)

        def pays(pages: int) -> bool:
            tokens = pages * self._page_size
            found = plan(chain, nothing, tokens, self._page_size)
            return found.seconds <= WORTH * self._local.seconds(0, tokens)

        low, high = 1, 2
        while not self._closing.is_set() and not pays(high):
            low, high = high, 2 * high
            if high * self._page_size > longest:
                return longest
        while not self._closing.is_set() and high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high * self._page_size
