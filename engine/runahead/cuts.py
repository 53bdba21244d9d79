"""Where a prompt is cut for KV-Runahead, and between which ranks (arXiv 2405.05329, section 4).

    prompt   0 ········ start ────────────┬────────────┬──────────┬──────── end
             cached     │ rank 0          │ rank 1     │ rank 2   │ engine │
                    bounds[0]         bounds[1]    bounds[2]  bounds[3] bounds[4]

Later ranks attend to more keys, so earlier ones get more tokens. Four ways to the cuts:

    even_cuts      equal chunks                                             the paper's KVR-E
    search_cuts    measured around those, ever nearer                       KVR-S
    CutTable       interpolated between prompt lengths that were searched   KVR-P
    modelled_cuts  the same search, by costs.py instead of a measurement

``plan`` is what serving asks: which ranks, where the chain begins, and what to expect of it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headstart.engine.costs.measurements import keep, load_kept
from headstart.engine.ranges.segments import CAUSAL, Segments
from headstart.engine.runahead.costs import Chain, first_token_seconds


class Positions:
    """The positions strictly between ``start`` and ``end`` where a prompt may be cut, rising.

    At pages' ends, since pages are what the cache keeps, but not inside a segment, whose rows go
    through each layer together; and at segments' ends. Raises ValueError if ``end`` is not after
    ``start``.
    """

    def __init__(self, start: int, end: int, page_size: int, segments: Segments = CAUSAL) -> None:
        if not 0 <= start < end:
            raise ValueError(f"no tokens in [{start}, {end})")
        self.start = start
        self.end = end
        allowed: list[int] = []
        free = start + 1  # what is before is decided
        for first, last in segments.spans:
            if start < last and first < end:
                allowed += _multiples(page_size, free, min(first + 1, end))
                free = last + 1
                if last < end:
                    allowed.append(last)
        rest = _multiples(page_size, free, end)
        self.allowed: Sequence[int] = [*allowed, *rest] if allowed else rest

    def bounds(self, wanted: Sequence[float], held: Sequence[int] = ()) -> list[int] | None:
        """Start, the allowed cuts nearest to ``wanted``, end; strictly rising.

        Rank i, who holds the KV of ``[0, held[i])``, gets more than that. None where there are no
        such cuts.
        """
        at = []  # by place in ``allowed``
        least = 0
        for i, position in enumerate(wanted):
            if i < len(held):
                least = max(least, bisect_right(self.allowed, held[i]))
            at.append(max(least, self._nearest(position)))
            least = at[-1] + 1
        most = len(self.allowed)
        for i in reversed(range(len(at))):
            at[i] = most = min(at[i], most - 1)
        if most < 0:
            return None
        bounds = [self.start, *(self.allowed[i] for i in at), self.end]
        return bounds if _all_busy(bounds, held) else None

    def _nearest(self, position: float) -> int:
        """Its place in ``allowed``; of two as near that of the earlier."""
        after = bisect_left(self.allowed, position)
        if after == len(self.allowed):
            return after - 1
        if after and position - self.allowed[after - 1] <= self.allowed[after] - position:
            return after - 1
        return after


def _multiples(of: int, first: int, end: int) -> range:
    return range(-(-first // of) * of, end, of)


def _rises(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _all_busy(bounds: Sequence[int], held: Sequence[int]) -> bool:
    """Whether each rank has tokens to compute beyond those it holds."""
    return _rises(bounds) and all(own < end for own, end in zip(held, bounds[1:], strict=False))


def even_cuts(positions: Positions, ranks: int) -> list[int]:
    """Bounds of equal chunks, for as many of ``ranks`` ranks as can each get one."""
    length = positions.end - positions.start
    for count in range(ranks, 1, -1):
        bounds = positions.bounds([positions.start + length * i / count for i in range(1, count)])
        if bounds is not None:
            return bounds
    return [positions.start, positions.end]


class Trial(NamedTuple):
    """Bounds, and the seconds to the first token that were measured, or predicted, with them."""

    bounds: list[int]
    seconds: float


def search_cuts(
    measure: Callable[[list[int]], float],
    positions: Positions,
    start: Sequence[int],
    held: Sequence[int] = (),
) -> Iterator[Trial]:
    """Measure bounds around ``start``, then around the best so far, at strides that halve to one.

    The paper's hierarchical search (section 4.3, KVR-S), with other steps than its grid: a chunk
    takes a stride from each of a run of others, or gives it. Moving one cut at a time gets stuck
    where two ranks hold up the chain equally, and a grid is large. Nothing is measured twice.
    Yields every trial; the least ``seconds`` is what was searched for.
    """
    allowed = positions.allowed
    centre = tuple(bisect_left(allowed, cut) for cut in start[1:-1])
    tried = {centre}
    best = measure(list(start))
    yield Trial(list(start), best)
    moves = _moves(len(start) - 1)
    stride = 1 << (len(allowed) // (2 * len(start))).bit_length()
    while stride:
        moved = False
        for move, by in itertools.product(moves, (stride, -stride)):
            at = tuple(place + by * step for place, step in zip(centre, move, strict=True))
            if at in tried or not _rises((-1, *at, len(allowed))):
                continue
            bounds = [positions.start, *(allowed[place] for place in at), positions.end]
            if not _all_busy(bounds, held):
                continue
            tried.add(at)
            seconds = measure(bounds)
            yield Trial(bounds, seconds)
            if seconds < best:
                best, centre, moved = seconds, at, True
        if not moved:
            stride //= 2


def _moves(chunks: int) -> list[tuple[int, ...]]:
    """By how much each cut goes if one chunk takes 1 from each of a run of other chunks."""
    moves: dict[tuple[int, ...], None] = {}
    for taker in range(chunks):
        for first, last in itertools.combinations_with_replacement(range(chunks), 2):
            if not first <= taker <= last:
                change = [-(first <= chunk <= last) for chunk in range(chunks)]
                change[taker] = last - first + 1
                moves[tuple(itertools.accumulate(change[:-1]))] = None
    return list(moves)


def _for_ever() -> bool:
    return True


def modelled_cuts(
    chain: Chain,
    held: Sequence[int],
    positions: Positions,
    going_on: Callable[[], bool] = _for_ever,
) -> Trial | None:
    """Bounds for all ranks of ``chain``, and the seconds that costs.py predicts for them.

    Searched from even chunks and from equal times: one valley may end where a slow link begins.
    None where not every rank can get something to compute. Rank i holds ``[0, held[i])``.
    ``going_on`` is asked before each trial; False ends the search with the best so far.
    """
    length, ranks = positions.end - positions.start, len(chain.ranks)
    even = [positions.start + length * i / ranks for i in range(1, ranks)]

    def seconds(bounds: Sequence[int]) -> float:
        return first_token_seconds(chain, held, bounds) if going_on() else math.inf

    found: list[Trial] = []
    for wanted in (even, _equal_times(chain, positions)):
        start = positions.bounds(wanted, held)
        if start is None:
            return None
        trials = search_cuts(seconds, positions, start, held)
        found += itertools.takewhile(lambda trial: trial.seconds < math.inf, trials)
    return min(found, key=lambda trial: trial.seconds, default=None)


def _equal_times(chain: Chain, positions: Positions) -> list[float]:
    """Cuts between chunks that take each rank as long to compute."""
    end = float(positions.end)
    low, high = 0.0, chain.ranks[-1].seconds(positions.start, positions.end - positions.start)
    cuts: list[float] = []
    for _ in range(40):  # bisection of the time
        middle = (low + high) / 2
        at = float(positions.start)
        cuts = []
        for rank in chain.ranks:
            at += rank.tokens(at, middle)
            cuts.append(min(at, end))
        if at < end:
            low = middle
        else:
            high = middle
    return cuts[:-1]


class Plan(msgspec.Struct, frozen=True):
    """How one prompt is computed.

    first:          the first rank of the chain that takes part; with those after it to the engine
    bounds:         of their chunks, one more than ranks; one chunk: the engine computes it alone
    seconds:        predicted, to the first token
    local_seconds:  predicted, were the engine alone
    """

    first: int
    bounds: tuple[int, ...]
    seconds: float
    local_seconds: float


def plan(
    chain: Chain,
    held: Sequence[int],
    length: int,
    page_size: int,
    segments: Segments = CAUSAL,
    going_on: Callable[[], bool] = _for_ever,
) -> Plan:
    """The quickest way to the first token of a prompt of ``length`` tokens.

    Rank i of ``chain`` holds the KV of ``[0, held[i])``, the last one being the engine. Tried are
    the last 1, 2, ... ranks. They begin where the engine's prefix ends, and the first of them is
    sent what it lacks; or where that rank's own, shorter prefix ends, and compute again what the
    engine has. ``going_on``: as of modelled_cuts. Raises ValueError if the engine holds all of
    the prompt.
    """
    engine = len(chain.ranks) - 1
    cached = held[engine]
    if cached >= length:
        raise ValueError(f"nothing to compute: {cached} of {length} tokens are cached")
    local = chain.ranks[engine].seconds(cached, length - cached)
    best = Plan(engine, (cached, length), local, local)
    for first in reversed(range(engine)):
        some = chain.last(engine + 1 - first)
        for begin in sorted({cached, min(cached, held[first])}):
            positions = Positions(begin, length, page_size, segments)
            found = modelled_cuts(some, held[first:], positions, going_on)
            if found is not None and found.seconds < best.seconds:
                best = Plan(first, tuple(found.bounds), found.seconds, local)
    return best


class SearchedCuts(msgspec.Struct, frozen=True):
    """The best cuts of ``length`` tokens, as rising fractions of them."""

    length: int
    fractions: tuple[float, ...]


class CutTable(msgspec.Struct, frozen=True):
    """Searched cuts by number of ranks and rising length; between lengths they are interpolated.

    The paper's lookup table (section 4.3, KVR-P), which it finds within 1.3% of the search.
    """

    searched: dict[int, tuple[SearchedCuts, ...]] = {}

    def __post_init__(self) -> None:
        for ranks, rows in self.searched.items():
            lengths = [0, *(row.length for row in rows)]
            cuts = [(0.0, *row.fractions, 1.0) for row in rows]
            if not rows or not all(map(_rises, [lengths, *cuts])) or ranks < 2:
                raise ValueError("not a table of cuts")
            if any(len(row.fractions) != ranks - 1 for row in rows):
                raise ValueError(f"not cuts for {ranks} ranks")

    def with_cuts(self, bounds: Sequence[int]) -> CutTable:
        """This table and the best bounds of one length, in place of what it had for that."""
        start, *cuts, end = bounds
        length = end - start
        new = SearchedCuts(length, tuple((cut - start) / length for cut in cuts))
        ranks = len(cuts) + 1
        rows = [row for row in self.searched.get(ranks, ()) if row.length != length]
        rows = sorted([*rows, new], key=lambda row: row.length)
        return CutTable({**self.searched, ranks: tuple(rows)})

    def predict(
        self, ranks: int, positions: Positions, held: Sequence[int] = ()
    ) -> list[int] | None:
        """Bounds for ``ranks`` ranks; beyond the searched lengths the nearest one's fractions.

        None where there are no cuts for that many ranks, or no such positions.
        """
        rows = self.searched.get(ranks)
        if rows is None:
            return None
        length = positions.end - positions.start
        at = bisect_left(rows, length, key=lambda row: row.length)
        low, high = rows[max(at - 1, 0)], rows[min(at, len(rows) - 1)]
        share = (length - low.length) / (high.length - low.length) if high is not low else 0.0
        fractions = [
            a + share * (b - a) for a, b in zip(low.fractions, high.fractions, strict=True)
        ]
        return positions.bounds([positions.start + part * length for part in fractions], held)

    @classmethod
    def load(cls, folder: Path | None, about: dict[str, Any]) -> CutTable:
        """The table kept in ``folder`` for the circumstances ``about``; an empty one if none is."""
        return load_kept(folder, "cuts", about, cls) or cls()

    def save(self, folder: Path | None, about: dict[str, Any]) -> None:
        """Keep it there in place of what was kept; ``about`` is plain JSON."""
        keep(folder, "cuts", about, self)
