"""Links: the KV of a prompt's beginning on its way from one rank to the next, layer by layer.

    offer(job, pages)      which pages of the sender's pool are going to be sent
    send(job, layer)       their KV of this layer is complete      expect(job, pages)
                           ── whole pages, as they lie in the pool ─▶ arrived(job, layer)

Nothing waits for anybody: sends are asynchronous, receives are posted early (KV-Runahead, arXiv
2405.05329, section 4). There are two transports.

shared   Ranks of one machine: the receiver maps the sender's pool and copies the pages from there
         into its own. What is sent is a note that a layer is ready. The sender keeps the pages
         until the receiver has taken them or is gone.
gloo     torch.distributed between two processes: one packed buffer a layer. A thread at each end
         waits for it, so that those who compute need not.

A thread must not outlive its interpreter, hence ``join``.

An end that fails keeps the reason in ``error`` and says no to everything from then on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import select
import socket
import threading
import time
from array import array
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from headstart.engine.errors import ConfigError
from headstart.engine.model_runner import ModelRunner
from headstart.engine.runahead.costs import LinkCosts
from headstart.engine.runahead.messages import LinkEnd
from headstart.kernels.shared_memory import SharedMemory, attach

dist: Any = distributed  # which does not declare what it has

STAGED_BYTES = 256 << 20
"""Of a gloo link: what may be packed, or have arrived, and wait for its turn."""
PROBE_BYTES = 1 << 20
_SHARED_COSTS = LinkCosts(latency=5e-5, seconds_per_byte=2.5e-10)  # a copy within memory
_GLOO_LATENCY = 2e-4
_BYE, _PROBE = -1, -2  # in place of a job
_FOREVER = timedelta(days=10_000)
_UNEXPECTED = "what came is not what was expected"


class Pool(NamedTuple):
    """A rank's KV memory: ``pages`` uint8 ``[layers, num_pages, bytes]``."""

    pages: Tensor
    memory: SharedMemory | None

    @classmethod
    def of(cls, runner: ModelRunner) -> Pool:
        return cls(runner.backend.kv_pages(runner.kv), runner.backend.kv_memory(runner.kv))

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return self.pages[:, 0].numel()


class Sender(Protocol):
    """The near end of a link."""

    error: str | None

    def offer(self, job: int, pages: list[int]) -> None:
        """These pages will be sent, layer after layer."""
        ...

    def send(self, job: int, layer: int) -> bool:
        """Send them as they are in this layer; False: too much is under way, ask again."""
        ...

    def taken(self, job: int) -> bool:
        """Whether the pages may be changed. Ask once all that is wanted of them has been sent."""
        ...

    def drop(self, job: int) -> None:
        """Send no more of it. ``taken`` says when its pages may be changed."""
        ...

    def close(self) -> None:
        """Say goodbye. ``join`` waits until that is done, for some seconds at most."""
        ...

    def join(self, timeout: float) -> None: ...


class Receiver(Protocol):
    """The far end. ``fileno()`` is readable when something may have arrived."""

    error: str | None
    costs: LinkCosts

    def fileno(self) -> int: ...

    def read(self) -> None:
        """Take note of what has come, so that ``fileno()`` is not readable any more."""
        ...

    def expect(self, job: int, pages: list[int]) -> None:
        """Its pages belong into these of the own pool, in their order."""
        ...

    def arrived(self, job: int, layer: int) -> bool:
        """Whether this layer is in the own pool; puts it there if it has come."""
        ...

    def drop(self, job: int) -> None:
        """Take no more of it."""
        ...

    def close(self) -> None:
        """Take nothing more. ``join`` waits for the other end's goodbye, for some seconds."""
        ...

    def join(self, timeout: float) -> None: ...


# ------------------------------------------------------------------------- shared memory


class _Greeting(msgspec.Struct):
    """The first record of a shared link, beside the descriptor of the sender's pool."""

    shape: tuple[int, int, int]


class _Offer(msgspec.Struct, tag=True, array_like=True):
    job: int
    pages: bytes


class _Ready(msgspec.Struct, tag=True, array_like=True):
    job: int
    layer: int


