"""RelayGuard: proves on real logits that reading prefixes once gives what plain attention gives.

At start-up on a piece of text, and with --relay-check N on every Nth step that shares. A
difference beyond TOLERANCE turns RelayAttention off for good, with an error in the log and in the
metrics: a wrong answer is worse than a slow one.
"""

from __future__ import annotations

import logging
from array import array
from pathlib import Path

from torch import Tensor

from headstart.engine.batch import Batch, SharedRange, build_batch
from headstart.engine.models.formats.quality import text_tokens
from headstart.engine.models.runner import ModelRunner
from headstart.engine.ranges.shared import Relay, RelayPlan
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

logger = logging.getLogger(__name__)

TOLERANCE = {"f32": 1e-4, "f16": 4e-3, "bf16": 2e-2, "int8": 2e-2}
"""Largest difference of a logit, relative to the largest logit, by weight format: float32 adds in
another order, or values are rounded to 11 (f16) or 8 bits in between. The CPU kernels differ by
nothing."""

ROWS = (1, 5, 1)
"""Rows of the sequences at start-up: two that decode, and one in the middle of its prompt."""


def difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of a logit relative to the largest logit; infinite for NaN."""
    worst = float((logits - expected).abs().max() / expected.abs().max())
    return worst if worst == worst else float("inf")


class RelayGuard:
    """Compares and counts; ``every``: 0, or how many sharing steps to a check."""

    def __init__(self, relay: Relay, runner: ModelRunner, weights: str, every: int) -> None:
        self._relay = relay
        self._runner = runner
        self._page_size = runner.backend.page_size
        self._tolerance = TOLERANCE[weights]
        self._every = every
        self._steps = 0
        self.checks = 0
        self.largest_difference = 0.0
        self.refused = False

    def at_start(self, folder: Path) -> None:
        """Check on a prompt of a few rows; the pool's first pages must be nobody's yet."""
        step, page_size = self._runner.backend.range_step, self._page_size
        shared = step // page_size
        decoder = self._runner.decoder
        needed = shared + len(ROWS)
        if needed > self._runner.num_pages or step + max(ROWS) > decoder.max_len:
            logger.info("relay: off, since nothing long enough to share fits")
            self._relay.mode = "off"
            return
        tokens = prompt_tokens(folder, step + sum(ROWS), decoder.config.vocab_size)
        pages = list(range(shared))
        first = self._sequence(tokens[:step], pages)
        self._runner.run(build_batch([ScheduledSequence(first, 0, step, False)], page_size))
        scheduled = []
        for i, rows in enumerate(ROWS):
            own = tokens[step + sum(ROWS[:i]) :][:rows]
            seq = self._sequence(tokens[:step] + own, [*pages, shared + i])
            scheduled.append(ScheduledSequence(seq, step, rows, True))
        ranges = [SharedRange(0, step, list(range(len(ROWS))))]
        logits = self._runner.run(build_batch(scheduled, page_size, ranges).with_all_logits())
        found = logits.clone()
        plain = self._runner.run(build_batch(scheduled, page_size).with_all_logits())
        self._judge(difference(found, plain), "at start-up")

    def is_due(self, plan: RelayPlan | None) -> bool:
        """Whether the step just computed under ``plan`` is one to check."""
        if not self._every or plan is None or not plan.ranges:
            return False
        self._steps += 1
        return self._steps % self._every == 0

    def check(self, batch: Batch, logits: Tensor) -> Tensor:
        """Compute the step again, ``batch`` without sharing, and compare; the plain logits."""
        found = logits.clone()
        plain = self._runner.run(batch)
        if len(plain):
            self._judge(difference(found, plain), f"at check {self.checks + 1}")
        return plain

    def _judge(self, found: float, when: str) -> None:
        self.checks += 1
        self.largest_difference = max(self.largest_difference, found)
        if found <= self._tolerance:
            logger.debug("relay: logits differ by %.2g %s", found, when)
            return
        self.refused = True
        self._relay.mode = "off"
        logger.error(
            "relay: off, since its logits differ from those of plain attention by %.2g %s; up to "
            "%.2g is rounding. Please report this, with the model's name.",
            found,
            when,
            self._tolerance,
        )

    def _sequence(self, tokens: list[int], pages: list[int]) -> Sequence:
        params = SamplingParams(max_tokens=1)
        return Sequence(0, array("i", tokens), len(tokens), params, pages=pages)


def prompt_tokens(folder: Path, count: int, vocab_size: int) -> list[int]:
    """``count`` tokens of English under the model's tokenizer, or made up where it has none."""
    if (folder / "tokenizer.json").exists():
        tokens = text_tokens(folder, "evaluation", count)
        if len(tokens) == count and max(tokens) < vocab_size:
            return tokens
    return [(i * i * 7919 + 11) % vocab_size for i in range(count)]
