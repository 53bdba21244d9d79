"""Chain: the prefill ranks as their engine sees them; itself the last rank of the chain.

    rank 0 ──▶ rank 1 ──▶ engine        KV, over links; what a rank's cache lacks comes from the
      ▲───────────┴─────────┘           engine the other way

    scheduler: this prompt runs ahead
        Prepare ─▶ all ranks            what of it is cached there?
        plan                            where to cut, and whether it pays at all (planner.py)
        Run ─▶ those that take part     they compute; the engine's own chunk, a LongChunk, goes on
        logits                          as their KV arrives, beside the steps of others

Faults. A rank that has gone, hangs, or hands on nothing for ``runahead_timeout`` costs the prompts
that run ahead at that moment their time so far: the engine prefills them itself. The rank is left
out, greeted again until it answers, and taken into a newly formed chain. Nothing here ever waits.

The engine's thread calls ``poll`` before each step and now and then while there are none.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import zmq
from torch import Tensor
from zmq.utils.monitor import recv_monitor_message

from headstart.engine.batch import Read
from headstart.engine.config import EngineConfig
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.errors import ConfigError
from headstart.engine.kv.pool import PagePool
from headstart.engine.models.loading import LoadedModel
from headstart.engine.process.cores import kernel_environment
from headstart.engine.process.messages import RunaheadStats
from headstart.engine.runahead import control, costs
from headstart.engine.runahead.cuts import CutTable, Plan
from headstart.engine.runahead.links import Pool, Receiver, Sender, readable
from headstart.engine.runahead.measure import about_prefill, identity, rank_costs
from headstart.engine.runahead.messages import (
    Bye,
    Cancel,
    Declined,
    Failed,
    Finished,
    Form,
    Formed,
    FromRank,
    Hello,
    LinkEnd,
    Prepare,
    Prepared,
    Refused,
    Run,
    ToRank,
    Welcome,
)
from headstart.engine.runahead.opening import Opening
from headstart.engine.runahead.planner import CUTS, Planner, Planning, Prompt
from headstart.engine.runahead.rank import OPENING_SECONDS, JobNeighbours, RankConfig
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.engine.work import LongChunk

logger = logging.getLogger(__name__)

TRANSPORTS = ("auto", "gloo")
GREETING_SECONDS = 0.25
"""Between two greetings of a rank that does not answer."""
OUT_SECONDS = 5.0
"""For how long a rank that hung, or handed on nothing, is left out."""
RESPAWN_SECONDS = 1.0
"""Between two starts of a local rank."""
NEWS, MOST_PACE, LEAST_CHUNK = 0.4, 8.0, 64
"""How much the latest prompt changes what is known of a rank's pace, how far that may go, and how
many tokens a chunk must have to tell."""


class Report(msgspec.Struct, frozen=True):
    """How one prompt ran ahead. Per rank, the engine last: idle seconds (waiting for KV) and bytes
    of KV sent."""

    bounds: tuple[int, ...]
    predicted_seconds: float
    seconds: float
    idle: tuple[float, ...]
    sent_bytes: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Rank:
    """A prefill rank. ``welcome`` is what it answered; None: it is not there, or left out."""

    name: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    config: RankConfig | None = None  # of a local one, which is started here
    process: subprocess.Popen[bytes] | None = None
    welcome: Welcome | None = None
    formed: Formed | None = None
    origin: Sender | None = None  # the link from the engine
    greeted: float = -1e9
    started: float = -1e9
    out_until: float = -1e9
    reason: str = ""  # why it is out, said once
    pace: float = 1.0  # seconds a chunk takes, for each that was measured when it started


@dataclass(slots=True, eq=False)
class Ahead:
    """A prompt that runs ahead, and what its engine computes of it. ``failed``: why the engine has
    to compute all of it alone after all."""

    chain: Chain
    id: int
    seq: Sequence
    ranks: list[_Rank]
    begun: float
    held: dict[int, int] = field(default_factory=dict)  # by place in the chain
    planning: Planning[Plan] | None = None
    plan: Plan | None = None
    chunk: LongChunk | None = None
    neighbours: JobNeighbours | None = None
    unsent: list[tuple[Sender, int]] = field(default_factory=list)  # layers for the first rank
    origin_bytes: int = 0
    finished: dict[int, Finished] = field(default_factory=dict)
    busy: float = 0.0
    idle: float = 0.0
    waiting_since: float | None = None
    stuck_since: float = 0.0
    failed: str | None = None
    local: bool = False  # it is quicker alone: no fault

    reads: ClassVar[Items[Read]] = ()  # such prompts do not run ahead
    seconds: ClassVar[float] = 0.0  # of no chunk alone: copying what arrives is among ``busy``

    @property
    def entry(self) -> ScheduledSequence:
        assert self.chunk is not None
        return self.chunk.entry

    @property
    def waits(self) -> bool:
        return self.chunk is None or self.chunk.waits

    @property
    def num_computed(self) -> int:
        """About how many tokens are computed: all go through the layers together, here and on the
        ranks."""
        cached = self.seq.num_computed_tokens
        if self.chunk is None:
            return cached
        entry = self.chunk.entry
        share = (self.chunk.num_computed - entry.start) / entry.num_tokens
        return cached + int((self.seq.num_tokens - cached) * share)

    def pieces(self, num_tokens: int) -> int:
        return 0 if self.chunk is None else self.chunk.pieces(num_tokens)

    def advance(self, pieces: int) -> Tensor | None:
        """See LongChunk.advance."""
        return self._timed(lambda chunk: chunk.advance(pieces))

    def advance_until(self, moment: float) -> Tensor | None:
        """See LongChunk.advance_until."""
        return self._timed(lambda chunk: chunk.advance_until(moment))

    def _timed(self, advance: Callable[[LongChunk], Tensor | None]) -> Tensor | None:
        if self.chunk is None:
            return None
        begin = time.perf_counter()
        if self.waiting_since is not None:
            self.idle += begin - self.waiting_since
        layer = self.chunk.layer
        logits = advance(self.chunk)
        self.chunk.synchronize()
        now = time.perf_counter()
        self.busy += now - begin
        if not self.chunk.waits or self.chunk.layer != layer:
            self.stuck_since = now
        self.waiting_since = now if logits is None and self.chunk.waits else None
        return logits

    def finish(self) -> None:
        """The engine has its logits."""
        self.chain.finish(self)

    def cancel(self) -> None:
        """It was aborted, or has failed and is computed by the engine alone."""
        self.chain.cancel(self)


def _mixed(pace: float, seconds: float, measured: PrefillCosts, start: int, end: int) -> float:
    """A rank's pace after it took ``seconds`` for a chunk; short chunks tell nothing."""
    if end - start < LEAST_CHUNK:
        return pace
    latest = seconds / max(measured.seconds(start, end - start), 1e-9)
    return pace + NEWS * (min(max(latest, 1 / MOST_PACE), MOST_PACE) - pace)


