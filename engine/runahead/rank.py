"""A prefill rank: computes the first chunks of long prompts for an engine, and hands on their KV.

    python -m headstart.engine.runahead.rank < RankConfig as one line of JSON

It has the model, KV memory and a prefix cache of its own, and does what the engine says, one prompt
after the other: KV of the tokens before its chunk arrives layer by layer from the rank before, its
own goes to the rank behind with them (KV-Runahead, arXiv 2405.05329, section 4).

    engine   Prepare ─▶            Run ─▶
    rank             ◀─ Prepared          layer 0, layer 1, ...   ◀─ Finished
    links                                 ─▶ KV of layer 0 ─▶ KV of layer 1 ...

Nothing of a prompt is kept but KV, and nobody else is served: an engine that says Hello takes over.
"""

from __future__ import annotations

import logging
import signal
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from headstart.engine.config import EngineConfig
from headstart.engine.costs.model import step_table
from headstart.engine.errors import ConfigError, HeadstartError
from headstart.engine.kv.pages_ahead import PagesAhead
from headstart.engine.kv.pool import PagePool
from headstart.engine.kv.tree import Node, RadixCache
from headstart.engine.models.adapters import Adapter
from headstart.engine.models.loading import load_model
from headstart.engine.process.groups import Store, use_gpu
from headstart.engine.ranges.segments import Segments
from headstart.engine.runahead import control
from headstart.engine.runahead.links import Pool, Receiver
from headstart.engine.runahead.measure import identity
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
    Prepare,
    Prepared,
    Refused,
    Run,
    ToRank,
    Welcome,
)
from headstart.engine.runahead.opening import Ends
from headstart.engine.runahead.part import Part
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class RankConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one rank: model and kernels as for an engine.

    listen:     HOST:PORT, HOST being an address that the other ranks reach, or a ZeroMQ endpoint
    secret:     what the engine has to know
    transport:  "auto" (shared memory with ranks of the same machine, NCCL between GPUs) or "gloo"
    gpu:        which of the machine's, if there are any
    """

    engine: EngineConfig
    listen: str
    secret: str
    transport: str = "auto"
    gpu: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    """A prompt here: prepared, then run. ``node`` is locked; ``seq.pages`` are referenced."""

    id: int
    seq: Sequence
    node: Node
    held: int
    end: int = 0
    part: Part | None = None


class Rank:
    """Raises HeadstartError when the model or a setting cannot work."""

    def __init__(self, config: RankConfig) -> None:
        control.require_linux()
        use_gpu(config.gpu)
        loaded = load_model(config.engine, shared=True)
        self._runner = loaded.runner
        self._page_size = loaded.backend.page_size
        self._pool = PagePool(self._runner.num_pages, self._page_size)
        self._cache = RadixCache(self._pool)
        self._caching = config.engine.prefix_caching
        self._adapters = loaded.adapters(config.engine.max_adapters)
        self._memory = Pool.of(self._runner)
        self._pages_ahead = PagesAhead(self._runner, self._pool, self._memory.page_bytes)
        self._identity = identity(loaded)
        self._costs = step_table(loaded, config.engine.machine_folder).prefill
        self._transport = config.transport
        address = control.endpoint(config.listen)
        host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        local = not address.startswith("tcp://")
        self._store = Store("127.0.0.1" if local else host)
        self._context = zmq.Context()
        self._socket = control.listen(self._context, config.listen, config.secret)
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._engine = b""  # whom to answer
        self._session = 0
        self._jobs: dict[int, _Job] = {}  # in the order of their Prepare
        self._leaving: list[_Job] = []  # computed or dropped; their pages may still be read
        self._form: Form | None = None  # until its links are open
        self._ends = Ends({}, {}, self._memory, self._store)

    # ---------------------------------------------------------------- the loop

    def serve(self, ended: Callable[[], bool] = lambda: False) -> None:
        """Do what the engine says until ``ended``."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        watched: set[int] = set()
        while not ended():
            descriptors = {end.fileno() for end in self._receivers() if end.error is None}
            for gone in watched - descriptors:
                poller.unregister(gone)
            for new in descriptors - watched:
                poller.register(new, zmq.POLLIN)
            watched = descriptors
            poller.poll(self._patience())
            for end in self._receivers():
                end.read()
            self._receive()
            self._open()
            self._compute()
            self._let_go()

    def _patience(self) -> int:
        """Milliseconds until there is something to do that nobody announces."""
        head = self._head()
        if head is not None and head.waiting_since is None:
            return 0
        if head is not None or self._form is not None or self._leaving:
            return 5
        return 0 if self._pages_ahead.prepare() else 500

    def _receivers(self) -> list[Receiver]:
        ends = (self._ends.get(name) for name in ("upstream", "origin"))
        return [end for end in ends if end is not None]

    def _head(self) -> Part | None:
        """Of the first job that runs."""
        return next((job.part for job in self._jobs.values() if job.part is not None), None)

    def _send(self, message: FromRank) -> None:
        self._socket.send_multipart([self._engine, msgspec.msgpack.encode(message)])

    def _receive(self) -> None:
        while True:
            try:
                sender, data = self._socket.recv_multipart(zmq.DONTWAIT)
                message = self._decoder.decode(data)
            except zmq.Again:
                return
            except (msgspec.DecodeError, ValueError):
                continue
            if isinstance(message, Hello):
                self._hello(sender, message)
            elif sender == self._engine:
                match message:
                    case Form():
                        self._reform(message)
                    case Prepare():
                        self._prepare(message)
                    case Run():
                        self._run(message)
                    case Cancel(job):
                        if job in self._jobs:
                            self._drop(self._jobs[job])
                    case Bye():
                        self._close_links()

    # ---------------------------------------------------------------- engine and links

    def _hello(self, sender: bytes, message: Hello) -> None:
        reason = self._identity.difference(message.identity)
        if reason is not None:
            refused = msgspec.msgpack.encode(Refused(message.session, reason))
            self._socket.send_multipart([sender, refused])
            return
        if message.session != self._session:
            self._close_links()
            if self._session:
                self._send(Refused(self._session, "another engine has taken it over"))
        self._engine, self._session = sender, message.session
        shared = self._transport != "gloo" and self._memory.memory is not None
        shares, port, host = shared and _reads(message), self._store.port, self._store.host
        self._send(Welcome(message.session, self._costs, shares, port, host, self._memory.gpu))

    def _reform(self, message: Form) -> None:
        self._close_links()
        self._form = message
        receives = {"origin": message.origin}
        if message.upstream is not None:
            receives["upstream"] = message.upstream
        self._ends = Ends({"downstream": message.downstream}, receives, self._memory, self._store)

    def _open(self) -> None:
        if self._form is not None and self._ends.done:
            upstream = self._ends.get("upstream")
            costs = None if upstream is None else upstream.costs
            self._send(Formed(self._form.generation, costs, self._ends.error))
            self._form = None

    def _close_links(self) -> None:
        for job in list(self._jobs.values()):
            self._drop(job)
        self._ends.close()
        self._form = None

    def close(self) -> None:
        """Leave the chain."""
        self._close_links()
        self._ends.join(1.0)
        self._socket.close()
        self._context.term()

    # ---------------------------------------------------------------- jobs

    def _prepare(self, message: Prepare) -> None:
        token_ids = array("i")
        token_ids.frombytes(message.token_ids)
        try:
            adapter = self._adapter(message.adapter)
        except HeadstartError as error:
            self._send(Declined(message.job, str(error)))
            return
        seq = Sequence(
            message.job,
            token_ids,
            len(token_ids),
            SamplingParams(max_tokens=1),
            namespace=message.namespace,
            segments=Segments.of(message.segments, len(token_ids)),
            adapter=adapter,
        )
        root = self._cache.root(message.namespace)
        limit = len(token_ids) if self._caching else 0
        node, pages = self._cache.match(root, seq.cache_keys(self._page_size), limit)
        self._cache.lock(node)
        self._pool.retain(pages)
        seq.pages = list(pages)
        held = len(pages) * self._page_size
        self._jobs[message.job] = _Job(message.job, seq, node, held)
        self._send(Prepared(message.job, held))

    def _adapter(self, wanted: tuple[str, bytes] | None) -> Adapter | None:
        """The adapter, loaded now if need be. Raises HeadstartError."""
        if wanted is None:
            return None
        path, digest = wanted
        name = digest.hex()  # what the engine calls it may come to mean another
        if name not in self._adapters:
            self._adapters.make_room()
            self._adapters.load(name, path)
        adapter = self._adapters.get(name)
        if adapter.digest != digest:
            self._adapters.unload(name)
            raise ConfigError(f"the adapter in {path} is another one here")
        return adapter

    def _run(self, message: Run) -> None:
        job = self._jobs.get(message.job)
        if job is None:  # cancelled
            return
        seq, start, end = job.seq, message.start, message.end
        job.end = end
        part = job.part = Part(job.id, seq, self._runner)
        # Before anything can fail: what is sent here for it must not stay in the link.
        part.receiver = self._ends.get(message.source)
        missing = self._pool.pages_for(end) - len(seq.pages)
        if missing > self._pool.num_free:
            self._cache.evict(missing - self._pool.num_free)
        if missing > self._pool.num_free:
            self._drop(job)
            self._send(Declined(job.id, f"its KV memory is full: {missing} pages wanted"))
            return
        seq.pages += self._pool.allocate(max(missing, 0))
        if part.receiver is not None:
            part.receive(part.receiver, job.held, start)
        elif message.source:
            self._fail(job, f"it has no link to {message.source}")
            return
        if message.next_held < end:
            sender = self._ends.get("downstream")
            if sender is None:
                self._fail(job, "it has no link downstream")
                return
            part.send(sender, message.next_held, end)
        first = max(start, min(job.held, end))
        if first < end:
            part.compute(first, end)

    def _compute(self) -> None:
        part = self._head()
        if part is None:
            return
        part.advance()
        job = self._jobs[part.job]
        if part.done:
            self._send(Finished(job.id, part.busy, part.idle, part.sent_bytes))
            self._drop(job)
        elif part.error is not None:
            self._fail(job, part.error)

    def _fail(self, job: _Job, reason: str) -> None:
        self._drop(job)
        self._send(Failed(job.id, reason))

    def _drop(self, job: _Job) -> None:
        del self._jobs[job.id]
        if job.part is not None:
            job.part.drop()
        self._leaving.append(job)

    def _let_go(self) -> None:
        """Free the pages of jobs once nobody reads them; what they computed stays in the cache."""
        for job in list(self._leaving):
            if job.part is not None and not job.part.released:
                continue
            self._leaving.remove(job)
            seq, node = job.seq, job.node
            if job.part is not None and job.part.done and self._caching:
                first, last = node.depth // self._page_size, job.end // self._page_size
                keys = seq.cache_keys(self._page_size)
                self._cache.insert(node, keys, seq.pages[first:last])
            self._pool.release(reversed(seq.pages))
            self._cache.unlock(node)

    def check(self) -> None:
        """Prove the books, for tests. Raises AccountingError."""
        jobs = [*self._jobs.values(), *self._leaving]
        locks: dict[Node, int] = {}
        owners: dict[int, int] = {}
        for job in jobs:
            locks[job.node] = locks.get(job.node, 0) + 1
            for page in job.seq.pages:
                owners[page] = owners.get(page, 0) + 1
        for page, count in self._cache.check(locks).items():
            owners[page] = owners.get(page, 0) + count
        self._pool.check(owners)


def _reads(message: Hello) -> bool:
    """Whether the engine's private folder is here: its files are its user's alone."""
    try:
        return (Path(message.folder) / "token").read_text() == message.token
    except (OSError, ValueError):
        return False


def main() -> None:
    """Serve until standard input ends, which the parent holds open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the parent decides
    config = msgspec.json.decode(sys.stdin.readline(), type=RankConfig)
    logging.basicConfig(
        level=config.engine.log_level.upper(), format="%(levelname)s: runahead rank: %(message)s"
    )
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    try:
        rank = Rank(config)
        rank.serve(ended=lambda: bool(poller.poll(0)))
        rank.close()
    except HeadstartError as error:
        print(f"runahead rank: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
