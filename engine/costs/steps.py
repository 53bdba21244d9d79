"""StepCosts: the seconds of a step, from its rows, the keys they read, and the tokens it samples.

    seconds = linear(rows) + per_pair * pairs + decode * attention(keys) + per_sample * samples
              + per_adapted * rows with an adapter

    linear(rows)   a line between knots at 1, 2, 4, ... rows; beyond the last one in proportion
    pairs          of a row of a prompt's chunk and a key that it sees
    attention      of rows that decode, by the machine's table (attention.py) and what
                   RelayAttention reads once; ``decode`` is what it really takes of that

Measured at start by a few steps, in a second at most, and kept by machine and model. Then every
step corrects it: what was wrong by a factor is put right by a fifth of that, shared out among the
terms by how much of the step they are (a normalised LMS filter on the terms' logarithms). So it
follows a machine that has other work, and no term ever becomes negative.

The budget of a step, the order of prompts, admission and KV-Runahead's cuts ask here;
RelayAttention and ``headstart plan`` ask the table of attention that is a part of it.
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple

import msgspec

from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.costs.prefill import PrefillCosts, check_costs
from headstart.engine.sequence import ScheduledSequence

KNOTS = tuple(2**i for i in range(11))
"""Rows of a step, at which its linear part is known."""
MEASURE_SECONDS = 0.8
"""The measurement takes about this long at most, however large the model is."""
PROBES = (1, 4, 16, 64, 256)
"""Rows of the steps that are measured."""
REPEATS = 4
FAR, FAR_ROWS = 4096, 64
"""Where in a prompt, and of how many rows, a chunk is measured for the price of its pairs."""
UNKNOWN_ROW = 0.2
"""What a further row takes of a single one's time, where only that could be measured: a single row
waits for memory, and many for arithmetic."""
NEWS = 0.2
"""How much of an error the next prediction is corrected by."""
MOST_NEWS = 0.5
"""In logarithms: one that took much longer tells no more than this, since others were at work."""


class StepWork(NamedTuple):
    """What a step computes.

    rows:       all of them
    pairs:      of a chunk's rows and the keys that each sees
    attention:  seconds that its decoding rows' attention takes by the table, in all layers
    samples:    tokens that are chosen
    adapted:    rows of sequences with an adapter
    """

    rows: int
    pairs: float
    attention: float
    samples: int
    adapted: int


class StepTable(msgspec.Struct, frozen=True):
    """The terms: ``linear`` at KNOTS, and the factors of the others."""

    linear: list[float]
    per_pair: float
    decode: float
    per_sample: float
    per_adapted: float

    def __post_init__(self) -> None:
        check_costs(*self.linear, self.per_pair, self.decode, self.per_sample, self.per_adapted)
        if len(self.linear) != len(KNOTS) or not min(self.linear) > 0:
            raise ValueError("not a table of steps' costs")

    @property
    def prefill(self) -> PrefillCosts:
        """Of chunks of prompts, alone: a line through the knots that such chunks have."""
        low, high = KNOTS.index(64), KNOTS.index(512)
        few, many = self.linear[low], self.linear[high]
        per_token = max(many - few, 0.1 * many) / (KNOTS[high] - KNOTS[low])
        return PrefillCosts(max(few - per_token * KNOTS[low], 0.0), per_token, self.per_pair)


class StepCosts:
    """``table``: as measured. ``attention``: what reading KV costs. ``layers``: of the model."""

    def __init__(self, table: StepTable, attention: AttentionCosts, layers: int) -> None:
        self._linear = list(table.linear)
        self._factors = [table.per_pair, table.decode, table.per_sample, table.per_adapted]
        self._attention = attention
        self._layers = layers
        self._prefill: PrefillCosts | None = None
        self.latest: tuple[float, float] | None = None
        """(predicted, actual) seconds of the step that was observed last."""

    @property
    def table(self) -> StepTable:
        """The terms as they are known now."""
        return StepTable(list(self._linear), *self._factors)

    @property
    def prefill(self) -> PrefillCosts:
        """Of chunks of prompts, alone."""
        if self._prefill is None:
            self._prefill = self.table.prefill
        return self._prefill

    def decode_seconds(self, rows: int, keys: int) -> float:
        """Of a step in which so many sequences decode, which read ``keys`` keys together."""
        if not rows:
            return 0.0
        attention = self._layers * rows * self._attention.seconds(1, keys / rows)
        return self.seconds(StepWork(rows, 0.0, attention, rows, 0))

    def work(
        self, scheduled: Items[ScheduledSequence], relay_seconds: float | None = None
    ) -> StepWork:
        """Of a step. ``relay_seconds``: of its attention in one layer, where prefixes are shared;
        chunks' pairs are in it, too."""
        rows = samples = adapted = 0
        pairs = attention = 0.0
        fixed, cold, _ = self._attention.of(1)
        for seq, start, num_tokens, samples_one in scheduled:
            rows += num_tokens
            samples += samples_one
            if seq.adapter is not None:
                adapted += num_tokens
            if num_tokens == 1:
                attention += fixed + cold * (start + 1)
            else:
                pairs += num_tokens * (start + num_tokens / 2)
        if relay_seconds is not None:
            chunks = self._factors[0] / max(self._factors[1], 1e-9) * pairs / self._layers
            attention = max(relay_seconds - chunks, 0.0) if pairs else relay_seconds
        return StepWork(rows, pairs, self._layers * attention, samples, adapted)

    def seconds(self, work: StepWork) -> float:
        """Predicted seconds of a step."""
        return sum(share for _, share in self._terms(work))

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step took ``seconds``: correct what it is made of."""
        terms = self._terms(work)
        predicted = sum(share for _, share in terms)
        self.latest = predicted, seconds
        if not predicted > 0 or not 0 < seconds < math.inf:
            return
        news = math.log(seconds) - math.log(predicted)  # of their ratio: it may be 0
        error = min(max(news, -MOST_NEWS), MOST_NEWS)
        weight = sum(share * share for _, share in terms) / predicted
        for place, share in terms:
            factor = math.exp(NEWS * error * share / weight)
            if place < len(KNOTS):
                self._linear[place] *= factor
            else:
                self._factors[place - len(KNOTS)] *= factor
        self._prefill = None

    def _terms(self, work: StepWork) -> list[tuple[int, float]]:
        """Which numbers a step's seconds are made of, and how much each gives."""
        rows, terms = work.rows, []
        if rows >= KNOTS[-1]:
            terms.append((len(KNOTS) - 1, self._linear[-1] * rows / KNOTS[-1]))
        elif rows > 0:
            at = bisect_left(KNOTS, rows)
            if KNOTS[at] == rows:
                terms.append((at, self._linear[at]))
            else:
                share = (rows - KNOTS[at - 1]) / (KNOTS[at] - KNOTS[at - 1])
                terms.append((at - 1, (1 - share) * self._linear[at - 1]))
                terms.append((at, share * self._linear[at]))
        amounts = (work.pairs, work.attention, work.samples, work.adapted)
        for i, (factor, amount) in enumerate(zip(self._factors, amounts, strict=True)):
            if amount:
                terms.append((len(KNOTS) + i, factor * amount))
        return terms