class _Dropped(msgspec.Struct, tag=True, array_like=True):
    job: int


class _Taken(msgspec.Struct, tag=True, array_like=True):
    job: int


_Record = _Offer | _Ready | _Dropped | _Taken
_MOST_BYTES = 1 << 18  # of a record


class _Records:
    """Records over a connected Unix socket, without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.error: str | None = None
        self._out: deque[bytes] = deque()
        self._decoder = msgspec.msgpack.Decoder(_Record)

    def put(self, record: _Record) -> None:
        self._out.append(msgspec.msgpack.encode(record))
        self.flush()

    def flush(self) -> bool:
        """Whether all has gone out."""
        try:
            while self._out:
                self.connection.send(self._out[0])
                self._out.popleft()
        except BlockingIOError:
            return False
        except OSError as error:
            self.error = self.error or f"the connection broke ({error.strerror})"
        return not self._out

    def get(self) -> list[_Record]:
        """What has come; ``error`` is set when there will be no more."""
        records: list[_Record] = []
        while self.error is None:
            try:
                data = self.connection.recv(_MOST_BYTES)
                if not data:
                    self.error = "the other end closed it"
                    break
                records.append(self._decoder.decode(data))
            except BlockingIOError:
                break
            except (OSError, msgspec.DecodeError) as error:
                self.error = f"the connection broke ({error})"
        return records


class SharedSender:
    """See Sender. Pages stay as they are until the receiver says so, or has closed its end."""

    def __init__(self, connection: socket.socket, pool: Pool) -> None:
        assert pool.memory is not None
        assert pool.memory.descriptor is not None
        greeting = msgspec.msgpack.encode(_Greeting(tuple(pool.pages.shape)))  # type: ignore[arg-type]
        socket.send_fds(connection, [greeting], [pool.memory.descriptor])
        self._records = _Records(connection)
        self._offered: set[int] = set()
        self._closed = False

    @property
    def error(self) -> str | None:
        return "closed" if self._closed else self._records.error

    def offer(self, job: int, pages: list[int]) -> None:
        self._offered.add(job)
        self._records.put(_Offer(job, array("i", pages).tobytes()))

    def send(self, job: int, layer: int) -> bool:
        if self._closed or not self._records.flush():
            return False
        self._records.put(_Ready(job, layer))
        return True

    def taken(self, job: int) -> bool:
        if not self._closed:
            self._records.flush()
        for record in self._records.get():
            if isinstance(record, _Taken):
                self._offered.discard(record.job)
        return self._records.error is not None or job not in self._offered

    def drop(self, job: int) -> None:
        if job in self._offered and not self._closed:
            self._records.put(_Dropped(job))

    def close(self) -> None:
        # The receiver may be copying: its end of file says that it is not. Writing on would be an
        # error of this end's own, which says nothing of the other.
        self._closed = True
        with contextlib.suppress(OSError):
            self._records.connection.shutdown(socket.SHUT_WR)

    def join(self, timeout: float) -> None:
        """Nothing to wait for."""


class SharedReceiver:
    """See Receiver. ``costs`` are those of a copy."""

    costs = _SHARED_COSTS

    def __init__(self, connection: socket.socket, pool: Pool) -> None:
        data, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
        try:
            greeting = msgspec.msgpack.decode(data, type=_Greeting)
            self._memory: mmap.mmap = attach(descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._theirs = np.frombuffer(self._memory, dtype=np.uint8).reshape(greeting.shape)
        self._own: npt.NDArray[np.uint8] = pool.pages.numpy()
        self._records = _Records(connection)
        self._expected: dict[int, list[int]] = {}
        self._runs: dict[int, list[tuple[int, int, int]]] = {}
        self._offers: dict[int, list[int]] = {}
        self._ready: dict[int, int] = {}  # layers, by job
        self._copied: dict[int, int] = {}
        self._dropped: set[int] = set()

    @property
    def error(self) -> str | None:
        return self._records.error

    def fileno(self) -> int:
        return self._records.connection.fileno()

    def expect(self, job: int, pages: list[int]) -> None:
        self._expected[job] = pages
        self._copied[job] = 0

    def arrived(self, job: int, layer: int) -> bool:
        if self._copied[job] > layer:
            return True
        self.read()
        if self._records.error is not None or self._ready.get(job, 0) <= layer:
            return False
        if len(self._offers[job]) != len(self._expected[job]):
            self._records.error = _UNEXPECTED
            return False
        for to, of, count in self._runs_of(job):
            self._own[layer, to : to + count] = self._theirs[layer, of : of + count]
        self._copied[job] = layer + 1
        if self._copied[job] == len(self._own):
            self._forget(job)
        return True

    def drop(self, job: int) -> None:
        if self._copied.pop(job, 0) < len(self._own) and job not in self._offers:
            self._dropped.add(job)  # its offer may be on its way
        self._forget(job)
        self._expected.pop(job, None)

    def close(self) -> None:
        self._records.connection.close()
        self._records.error = self._records.error or "closed"

    def join(self, timeout: float) -> None:
        """Nothing to wait for."""

    def _runs_of(self, job: int) -> list[tuple[int, int, int]]:
        """(own first page, theirs, how many): pages come in runs while a pool is fresh."""
        if job not in self._runs:
            own, theirs = self._expected[job], self._offers[job]
            runs: list[tuple[int, int, int]] = []
            for to, of in zip(own, theirs, strict=True):
                if runs and (to, of) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                    runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
                else:
                    runs.append((to, of, 1))
            self._runs[job] = runs
        return self._runs[job]

    def read(self) -> None:
        for record in self._records.get():
            match record:
                case _Offer(job, pages) if job in self._dropped:
                    self._dropped.discard(job)
                    self._records.put(_Taken(job))
                case _Offer(job, pages):
                    offered = array("i")
                    offered.frombytes(pages)
                    self._offers[job] = offered.tolist()
                case _Ready(job, layer) if job in self._offers:
                    self._ready[job] = layer + 1
                case _Dropped(job):
                    self._forget(job)

    def _forget(self, job: int) -> None:
        self._runs.pop(job, None)
        self._ready.pop(job, None)
        if self._offers.pop(job, None) is not None:
            self._records.put(_Taken(job))


# ---------------------------------------------------------------------------------- gloo


class GlooSender:
    """See Sender: a layer's pages are packed at once, so they may change as soon as all is sent."""

    def __init__(self, group: Any, pool: Pool) -> None:
        self.error: str | None = None
        self._pool = pool
        self._pages: dict[int, Tensor] = {}
        self._queue: queue.SimpleQueue[tuple[int, int, Tensor] | None] = queue.SimpleQueue()
        self._queued = 0  # bytes; the thread takes off what it has sent
        self._lock = threading.Lock()
        for _ in range(2):
            self._put(_PROBE, 0, torch.zeros(PROBE_BYTES, dtype=torch.uint8))
        self._thread = threading.Thread(target=self._run, args=(group,), daemon=True)
        self._thread.start()

    def offer(self, job: int, pages: list[int]) -> None:
        self._pages[job] = torch.tensor(pages, dtype=torch.int64)

    def send(self, job: int, layer: int) -> bool:
        if self.error is not None or self._queued > STAGED_BYTES:
            return False
        self._put(job, layer, self._pool.pages[layer].index_select(0, self._pages[job]).view(-1))
        if layer + 1 == len(self._pool.pages):
            del self._pages[job]
        return True

    def taken(self, job: int) -> bool:
        return True

    def drop(self, job: int) -> None:
        self._pages.pop(job, None)

    def close(self) -> None:
        self._queue.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _put(self, job: int, layer: int, data: Tensor) -> None:
        with self._lock:
            self._queued += len(data)
        self._queue.put((job, layer, data))

    def _run(self, group: Any) -> None:
        try:
            while (item := self._queue.get()) is not None:
                job, layer, data = item
                header = torch.tensor([job, layer, len(data)])
                # Both under way before either is waited for.
                works = [group.send([header], 1, 0), group.send([data], 1, 0)]
                for work in works:
                    work.wait(_FOREVER)  # until there is room: a peer that is gone is an error
                with self._lock:
                    self._queued -= len(data)
            group.send([torch.tensor([_BYE, 0, 0])], 1, 0).wait(_FOREVER)
        except RuntimeError as error:
            self.error = _first_line(error)


