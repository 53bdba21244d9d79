"""Chain: the prefill ranks as their engine sees them; itself the last rank of the chain.

    rank 0 ──▶ rank 1 ──▶ engine        KV, over links; what a rank's cache lacks comes from the
      ▲───────────┴─────────┘           engine the other way

    membership.py     which ranks are there      ─▶ forming.py     the links among those that are
    jobs.py           prompts that run ahead over them, one for each

Faults. A rank that has gone, hangs, or hands on nothing for ``runahead_timeout`` costs the prompts
that run ahead at that moment their time so far: the engine prefills them itself. The rank is left
out, greeted again until it answers, and taken into a newly formed chain. Nothing here ever waits.

The engine's thread calls ``poll`` before each step and now and then while there are none.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import msgspec

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError
from headstart.engine.kv.pool import PagePool
from headstart.engine.models.loading import LoadedModel
from headstart.engine.process.messages import RunaheadStats
from headstart.engine.runahead import control
from headstart.engine.runahead.forming import Formation
from headstart.engine.runahead.jobs import Job, Report
from headstart.engine.runahead.last_rank import LastRank
from headstart.engine.runahead.links import readable
from headstart.engine.runahead.membership import Member, Membership
from headstart.engine.runahead.messages import (
    Bye,
    Declined,
    Failed,
    Finished,
    Formed,
    FromRank,
    Prepared,
)
from headstart.engine.runahead.planner import CUTS
from headstart.engine.sequence import Sequence

logger = logging.getLogger(__name__)

TRANSPORTS = ("auto", "gloo")


class Chain:
    """Starts, greets, connects and watches the ranks, and runs prompts ahead over them.

    ``forced_bounds``: cuts of the next prompts, for measurements. ``last``: the latest report.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel, pool: PagePool) -> None:
        if config.runahead_cuts not in CUTS:
            raise ConfigError(f"--runahead-cuts must be {', '.join(CUTS)}")
        if config.runahead_transport not in TRANSPORTS:
            raise ConfigError(f"--runahead-transport must be {', '.join(TRANSPORTS)}")
        control.require_linux()
        if config.runahead_hosts and config.runahead_secret is None:
            raise ConfigError("--runahead-hosts needs the secret that the ranks were started with")
        self.forced_bounds: list[int] | None = None
        self.last: Report | None = None
        self._engine = LastRank(config, loaded, pool)
        secret = config.runahead_secret or secrets.token_urlsafe(24)
        timeout = config.runahead_timeout
        self._membership = membership = Membership(secret, self._engine.identity, timeout)
        self._ids = itertools.count(1)
        self._formation = self._form([], 0.0)
        self._grows = False  # a rank has come; no more prompts run ahead until it takes part
        self._jobs: dict[int, Job] = {}
        self._stats = RunaheadStats()
        self._closed = False
        try:
            for address in config.runahead_hosts:
                membership.add(address)
            for i in range(config.runahead - 1):
                address = f"ipc://{membership.folder}/rank-{i}.sock"
                membership.add(address, self._engine.neighbour(address, secret, i + 1))
        except ConfigError:
            self.close()
            raise

    @property
    def whole(self) -> bool:
        """Whether every rank is there, the chain is formed, and it is known what pays."""
        formation = self._formation
        return formation.least is not None and len(formation.ranks) == len(self._membership.ranks)

    def __str__(self) -> str:
        """Which ranks are missing, and why."""
        return str(self._membership) or "its links are not open"

    @property
    def num_ranks(self) -> int:
        """Ranks of the chain as it is, the engine included."""
        return len(self._formation.ranks) + 1 if self._formation.costs is not None else 1

    @property
    def stats(self) -> RunaheadStats:
        return msgspec.structs.replace(
            self._stats,
            ranks=len(self._membership.ranks) + 1,
            ranks_live=self.num_ranks,
            left_out=self._membership.left_out,
        )

    def pages_lent(self) -> Iterable[int]:
        """Pages to which the chain holds a reference, once for each."""
        return self._engine.pages_lent

    def wants(self, seq: Sequence, start: int, num_ahead: int) -> bool:
        """Whether ``seq``, of which ``[0, start)`` is cached, should run ahead of the engine now,
        behind ``num_ahead`` others."""
        least = self._formation.least
        return (
            least is not None
            and not self._grows
            and num_ahead < self.num_ranks
            and seq.num_tokens - start >= max(least, self._engine.page_size + 1)
        )

    def start(self, seq: Sequence) -> Job:
        """Let ``seq`` run ahead; it has pages for all its tokens."""
        bounds = None if self.forced_bounds is None else tuple(self.forced_bounds)
        job = Job(next(self._ids), seq, self._formation, bounds, self.finish, self.cancel)
        self._jobs[job.id] = job
        return job

    def finish(self, job: Job) -> None:
        """The engine has its logits."""
        for rank in job.ranks:  # what they have finished with came before their last KV
            self._note(self._membership.hear(rank))
        self._end(job)
        job.learn()
        self.last = report = job.report()
        self._count(
            prompts=1,
            tokens=report.bounds[-1] - report.bounds[0],
            seconds=report.seconds,
            predicted_seconds=report.predicted_seconds,
            idle_seconds=job.part.idle,
            bytes_sent=sum(report.sent_bytes),
        )

    def cancel(self, job: Job) -> None:
        """It was aborted, or has failed and is computed by the engine alone."""
        self._end(job)
        if job.failed is not None and not job.local:
            self._count(failed=1)
            logger.warning("runahead: a prompt is computed here alone: %s", job.failed)

    def _end(self, job: Job) -> None:
        del self._jobs[job.id]
        job.close()

    def _count(self, **more: float) -> None:
        changed = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = msgspec.structs.replace(self._stats, **changed)

    def poll(self) -> None:
        """Hear what ranks say, notice what they do not, and act on it. Never waits."""
        now = time.perf_counter()
        self._note(self._membership.poll(now))
        there, live = self._membership.there, self._formation.ranks
        # Ranks that have come wait for the prompts that run ahead without them.
        self._grows = self.num_ranks > 1 and set(there) > set(live)
        if self._grows and self._jobs:
            there = live
        renew_at = self._formation.renew_at
        if there != live or (renew_at is not None and now > renew_at):
            self._formation.close()
            for job in self._jobs.values():
                job.abandon("the chain was formed anew")
            self._formation = self._form(there, now)
        self._formation.poll(now)
        first = next(iter(self._jobs), None)
        for job in self._jobs.values():
            job.poll(now, job.id == first)
        self._engine.take_back()

    def _note(self, heard: Items[tuple[Member, FromRank]]) -> None:
        for rank, message in heard:
            match message:
                case Formed():
                    self._formation.note(rank, message)
                case Prepared() | Declined() | Finished() | Failed() if message.job in self._jobs:
                    self._jobs[message.job].note(rank, message)

    def _form(self, ranks: list[Member], now: float) -> Formation:
        number = next(self._ids)
        return Formation(number, ranks, self._engine, self._membership, now)

    def wait(self, seconds: float) -> None:
        """Until KV arrives or a rank says something, for ``seconds`` at most."""
        ends: list[Any] = [rank.socket.fd for rank in self._membership.ranks]
        receiver = self._formation.receiver
        if receiver is not None and receiver.error is None:
            ends.append(receiver)
        readable(ends, seconds)

    def tuned(self, bounds: Items[int]) -> Path | None:
        """Keep these cuts as the best of their length; the folder they are kept in."""
        return self._engine.tuned(bounds)

    def close(self) -> None:
        """End the local ranks and close all links; once is enough."""
        if self._closed:
            return
        self._closed = True
        self._engine.planner.close()
        for job in self._jobs.values():
            job.abandon("the engine ends")
        for rank in self._membership.ranks:
            rank.send(Bye())
        self._formation.close()
        self._formation.join(1.0)
        self._membership.close()