Probe = Callable[[int, int], float]
"""Seconds of a step with a chunk: (start, rows)."""


def measure_steps(probe: Probe, longest: int, pair: float = 0.0) -> StepTable:
    """Measure steps of PROBES rows, and one far into a prompt, as far as MEASURE_SECONDS allow.

    ``longest``: tokens that a prompt may have here. ``pair``: seconds of a row and a key that it
    sees, as far as known.
    """
    deadline = time.perf_counter() + MEASURE_SECONDS
    known: list[tuple[int, float]] = []
    probe(0, 1)  # which touches every weight
    for rows in PROBES:
        if rows > longest:
            break
        # Four times the rows take up to four times as long. The quickest of some runs counts:
        # others may have been disturbed.
        if known and time.perf_counter() + 4 * known[-1][1] > deadline:
            break
        seconds = probe(0, rows)
        for _ in range(REPEATS):
            if time.perf_counter() + seconds > deadline - MEASURE_SECONDS / 2:
                break
            seconds = min(seconds, probe(0, rows))
        known.append((rows, max(seconds - pair * rows * rows / 2, seconds / 2)))
    linear = [_between(known, rows) for rows in KNOTS]
    near, start = _between(known, FAR_ROWS), min(FAR, longest - FAR_ROWS)
    expected = 2 * near + pair * FAR_ROWS * start
    if start >= FAR // 4 and time.perf_counter() + expected < deadline:
        measured = (probe(start, FAR_ROWS) - near) / (FAR_ROWS * (start + FAR_ROWS / 2))
        pair = max(measured, pair / 8)
    per_token = max(linear[-1] - linear[-2], 0.0) / (KNOTS[-1] - KNOTS[-2])
    return StepTable(linear, pair, 1.0, 0.2 * per_token + 1e-5, 0.1 * per_token)


def _between(known: Items[tuple[int, float]], rows: int) -> float:
    """On the line through measured (rows, seconds), never falling; beyond them in proportion."""
    before = known[0]
    for (few, less), (many, more) in itertools.pairwise(known):
        if rows <= many:
            return less + max(more - less, 0.0) * (max(rows, few) - few) / (many - few)
        before = (few, less)
    last, seconds = known[-1]
    if rows <= last:
        return seconds
    if last == known[0][0]:
        return seconds * (1 + UNKNOWN_ROW * (rows - last))
    slope = (seconds - before[1]) / (last - before[0])
    return seconds + max(slope, 0.3 * seconds / last) * (rows - last)
