"""Job: a prompt that runs ahead of its engine.

Prepare ─▶ all ranks            what of it is cached there?
plan                            where to cut, and whether it pays at all (planner.py)
Run ─▶ those that take part     they compute; the engine's own Part goes on as their KV
logits                          arrives, beside the steps of others
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import pairwise
from typing import ClassVar

import msgspec
from torch import Tensor

from headstart.engine.batch import Read
from headstart.engine.runahead.cuts import Plan
from headstart.engine.runahead.forming import Formation
from headstart.engine.runahead.membership import Away, Member, mixed
from headstart.engine.runahead.messages import (
    Cancel,
    Declined,
    Failed,
    Finished,
    FromRank,
    Prepare,
    Prepared,
    Run,
)
from headstart.engine.runahead.part import Part
from headstart.engine.runahead.planner import Planning, Prompt
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.engine.work import LongChunk


class Report(msgspec.Struct, frozen=True):
    """How one prompt ran ahead. Per rank, the engine last: idle seconds (waiting for KV) and bytes
    of KV sent."""

    bounds: tuple[int, ...]
    predicted_seconds: float
    seconds: float
    idle: tuple[float, ...]
    sent_bytes: tuple[int, ...]


class Job:
    """``seq`` runs ahead, over ``formation``; it has pages for all its tokens. For the engine it
    is work beside the steps, as a LongChunk is.

    held:      how many of its tokens a rank has cached
    finished:  what ranks said that have computed and sent all they had to
    failed:    why the engine has to compute all of it after all
    local:     because that is quicker, which is no fault
    """

    reads: ClassVar[Items[Read]] = ()  # prompts that somebody reads do not run ahead
    seconds: ClassVar[float] = 0.0  # of its chunk alone: nobody knows

    def __init__(
        self,
        number: int,
        seq: Sequence,
        formation: Formation,
        bounds: tuple[int, ...] | None,
        finish: Callable[[Job], None],
        cancel: Callable[[Job], None],
    ) -> None:
        self.id = number
        self.seq = seq
        self.ranks = formation.ranks
        self.held: dict[Member, int] = {}
        self.finished: dict[Member, Finished] = {}
        self.planning: Planning[Plan] | None = None
        self.plan: Plan | None = None
        self.part = Part(number, seq, formation.last.loaded.runner)
        self.failed: str | None = None
        self.local = False
        self._formation = formation
        self._bounds = bounds
        self._finish, self._cancel = finish, cancel
        self._lent: Part | None = None  # what the first rank lacks
        self._begun = self._stuck_since = time.perf_counter()
        adapter = None if seq.adapter is None else (seq.adapter.info.path, seq.adapter.digest)
        spans = list(seq.segments.spans)
        message = Prepare(number, seq.token_ids.tobytes(), seq.namespace, spans, adapter)
        for rank in self.ranks:
            rank.send(message)

    # ---------------------------------------------------------------- work of the engine

    @property
    def entry(self) -> ScheduledSequence:
        assert self.part.chunk is not None
        return self.part.chunk.entry

    @property
    def waits(self) -> bool:
        return self.part.waits

    @property
    def num_computed(self) -> int:
        """About how many tokens are computed: all go through the layers together, here and on the
        ranks."""
        cached, chunk = self.seq.num_computed_tokens, self.part.chunk
        if chunk is None:
            return cached
        share = (chunk.num_computed - chunk.entry.start) / chunk.entry.num_tokens
        return cached + int((self.seq.num_tokens - cached) * share)

    def pieces(self, num_tokens: int) -> int:
        return 0 if self.part.chunk is None else self.part.chunk.pieces(num_tokens)

    def advance(self, pieces: int) -> Tensor | None:
        """See LongChunk.advance."""
        return self._advance(lambda chunk: chunk.advance(pieces))

    def advance_until(self, moment: float) -> Tensor | None:
        """See LongChunk.advance_until."""
        return self._advance(lambda chunk: chunk.advance_until(moment))

    def _advance(self, compute: Callable[[LongChunk], Tensor | None]) -> Tensor | None:
        chunk = self.part.chunk
        if chunk is None:
            return None
        layer = chunk.layer
        logits = self.part.advance(compute)
        if not chunk.waits or chunk.layer != layer:
            self._stuck_since = time.perf_counter()
        return logits

    def finish(self) -> None:
        """The engine has its logits."""
        self._finish(self)

    def cancel(self) -> None:
        """It was aborted, or has failed."""
        self._cancel(self)

    # ---------------------------------------------------------------- of its chain

    def note(self, rank: Member, message: FromRank) -> None:
        """A rank says this of it."""
        self._check_ranks()  # one that has gone says more than those that miss it
        if self.failed is not None or rank not in self.ranks:
            return
        match message:
            case Prepared(_, held):
                self.held[rank] = held
                if len(self.held) == len(self.ranks) and not self.planning and not self.plan:
                    seq = self.seq
                    prompt = Prompt(seq.num_tokens, self._held(), seq.segments, self._bounds)
                    self.planning = self._formation.plan(prompt)
            case Declined(_, reason):
                self.failed = f"{rank.name} cannot compute it: {reason}"
            case Finished():
                self.finished[rank] = message
            case Failed(_, reason):
                self._break(f"{rank.name}: {reason}")

    def _held(self) -> tuple[int, ...]:
        """Of its tokens, by place in the chain, the engine last."""
        return (*(self.held[rank] for rank in self.ranks), self.seq.num_computed_tokens)

    def poll(self, now: float, is_first: bool) -> None:
        """Run it once it is planned, and give it up where it does not get on."""
        self._check_ranks()
        if self.failed is None and self.planning is not None and self.planning.done():
            self.plan, self.planning = self.planning.result(), None
            self._run(self.plan)
        if self.failed is None:
            if self._lent is not None and not self._lent.done:
                self._lent.advance()
            self._watch(now, is_first)
            self._check_ranks()

    def _run(self, plan: Plan) -> None:
        """Set the ranks to work, and the engine to its own rows."""
        first, bounds, held, formation = plan.first, plan.bounds, self._held(), self._formation
        if len(bounds) == 2:
            self.failed, self.local = "it is quicker alone", True
            return
        for rank in self.ranks[:first]:
            rank.send(Cancel(self.id))
        source = "origin"
        for rank, (start, end), (own, next_held) in zip(
            self.ranks[first:], pairwise(bounds), pairwise(held[first:]), strict=False
        ):
            lacks = own < start
            rank.send(Run(self.id, start, end, source if lacks else "", next_held))
            if lacks and source == "origin":
                origin = formation.origin(rank)
                self._lent = formation.last.lend(self.id, self.seq, origin, own, start)
            source = "upstream"
        start, cached = bounds[-2], held[-1]
        if start > cached and formation.receiver is not None:
            self.part.receive(formation.receiver, cached, start)
        # What is cached others may be reading.
        self.part.compute(max(start, cached), self.seq.num_tokens)
        self._stuck_since = time.perf_counter()

    def _check_ranks(self) -> None:
        for rank in self.ranks:
            if isinstance(rank.state, Away):
                self.failed = self.failed or f"{rank.name}: {rank.state.reason}"

    def _watch(self, now: float, is_first: bool) -> None:
        """Give it up if it does not get on; and the rank that is to blame, if it is known."""
        hang, patience = (
            self._formation.membership.hang,
            self._formation.last.config.runahead_timeout,
        )
        stuck = now - self._stuck_since > patience
        before = self.ranks[-1].name
        if self.part.error is not None:
            self._break(f"the link from {before}: {self.part.error}")
        elif not is_first:
            self._stuck_since, self.part.waiting_since = now, None  # its turn has not come
        elif self.plan is None:
            for rank in self.ranks:
                if stuck and rank not in self.held:
                    hang(rank, "it does not answer")
        else:
            # Time in which others' prompts or steps were computed is nobody's fault.
            slow = self.part.idle > 2 * self.plan.local_seconds + patience
            if slow or (self.waits and stuck):
                behind = [r for r in self.ranks[self.plan.first :] if r not in self.finished]
                if behind:
                    hang(behind[0], "it is too slow" if slow else "it hands on nothing")
                else:
                    self._break(f"nothing comes from {before}")

    def _break(self, reason: str) -> None:
        """A link is not what it was."""
        self.failed = reason
        self._formation.renew()

    def abandon(self, reason: str) -> None:
        """Its chain is no more."""
        self._check_ranks()
        self.failed = self.failed or reason

    def close(self) -> None:
        """Nobody computes it any more, or waits for it."""
        if self.planning is not None:
            self.planning.cancel()
        self.part.drop()
        if self._lent is not None:
            self._lent.drop()
        for rank in self.ranks:
            if rank not in self.finished:
                rank.send(Cancel(self.id))

    def learn(self) -> None:
        """What a chunk takes the ranks now."""
        assert self.plan is not None
        if self._formation.costs is None or not all(rank.there for rank in self.ranks):
            return  # one has just gone: a new chain comes
        bounds, last = self.plan.bounds, self._formation.last
        for rank, (start, end) in zip(
            self.ranks[self.plan.first :], pairwise(bounds), strict=False
        ):
            if rank in self.finished:
                start, seconds = max(start, self.held[rank]), self.finished[rank].busy
                rank.pace = mixed(rank.pace, seconds, rank.welcome.costs, start, end)
        last.pace = mixed(last.pace, self.part.busy, last.costs, self.entry.start, bounds[-1])
        self._formation.learn()

    def report(self) -> Report:
        """How it went, once it is done."""
        assert self.plan is not None
        missing = Finished(self.id, 0.0, 0.0, 0)  # of a rank that has gone since
        finished = [self.finished.get(rank, missing) for rank in self.ranks[self.plan.first :]]
        lent = 0 if self._lent is None else self._lent.sent_bytes
        return Report(
            self.plan.bounds,
            self.plan.seconds,
            time.perf_counter() - self._begun,
            (*(each.idle for each in finished), self.part.idle),
            (*(each.sent_bytes for each in finished), lent),
        )
