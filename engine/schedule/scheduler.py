"""Scheduler: which tokens of which sequences the next step computes, and who holds which pages.

There is no prefill phase and no decode phase, only sequences whose ``num_computed_tokens`` must
catch up with their tokens under one token budget a step:

    1. running sequences that decode: with one pending token, or a *run* of a few that nobody had to
       choose (sampling/grammar.py), of which as many as the budget has beside a token for everybody
    2. running sequences with more: a chunk of their prompt each, in order
    3. waiting sequences, in order, while budget, running slots and pages last

The order is that of priority, lower ones first, and among equals of arrival.

    add ──> WAITING ──admit──> RUNNING ──commit──> FINISHED
               ^                  │
               └── preempt: pages and lock given up, tokens kept; full pages stay in the cache

Pages. A sequence takes pages for the chunk at hand only; the cache gives up what nobody uses when
the pool is short. If that is not enough, the last of the running sequences is preempted, so the
first one always advances, and with it everything finishes. A waiting sequence is
admitted only if all its tokens would fit beside those of the running ones and a page to grow for
each, or if nothing runs: admission does not lead straight to preemption.

A segment (ranges/segments.py) is computed whole: a chunk may begin inside one, where the cache has
its beginning, but never ends inside one. One that is longer than the budget is a *long chunk*, once
it is the first prompt in a step. It is computed beside the steps that follow, some layers of it
with each, and until it is committed those steps hold nothing but the rows of sequences that decode:

    step           n          n + 1       n + 2       n + 3
    rows           d d d      d d d d     d d d       d d d  p p p p ...
    long chunk     layers 0..9   10..19      20..29                          committed

Where it is known what steps cost (``Pace``), a step is a time: what prompts get of it is what those
that decode leave. Chunks are cut to what fits, at any length of context. What does not fit, a page
of a large model or a long segment, is a long chunk; several of them may be under way, and a work
beside the steps takes its turn like a prompt in them (turns.py):

    step           n                    n + 1                n + 2
    rows           d d d  p p p         d d d                d d d d  p p
    beside         ·                    long chunk           other long chunk

Tokens of a step are sent before what is beside it is computed. Those who decode have waited for
that when the next step begins, which therefore has so much less room for prompts.

A prompt that *runs ahead* (engine/runahead) is computed by other processes but for its end, which
is computed beside the steps, too. It has pages for all its tokens from the start. Meanwhile others
get half the budget, and further prompts may run ahead behind it, but where steps are a time none
that is shorter: that is sooner done here. If that fails, ``fall_back`` makes
it one of those that prefill here.

A step may be scheduled while the one before is *in flight*: launched, and its tokens not known to
the host. What that one computes counts as computed, and the token it samples as there:

    step n       row [ t40 ]   samples t41: in flight
    step n + 1   row [  ?  ]   t41, taken on the device; position 41, behind the known tokens
    commit n     t41 is known: it may end the sequence, and what step n + 1 computes is dropped

Ends by length are known beforehand and not run past. A sequence whose logits depend on its output
(penalties) waits for its token. Pages that an end, an abort or a preemption sets free may be given
out at once: those who get them write to them in a later step, and steps are computed in order, so
whatever a step in flight still reads or writes there, it does before.

Shared prefixes are computed once. A sequence that gets a chunk first jumps ahead to what the
cache holds by now, and one whose next page is being computed by a chunk scheduled earlier in the
same step waits a step for it.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from operator import attrgetter
from typing import NamedTuple

from headstart.engine.errors import RequestError
from headstart.engine.kv.history import History
from headstart.engine.kv.pool import AccountingError, PagePool
from headstart.engine.kv.tree import Match, Node, RadixCache
from headstart.engine.schedule.turns import Pace, Turns
from headstart.engine.sequence import FinishReason, ScheduledSequence, Sequence, Status

_by_rank = attrgetter("priority", "arrival")


class SchedulerOutput(NamedTuple):
    """One step. ``preempted``: how many sequences lost their pages to make it fit.

    ``long_chunk``: begins with this step, and is committed by itself when it has been computed.
    ``ahead``: prompts that begin to run ahead; their ends are committed in the same way.
    ``beside``: for how many seconds those are to be computed that go on beside this step; empty
    where steps are no time.
    """

    scheduled: list[ScheduledSequence]
    preempted: int
    long_chunk: ScheduledSequence | None = None
    ahead: Items[Sequence] = ()
    beside: Items[tuple[Sequence, float]] = ()

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)

    @property
    def num_prefilled(self) -> int:
        """Tokens of chunks, which take a step its time; decoding rows take little."""
        return sum(entry.num_tokens for entry in self.scheduled if entry.num_tokens > 1)


NOTHING = SchedulerOutput([], 0)
"""No step."""

MOST_LONG = 4
"""Long chunks that are computed at a time, where steps are a time; together they have no more rows
than the longest sequence."""

REFRESHED = 4
"""Waiting sequences a step whose cached part is looked up anew."""

LONGEST_RUN = 32
"""Tokens of an output that are computed like a decoding one; more are a chunk like any other."""


class NewToken(NamedTuple):
    """``token_id`` is None if the sequence has finished without one."""

    seq: Sequence
    token_id: int | None
    finished: bool


class _Step:
    """What one call of ``schedule`` has decided so far."""

    __slots__ = (
        "ahead",
        "all_seconds",
        "before",
        "beside",
        "budget",
        "in_flight",
        "keys",
        "long_chunk",
        "preempted",
        "prefills",
        "room",
        "scheduled",
        "seconds",
    )

    def __init__(self, budget: int, before: SchedulerOutput) -> None:
        self.budget = budget  # below 0 after a segment that is longer than what was left
        self.seconds = self.all_seconds = math.inf  # for prompts: what is left, and at first
        self.room = math.inf  # what of that may be in the step itself
        # What the step in flight computes.
        self.before = {entry.seq: entry for entry in before.scheduled}
        self.prefills = False  # whether part of a prompt is in it
        self.long_chunk: ScheduledSequence | None = None
        self.ahead: list[Sequence] = []
        self.beside: list[tuple[Sequence, float]] = []
        self.scheduled: dict[Sequence, ScheduledSequence] = {}
        # (node, tokens of the page after it) that this step or the one before computes, and for
        # whom.
        self.in_flight: dict[tuple[Node, bytes], Sequence] = {}
        self.preempted = 0
        self.keys = 0  # that those which decode read

    def start(self, seq: Sequence) -> int:
        """The first position of ``seq`` that nobody has computed."""
        entry = self.before.get(seq)
        # It may have jumped beyond what is in flight.
        return seq.num_computed_tokens if entry is None else max(seq.num_computed_tokens, entry.end)

    def num_tokens(self, seq: Sequence) -> int:
        """The tokens of ``seq``, the one that is in flight included."""
        return len(seq.token_ids) + self.awaits(seq)

    def awaits(self, seq: Sequence) -> bool:
        """Whether the last token of ``seq`` is in flight."""
        entry = self.before.get(seq)
        return entry is not None and entry.samples


class Scheduler:
    """Sequences from ``add`` to their end; one ``schedule`` and one ``commit`` a step, in order.

    max_batched_tokens:  token budget of a step
    max_running:         sequences that hold pages at a time; never more than the token budget,
                         so that each gets a row in every step once it decodes
    max_model_len:       a sequence ends when prompt and output are this long
    runs_ahead:          whether a sequence, cached up to a position, should run ahead now, behind
                         so many others
    pace:                what a step may take; None: as long as its tokens do
    history:             is told of the sequences that end
    """

    def __init__(
        self,
        pool: PagePool,
        cache: RadixCache,
        *,
        max_batched_tokens: int,
        max_running: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        prefix_caching: bool = True,
        runs_ahead: Callable[[Sequence, int, int], bool] = lambda seq, start, num_ahead: False,
        pace: Pace | None = None,
        history: History | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batched_tokens < 1 or max_running < 1:
            raise ValueError(f"nothing can run: {max_batched_tokens=}, {max_running=}")
        self._pool = pool
        self._cache = cache
        self._page_size = pool.page_size
        self._max_batched_tokens = max_batched_tokens
        self._max_running = min(max_running, max_batched_tokens)
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._prefix_caching = prefix_caching
        self._runs_ahead = runs_ahead
        self._pace = pace
        self._turns = None if pace is None else Turns(pace)
        self._clock = clock
        self._history = History(clock=clock) if history is None else history
        # Both in order.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._long: dict[Sequence, int] = {}  # whose long chunks are being computed, up to where
        self._ahead: list[Sequence] = []  # those that run ahead
        self._num_arrived = 0
        self._num_looks = 0  # for what is cached of waiting sequences
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens of all prompts that are still to be computed."""
        left = (seq.num_prompt_tokens - seq.num_computed_tokens for seq in self._by_id.values())
        return sum(tokens for tokens in left if tokens > 0)

    @property
    def sequences(self) -> Collection[Sequence]:
        """Those that run or wait."""
        return self._by_id.values()

    def backlog(self) -> list[float]:
        """Seconds until the first token of each prompt that is not computed yet, alone; empty where
        steps are no time."""
        if self._pace is None:
            return []
        prompts = [s for s in self._running if s.num_computed_tokens < s.num_prompt_tokens]
        return [self._pace.left(seq) for seq in (*prompts, *self._waiting)]

    def add(self, seq: Sequence) -> None:
        """Queue ``seq``. Raises RequestError if it could never run here."""
        num_prompt, limit = seq.num_prompt_tokens, self._max_model_len
        if num_prompt < 1:
            raise RequestError("the prompt has no tokens", "prompt")
        if num_prompt >= limit:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; this model takes at most {limit - 1}, "
                f"since prompt and output together are limited to {limit}",
                "prompt",
            )
        # The last token of all is sampled and never computed.
        longest = max(min(num_prompt + seq.params.max_tokens, limit) - 1, num_prompt)
        room = self._pool.num_pages * self._page_size
        if self._pool.pages_for(longest) > self._pool.num_pages:
            raise RequestError(
                f"prompt and max_tokens need KV memory for {longest} tokens; there is room for "
                f"{room}: ask for less, or start the server with a larger --kv-memory",
                "max_tokens",
            )
        if seq.id in self._by_id:
            raise RequestError(f"a request with id {seq.id} is already running")
        self._by_id[seq.id] = seq
        seq.arrival = self._num_arrived
        self._num_arrived += 1
        seq.status = Status.WAITING
        self._expect(seq)
        insort(self._waiting, seq, key=_by_rank)

    def abort(self, ids: Iterable[int]) -> list[Sequence]:
        """End these sequences now and free what they hold; unknown ids are ignored.

        Returns the ended ones. May be called between ``schedule`` and ``commit``, too; what the
        step then computes for them is dropped.
        """
        aborted = [self._by_id[id_] for id_ in dict.fromkeys(ids) if id_ in self._by_id]
        for seq in aborted:
            self._finish(seq, FinishReason.ABORT)
        return aborted

    # ---------------------------------------------------------------- schedule

    def schedule(
        self, in_flight: SchedulerOutput = NOTHING, beside: float = 0.0
    ) -> SchedulerOutput:
        """Decide the next step; never empty while there is work, but for a long chunk and what
        waits for the step in flight.

        ``in_flight``: a step whose ``commit`` is to come, before that of the one decided here.
        ``beside``: seconds that passed since the tokens of the step before, with work beside it.
        """
        step = _Step(self._max_batched_tokens, in_flight)
        spare = max(step.budget - len(self._running), 0)  # beside a token for everybody
        prefilling = []
        for seq, entry in step.before.items():
            if seq.status is Status.RUNNING:  # else aborted
                self._note_in_flight(step, seq, entry.end)
        for seq in self._running.copy():
            # Not running: preempted by an older one just now.
            if seq.status is not Status.RUNNING or self._is_beside(seq):
                continue
            start, num_tokens = step.start(seq), step.num_tokens(seq)
            if step.awaits(seq) and (seq.params.needs_tokens or self._is_full(seq, num_tokens)):
                continue
            if start == num_tokens:  # its prompt, which is all that is wanted, is in flight
                continue
            pending = num_tokens - start
            if pending > 1 and not (start >= seq.num_prompt_tokens and pending <= LONGEST_RUN):
                prefilling.append(seq)
                continue
            run = min(pending, 1 + spare)
            lacking = self._pool.pages_for(start + run) - len(seq.pages)
            if lacking <= 0 or self._take_pages(step, seq, lacking):
                spare -= run - 1
                step.keys += start + run
                self._put(step, seq, start, run)
        if self._pace is not None:
            step.seconds = self._pace.for_prompts(len(step.scheduled), step.keys)
            step.all_seconds = step.seconds
            # Who decodes has waited for that already.
            step.room = step.seconds - beside if step.scheduled else step.seconds
        elif self._long:
            step.budget = 0
        elif self._ahead:
            step.budget -= self._max_batched_tokens // 2
        for seq, end in self._long.items():
            self._note_in_flight(step, seq, end)
        for seq in self._ahead:
            self._note_in_flight(step, seq, len(seq.token_ids))
        self._prefill(step, prefilling)
        self.preemptions += step.preempted
        return SchedulerOutput(
            list(step.scheduled.values()),
            step.preempted,
            step.long_chunk,
            step.ahead,
            step.beside,
        )

    def _put(self, step: _Step, seq: Sequence, start: int, num_tokens: int) -> None:
        end = start + num_tokens
        samples = seq.generates and end == step.num_tokens(seq)
        entry = ScheduledSequence(seq, start, num_tokens, samples)
        if num_tokens > self._max_batched_tokens or (num_tokens > 1 and self._is_long(step, entry)):
            self._long[seq] = end
            step.long_chunk, step.budget = entry, 0
            if self._pace is not None:
                self._put_beside(step, seq)
        else:
            step.budget -= num_tokens
            if self._pace is not None and num_tokens > 1:
                seconds = self._pace.costs.prefill.seconds(start, num_tokens)
                step.room -= seconds
                self._take_seconds(step, seq, seconds)
            step.scheduled[seq] = entry
        self._note_in_flight(step, seq, end)

    def _is_long(self, step: _Step, entry: ScheduledSequence) -> bool:
        """Whether a chunk takes longer than a step has for prompts."""
        if self._pace is None:
            return False
        seconds = self._pace.costs.prefill.seconds(entry.start, entry.num_tokens)
        return seconds > step.all_seconds

    def _put_beside(self, step: _Step, seq: Sequence) -> None:
        """Go on with what is computed beside the steps, for what is left of this one's time; or
        half of it, where others compute the most and it may have to wait for them."""
        seconds = step.seconds / 2 if seq in self._ahead else step.seconds
        if seconds > 0:
            step.beside.append((seq, seconds))
            self._take_seconds(step, seq, seconds)

    def _take_seconds(self, step: _Step, seq: Sequence, seconds: float) -> None:
        step.seconds -= seconds
        if self._turns is not None:
            self._turns.serve(seq, seconds)

    def _note_in_flight(self, step: _Step, seq: Sequence, end: int) -> None:
        """The page after what the cache has of ``seq`` is being computed, if ``end`` is beyond."""
        if seq.node is not None:
            page_end = seq.node.depth + self._page_size
            if min(end, len(seq.token_ids)) >= page_end:  # nobody can ask for unknown tokens
                keys = seq.cache_keys(self._page_size)
                page = keys[seq.node.depth : page_end].tobytes()
                step.in_flight.setdefault((seq.node, page), seq)

    def _is_beside(self, seq: Sequence) -> bool:
        """Whether ``seq`` is computed beside the steps, and not in them."""
        return seq in self._long or seq in self._ahead

    def fall_back(self, seq: Sequence) -> None:
        """``seq`` does not run ahead any more: what is not cached of it is computed in steps."""
        self._ahead.remove(seq)

    def _take_pages(self, step: _Step, seq: Sequence, n: int) -> bool:
        """Give ``seq`` ``n`` more pages, at others' cost if need be; False: it was preempted."""
        while self._available < n:
            victim = next(s for s in reversed(self._running) if not self._is_beside(s))
            self._preempt(step, victim)
            if victim is seq:
                return False
        seq.pages += self._allocate(seq, n)
        return True

    def _prefill(self, step: _Step, prefilling: list[Sequence]) -> None:
        """Chunks for those that run, and for those that wait while there is room for them."""
        # A copy of the head: admitting changes the list, and those passed over are bounded.
        waiting = self._waiting[: self._max_running]
        reserved: int | None = None  # pages that those running will take; None: not counted yet
        for seq in self._in_turn(prefilling, waiting):
            if self._is_beside(seq):
                self._put_beside(step, seq)
            elif seq.status is Status.RUNNING:
                if step.budget > 0:
                    self._continue_prefill(step, seq)
            # What was just preempted for want of pages would only come and go.
            elif seq.status is Status.WAITING and waiting and not step.preempted:
                if reserved is None:
                    reserved = sum(map(self._pages_to_come, self._running))
                pages = self._admit(step, seq, reserved)
                if pages is None:
                    waiting = []  # nobody behind it, either
                else:
                    reserved += pages

    def _in_turn(self, prefilling: list[Sequence], waiting: list[Sequence]) -> list[Sequence]:
        """Where steps are a time, the soonest done first; else those that run, then the others."""
        if self._turns is None:
            return prefilling + waiting
        for i in range(min(REFRESHED, len(waiting))):
            self._expect(waiting[(self._num_looks + i) % len(waiting)])
        self._num_looks += REFRESHED
        return self._turns.order([*self._long, *self._ahead, *prefilling, *waiting])

    def _expect(self, seq: Sequence) -> None:
        """How much of a waiting sequence is cached decides when its turn is."""
        if self._pace is not None and self._prefix_caching:
            keys = seq.cache_keys(self._page_size)
            seq.num_expected_tokens = self._cache.depth(seq.namespace, keys, seq.cacheable)

    def _continue_prefill(self, step: _Step, seq: Sequence) -> None:
        if seq.node is not None:
            self._jump_ahead(step, seq, self._match(seq.node, seq))
            if self._is_in_flight(step, seq, seq.node):
                return
        start, held = step.start(seq), len(seq.pages)
        num_tokens = self._next_chunk(step, seq, start)
        if not num_tokens:
            return
        # A commit may exchange pages for equal ones, which a long chunk would go on reading.
        if num_tokens > self._max_batched_tokens and seq in step.before:
            return
        room = (held + self._available) * self._page_size - start
        if num_tokens > room:
            # Rather a shorter chunk than somebody else's pages.
            num_tokens = self._chunk(seq, start, room) or self._shortest_chunk(
                seq, start, num_tokens
            )
        if self._take_pages(step, seq, self._pool.pages_for(start + num_tokens) - held):
            step.prefills = True
            self._put(step, seq, start, num_tokens)

    def _admit(self, step: _Step, seq: Sequence, reserved: int) -> int | None:
        """Let a waiting sequence run, if it can. How many more pages will be wanted then; None: it
        can't, and nobody that comes behind it shall."""
        if len(self._running) >= self._max_running:
            return None
        if (step.budget <= 0 or step.seconds <= 0) and not self._may_run_ahead(seq, 0):
            return None
        if self._prefix_caching:
            node, pages = self._match(self._cache.root(seq.namespace), seq)
            if self._is_in_flight(step, seq, node):
                return 0
            self._cache.lock(node)  # before anything is evicted to make room
            seq.node, seq.pages = node, pages
        start = len(seq.pages) * self._page_size
        ahead = self._may_run_ahead(seq, start)
        if ahead:
            num_tokens = len(seq.token_ids) - start
        else:
            num_tokens = self._next_chunk(step, seq, start) if step.budget > 0 else 0
        short = self._pages_to_come(seq) + reserved > self._available
        if not num_tokens or (self._running and short):
            if seq.node is not None:
                self._cache.unlock(seq.node)
                seq.node, seq.pages = None, []
            return self._pass(seq, short=num_tokens > 0)
        self._waiting.remove(seq)
        self._start(step, seq, num_tokens, ahead)
        return self._pages_to_come(seq)

    def _pass(self, seq: Sequence, *, short: bool) -> int | None:
        """Whether those behind ``seq`` may come in before it: 0, and None if not. ``short``: it is
        kept out by want of pages, for as many steps as sequences can run."""
        if self._pace is None:
            return None
        seq.num_short += short
        return None if seq.num_short > self._max_running else 0

    def _may_run_ahead(self, seq: Sequence, start: int) -> bool:
        if self._pace is None:
            free = not self._long
        else:
            # Ranks go on with one prompt after the other: a shorter one is sooner done here.
            left = self._pace.left(seq)
            free = all(left >= self._pace.left(other) for other in self._ahead)
        return free and self._runs_ahead(seq, start, len(self._ahead))

    def _start(self, step: _Step, seq: Sequence, num_tokens: int, ahead: bool) -> None:
        """Run a sequence that holds its lock and ``pages`` of the cache, without references."""
        self._pool.retain(seq.pages)
        start = seq.num_computed_tokens = len(seq.pages) * self._page_size
        seq.status = Status.RUNNING
        insort(self._running, seq, key=_by_rank)
        if not seq.num_preemptions:
            seq.scheduled = self._clock()
            self.prompt_tokens += seq.num_prompt_tokens
            self._count_cached(seq, 0, start)
        lacking = self._pool.pages_for(start + num_tokens) - len(seq.pages)
        seq.pages += self._allocate(seq, lacking)
        if ahead:
            self._ahead.append(seq)
            step.ahead.append(seq)
            self._note_in_flight(step, seq, len(seq.token_ids))
            return
        step.prefills |= num_tokens > 1
        self._put(step, seq, start, num_tokens)

    def _next_chunk(self, step: _Step, seq: Sequence, start: int) -> int:
        """How many tokens of ``seq`` this step computes, or a long chunk; 0: it has to wait."""
        if self._pace is None:
            return self._chunk_of_tokens(step, seq, start)
        if step.seconds <= 0 or step.budget <= 0:
            return 0
        costs = self._pace.costs.prefill
        seconds = max(min(step.seconds, step.room), 0.0)
        fits = int(min(costs.tokens(start, seconds), step.budget))
        num_tokens = self._chunk(seq, start, fits) if fits else 0
        left = len(seq.token_ids) - start
        if num_tokens >= min(self._page_size, left):
            return num_tokens
        # Not even a page, or a segment that is longer.
        least = self._shortest_chunk(seq, start, left)
        wanted = costs.seconds(start, least)
        if least <= self._max_batched_tokens and wanted <= step.all_seconds:
            if wanted <= seconds and (least <= step.budget or not step.prefills):
                return least
            if wanted <= step.seconds:
                step.seconds = 0.0  # the next step has room for it
            return 0
        held = sum(end - seq.num_computed_tokens for seq, end in self._long.items())
        full = len(self._long) >= MOST_LONG or held + least > self._max_model_len
        if step.long_chunk is not None or (self._long and full):
            return 0
        # So many rows that a layer of them is half a step; a segment is whole, though.
        seconds = self._pace.layers * self._pace.seconds / 2
        most = int(min(costs.tokens(start, seconds), self._max_batched_tokens))
        return max(self._chunk(seq, start, most) if most else 0, least)

    def _chunk_of_tokens(self, step: _Step, seq: Sequence, start: int) -> int:
        """How many tokens of ``seq`` the budget has; 0: a segment has to wait for its turn.

        One that does not fit into what is left of the budget may go beyond it, but then it is the
        only prompt: the one that runs next, and so never passed over.
        """
        num_tokens = self._chunk(seq, start, step.budget)
        if step.prefills or num_tokens >= self._page_size:
            return num_tokens
        # Nothing, or less than a page (begin of text), and then a segment: both together.
        end = seq.segments.end_of(start + num_tokens + 1)
        return end - start if end - start > num_tokens + 1 else num_tokens

    def _chunk(self, seq: Sequence, start: int, most: int) -> int:
        """At most how many of ``most`` tokens make a chunk; 0 where a segment is longer.

        It ends where a page does, or a segment, if it is not the last chunk.
        """
        limit = start + most
        if len(seq.token_ids) <= limit:
            return len(seq.token_ids) - start
        end = limit // self._page_size * self._page_size
        if end <= start:
            end = limit
        whole = seq.segments.end_of(end)
        return max((whole if whole <= limit else seq.segments.start_of(end)) - start, 0)

    def _shortest_chunk(self, seq: Sequence, start: int, most: int) -> int:
        """The rest of the segment that ``start`` lies in, or of ``most`` tokens one page's."""
        end = seq.segments.end_of(start + 1)
        if end > start + 1:
            return end - start
        return self._chunk(seq, start, min(most, self._page_size))

    def _match(self, start: Node, seq: Sequence) -> Match:
        return self._cache.match(start, seq.cache_keys(self._page_size), seq.cacheable)

    def _jump_ahead(self, step: _Step, seq: Sequence, match: Match) -> None:
        """Take the cache's pages for tokens that others have computed meanwhile."""
        assert seq.node is not None
        start = step.start(seq)
        if match.node.depth <= start:
            return
        self._cache.lock(match.node)
        self._pool.retain(match.pages)
        first = seq.node.depth // self._page_size
        self._pool.release(seq.pages[first:])
        seq.pages[first:] = match.pages
        self._cache.unlock(seq.node)
        seq.node = match.node
        if not seq.num_preemptions:
            self._count_cached(seq, start, match.node.depth)
        seq.num_computed_tokens = match.node.depth

    def _count_cached(self, seq: Sequence, first: int, end: int) -> None:
        seq.num_cached_tokens += end - first
        seq.taken.append((first, end))
        self.cached_tokens += end - first

    def _is_in_flight(self, step: _Step, seq: Sequence, node: Node) -> bool:
        """Whether this step, or the one before, computes the page of ``seq`` that follows
        ``node``, for somebody else.

        Two sequences with equal tokens up to a page's end that the tree knows share the node
        that ends there, so comparing node and page compares the whole prefix.
        """
        page_end = node.depth + self._page_size
        if not step.in_flight or page_end > seq.cacheable:  # it would not take that page
            return False
        keys = seq.cache_keys(self._page_size)
        owner = step.in_flight.get((node, keys[node.depth : page_end].tobytes()), seq)
        return owner is not seq

    def _pages_to_come(self, seq: Sequence) -> int:
        """Pages for the tokens it has, and one to grow."""
        return self._pool.pages_for(len(seq.token_ids)) - len(seq.pages) + 1

    @property
    def _available(self) -> int:
        return self._pool.num_free + self._cache.num_evictable_pages

    def _allocate(self, seq: Sequence, n: int) -> list[int]:
        short = n - self._pool.num_free
        if short > 0:
            answers = seq.num_computed_tokens >= seq.num_prompt_tokens
            self._cache.evict(short, "answer" if answers else "prompt")
        return self._pool.allocate(n)

    def _preempt(self, step: _Step, seq: Sequence) -> None:
        entry = step.scheduled.pop(seq, None)
        if entry is not None:
            step.budget += entry.num_tokens
        self._leave(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        insort(self._waiting, seq, key=_by_rank)
        step.preempted += 1

    def _leave(self, seq: Sequence) -> None:
        """Take ``seq`` out of the running ones, with its pages and its lock."""
        self._running.remove(seq)
        self._is_no_longer_beside(seq)
        # Reversed, so that the next to take pages gets the first of these first.
        self._pool.release(reversed(seq.pages))
        seq.pages = []
        if seq.node is not None:
            self._cache.unlock(seq.node)
            seq.node = None

    def _is_no_longer_beside(self, seq: Sequence) -> None:
        if seq in self._long:
            del self._long[seq]
        elif seq in self._ahead:
            self._ahead.remove(seq)

    # ---------------------------------------------------------------- commit

    def commit(
        self, output: SchedulerOutput, tokens: Items[int | FinishReason | None]
    ) -> list[NewToken]:
        """Book a computed step: advance, cache full pages, append tokens, finish.

        ``tokens``: for each entry with ``samples``, in order, the sampled token; or why the
        sequence ends without one; or None where the logits were not numbers, which ends it with
        FinishReason.ERROR.
        """
        sampled = iter(tokens)
        new_tokens = []
        for seq, start, num_tokens, samples in output.scheduled:
            self._is_no_longer_beside(seq)
            token = next(sampled) if samples else None
            # Aborted while the step ran, or ended by the token of the step before.
            if seq.status is Status.FINISHED:
                continue
            if samples and token is None:
                self._finish(seq, FinishReason.ERROR)
                new_tokens.append(NewToken(seq, None, True))
                continue
            # Not running: preempted by the step that comes after this one. The token stays.
            if seq.status is Status.RUNNING:
                seq.num_computed_tokens = max(seq.num_computed_tokens, start + num_tokens)
                if seq.node is not None:
                    self._cache_full_pages(seq, seq.node)
            if not seq.generates and start + num_tokens == len(seq.token_ids):
                self._finish(seq, seq.reading.finish_reason if seq.reading else FinishReason.LENGTH)
                new_tokens.append(NewToken(seq, None, True))
            if isinstance(token, FinishReason):
                self._finish(seq, token)
                new_tokens.append(NewToken(seq, None, True))
            elif token is not None:
                new_tokens.append(NewToken(seq, token, self._append(seq, token)))
        return new_tokens

    def extend(self, seq: Sequence, token_ids: Iterable[int]) -> list[int]:
        """Append tokens that nobody had to choose, until one ends the sequence; which those are.

        Only where no step in flight computes it.
        """
        taken: list[int] = []
        for token_id in token_ids:
            taken.append(token_id)
            if self._append(seq, token_id):
                break
        return taken

    def _append(self, seq: Sequence, token_id: int) -> bool:
        """Whether it ends the sequence."""
        seq.token_ids.append(token_id)
        self.generation_tokens += 1
        reason = self._finish_reason(seq, token_id)
        if reason is not None:
            self._finish(seq, reason)
        return reason is not None

    def _cache_full_pages(self, seq: Sequence, node: Node) -> None:
        first = node.depth // self._page_size
        last = seq.num_computed_tokens // self._page_size
        if last <= first:
            return
        own = seq.pages[first:last]
        end, held = self._cache.insert(node, seq.cache_keys(self._page_size), own)
        if held != own:
            # Somebody computed the same tokens at the same time; one copy is enough.
            self._pool.retain(held)
            self._pool.release(own)
            seq.pages[first:last] = held
        if end is not node:
            self._cache.lock(end)
            self._cache.unlock(node)
            seq.node = end

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        if seq.params.is_end(token_id, self._eos_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(seq, len(seq.token_ids)) else None

    def _is_full(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether ``seq`` ends when it has so many tokens, whatever they are."""
        most = min(seq.num_prompt_tokens + seq.params.max_tokens, self._max_model_len)
        return num_tokens >= most

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        node = seq.node
        if seq.status is Status.RUNNING:
            self._history.leave(seq, self._page_size, aborted=reason is FinishReason.ABORT)
            self._leave(seq)
        else:
            self._waiting.remove(seq)
            if reason is FinishReason.ERROR and self._prefix_caching:
                node = self._match(self._cache.root(seq.namespace), seq).node
        if reason is FinishReason.ERROR and node is not None:
            # Whoever shares this prefix would read the same broken KV.
            self._cache.discard(node)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        del self._by_id[seq.id]

    # ---------------------------------------------------------------- check

    def check(self, lent: Iterable[int] = ()) -> None:
        """Prove the books of sequences, cache and pool; for tests. Raises AccountingError.

        ``lent``: pages to which others hold a reference, once for each.
        """
        owners: Counter[int] = Counter(lent)
        locks: Counter[Node] = Counter()
        for seq in self._running:
            computed = seq.num_computed_tokens
            _prove(seq.status is Status.RUNNING, seq, "runs, but its status differs")
            _prove(computed < seq.num_tokens, seq, "has nothing to compute")
            _prove(len(seq.pages) * self._page_size >= computed, seq, "has too few pages")
            whole = seq.segments.end_of(computed) == computed
            cached = seq.node is not None and seq.node.depth == computed
            _prove(whole or cached, seq, "has computed a segment in part")
            owners.update(seq.pages)
            _prove((seq.node is not None) is self._prefix_caching, seq, "has no lock, or a stray")
            if seq.node is not None:
                locks[seq.node] += 1
                path = seq.node.path()
                pages = [page for node in path for page in node.pages]
                key = b"".join(node.key for node in path)
                _prove(seq.node.namespace == seq.namespace, seq, "is in another's namespace")
                _prove(seq.pages[: len(pages)] == pages, seq, "uses other pages than its node")
                keys = seq.cache_keys(self._page_size)[: seq.node.depth]
                _prove(keys.tobytes() == key, seq, "has other tokens")
                _prove(seq.node.depth <= computed, seq, "has tokens in the cache before computing")
        for seq in self._waiting:
            idle = seq.status is Status.WAITING and not seq.num_computed_tokens
            _prove(idle and not seq.pages and seq.node is None, seq, "waits, but holds something")
        queued = self._waiting + self._running
        if len(queued) != len(self._by_id) or {s.id for s in queued} != self._by_id.keys():
            raise AccountingError("scheduler: the queues and the index by id differ")
        for queue in (self._waiting, self._running):
            if sorted(queue, key=_by_rank) != queue:
                raise AccountingError("scheduler: a queue is not in order")
        owners.update(self._cache.check(locks))
        self._pool.check(owners)


def _prove(holds: bool, seq: Sequence, otherwise: str) -> None:
    if not holds:
        raise AccountingError(f"scheduler: sequence {seq.id} {otherwise}")