class _Lent(NamedTuple):
    """Pages that a rank may be reading, with a reference to each."""

    job: Ahead
    sender: Sender
    pages: list[int]


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
        self._config = config
        self._loaded = loaded
        self._runner = loaded.runner
        self._pool = pool
        self._identity = identity(loaded)
        # Before anything is kept in the pages that this writes to.
        self._costs = rank_costs(loaded, self._identity, config.machine_folder)
        self._page_size = loaded.backend.page_size
        self._layers = loaded.config.num_layers
        self._memory = Pool.of(self._runner)
        self._secret = config.runahead_secret or secrets.token_urlsafe(24)
        self._session = secrets.randbits(62)
        self._folder = Path(tempfile.mkdtemp(prefix="headstart-"))  # for this user alone
        self._token = secrets.token_hex(16)
        (self._folder / "token").write_text(self._token)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._context = zmq.Context()
        self._ids = itertools.count(1)
        self._generation = 0
        self._live: list[_Rank] = []  # of the chain as formed, or being formed
        self._forming: float | None = None  # since when
        self._grows = False  # a rank has come; no more prompts run ahead until it takes part
        self._retry: float | None = None  # when to form again, after a failure
        self._opening: dict[str, Opening] = {}
        self._receiver: Receiver | None = None
        self._chain: costs.Chain | None = None
        self._pace = 1.0  # the engine's own, see _Rank
        self._planner = Planner(
            config.runahead_cuts,
            config.runahead_min is not None,
            self._page_size,
            self._costs,
            CutTable.load(config.machine_folder, self._about()),
        )
        self._least: int | None = None  # tokens of a prompt that runs ahead; None: not known yet
        self._finding_least: Planning[int] | None = None
        self._jobs: dict[int, Ahead] = {}
        self._lent: list[_Lent] = []
        self._stats = RunaheadStats()
        self._ranks: list[_Rank] = []
        try:
            for address in config.runahead_hosts:
                self._add(f"rank {len(self._ranks)} ({address})", address)
            for i in range(config.runahead - 1):
                address = f"ipc://{self._folder}/rank-{i}.sock"
                self._add(f"rank {len(self._ranks)} (local)", address, self._local(address, i + 1))
        except ConfigError:
            self.close()
            raise

    def _add(self, name: str, address: str, local: RankConfig | None = None) -> None:
        socket = control.connect(
            self._context, address, self._secret, self._config.runahead_timeout
        )
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        monitor = socket.get_monitor_socket(events)
        self._ranks.append(_Rank(name, socket, monitor, local))

    def _local(self, address: str, number: int) -> RankConfig:
        """A rank on this machine: as the engine, with a share of its KV memory."""
        loaded, config, count = self._loaded, self._config, self._config.runahead - 1
        sequence = -(-loaded.max_model_len // self._page_size)
        pages = max(self._runner.num_pages // (2 * count), sequence)
        return RankConfig(
            engine=msgspec.structs.replace(
                config,
                weights=loaded.weights,
                # A GPU of its own has memory of its own.
                kv_memory=(
                    config.kv_memory if self._memory.gpu else pages * self._memory.page_bytes
                ),
                max_model_len=loaded.max_model_len,
                threads=loaded.threads,
                adapters={},
                runahead=1,
                runahead_hosts=[],
                runahead_secret=None,
            ),
            listen=address,
            secret=self._secret,
            transport=config.runahead_transport,
            gpu=number,
        )

    # ---------------------------------------------------------------- for the engine

    @property
    def whole(self) -> bool:
        """Whether every rank is there, the chain is formed, and it is known what pays."""
        formed = self._chain is not None and self._least is not None
        return formed and len(self._live) == len(self._ranks)

    def __str__(self) -> str:
        """Which ranks are missing, and why."""
        missing = [rank for rank in self._ranks if rank.welcome is None]
        told = [f"{rank.name} {rank.reason or 'does not answer'}" for rank in missing]
        return ", ".join(told) or "its links are not open"

    @property
    def num_ranks(self) -> int:
        """Ranks of the chain as it is, the engine included."""
        return len(self._live) + 1 if self._chain is not None else 1

    @property
    def stats(self) -> RunaheadStats:
        return msgspec.structs.replace(
            self._stats, ranks=len(self._ranks) + 1, ranks_live=self.num_ranks
        )

    def wants(self, seq: Sequence, start: int, num_ahead: int) -> bool:
        """Whether ``seq``, of which ``[0, start)`` is cached, should run ahead of the engine now,
        behind ``num_ahead`` others."""
        return (
            self._chain is not None
            and self._least is not None
            and not self._grows
            and num_ahead < self.num_ranks
            and seq.num_tokens - start >= max(self._least, self._page_size + 1)
        )

    def start(self, seq: Sequence) -> Ahead:
        """Let ``seq`` run ahead; it has pages for all its tokens."""
        now = time.perf_counter()
        job = Ahead(self, next(self._ids), seq, list(self._live), now, stuck_since=now)
        self._jobs[job.id] = job
        adapter = seq.adapter
        message = Prepare(
            job.id,
            seq.token_ids.tobytes(),
            seq.namespace,
            list(seq.segments.spans),
            None if adapter is None else (adapter.info.path, adapter.digest),
        )
        for rank in job.ranks:
            self._send(rank, message)
        return job

    def finish(self, job: Ahead) -> None:
        """The engine has its logits."""
        for rank in job.ranks:  # what they have finished with came before their last KV
            self._hear(rank)
        self._end(job)
        self._learn(job)
        self._report(job)

    def cancel(self, job: Ahead) -> None:
        """It was aborted, or has failed and is computed by the engine alone."""
        self._end(job)
        if job.failed is not None and not job.local:
            self._count(failed=1)
            logger.warning("runahead: a prompt is computed here alone: %s", job.failed)

    def _end(self, job: Ahead) -> None:
        del self._jobs[job.id]
        if job.planning is not None:
            job.planning.cancel()
        if job.neighbours is not None:
            job.neighbours.drop()
        if job.unsent:
            job.unsent[0][0].drop(job.id)
            job.unsent = []
        for place, rank in enumerate(job.ranks):
            if place not in job.finished:
                self._send(rank, Cancel(job.id))

    def wait(self, seconds: float) -> None:
        """Until KV arrives or a rank says something, for ``seconds`` at most."""
        ends: list[Any] = [rank.socket.fd for rank in self._ranks]
        if self._receiver is not None and self._receiver.error is None:
            ends.append(self._receiver)
        readable(ends, seconds)

    def close(self) -> None:
        """End the local ranks and close all links; once is enough."""
        if self._context.closed:
            return
        self._planner.close()
        for job in self._jobs.values():
            job.failed = job.failed or "the engine ends"
        ends = [rank.origin for rank in self._ranks] + [self._receiver]
        for rank in self._ranks:
            self._send(rank, Bye())
        self._close_links()
        for end in ends:
            if end is not None:
                end.join(1.0)
        processes = [rank.process for rank in self._ranks if rank.process is not None]
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for rank in self._ranks:
            rank.socket.disable_monitor()
            rank.monitor.close(0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def pages_lent(self) -> Iterator[int]:
        """Pages to which the chain holds a reference, once for each."""
        for lent in self._lent:
            yield from lent.pages

    def poll(self) -> None:
        """Hear what ranks say, notice what they do not, and act on it. Never waits."""
        now = time.perf_counter()
        for rank in self._ranks:
            self._supervise(rank, now)
            self._hear(rank)
            if rank.welcome is None and now > max(rank.out_until, rank.greeted + GREETING_SECONDS):
                rank.greeted = now
                hello = Hello(self._session, self._identity, str(self._folder), self._token)
                self._send(rank, hello)
        there = [rank for rank in self._ranks if rank.welcome is not None]
        # Ranks that have come wait for the prompts that run ahead without them.
        self._grows = self._chain is not None and set(there) > set(self._live)
        if self._grows and self._jobs:
            there = self._live
        if there != self._live or (self._retry is not None and now > self._retry):
            self._form(there, now)
        elif self._forming is not None:
            self._connect(now)
        if self._receiver is not None:
            self._receiver.read()
        self._take_plans()
        for job in self._jobs.values():
            self._push(job)
            if job.failed is None:
                self._watch(job, now)
        for lent in list(self._lent):
            if not lent.job.unsent and lent.sender.taken(lent.job.id):
                self._lent.remove(lent)
                self._pool.release(lent.pages)

    # ---------------------------------------------------------------- ranks

    def _supervise(self, rank: _Rank, now: float) -> None:
        """Start a local rank, and again when it has ended."""
        if rank.config is None:
            return
        if rank.process is not None:
            status = rank.process.poll()
            if status is None:
                return
            self._leave_out(rank, f"it ended (exit status {status})", 0.0)
            rank.process = None
        if now - rank.started < RESPAWN_SECONDS:
            return
        rank.started = now
        rank.process = subprocess.Popen(
            [sys.executable, "-m", "headstart.engine.runahead.rank"],
            stdin=subprocess.PIPE,
            env=kernel_environment(),
        )
        assert rank.process.stdin is not None
        try:
            rank.process.stdin.write(msgspec.json.encode(rank.config) + b"\n")
            rank.process.stdin.flush()
        except OSError:  # it has ended already: its exit status says more
            return

    def _send(self, rank: _Rank, message: ToRank) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is connected: it is greeted when it is back
            rank.socket.send(self._encoder.encode(message), zmq.DONTWAIT)

    def _hear(self, rank: _Rank) -> None:
        while rank.monitor.poll(0):
            event = recv_monitor_message(rank.monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._hangs(rank, "the connection to it broke", 0.0)
            else:
                self._refuse(rank, "it knows another secret")
        while True:
            try:
                message = self._decoder.decode(rank.socket.recv(zmq.DONTWAIT))
            except zmq.Again:
                return
            except msgspec.DecodeError as error:
                self._refuse(rank, f"it speaks another version ({error})")
                continue
            match message:
                case Welcome() if message.session == self._session:
                    if rank.welcome is None:
                        rank.welcome, rank.reason = message, ""
                        logger.info("runahead: %s is there", rank.name)
                case Refused() if message.session == self._session:
                    self._refuse(rank, message.reason)
                    self._leave_out(rank, message.reason, OUT_SECONDS)
                case Formed() if message.generation == self._generation:
                    rank.formed = message
                case Prepared() | Declined() | Finished() | Failed():
                    job = self._jobs.get(message.job)
                    if job is not None and job.failed is None and rank in job.ranks:
                        self._note(job, rank, message)

    def _refuse(self, rank: _Rank, reason: str) -> None:
        """It will not do, as it is; said once."""
        if rank.reason != reason:
            rank.reason = reason
            logger.error("runahead: %s cannot take part: %s", rank.name, reason)

    def _leave_out(self, rank: _Rank, reason: str, seconds: float) -> None:
        """From now on, and for ``seconds`` at least."""
        rank.out_until = time.perf_counter() + seconds
        if rank.welcome is None:
            return
        rank.welcome = None
        self._count(left_out=1)
        logger.warning("runahead: %s is left out: %s", rank.name, reason)
        for job in self._jobs.values():
            if rank in job.ranks and job.failed is None:
                job.failed = f"{rank.name}: {reason}"

    # ---------------------------------------------------------------- forming

    def _form(self, ranks: list[_Rank], now: float) -> None:
        """Connect these ranks and the engine to a chain."""
        self._close_links()
        for job in self._jobs.values():
            job.failed = job.failed or "the chain was formed anew"
        self._live = ranks
        self._retry = None
        self._generation += 1
        self._forming = now if ranks else None
        upstream: LinkEnd | None = None
        for i, rank in enumerate(ranks):
            rank.formed = None
            behind = ranks[i + 1] if i + 1 < len(ranks) else None
            here, there = self._ends(rank, behind)
            origin, own = self._ends(rank, None)
            self._send(rank, Form(self._generation, upstream, here, origin))
            upstream = there
            self._opening[rank.name] = Opening(True, own, self._memory, None, OPENING_SECONDS)
        if upstream is not None:
            self._opening[""] = Opening(False, upstream, self._memory, None, OPENING_SECONDS)

    def _ends(self, rank: _Rank, other: _Rank | None) -> tuple[LinkEnd, LinkEnd]:
        """The ends of a link between ``rank`` and another one, None being the engine."""
        assert rank.welcome is not None
        name = secrets.token_hex(16)
        shares = rank.welcome.shares and self._config.runahead_transport == "auto"
        if other is None:
            shares &= self._memory.memory is not None
            gpu = self._memory.gpu
        else:
            assert other.welcome is not None
            shares &= other.welcome.shares
            gpu = other.welcome.gpu
        if shares:
            end = LinkEnd(name, "shared", path=f"{self._folder}/{name}")
            return end, end
        between_gpus = gpu and rank.welcome.gpu and gpu != rank.welcome.gpu
        transport = "gloo"
        if between_gpus and self._config.runahead_transport == "auto":
            transport = "nccl"
        host, port = rank.welcome.host, rank.welcome.store_port
        return LinkEnd(name, transport), LinkEnd(name, transport, host=host, port=port)

    def _connect(self, now: float) -> None:
        """Take the links that are open; the chain is formed once all are."""
        assert self._forming is not None
        late = now - self._forming > OPENING_SECONDS + self._config.runahead_timeout
        if late:
            for rank in self._live:
                if rank.formed is None:
                    self._leave_out(rank, "it did not open its links", OUT_SECONDS)
            return
        if not all(rank.formed for rank in self._live):
            return
        if not all(opening.done for opening in self._opening.values()):
            return
        errors = [
            f"{rank.name}: {rank.formed.error}"
            for rank in self._live
            if rank.formed is not None and rank.formed.error
        ]
        errors += [opening.error for opening in self._opening.values() if opening.error]
        if errors:
            logger.warning("runahead: the chain could not be formed: %s", "; ".join(errors))
            self._close_links()
            self._retry = now + RESPAWN_SECONDS
            return
        self._forming = None
        self._receiver = self._opening[""].end
        for rank in self._live:
            rank.origin = self._opening[rank.name].end
        self._opening = {}
        self._describe()

    def _describe(self) -> None:
        """What the chain costs, and from how many tokens on it pays."""
        assert self._receiver is not None
        links = [rank.formed.costs for rank in self._live[1:] if rank.formed is not None]
        token_bytes = self._memory.pages.shape[2] // self._page_size
        self._chain = costs.Chain(
            layers=self._layers,
            token_bytes=token_bytes,
            ranks=self._paced(),
            links=(*(link for link in links if link is not None), self._receiver.costs),
            back=self._receiver.costs,
        )
        if self._config.runahead_min is None:
            longest = self._loaded.max_model_len
            self._finding_least = self._planner.pays_from(self._chain, longest)
        else:
            self._begin(self._config.runahead_min)

    def _begin(self, least: int) -> None:
        """Let prompts run ahead."""
        self._least = least
        logger.info(
            "runahead: a chain of %d, for prompts of %d tokens or more that are not cached",
            self.num_ranks,
            least,
        )

    def _take_plans(self) -> None:
        """Go on with what the planner has found."""
        if self._finding_least is not None and self._finding_least.done():
            least, self._finding_least = self._finding_least.result(), None
            self._begin(least)
        for job in self._jobs.values():
            if job.planning is not None and job.planning.done() and job.failed is None:
                job.plan, job.planning = job.planning.result(), None
                self._run(job, job.plan)

    def tuned(self, bounds: Items[int]) -> Path | None:
        """Keep these cuts as the best of their length; the folder they are kept in."""
        table = self._planner.table = self._planner.table.with_cuts(bounds)
        table.save(self._config.machine_folder, self._about())
        return self._config.machine_folder

    def _paced(self) -> tuple[PrefillCosts, ...]:
        """What chunks cost each rank, by what they have cost lately."""
        ranks = [
            rank.welcome.costs.times(rank.pace) for rank in self._live if rank.welcome is not None
        ]
        return (*ranks, self._costs.times(self._pace))

    def _learn(self, job: Ahead) -> None:
        """Ranks that share cores, or have other work, are slower than when they were measured."""
        gone = any(rank.welcome is None for rank in self._live)  # just now: a new chain comes
        if self._chain is None or job.plan is None or job.ranks != self._live or gone:
            return
        first, bounds = job.plan.first, job.plan.bounds
        for place, rank in enumerate(job.ranks):
            if place in job.finished and rank.welcome is not None:
                start, end = bounds[place - first : place - first + 2]
                start = max(start, job.held[place])
                measured = rank.welcome.costs
                rank.pace = _mixed(rank.pace, job.finished[place].busy, measured, start, end)
        start = job.entry.start
        self._pace = _mixed(self._pace, job.busy, self._costs, start, bounds[-1])
        self._chain = msgspec.structs.replace(self._chain, ranks=self._paced())

    def _about(self) -> dict[str, Any]:
        """What searched cuts depend on."""
        transport = self._config.runahead_transport
        hosts = list(self._config.runahead_hosts)
        return {
            **about_prefill(self._loaded, self._identity),
            "transport": transport,
            "hosts": hosts,
        }

    def _close_links(self) -> None:
        self._chain = None
        if self._finding_least is not None:
            self._finding_least.cancel()
        self._least = self._finding_least = None
        self._forming = None
        for opening in self._opening.values():
            opening.close()
        self._opening = {}
        for rank in self._ranks:
            if rank.origin is not None:
                rank.origin.close()
                rank.origin = None
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    # ---------------------------------------------------------------- jobs

    def _note(
        self, job: Ahead, rank: _Rank, message: Prepared | Declined | Finished | Failed
    ) -> None:
        place = job.ranks.index(rank)
        match message:
            case Prepared(_, held):
                job.held[place] = held
                if len(job.held) == len(job.ranks) and job.planning is None and job.plan is None:
                    self._ask_for_plan(job)
            case Declined(_, reason):
                job.failed = f"{rank.name} cannot compute it: {reason}"
            case Finished():
                job.finished[place] = message
            case Failed(_, reason):
                job.failed = f"{rank.name}: {reason}"
                # Its links are not what they were; new ones are quickly made.
                self._retry = self._retry or time.perf_counter()

    def _held(self, job: Ahead) -> tuple[int, ...]:
        """Of its tokens, by place in the chain, the engine last."""
        ranks = (job.held[place] for place in range(len(job.ranks)))
        return (*ranks, job.seq.num_computed_tokens)

    def _ask_for_plan(self, job: Ahead) -> None:
        """All ranks have said what they hold: where is the prompt to be cut?"""
        assert self._chain is not None
        seq, forced = job.seq, self.forced_bounds
        bounds = None if forced is None else tuple(forced)
        prompt = Prompt(seq.num_tokens, self._held(job), seq.segments, bounds)
        job.planning = self._planner.plan(self._chain, prompt)

    def _run(self, job: Ahead, plan: Plan) -> None:
        """Set the ranks to work, and the engine to its own chunk."""
        assert self._receiver is not None
        seq, page_size = job.seq, self._page_size
        length, held = seq.num_tokens, self._held(job)
        first, bounds = plan.first, plan.bounds
        if len(bounds) == 2:
            job.failed, job.local = "it is quicker alone", True
            return
        for place, rank in enumerate(job.ranks):
            if place < first:
                self._send(rank, Cancel(job.id))
                continue
            start, end = bounds[place - first : place - first + 2]
            source = ""
            if held[place] < start:
                source = "origin" if place == first else "upstream"
            self._send(rank, Run(job.id, start, end, source, held[place + 1]))
            if source == "origin":
                assert rank.origin is not None
                pages = seq.pages[held[place] // page_size : start // page_size]
                rank.origin.offer(job.id, pages)
                self._pool.retain(pages)
                self._lent.append(_Lent(job, rank.origin, pages))
                job.unsent = [(rank.origin, layer) for layer in range(self._layers)]
                job.origin_bytes = len(pages) * self._memory.page_bytes
        start = bounds[-2]
        receiver = None
        if start > seq.num_computed_tokens:
            receiver = self._receiver
            first_page, last_page = seq.num_computed_tokens // page_size, -(-start // page_size)
            receiver.expect(job.id, seq.pages[first_page:last_page])
        job.neighbours = JobNeighbours(job.id, receiver, None)
        first_row = max(start, seq.num_computed_tokens)  # what is cached others may be reading
        entry = ScheduledSequence(seq, first_row, length - first_row, True)
        job.chunk = LongChunk(entry, self._runner, page_size, job.neighbours)
        job.stuck_since = time.perf_counter()

    def _push(self, job: Ahead) -> None:
        """Send the first rank what it lacks, as fast as the link takes it."""
        while job.unsent and job.failed is None:
            sender, layer = job.unsent[0]
            if not sender.send(job.id, layer):
                return
            job.unsent.pop(0)

    def _watch(self, job: Ahead, now: float) -> None:
        """Give up a job that does not get on; and the rank that is to blame, if it is known."""
        patience = self._config.runahead_timeout
        if job.neighbours is not None and job.neighbours.error is not None:
            job.failed = f"the link from {job.ranks[-1].name}: {job.neighbours.error}"
            self._retry = self._retry or now
            return
        if job is not next(iter(self._jobs.values())):
            job.stuck_since = now  # its turn has not come
            return
        if job.plan is None:
            if now - job.stuck_since > patience:
                silent = [r for i, r in enumerate(job.ranks) if i not in job.held]
                for rank in silent:
                    self._hangs(rank, "it does not answer")
            return
        # Time in which others' prompts or steps were computed is nobody's fault.
        slow = job.idle > 2 * job.plan.local_seconds + patience
        if slow or (job.waits and now - job.stuck_since > patience):
            for place in range(job.plan.first, len(job.ranks)):
                rank = job.ranks[place]
                if place not in job.finished:
                    self._hangs(rank, "it is too slow" if slow else "it hands on nothing")
                    return
            job.failed = f"nothing comes from {job.ranks[-1].name}"
            self._retry = self._retry or now

    def _hangs(self, rank: _Rank, reason: str, seconds: float = OUT_SECONDS) -> None:
        self._leave_out(rank, reason, seconds)
        if rank.process is not None:
            rank.process.kill()  # and it is started again

    def _report(self, job: Ahead) -> None:
        assert job.plan is not None
        seconds = time.perf_counter() - job.begun
        missing = Finished(job.id, 0.0, 0.0, 0)  # of a rank that has gone since
        places = range(job.plan.first, len(job.ranks))
        finished = [job.finished.get(place, missing) for place in places]
        self.last = Report(
            job.plan.bounds,
            job.plan.seconds,
            seconds,
            (*(each.idle for each in finished), job.idle),
            (*(each.sent_bytes for each in finished), job.origin_bytes),
        )
        self._count(
            prompts=1,
            tokens=job.plan.bounds[-1] - job.plan.bounds[0],
            seconds=seconds,
            predicted_seconds=job.plan.seconds,
            idle_seconds=job.idle,
            bytes_sent=sum(self.last.sent_bytes),
        )

    def _count(self, **more: float) -> None:
        changed = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = msgspec.structs.replace(self._stats, **changed)
