"""LongChunk: a segment longer than a step's token budget, computed beside the steps of others.

Its rows have to go through each layer together, but not through all layers in one step: between
two layers of it nothing is half done. So it advances by a step's worth of work with each step, and
those that decode wait no longer than beside a chunk of a causal prompt.
"""

from __future__ import annotations

from torch import Tensor

from headstart.engine.batch import build_batch
from headstart.engine.model_runner import ModelRunner
from headstart.engine.models.decoder import TILE_ROWS
from headstart.engine.scheduler import ScheduledSequence


class LongChunk:
    """``entry`` on its way through the layers. Dropping it between two calls leaves no trace."""

    def __init__(self, entry: ScheduledSequence, runner: ModelRunner, page_size: int) -> None:
        self.entry = entry
        self._layers = runner.run_beside(build_batch([entry], page_size))
        self._num_layers = runner.decoder.config.num_layers

    def advance(self, num_tokens: int) -> Tensor | None:
        """Compute what ``num_tokens`` tokens take through all layers; the logits, once done."""
        for _ in range(max(num_tokens // TILE_ROWS, 1) * self._num_layers):
            try:
                next(self._layers)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
        return None
