"""Links through torch.distributed: one packed buffer a layer, a process group for each link.

    gloo     both in the host's memory; pages of a GPU are copied there and back
    nccl     buffers from GPU to GPU, headers in the host's memory through Gloo

A thread at each end waits, so that those who compute need not. What it copies on a GPU it does in
a stream of its own, after what the computing stream had been given when the layer was complete:

    computing stream   layer i ─ pack ─┬─ layer i+1 ...
    sender's stream                    ╰─ (to the host) ─ send

A thread must not outlive its interpreter, hence ``join``.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.engine.process.groups import first_line
from headstart.engine.runahead.costs import LinkCosts
from headstart.engine.runahead.links import UNEXPECTED, Pool

STAGED_BYTES = 256 << 20
"""What may be packed, or have arrived, and wait for its turn."""
PROBE_BYTES = 1 << 20
_LATENCY = 2e-4
_BYE, _PROBE = -1, -2  # in place of a job
_FOREVER = timedelta(days=10_000)


class Groups(NamedTuple):
    """Process groups of a link's two ends: 0 sends, 1 receives. ``headers`` carries tensors in the
    host's memory, ``payloads`` those on ``device``; they may be the same."""

    headers: Any
    payloads: Any
    device: torch.device

    def abort(self) -> None:
        """End what waits in ``payloads``, if they are a GPU's: nobody else does."""
        if self.payloads is not self.headers:
            self.payloads.abort()


class _Layer(NamedTuple):
    """A packed layer on its way. ``mark``: see _Lane."""

    job: int
    layer: int
    data: Tensor
    mark: Any


class _Lane:
    """Where a thread's copies are ordered: a stream of a GPU; in the host's memory, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        new_stream: Any = torch.cuda.Stream
        self._stream = new_stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """All that the calling thread has launched so far."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    @contextlib.contextmanager
    def after(self, mark: Any = None) -> Iterator[None]:
        """What is launched within comes after ``mark``, and is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if mark is not None:
                self._stream.wait_event(mark)
            yield
            self._stream.synchronize()


class GroupSender:
    """See Sender: a layer's pages are packed at once, so they may change as soon as all is sent."""

    def __init__(self, groups: Groups, pool: Pool) -> None:
        self.error: str | None = None
        self._groups = groups
        self._pool = pool
        self._lane = _Lane(pool.pages.device)
        self._pages: dict[int, Tensor] = {}
        self._queue: queue.SimpleQueue[_Layer | None] = queue.SimpleQueue()
        self._queued = 0  # bytes; the thread takes off what it has sent
        self._lock = threading.Lock()
        for _ in range(2):
            probe = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=pool.pages.device)
            self._put(_PROBE, 0, probe)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def offer(self, job: int, pages: list[int]) -> None:
        self._pages[job] = torch.tensor(pages, dtype=torch.int64, device=self._pool.pages.device)

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
        _join(self._thread, self._groups, timeout)

    def _put(self, job: int, layer: int, data: Tensor) -> None:
        with self._lock:
            self._queued += len(data)
        self._queue.put(_Layer(job, layer, data, self._lane.mark()))

    def _run(self) -> None:
        headers, payloads, device = self._groups
        try:
            while (packed := self._queue.get()) is not None:
                header = torch.tensor([packed.job, packed.layer, len(packed.data)])
                with self._lane.after(packed.mark):
                    data = packed.data.to(device)
                    # Both under way before either is waited for.
                    works = [headers.send([header], 1, 0), payloads.send([data], 1, 0)]
                    for work in works:
                        work.wait(_FOREVER)  # until there is room: a peer that is gone is an error
                with self._lock:
                    self._queued -= len(data)
            headers.send([torch.tensor([_BYE, 0, 0])], 1, 0).wait(_FOREVER)
        except RuntimeError as error:
            self.error = reason(error)
            self._groups.abort()


class GroupReceiver:
    """See Receiver. A thread takes what comes, and keeps it until it is asked for."""

    def __init__(self, groups: Groups, pool: Pool) -> None:
        self.error: str | None = None
        self._groups = groups
        self._lane = _Lane(pool.pages.device)
        self.costs = LinkCosts(latency=_LATENCY, seconds_per_byte=0.0)
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
        self._thread = threading.Thread(target=self._run, daemon=True)
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
        self._expected[job] = torch.tensor(pages, dtype=torch.int64, device=self._pool.pages.device)
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
            self.error = UNEXPECTED
            return False
        self._pool.pages[layer].index_copy_(0, pages, data.view(len(pages), -1))
        if data.is_cuda:  # it was made in the thread's stream: not to be reused before this copy
            data.record_stream(torch.cuda.current_stream(data.device))
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
        _join(self._thread, self._groups, timeout)

    def _run(self) -> None:
        headers, payloads, device = self._groups
        try:
            header = torch.zeros(3, dtype=torch.int64)
            pending = headers.recv([header], 0, 0)
            while True:
                pending.wait(_FOREVER)
                begin = time.perf_counter()
                job, layer, size = header.tolist()
                if job == _BYE:
                    raise RuntimeError("the other end closed it")
                if not 0 < size <= max(self._layer_bytes, PROBE_BYTES):
                    raise RuntimeError(f"a buffer of {size} bytes was announced")
                with self._lane.after():
                    buffer = torch.empty(size, dtype=torch.uint8, device=device)
                    payload = payloads.recv([buffer], 0, 0)
                    header = torch.zeros(3, dtype=torch.int64)
                    pending = headers.recv([header], 0, 0)
                    payload.wait(_FOREVER)
                    data = buffer.to(self._pool.pages.device)
                if job == _PROBE:
                    self._probe((time.perf_counter() - begin) / size)
                else:
                    self._stage(job, layer, data)
        except RuntimeError as error:
            self.error = self.error or reason(error)
            with self._changed:
                self._changed.notify()
            with contextlib.suppress(OSError):
                os.eventfd_write(self._event, 1)
            self._groups.abort()

    def _probe(self, seconds_per_byte: float) -> None:
        self.costs = LinkCosts(latency=_LATENCY, seconds_per_byte=seconds_per_byte)
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


def _join(thread: threading.Thread, groups: Groups, timeout: float) -> None:
    thread.join(timeout)
    if thread.is_alive():
        groups.abort()
        thread.join(1.0)


def reason(error: Exception) -> str:
    """The same in short: Gloo goes on to give advice."""
    return first_line(error).partition(". ")[0][:200]
