"""Relay: which shared prefixes of a batch are read once for all rows that have them in common.

RelayAttention (arXiv 2402.14808) for many prefixes at a time, nested, found anew each step from
where the scheduled sequences stand in the radix tree:

    tree                          runs: keys that the same sequences share, two of them at least
    root ── sys ──┬── tenant A ──┬── 0
                  │              └── 1         sys        0 1 2 3 4      read once for 5 rows
                  ├── tenant B ──── 2, 3       tenant A   0 1
                  └── 4                        tenant B   2 3            4 has only sys in common

A run becomes one KV range over all rows of its members, or it does not, and then each branch below
it reads those keys for itself, as part of its own range. All rows of a member are past the run:
what the tree holds of a sequence is computed before its scheduled rows are. Ranges begin and end at
multiples of the backend's ``range_step``, so that a backend that promises equal bits keeps that
promise; what is left over is read by the branches.

Decided by predicted time (costs/attention.py). A run of n keys and R rows over branches of
R_1, R_2, ... rows pays if

    fixed(R) + n * cold(R)  <  n * (hot(R_1) + hot(R_2) + ... + one branch's cold - hot)

by MARGIN at least: read apart, the first branch fetches the keys from memory, and the others find
them in a cache, if they are still there. Runs are decided from the leaves of the tree up; one that
does not pay hands its branches on to the run above it. There a branch that paid below may be a
loss: it reads the keys at the price of its many rows. Where all from a run down would take less
with nothing shared, nothing is. Prefill rows are rows like others: 16 prompts of 30 tokens after
one prefix are 480 rows on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from headstart.engine.batch import SharedRange
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.kv.tree import Node
from headstart.engine.sequence import ScheduledSequence

MODES = ("auto", "on", "off")
"""auto: what is predicted to pay. on: whatever is shared. off: nothing."""

MARGIN = 0.03
"""Least predicted saving, as a share of what the branches would take: predictions are that good."""


class RelayPlan(NamedTuple):
    """What one step shares.

    ranges:          in key order for every row, as ``build_batch`` takes them
    seconds:         predicted attention time of one layer
    plain_seconds:   the same with nothing shared
    pages_read:      pages of all ranges, each counted once a range that reads it
    pages_distinct:  pages if each were read once a step: no plan reads fewer
    """

    ranges: list[SharedRange]
    seconds: float
    plain_seconds: float
    pages_read: int
    pages_distinct: int


class _Readers:
    """What it costs per key that some ranges, each of some rows, read the same keys one by one."""

    __slots__ = ("cold", "hot", "most")

    def __init__(self, cold: float, hot: float) -> None:
        self.cold = cold  # summed over the ranges, each from memory
        self.hot = hot  # each from a cache
        self.most = cold - hot  # the largest difference of one of them: it comes first

    def add(self, other: _Readers) -> None:
        self.cold += other.cold
        self.hot += other.hot
        self.most = max(self.most, other.most)

    def rate(self, coldness: float) -> float:
        """Seconds per key, where a key is ``coldness`` cold again when the next one comes."""
        warm = self.hot + self.most
        return warm + coldness * (self.cold - warm)


class _Run:
    """Keys ``[begin, end)`` that exactly ``members`` share; ``branches`` are the runs below."""

    __slots__ = (
        *("begin", "branches", "emitted", "end", "first_key", "members"),
        *("plain_seconds", "readers", "rows", "seconds"),
    )

    def __init__(self, begin: int, end: int, members: list[int], branches: list[_Run]) -> None:
        self.begin = begin
        self.end = end
        self.members = members
        self.branches = branches
        self.rows = 0
        self.emitted = False
        self.first_key = 0  # where its range begins, if it is emitted
        self.readers = _Readers(0.0, 0.0)  # of keys above this run
        self.seconds = 0.0  # of reading these keys and those of the runs below
        self.plain_seconds = 0.0  # the same with nothing shared

    def share_nothing(self, readers: _Readers) -> None:
        """Take back what was decided here and below; ``readers``: one for each member."""
        self.readers, self.seconds = readers, self.plain_seconds
        below = [self]
        while below:
            run = below.pop()
            run.emitted = False
            below += run.branches


def shared_runs(scheduled: list[ScheduledSequence]) -> list[_Run]:
    """The runs that two or more of ``scheduled`` share, those below before those above."""
    members: dict[Node, list[int]] = {}
    below: dict[Node, list[_Run]] = {}
    # Deepest first: all below a node is known when its turn comes. The number breaks ties.
    queue: list[tuple[int, int, Node]] = []

    def reach(node: Node, some: list[int]) -> None:
        known = members.get(node)
        if known is None:
            members[node] = some
            heapq.heappush(queue, (-node.depth, len(members), node))
        else:
            known.extend(some)

    for i, entry in enumerate(scheduled):
        node = entry.seq.node
        if node is not None and node.parent is not None:
            reach(node, [i])
    runs: list[_Run] = []
    while queue:
        node = heapq.heappop(queue)[2]
        group, branches = members[node], below.pop(node, [])
        parent = node.parent
        assert parent is not None
        if len(group) > 1:
            # Nobody is left who could join or leave above: the rest of the path is theirs.
            begin = parent.depth if queue else 0
            if len(branches) == 1 and len(branches[0].members) == len(group):
                branches[0].begin = begin
            else:
                branches = [_Run(begin, node.depth, group, branches)]
                runs += branches
        if not queue:
            break
        if parent.parent is not None:
            reach(parent, list(group))
            if branches:
                below.setdefault(parent, []).extend(branches)
    return runs


class Relay:
    """Plans the shared ranges of each step.

    ``costs`` is called when a decision first needs them. ``page_size`` and ``range_step`` are the
    backend's, in keys.
    """

    def __init__(
        self, mode: str, page_size: int, range_step: int, costs: Callable[[], AttentionCosts]
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"relay must be {', '.join(MODES)}; got {mode}")
        self.mode = mode
        self._page_size = page_size
        self._step = range_step
        self._measure = costs
        self._costs: AttentionCosts | None = None
        self._known: dict[int, tuple[float, float, float]] = {}  # rows -> (fixed, cold, hot)

    @property
    def costs(self) -> AttentionCosts:
        """Of this machine and model shape; measured on first use."""
        if self._costs is None:
            self._costs = self._measure()
        return self._costs

    def plan(self, scheduled: list[ScheduledSequence]) -> RelayPlan | None:
        """The shared ranges of one step; None where nothing could be shared."""
        if self.mode == "off" or len(scheduled) < 2:
            return None
        runs = shared_runs(scheduled)
        if not any(run.end // self._step > run.begin // self._step for run in runs):
            return None
        return self._choose(scheduled, runs)

    def _choose(self, scheduled: list[ScheduledSequence], runs: list[_Run]) -> RelayPlan:
        step, page_size, costs = self._step, self._page_size, self.costs
        alone = [self._cost(entry.num_tokens) for entry in scheduled]
        private = [0] * len(scheduled)  # from here on, keys are nobody else's
        seconds = plain_seconds = 0.0
        saved_pages = shared_pages = 0
        for run in runs:  # from the leaves up
            branched: set[int] = set()
            for branch in run.branches:
                branched.update(branch.members)
            apart, plain = _Readers(0.0, 0.0), _Readers(0.0, 0.0)
            for i in run.members:
                _, cold, hot = alone[i]
                one = _Readers(cold, hot)
                plain.add(one)
                run.rows += scheduled[i].num_tokens
                if i not in branched:
                    apart.add(one)
                    private[i] = run.end
            for branch in run.branches:
                apart.add(branch.readers)
            coldness = costs.coldness_after(run.end)
            rate = apart.rate(coldness)
            end = run.end // step * step
            keys = end - run.begin // step * step
            fixed, cold, hot = self._cost(run.rows)
            saved = keys * (rate - cold) - fixed
            run.emitted = keys > 0 and (self.mode == "on" or saved > MARGIN * keys * rate)
            length = run.end - run.begin
            run.plain_seconds = length * plain.rate(coldness)
            if run.emitted:
                run.readers = _Readers(cold, hot)
                run.seconds = fixed + (end - run.begin) * cold + (run.end - end) * rate
            else:
                run.readers = apart
                run.seconds = length * rate
            for branch in run.branches:
                run.seconds += branch.seconds
                run.plain_seconds += branch.plain_seconds
            above = run.begin % step  # keys of the run above that will not be in its range
            gain = run.plain_seconds - run.seconds
            gain += above * (plain.rate(coldness) - run.readers.rate(coldness))
            if self.mode == "auto" and gain < 0:
                run.share_nothing(plain)
            if run.begin == 0:
                seconds += run.seconds
                plain_seconds += run.plain_seconds
            shared_pages += length // page_size * (len(run.members) - 1)

        pages = 0
        for entry, (fixed, cold, _), begin in zip(scheduled, alone, private, strict=True):
            end = entry.start + entry.num_tokens
            pages += -(-end // page_size)
            # Rows of a chunk see up to the key they are: half of the chunk on average.
            own = fixed + cold * (end - (entry.num_tokens - 1) / 2 - begin)
            seconds += own
            plain_seconds += own

        ranges = []
        for run in reversed(runs):  # from the root down
            first = run.first_key
            if run.emitted:
                end = run.end // step * step
                ranges.append(SharedRange(first, end, run.members))
                saved_pages += (end - first) // page_size * (len(run.members) - 1)
                first = end
            for branch in run.branches:
                branch.first_key = first
        return RelayPlan(ranges, seconds, plain_seconds, pages - saved_pages, pages - shared_pages)

    def _cost(self, rows: int) -> tuple[float, float, float]:
        known = self._known.get(rows)
        if known is None:
            known = self._known[rows] = self.costs.of(rows)
        return known

    def break_even(self, keys: int, most: int = 1024) -> int | None:
        """The smallest number of decoding sequences that pays to share ``keys`` keys, if any."""
        keys = keys // self._step * self._step
        coldness = self.costs.coldness_after(keys)
        readers, one = _Readers(0.0, 0.0), _Readers(*self._cost(1)[1:])
        readers.add(one)
        for count in range(2, most + 1):
            readers.add(one)
            fixed, cold, _ = self._cost(count)
            rate = readers.rate(coldness)
            if keys * (rate - cold) - fixed > MARGIN * keys * rate:
                return count
        return None
