"""Why the cache did not have more of a prompt, for the requests that ask (``cache_explain``).

A prompt is compared with earlier ones of its own salt and owner (kv/history.py) and with those that
run or wait. The one that it shares most tokens with explains it:

    tokens   0        kept         pages       usable      shared             last
             ├─ evicted ─┼ not_computed ┼ below_page ┼ segment_changed ┼ differs ┼ last_token
                         │ being_computed                              │ new
                                                                       │ never_seen

    kept      what the cache held of it: it has been evicted, unless it was found
    pages     whole pages of what is shared and may be used
    usable    what is shared, without the segment that it ends inside of: its rows see all of it

What came from the cache is cut out of this. A prompt of another adapter or segment mask that shares
at least a page more says ``other_adapter`` or ``other_segment_mask``. Rows that somebody reads
(``reads_prompt``) are always computed, and so is the last one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from headstart.engine.kv.history import Earlier, Eviction, History, Namespace, State
from headstart.engine.process.messages import Cause, Difference, Explanation, Missed
from headstart.engine.ranges.segments import CAUSAL, Segments

if TYPE_CHECKING:
    from headstart.engine.schedule.scheduler import Scheduler
    from headstart.engine.sequence import Sequence

BEFORE, AFTER = 24, 64
"""Tokens of the earlier prompt that are told on either side of the place where they differ."""

REJOINING = 12
"""So many equal tokens in a row say that a prompt goes on as the other one does elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The prompt that is asked about. ``reach``: tokens that may come from the cache at all: not
    the last one, and with ``reads`` none from a row on that somebody reads."""

    token_ids: array[int]
    namespace: bytes
    page_size: int
    reach: int
    segments: Segments = CAUSAL
    reads: bool = False


class _Close(NamedTuple):
    """An earlier prompt. ``shared``: how many first tokens are equal. ``usable``: see above."""

    shared: int
    usable: int
    earlier: Earlier


def explain(
    asked: Asked,
    earlier: Iterable[Earlier],
    history: History,
    taken: Items[tuple[int, int]],
) -> Explanation:
    """Why ``asked`` missed what ``taken`` does not have. ``earlier``: to compare it with, of those
    that are equally close the first counts."""
    same: _Close | None = None
    other: _Close | None = None
    for candidate in earlier:
        close = _compare(asked, candidate)
        if candidate.namespace == asked.namespace:
            if same is None or _closeness(close) > _closeness(same):
                same = close
            if (
                min(close.shared, candidate.kept)
                >= asked.reach // asked.page_size * asked.page_size
            ):
                break  # it was all there: nobody can be closer
        elif other is None or close.shared > other.shared:
            other = close
    found = taken[0][1] if taken and taken[0][0] == 0 else 0
    page = asked.page_size
    known = max(same.shared if same else 0, found)
    if other is not None and other.shared // page <= known // page:
        other = None
    marks = _Marks(asked, history.clock())
    if same is not None and same.shared:
        _mark(marks, asked, same, history.eviction(same.earlier, found // page))
    closest = other or same
    if other is not None:
        marks.other(other)
    marks.rest(closest)
    return cut_out(
        Explanation(
            page, marks.missed, _difference(asked, closest, marks.now) if closest else None
        ),
        taken,
    )


def found_of(asked: Asked, earlier: Earlier) -> int:
    """How many tokens the cache would have of it if it had this prompt and nothing else."""
    if earlier.namespace != asked.namespace:
        return 0
    usable = min(_compare(asked, earlier).usable, asked.reach)
    return min(usable // asked.page_size * asked.page_size, earlier.kept)


def caching_is_off(asked: Asked) -> Explanation:
    """Of an engine that keeps nothing."""
    return Explanation(
        asked.page_size, [Missed(0, len(asked.token_ids), "prefix_caching_off")], None
    )


def cut_out(explanation: Explanation, taken: Items[tuple[int, int]]) -> Explanation:
    """What is left of ``missed`` without the spans ``taken`` from the cache."""
    missed = list(explanation.missed)
    for first, end in taken:
        missed = [
            msgspec.structs.replace(span, start=a, end=b)
            for span in missed
            for a, b in ((span.start, min(span.end, first)), (max(span.start, end), span.end))
            if a < b
        ]
    difference = explanation.difference
    beyond = max((end for _, end in taken), default=0)
    if difference is not None and difference.token < beyond:
        # More was found than of any prompt that is remembered: what comes next is not known.
        difference = None
        missed = [
            msgspec.structs.replace(span, cause="never_seen", seconds_ago=None)
            if span.cause in ("differs", "new")
            else span
            for span in missed
        ]
    return msgspec.structs.replace(explanation, missed=missed, difference=difference)


class _Marks:
    """The spans of a prompt from its beginning on, each as long as its cause holds."""

    def __init__(self, asked: Asked, now: float) -> None:
        self.now = now
        self.missed: list[Missed] = []
        self._asked = asked
        self._at = 0

    def until(
        self, end: int, cause: Cause, *, when: float | None = None, by: str | None = None
    ) -> None:
        """Up to ``end``, or to where nothing may come from the cache."""
        end = min(end, self._asked.reach)
        if end > self._at:
            ago = None if when is None else max(self.now - when, 0.0)
            self._add(Missed(self._at, end, cause, ago, by))

    def _add(self, span: Missed) -> None:
        if self.missed and self.missed[-1].cause == span.cause:
            span = msgspec.structs.replace(span, start=self.missed.pop().start)
        self.missed.append(span)
        self._at = span.end

    def other(self, close: _Close) -> None:
        """What one under another namespace had."""
        mine = Namespace.of(self._asked.namespace)
        theirs = Namespace.of(close.earlier.namespace)
        if mine.adapter != theirs.adapter:
            self.until(close.shared, "other_adapter", by=close.earlier.adapter)
        else:
            by = "turns" if theirs.segmented else "causal"
            self.until(close.shared, "other_segment_mask", by=by)

    def rest(self, close: _Close | None) -> None:
        """What comes behind the shared part, and what is computed in any case."""
        asked, size = self._asked, len(self._asked.token_ids)
        if close is None or not close.shared:
            self.until(size, "never_seen")
        else:
            ended = close.shared == len(close.earlier.token_ids)
            self.until(size, "new" if ended else "differs", when=close.earlier.when)
        if size > asked.reach:
            cause: Cause = "reads_prompt" if asked.reads else "last_token"
            self._add(Missed(asked.reach, size, cause))


def _mark(marks: _Marks, asked: Asked, close: _Close, eviction: Eviction | None) -> None:
    """The spans of what is shared with ``close``, of the same namespace."""
    earlier, page = close.earlier, asked.page_size
    usable = min(close.usable, asked.reach)
    pages = usable // page * page
    if earlier.when is None:
        marks.until(pages, "being_computed", by=earlier.state)
    else:
        when, by = (eviction.when, eviction.why) if eviction else (None, None)
        marks.until(min(earlier.kept, pages), "evicted", when=when, by=by)
        marks.until(pages, "not_computed", when=earlier.when, by=earlier.state)
    # The page of the last token is whole, and would be there but for that token.
    whole = close.usable >= pages + page
    cause: Cause = "reads_prompt" if asked.reads else "last_token"
    marks.until(usable, cause if whole else "below_page")
    marks.until(close.shared, "segment_changed")


def _compare(asked: Asked, earlier: Earlier) -> _Close:
    shared = _equal_tokens(asked.token_ids, earlier.token_ids)
    usable = shared
    if asked.namespace == earlier.namespace and (asked.segments or earlier.segments):
        usable = _usable(asked.segments, earlier.segments, shared)
    return _Close(shared, usable, earlier)


def _closeness(close: _Close) -> tuple[int, int]:
    return close.shared, close.earlier.kept


def _usable(mine: Segments, theirs: Segments, shared: int) -> int:
    """How many of ``shared`` first tokens have equal segments from end to end."""
    differ = set(mine.spans) ^ set(theirs.spans)
    first = min((start for start, _ in differ if start < shared), default=shared)
    return min(mine.start_of(shared), theirs.start_of(shared), first)


def _equal_tokens(a: array[int], b: array[int]) -> int:
    """How many first tokens are equal."""
    size = min(len(a), len(b))
    step = 64  # most prompts differ early
    done = 0
    while done < size:
        end = min(done + step, size)
        # Copies: while there is a view of one that runs, it cannot grow.
        unequal = np.flatnonzero(np.array(a[done:end]) != np.array(b[done:end]))
        if len(unequal):
            return done + int(unequal[0])
        done, step = end, 8 * step
    return size


def _difference(asked: Asked, close: _Close, now: float) -> Difference | None:
    earlier = close.earlier
    if close.shared >= len(asked.token_ids):
        return None
    start = max(close.shared - BEFORE, 0)
    return Difference(
        close.shared,
        start,
        list(earlier.token_ids[start : close.shared + AFTER]),
        None if earlier.when is None else max(now - earlier.when, 0.0),
        removed=_later(asked.token_ids, earlier.token_ids, close.shared),
        inserted=_later(earlier.token_ids, asked.token_ids, close.shared),
    )


def _later(tokens: array[int], others: array[int], at: int) -> int | None:
    """How many tokens behind ``at`` the ``others`` go on as ``tokens`` do there, if anywhere."""
    wanted = tokens[at : at + REJOINING].tobytes()
    data, size = others[at + 1 :].tobytes(), tokens.itemsize
    if len(wanted) < REJOINING * size:
        return None
    found = data.find(wanted)
    while found % size and found >= 0:  # amid a token
        found = data.find(wanted, found + 1)
    return None if found < 0 else found // size + 1


class Explainer:
    """The requests that ask. Costs nothing while nobody does."""

    def __init__(
        self,
        scheduler: Scheduler,
        history: History,
        page_size: int,
        *,
        prefix_caching: bool,
    ) -> None:
        self._scheduler = scheduler
        self._history = history
        self._page_size = page_size
        self._prefix_caching = prefix_caching
        self._asked: dict[int, Sequence] = {}
        self._coming: dict[int, tuple[int, int]] = {}
        self._explained: dict[int, Explanation] = {}

    @property
    def asked(self) -> bool:
        """Whether anybody does."""
        return bool(self._asked)

    def add(self, seq: Sequence) -> None:
        """``seq`` asks; it comes now."""
        self._asked[seq.id] = seq
        asked = self._of(seq)
        spans = [
            (earlier.kept, min(close.usable, asked.reach))
            for earlier in self._live(seq)
            if earlier.state == "running" and earlier.namespace == seq.namespace
            for close in [_compare(asked, earlier)]
        ]
        self._coming[seq.id] = max(spans, key=lambda span: span[1], default=(0, 0))

    def forget(self, ids: Iterable[int]) -> None:
        for request_id in ids:
            for kept in (self._asked, self._coming, self._explained):
                kept.pop(request_id, None)

    def look(self) -> None:
        """Explain those that have just begun to run: now it is known what they found."""
        for request_id, seq in self._asked.items():
            if seq.scheduled is None or request_id in self._explained:
                continue
            asked = self._of(seq)
            if not self._prefix_caching:
                self._explained[request_id] = caching_is_off(asked)
                continue
            salt = Namespace.of(seq.namespace).salt
            earlier = [*self._live(seq), *self._history.prompts(salt, seq.owner)]
            self._explained[request_id] = explain(asked, earlier, self._history, seq.taken)

    def take(self, seq: Sequence) -> Explanation | None:
        """The explanation of ``seq``, whose first token is there, if it asked; only once."""
        if seq.id not in self._asked:
            return None
        explained = self._explained.get(seq.id)
        first, end = self._coming[seq.id]
        self.forget([seq.id])
        if explained is None:
            return None
        spans = [(max(first, a), min(end, b)) for a, b in seq.taken]
        return msgspec.structs.replace(
            cut_out(explained, seq.taken),
            meanwhile=sum(b - a for a, b in spans if b > a),
            preemptions=seq.num_preemptions,
        )

    def _of(self, seq: Sequence) -> Asked:
        size = seq.num_prompt_tokens
        reach = min(seq.cacheable, size - 1)
        return Asked(
            token_ids=seq.token_ids[:size],
            namespace=seq.namespace,
            page_size=self._page_size,
            reach=reach,
            segments=seq.segments,
            reads=reach < size - 1,
        )

    def _live(self, seq: Sequence) -> Iterable[Earlier]:
        """Those of the same salt and owner that came before ``seq`` and are not done."""
        salt = Namespace.of(seq.namespace).salt
        for other in self._scheduler.sequences:
            if other.owner != seq.owner or Namespace.of(other.namespace).salt != salt:
                continue
            if other is not seq and other.arrival < seq.arrival:
                yield _live(other)


def _live(seq: Sequence) -> Earlier:
    state: State = "running"
    if seq.status.value == "waiting":
        state = "preempted" if seq.num_preemptions else "waiting"
    return Earlier(
        namespace=seq.namespace,
        owner=seq.owner,
        token_ids=seq.token_ids,
        kept=0 if seq.node is None else seq.node.depth,
        segments=seq.segments,
        adapter=None if seq.adapter is None else seq.adapter.info.name,
        state=state,
    )
