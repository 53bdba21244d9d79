"""DecodeGraphs: decoding steps captured once by number of rows, and replayed.

Launching a step's kernels one by one takes the host longer than a GPU needs to compute them. A
step in which every sequence decodes one token always launches the same ones: only what they read
changes. So it is captured (CUDA graphs) on tensors that stay where they are, and every later step
writes its batch there and replays:

    batch of 5 rows ──> places for 8: token ids, positions, slots, attention plan ──> replay
                        three rows spare: slot -1, no items

Shared ranges (RelayAttention) are entries of the plan like any other, so they replay, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from headstart.engine.batch import Batch
from headstart.engine.models.decoder import Decoder
from headstart.kernels.backend import Backend, FixedBatch

logger = logging.getLogger(__name__)

MOST_ROWS = 256
"""Rows of the largest captured step; beyond, computing takes longer than launching."""


class DecodeGraphs:
    """Captured steps of 1, 2, 4, ... rows. ``replayed`` counts the steps."""

    def __init__(self, decoder: Decoder, backend: Backend, kv: Any) -> None:
        self._decoder = decoder
        self._backend = backend
        self._kv = kv
        self._places: dict[int, FixedBatch | None] = {}
        self._captured: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self.replayed = 0

    def run(self, batch: Batch) -> Tensor | None:
        """Logits of all rows, valid until the next call; None if it is no step to be replayed."""
        if not self._decoder.capturable or batch.num_rows > MOST_ROWS:
            return None
        if batch.logit_rows is not None or batch.adapters or batch.reads:
            return None
        rows = 1 << (batch.num_rows - 1).bit_length()
        if rows not in self._places:
            pages_of_one = -(-self._decoder.max_len // self._backend.page_size)
            shape = self._decoder.shape
            self._places[rows] = self._backend.fixed_batch(rows, rows * pages_of_one, shape)
        fixed = self._places[rows]
        if fixed is None or not fixed.fill(
            batch.token_ids, batch.positions, batch.slots, batch.kv_ranges
        ):
            return None
        if batch.pending is not None:
            fixed.token_ids.index_copy_(0, *batch.pending.tokens(self._backend))
        if rows not in self._captured:
            self._captured[rows] = self._capture(fixed)
            logger.info("decoding steps of up to %d rows are replayed", rows)
        logits, replay = self._captured[rows]
        replay()
        self.replayed += 1
        return logits[: batch.num_rows]

    def _capture(self, fixed: FixedBatch) -> tuple[Tensor, Callable[[], None]]:
        def work() -> Tensor:
            return self._decoder.forward_fixed(fixed, self._kv)

        work()  # so that kernels are compiled, and libraries have their workspaces
        return fixed.capture(work)
