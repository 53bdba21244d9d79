"""Work: what is computed of one sequence beside the steps of others, some of it with each step.

Between two layers nothing is half done, so it advances by a step's worth of work at a time, and
those that decode wait no longer than beside a chunk of a causal prompt. Two kinds of chunks need
that: a segment longer than a step's token budget, whose rows go through each layer together; and
what is left of a prompt that runs ahead on other processes, layer by layer (engine/runahead).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Protocol

from torch import Tensor

from headstart.engine.batch import Read, build_batch
from headstart.engine.models.runner import ModelRunner
from headstart.engine.sequence import ScheduledSequence, Sequence


class Work(Protocol):
    """``entry``: what is committed once it is done, ``reads``: who reads rows of it. ``waits``:
    whether the last ``advance`` ended for want of others. ``failed``: why it will never be done,
    and the steps have to compute it. ``num_computed``: about how many tokens of the sequence are.
    ``seconds``: what it has taken, where that tells of the machine; else 0.
    """

    @property
    def seq(self) -> Sequence: ...

    @property
    def entry(self) -> ScheduledSequence: ...

    @property
    def reads(self) -> Items[Read]: ...

    @property
    def waits(self) -> bool: ...

    @property
    def failed(self) -> str | None: ...

    @property
    def num_computed(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    def pieces(self, num_tokens: int) -> int:
        """How many of its pieces are as much work as ``num_tokens`` tokens, roughly."""
        ...

    def advance(self, pieces: int) -> Tensor | None:
        """Compute so many pieces, or as many as others allow; the logits, once done."""
        ...

    def advance_until(self, moment: float) -> Tensor | None:
        """The same until ``time.perf_counter`` says that: a piece at least, if it does not yet."""
        ...

    def finish(self) -> None:
        """Its logits are there."""
        ...

    def cancel(self) -> None:
        """It was aborted, or has failed: leave no trace."""
        ...


class Neighbours(Protocol):
    """The processes that compute other rows of the sequence, as a chunk sees them."""

    def arrived(self, layer: int) -> bool:
        """Whether the earlier rows' KV of this layer is in the sequence's pages by now."""
        ...

    def written(self, layer: int) -> bool:
        """The chunk's KV of this layer, and what came before it, is in the pages; False: ask again
        before anything else is computed."""
        ...


class Alone:
    """All rows are in the chunk, or in the cache."""

    def arrived(self, layer: int) -> bool:
        return True

    def written(self, layer: int) -> bool:
        return True


class LongChunk:
    """Work: ``entry`` on its way through the layers. Dropping it between two calls leaves no trace.

        neighbours       KV of layer 0 ──╮  KV of layer 1 ──╮
        this chunk       q k v of 0, attention of 0 ... q k v of 1, attention of 1 ...
                                 ╰── KV of layer 0           ╰── KV of layer 1         neighbours

    A chunk that begins inside a page writes into a page that arrives: its layers arrive first.
    """

    def __init__(
        self,
        entry: ScheduledSequence,
        runner: ModelRunner,
        page_size: int,
        neighbours: Neighbours | None = None,
        tile_rows: int | None = None,
    ) -> None:
        """``tile_rows``: of a piece; by default the backend's."""
        self._tile_rows = tile_rows or runner.backend.tile_rows
        self.entry = entry
        self._neighbours = neighbours or Alone()
        batch = build_batch([entry], page_size)
        self.reads = batch.reads
        self._layers = runner.run_beside(batch, self._tile_rows)
        self._num_layers = runner.decoder.config.num_layers
        self._backend = runner.backend
        self._shares_page = entry.start % page_size > 0
        self._layer = -1  # whose keys are written, and are read next
        self._sent = -1
        self.waits = False
        """Whether the last ``advance`` ended for want of a neighbour."""
        self.failed: str | None = None
        self.seconds = 0.0

    @property
    def seq(self) -> Sequence:
        return self.entry.seq

    @property
    def layer(self) -> int:
        """The layer it has come to; -1 before the first."""
        return self._layer

    @property
    def num_computed(self) -> int:
        """About how many tokens of the sequence are computed, by the layers that are."""
        share = max(self._layer, 0) / self._num_layers
        return self.entry.start + int(self.entry.num_tokens * share)

    def pieces(self, num_tokens: int) -> int:
        """How many of its pieces are as much work as ``num_tokens`` tokens, roughly."""
        return max(num_tokens // self._tile_rows, 1) * self._num_layers

    def advance(self, pieces: int) -> Tensor | None:
        """Compute so many tiles of one layer, or as many of them as the neighbours allow; the
        logits, once done."""
        # The very first is the keys of layer 0 alone.
        for _ in range(pieces + (self._layer < 0)):
            self.waits = not self._may_go_on()
            if self.waits:
                return None
            try:
                self._layer = next(self._layers)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
        return None

    def advance_until(self, moment: float) -> Tensor | None:
        """The same until ``time.perf_counter`` says that: one tile at least, if it does not yet."""
        begin = before = now = time.perf_counter()
        logits = None
        # The next piece takes about as long as the one before.
        while logits is None and now + (now - before) / 2 < moment:
            before = now
            logits = self.advance(1)
            now = time.perf_counter()
            if self.waits:
                break
        self.seconds += now - begin
        return logits

    def finish(self) -> None:
        """Nobody else knew of it."""

    def cancel(self) -> None:
        """See the class: there is nothing to undo."""

    def synchronize(self) -> None:
        """Wait until what it launched is computed, for its time to be known."""
        self._backend.synchronize()

    def _may_go_on(self) -> bool:
        ahead = self._layer + 1 if self._shares_page else self._layer
        for layer in {self._layer, min(ahead, self._num_layers - 1)} - {-1}:
            if not self._neighbours.arrived(layer):
                return False
        if self._sent < self._layer:
            if not self._neighbours.written(self._layer):
                return False
            self._sent = self._layer
        return True