class GlooReceiver:
    """See Receiver. A thread takes what comes, and keeps it until it is asked for."""

    def __init__(self, group: Any, pool: Pool) -> None:
        self.error: str | None = None
        self.costs = LinkCosts(latency=_GLOO_LATENCY, seconds_per_byte=0.0)
        self._pool = pool
        self._layer_bytes = pool.pages[0].numel()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._expected: dict[int, Tensor] = {}
        self._done: dict[int, int] = {}
        self._changed = threading.Condition()
        self._staged: dict[tuple[int, int], Tensor] = {}
        self._staged_bytes = 0
        self._dropped: set[int] = set()
        self._closed = False
        self._probes = 0
        self._thread = threading.Thread(target=self._run, args=(group,), daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        os.close(self._event)

    def fileno(self) -> int:
        return self._event

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def probed(self, timeout: float) -> None:
        """Wait until ``costs`` are measured; raises TimeoutError, or OSError with the reason."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._probes == 2 or self.error, timeout)
        if not done:
            raise TimeoutError("nothing came over the link")
        if self.error:
            raise OSError(self.error)

    def expect(self, job: int, pages: list[int]) -> None:
        self._expected[job] = torch.tensor(pages, dtype=torch.int64)
        self._done[job] = 0

    def arrived(self, job: int, layer: int) -> bool:
        if self._done[job] > layer:
            return True
        with self._changed:
            data = self._staged.pop((job, layer), None)
            if data is None:
                return False
            self._staged_bytes -= len(data)
            self._changed.notify()
        pages = self._expected[job]
        if len(data) * self._pool.pages.shape[1] != len(pages) * self._layer_bytes:
            self.error = _UNEXPECTED
            return False
        self._pool.pages[layer].index_copy_(0, pages, data.view(len(pages), -1))
        self._done[job] = layer + 1
        return True

    def drop(self, job: int) -> None:
        self._expected.pop(job, None)
        if self._done.pop(job, 0) == len(self._pool.pages):
            return
        with self._changed:
            self._dropped.add(job)  # more of it may be on its way
            for key in [key for key in self._staged if key[0] == job]:
                self._staged_bytes -= len(self._staged.pop(key))
            self._changed.notify()

    def close(self) -> None:
        self.error = self.error or "closed"
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self, group: Any) -> None:
        try:
            header = torch.zeros(3, dtype=torch.int64)
            pending = group.recv([header], 0, 0)
            while True:
                pending.wait(_FOREVER)
                begin = time.perf_counter()
                job, layer, size = header.tolist()
                if job == _BYE:
                    raise RuntimeError("the other end closed it")
                if not 0 < size <= max(self._layer_bytes, PROBE_BYTES):
                    raise RuntimeError(f"a buffer of {size} bytes was announced")
                data = torch.empty(size, dtype=torch.uint8)
                payload = group.recv([data], 0, 0)
                header = torch.zeros(3, dtype=torch.int64)
                pending = group.recv([header], 0, 0)
                payload.wait(_FOREVER)
                if job == _PROBE:
                    self._probe((time.perf_counter() - begin) / size)
                else:
                    self._stage(job, layer, data)
        except RuntimeError as error:
            self.error = self.error or _first_line(error)
            with self._changed:
                self._changed.notify()
            with contextlib.suppress(OSError):
                os.eventfd_write(self._event, 1)

    def _probe(self, seconds_per_byte: float) -> None:
        self.costs = LinkCosts(latency=_GLOO_LATENCY, seconds_per_byte=seconds_per_byte)
        with self._changed:
            self._probes += 1
            self._changed.notify()

    def _stage(self, job: int, layer: int, data: Tensor) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._staged_bytes < STAGED_BYTES)
            if self._closed or job in self._dropped:
                return
            self._staged[job, layer] = data
            self._staged_bytes += len(data)
        os.eventfd_write(self._event, 1)


def _first_line(error: Exception) -> str:
    """Gloo's messages begin with a source file in brackets, and go on to give advice."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0][:200]


# ------------------------------------------------------------------------------- opening


class Store:
    """A rank's torch.distributed store on ``host``, where the two ends of its links meet.

    Raises ConfigError where ``host`` is no address of this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"a runahead rank cannot listen on {host}: {reason}") from error
        self.host = host
        self.port: int = listener.getsockname()[1]
        self.store = dist.TCPStore(
            host, self.port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def meeting(host: str, port: int, hosts: bool, timeout: timedelta) -> Any:
    """A torch.distributed store, hosted here or found there; raises RuntimeError."""
    return dist.TCPStore(host, port, None, hosts, timeout, wait_for_workers=False)


class Opening:
    """An end of a link while it is being opened, in a thread. ``end``, or ``error``, once done."""

    def __init__(
        self, sends: bool, spec: LinkEnd, pool: Pool, store: Store | None, timeout: float
    ) -> None:
        self.end: Any = None
        self.error: str | None = None
        self._closed = False
        # Here, not in the thread: it has to be there when the receiver looks for it.
        listener = _listener(spec) if sends and spec.transport == "shared" else None
        work = (sends, spec, pool, store, timeout, listener)
        self._thread = threading.Thread(target=self._run, args=work, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._closed = True
        if self.end is not None:
            self.end.close()

    def _run(
        self,
        sends: bool,
        spec: LinkEnd,
        pool: Pool,
        store: Store | None,
        timeout: float,
        listener: socket.socket | None,
    ) -> None:
        try:
            if spec.transport == "shared":
                connection = _connection(spec, listener, timeout)
                connection.settimeout(timeout)
                self.end = (SharedSender if sends else SharedReceiver)(connection, pool)
            else:
                group = _group(sends, spec, store, timeout)
                if sends:
                    self.end = GlooSender(group, pool)
                else:
                    self.end = GlooReceiver(group, pool)
                    self.end.probed(timeout)
        except (OSError, RuntimeError, ValueError, IndexError, msgspec.MsgspecError) as error:
            self.error = _first_line(error) or type(error).__name__
        if self._closed and self.end is not None:
            self.end.close()


def _listener(spec: LinkEnd) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(OSError):
        listener.bind(spec.path)
        listener.listen(1)
    return listener


def _connection(spec: LinkEnd, listener: socket.socket | None, timeout: float) -> socket.socket:
    if listener is not None:
        listener.settimeout(timeout)
        try:
            return listener.accept()[0]
        finally:
            listener.close()
            Path(spec.path).unlink(missing_ok=True)
    deadline = time.monotonic() + timeout
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(spec.path)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _group(sends: bool, spec: LinkEnd, store: Store | None, timeout: float) -> Any:
    """The process group of a link's two ends: 0 sends, 1 receives."""
    if spec.port:
        host, port, own = spec.host, spec.port, own_address(spec.host)
    else:
        assert store is not None
        host, port, own = store.host, store.port, store.host
    # A connection for each opening: while one waits for its other end, no other gets through.
    store_there = meeting(host, port, False, timedelta(seconds=timeout))
    prefixed = dist.PrefixStore(spec.name, store_there)
    prefixed.set_timeout(timedelta(seconds=timeout))
    return gloo_group(prefixed, 0 if sends else 1, 2, own, timedelta(seconds=timeout))


def gloo_group(store: Any, rank: int, size: int, host: str, timeout: timedelta) -> Any:
    """A process group of its own, none of torch's globals, whose ranks meet in ``store``.

    ``host``: this rank's address. Raises RuntimeError.
    """
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def own_address(host: str) -> str:
    """This machine's address as ``host`` sees it. Nothing is sent."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def readable(ends: list[Any], timeout: float) -> None:
    """Wait until something has come over one of the links, or for ``timeout`` seconds."""
    poller = select.poll()
    for end in ends:
        poller.register(end, select.POLLIN)
    poller.poll(timeout * 1000)
