"""Forecast: what a decoding step costs with and without reading a shared prefix once.

Attention is predicted from the machine's cost table (attention.py), all else is measured: a
step of as many rows with next to no context. ``headstart plan`` prints it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass

from headstart.engine.batch import SharedRange, build_batch
from headstart.engine.errors import ConfigError
from headstart.engine.kv.tree import Node
from headstart.engine.models.runner import ModelRunner
from headstart.engine.ranges.shared import Relay, RelayPlan
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

REPEATS = 5


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step: attention over all layers, and everything else the model does."""

    attention: float
    rest: float

    @property
    def total(self) -> float:
        return self.attention + self.rest


@dataclass(frozen=True, slots=True)
class Forecast:
    """``batch`` sequences that share ``prefix`` tokens and have ``suffix`` of their own each.

    shared_keys:  how many of the prefix are read once; 0 where that does not pay
    measured:     (plain, relay) of real steps, if asked for
    pays_from:    the smallest batch for which that is predicted to pay; None: no batch
    """

    prefix: int
    batch: int
    suffix: int
    shared_keys: int
    plain: StepTime
    relay: StepTime
    measured: tuple[StepTime, StepTime] | None
    pays_from: int | None

    def __str__(self) -> str:
        lines = [
            f"{self.batch} sequences share {self.prefix} tokens and have {self.suffix} of their "
            f"own each; {self.shared_keys} tokens are read once",
            "",
            f"{'':28}{'plain':>12}{'relay':>12}{'ratio':>8}",
        ]
        columns = [("predicted", self.plain, self.relay)]
        if self.measured:
            columns.append(("measured", *self.measured))
        for name, plain, relay in columns:
            for what, a, b in (
                ("attention", plain.attention, relay.attention),
                ("step", plain.total, relay.total),
            ):
                label = f"{what}, {name}"
                lines.append(f"{label:28}{a * 1e3:>9.2f} ms{b * 1e3:>9.2f} ms{a / b:>8.2f}")
            rates = [f"{self.batch / side.total:>9.0f} /s" for side in (plain, relay)]
            lines.append(f"{f'tokens, {name}':28}{rates[0]}{rates[1]}")
        lines.append("")
        if self.pays_from is None:
            lines.append("reading this prefix once is predicted to pay at no batch size")
        else:
            lines.append(f"reading this prefix once pays from {self.pays_from} sequences on")
        return "\n".join(lines)


def forecast(
    runner: ModelRunner, relay: Relay, *, prefix: int, batch: int, suffix: int, measure: bool
) -> Forecast:
    """Predict, and with ``measure`` run, decoding steps. Raises ConfigError where nothing fits."""
    backend, layers = runner.backend, runner.decoder.config.num_layers
    page_size = backend.page_size
    longest = runner.decoder.max_len
    if prefix + suffix > longest:
        raise ConfigError(
            f"{prefix} + {suffix} tokens are more than the model's {longest}, or --max-model-len"
        )
    shared_pages = prefix // page_size
    own_pages = -(-(prefix + suffix) // page_size) - shared_pages
    needed = shared_pages + batch * own_pages if measure else batch
    if needed > runner.num_pages:
        raise ConfigError(
            f"this needs KV memory for {needed * page_size} tokens, and there is room for "
            f"{runner.num_pages * page_size}: use a larger --kv-memory"
        )
    backend.prepare_pages(runner.kv, 0, needed)
    root = Node(b"", None, b"", [], 0)
    node = Node(b"", root, b"", list(range(shared_pages)), shared_pages * page_size)

    def sequence(index: int) -> ScheduledSequence:
        first = shared_pages + index * own_pages
        params = SamplingParams(max_tokens=1)
        tokens = array("i", [0]) * (prefix + suffix)
        seq = Sequence(index, tokens, len(tokens), params, node=node)
        seq.pages = [*node.pages, *range(first, first + own_pages)]
        return ScheduledSequence(seq, len(tokens) - 1, 1, True)

    def short(index: int) -> ScheduledSequence:
        seq = Sequence(index, array("i", [0]), 1, SamplingParams(max_tokens=1), pages=[index])
        return ScheduledSequence(seq, 0, 1, True)

    scheduled = [sequence(i) for i in range(batch)]
    plan = relay.plan(scheduled)
    if plan is None:  # one sequence, or a prefix too short for a range
        own = batch * relay.costs.seconds(1, prefix + suffix)
        plan = RelayPlan([], own, own, 0, 0)
    rest = _best(runner, [short(i) for i in range(batch)], ()).rest
    measured = None
    if measure:
        measured = (_best(runner, scheduled, ()), _best(runner, scheduled, plan.ranges))
    return Forecast(
        prefix,
        batch,
        suffix,
        plan.ranges[0].end_key if plan.ranges else 0,
        StepTime(layers * plan.plain_seconds, rest),
        StepTime(layers * plan.seconds, rest),
        measured,
        relay.break_even(prefix),
    )


def _best(
    runner: ModelRunner,
    scheduled: list[ScheduledSequence],
    ranges: Items[SharedRange],
) -> StepTime:
    batch = build_batch(scheduled, runner.backend.page_size, ranges)
    runner.run(batch)
    times = []
    for _ in range(REPEATS):
        seconds, attention = runner.timed(batch)
        times.append(StepTime(attention, seconds - attention))
    return min(times, key=lambda step: step.total)
