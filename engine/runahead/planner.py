"""Planner: where a prompt is cut, and from what length on it pays, found in a thread of its own.

    engine's thread   ask ─▶ steps of others, aborts, ...     ─▶ take the plan when it is there
    planner           ······ search (cuts.py) ··············

A search takes as long as many steps where there are many ranks, and nobody's token waits for it:
between two trials it lets the engine's thread go on. After a share of the time that the prompt
takes anyway, the best plan so far is the answer. What is asked is answered by what was known when
it was asked. Holds no job, no rank and no page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Generic, TypeVar

import msgspec

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.ranges.segments import Segments
from headstart.engine.runahead.costs import Chain, first_token_seconds
from headstart.engine.runahead.cuts import CutTable, Plan, Positions, even_cuts, plan

CUTS = ("auto", "even", "predicted", "modelled")
WORTH = 0.95
"""A prompt runs ahead if that is predicted to take this share of the local time, or less."""


SEARCH_SECONDS, SEARCH_SHARE = 1.0, 0.05
"""A search lasts so long at most, or this share of the prompt's local time where that is longer."""

T = TypeVar("T")


class Planning(Generic[T]):
    """An answer that is being found; ``cancel`` gives it up, begun or not."""

    def __init__(self, thread: ThreadPoolExecutor, find: Callable[[Event], T]) -> None:
        self._given_up = Event()
        self._future: Future[T] = thread.submit(find, self._given_up)

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        return self._future.result(timeout)

    def cancelled(self) -> bool:
        return self._future.cancelled()

    def cancel(self) -> None:
        self._given_up.set()
        self._future.cancel()


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
        self, way: str, always: bool, page_size: int, local: PrefillCosts, table: CutTable
    ) -> None:
        self.table = table
        self._way = way
        self._always = always
        self._page_size = page_size
        self._local = local
        self._closing = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def plan(self, chain: Chain, prompt: Prompt) -> Planning[Plan]:
        """The cuts of ``prompt``; a plan of one chunk where it is quicker alone."""
        table = self.table
        return Planning(self._thread, lambda over: self._plan(chain, prompt, table, over))

    def pays_from(self, chain: Chain, longest: int) -> Planning[int]:
        """The shortest prompt that is predicted to be worth it, in tokens; ``longest`` if none."""
        return Planning(self._thread, lambda over: self._pays_from(chain, longest, over))

    def close(self) -> None:
        """End the thread: what is begun is given up, what waits is cancelled."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _over(self, given_up: Event) -> bool:
        return self._closing.is_set() or given_up.is_set()

    def _going_on(self, given_up: Event, local: float) -> Callable[[], bool]:
        """Whether a search may try more; the engine's thread gets the interpreter in between."""
        end = time.monotonic() + max(SEARCH_SECONDS, SEARCH_SHARE * local)

        def going_on() -> bool:
            time.sleep(0)
            return not self._over(given_up) and time.monotonic() < end

        return going_on

    def _plan(self, chain: Chain, prompt: Prompt, table: CutTable, given_up: Event) -> Plan:
        length, segments, cached = prompt.length, prompt.segments, prompt.held[-1]
        local = self._local.seconds(cached, length - cached)
        going_on = self._going_on(given_up, local)
        found = plan(chain, prompt.held, length, self._page_size, segments, going_on)
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

    def _pays_from(self, chain: Chain, longest: int, given_up: Event) -> int:
        nothing = [0] * len(chain.ranks)

        def pays(pages: int) -> bool:
            tokens = pages * self._page_size
            local = self._local.seconds(0, tokens)
            going_on = self._going_on(given_up, local)
            found = plan(chain, nothing, tokens, self._page_size, going_on=going_on)
            return found.seconds <= WORTH * local

        low, high = 1, 2
        while not self._over(given_up) and not pays(high):
            low, high = high, 2 * high
            if high * self._page_size > longest:
                return longest
        while not self._over(given_up) and high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high * self._page_size
