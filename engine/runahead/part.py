"""Part: what one process does of a prompt that several compute, a prefill rank or the engine.

    rank before ── KV of layer 0, 1, ... ─▶ own rows ── KV of both, layer by layer ─▶ rank behind

Where a process has no rows of its own, it hands on what arrives, or what it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from headstart.engine.models.runner import ModelRunner
from headstart.engine.runahead.links import Pool, Receiver, Sender
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.engine.work import LongChunk


def one_tile(chunk: LongChunk) -> Tensor | None:
    return chunk.advance(1)


class Part:
    """Of job number ``job``, a prefill of ``seq``. It is the Neighbours of its own LongChunk.

    receiver:       of what is sent here for the job, wanted or not
    sent:           pages whose KV goes to the next rank, layer by layer
    busy, idle:     seconds of computing and copying, and of waiting for KV
    waiting_since:  the last look, if nothing could be done
    """

    def __init__(self, job: int, seq: Sequence, runner: ModelRunner) -> None:
        self.job = job
        self.receiver: Receiver | None = None
        self.chunk: LongChunk | None = None
        self.sent: list[int] = []
        self.busy = 0.0
        self.idle = 0.0
        self.waiting_since: float | None = None
        self.done = False
        self._seq = seq
        self._runner = runner
        self._page_size = runner.backend.page_size
        self._layer = 0  # that is handed on next, where there is no chunk
        self._sender: Sender | None = None
        self._dropped = False

    def receive(self, receiver: Receiver, start: int, end: int) -> None:
        """KV of tokens ``[start, end)`` comes from there."""
        receiver.expect(self.job, self._pages(start, end))
        self.receiver = receiver

    def send(self, sender: Sender, start: int, end: int) -> None:
        """Send KV of tokens ``[start, end)``, each layer as soon as it is complete."""
        self.sent = self._pages(start, end)
        sender.offer(self.job, self.sent)
        self._sender = sender

    def _pages(self, start: int, end: int) -> list[int]:
        return self._seq.pages[start // self._page_size : -(-end // self._page_size)]

    def compute(self, start: int, end: int) -> None:
        """Compute the rows ``[start, end)``; the logits too, if they are the prompt's last."""
        samples = end == self._seq.num_tokens
        entry = ScheduledSequence(self._seq, start, end - start, samples)
        self.chunk = LongChunk(entry, self._runner, self._page_size, self)

    def arrived(self, layer: int) -> bool:
        return self.receiver is None or self.receiver.arrived(self.job, layer)

    def written(self, layer: int) -> bool:
        return self._sender is None or self._sender.send(self.job, layer)

    @property
    def sent_bytes(self) -> int:
        return len(self.sent) * Pool.of(self._runner).page_bytes

    @property
    def waits(self) -> bool:
        """Whether the last ``advance`` ended for want of KV, or of room in the link."""
        return self.chunk is None or self.chunk.waits

    @property
    def error(self) -> str | None:
        """Of a link."""
        ends = (self.receiver, self._sender)
        return next((end.error for end in ends if end is not None and end.error), None)

    def advance(self, compute: Callable[[LongChunk], Tensor | None] = one_tile) -> Tensor | None:
        """Compute some of the rows, or hand some KV on; the logits, once they are computed.

        ``done`` says whether that is all.
        """
        begin = time.perf_counter()
        if self.waiting_since is not None:
            self.idle += begin - self.waiting_since
        logits = None
        if self.chunk is None:
            self._hand_on()
        else:
            logits = compute(self.chunk)
            self.chunk.synchronize()
            self.done = logits is not None
        now = time.perf_counter()
        self.busy += now - begin
        self.waiting_since = now if self.waits and not self.done else None
        return logits

    def _hand_on(self) -> None:
        layers = self._runner.decoder.config.num_layers
        while not self.done and self.arrived(self._layer) and self.written(self._layer):
            self._layer += 1
            self.done = self._layer == layers

    def drop(self) -> None:
        """Want and send no more of it; all of it, if it is done."""
        if self.receiver is not None:
            self.receiver.drop(self.job)
        if self._sender is not None and not self.done:
            self._sender.drop(self.job)
        self._dropped = True

    @property
    def released(self) -> bool:
        """Whether nobody reads, or is going to read, the pages that it sends."""
        over = self.done or self._dropped
        return self._sender is None or (over and self._sender.taken(self.job))
