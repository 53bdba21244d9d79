"""Links in shared memory, between ranks of one machine.

The receiver maps the sender's pool and copies the pages from there into its own. What is sent is a
note that a layer is ready. The sender keeps the pages until the receiver has taken them or is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from array import array
from collections import deque

import msgspec
import numpy as np
import numpy.typing as npt

from headstart.engine.runahead.costs import LinkCosts
from headstart.engine.runahead.links import UNEXPECTED, Pool
from headstart.kernels.memory import attach

_COSTS = LinkCosts(latency=5e-5, seconds_per_byte=2.5e-10)  # a copy within memory


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

    costs = _COSTS

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
            self._records.error = UNEXPECTED
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
