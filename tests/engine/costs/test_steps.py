"""StepCosts: what is predicted of steps, measured at start and corrected by those that were."""

import random
import statistics
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.costs import steps
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.costs.backlog import CLASSES, Backlog
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.costs.record import StepRecord
from headstart.engine.costs.steps import (
    KNOTS,
    StepCosts,
    StepTable,
    StepWork,
    measure_steps,
)
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

ATTENTION = AttentionCosts(
    rows=[1, 64], fixed=[0.0, 0.0], cold=[1e-7, 1e-6], hot=[1e-7, 1e-6],
    footprints=[1 << 20], coldness=[1.0], key_bytes=768,
)  # fmt: skip
LAYERS = 10


class Machine:
    """Takes ``speed`` times what a step costs, and counts its time by a clock of its own."""

    def __init__(self, row: float = 0.001, weights: float = 0.006, pair: float = 1e-7) -> None:
        self.row, self.weights, self.pair = row, weights, pair
        self.now = 0.0

    def seconds(self, work: StepWork) -> float:
        linear = max(self.weights, 0.0) + self.row * work.rows
        return linear + self.pair * work.pairs + 1.5 * work.attention + 1e-4 * work.samples

    def probe(self, start: int, rows: int) -> float:
        seconds = self.seconds(StepWork(rows, rows * (start + rows / 2), 0.0, 1, 0))
        self.now += seconds
        return seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(steps.time, "perf_counter", lambda: machine.now)
    return machine


def measured(machine: Machine, longest: int = 8192) -> StepCosts:
    return StepCosts(measure_steps(machine.probe, longest, 1e-7), ATTENTION, LAYERS)


def some_work(draw: random.Random) -> StepWork:
    """A step of 1 to 64 that decode, and in half of them a chunk."""
    decoding, context = draw.choice((1, 4, 16, 64)), draw.choice((256, 2048, 16384))
    rows, pairs = decoding, 0.0
    if draw.random() < 0.5:
        chunk, start = draw.choice((32, 128, 512)), draw.choice((0, 1024, 15000))
        rows, pairs = rows + chunk, chunk * (start + chunk / 2)
    attention = LAYERS * decoding * ATTENTION.seconds(1, context)
    return StepWork(rows, pairs, attention, decoding, 0)


def errors(costs: StepCosts, machine: Machine, count: int, seed: int) -> list[float]:
    """Of so many steps in turn, each of which is then known."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        work = some_work(draw)
        seconds = machine.seconds(work) * draw.uniform(0.97, 1.03)
        found.append(abs(costs.seconds(work) / seconds - 1))
        costs.observe(work, seconds)
    return found


def test_measuring_takes_no_longer_than_it_may(machine: Machine) -> None:
    measured(machine)
    assert machine.now <= 1.0
    machine.row, machine.weights, machine.now = 0.06, 0.3, 0.0  # 8 billion weights
    table = measure_steps(machine.probe, 8192)
    assert machine.now <= 1.0
    # What was not measured is told from what was.
    assert 0.5 < table.linear[-1] / machine.seconds(StepWork(1024, 0, 0, 1, 0)) < 2


def test_what_was_measured_is_predicted(machine: Machine) -> None:
    costs = measured(machine)
    for rows in (1, 3, 16, 50, 256, 700, 2048):
        work = StepWork(rows, rows * rows / 2, 0.0, 1, 0)
        assert costs.seconds(work) == pytest.approx(machine.seconds(work), rel=0.15)
    far = StepWork(64, 64 * 4128, 0.0, 1, 0)
    assert costs.seconds(far) == pytest.approx(machine.seconds(far), rel=0.15)


def test_of_a_prompt_alone(machine: Machine) -> None:
    prefill = measured(machine).prefill
    assert prefill.per_token == pytest.approx(0.001, rel=0.1)
    assert prefill.per_pair == pytest.approx(1e-7, rel=0.1)
    assert prefill.seconds(4096, 512) == pytest.approx(0.006 + 0.512 + 0.2228, rel=0.1)


@pytest.mark.parametrize("speed", [0.3, 1.0, 3.0])
def test_steps_correct_what_is_predicted(machine: Machine, speed: float) -> None:
    """Within 15% at the median and 40% at the 95th percentile, and soon, whatever was measured."""
    costs = measured(machine)
    for name in ("row", "weights", "pair"):
        setattr(machine, name, speed * getattr(machine, name))
    errors(costs, machine, 150, seed=1)
    after = errors(costs, machine, 300, seed=2)
    assert statistics.median(after) <= 0.15
    assert statistics.quantiles(after, n=20)[-1] <= 0.4


def test_one_that_took_far_too_long_changes_little(machine: Machine) -> None:
    costs = measured(machine)
    work = StepWork(128, 128 * 500, 0.0, 1, 0)
    before = costs.seconds(work)
    costs.observe(work, 100 * before)
    assert costs.latest == (before, 100 * before)
    assert costs.seconds(work) <= 1.11 * before


@given(
    st.lists(
        st.tuples(
            st.builds(
                StepWork,
                rows=st.integers(0, 5000),
                pairs=st.floats(0, 1e9),
                attention=st.floats(0, 10),
                samples=st.integers(0, 300),
                adapted=st.integers(0, 300),
            ),
            st.floats(0, 1e6) | st.sampled_from([0.0, float("nan"), float("inf")]),
        )
    )
)
def test_whatever_steps_take_costs_are_costs(observed: list[tuple[StepWork, float]]) -> None:
    costs = measured(Machine())
    for work, seconds in observed:
        costs.observe(work, seconds)
    StepTable(**{name: getattr(costs.table, name) for name in StepTable.__struct_fields__})
    assert costs.seconds(StepWork(64, 64.0, 0.1, 1, 0)) > 0


def entry(start: int, num_tokens: int, samples: bool = False) -> ScheduledSequence:
    tokens = array("i", bytes(4 * (start + num_tokens)))
    seq = Sequence(0, tokens, len(tokens), SamplingParams(max_tokens=1))
    return ScheduledSequence(seq, start, num_tokens, samples)


def test_the_work_of_a_step() -> None:
    costs = measured(Machine())
    work = costs.work([entry(99, 1, True), entry(0, 32), entry(64, 64, True)])
    assert (work.rows, work.samples, work.adapted) == (97, 2, 0)
    assert work.pairs == 32 * 16 + 64 * 96
    assert work.attention == pytest.approx(LAYERS * ATTENTION.seconds(1, 100))
    shared = costs.work([entry(99, 1, True)] * 2, relay_seconds=0.25)
    assert (shared.attention, shared.pairs) == (LAYERS * 0.25, 0.0)


def test_a_newcomer_waits_for_those_that_are_sooner_done() -> None:
    assert Backlog().first_token(0.3) == 0.3
    backlog = Backlog.of([0.1, 0.1, 30.0], pace=1.0, long_share=0.25)
    assert backlog.total == pytest.approx(30.2)
    # A quarter of the time is that of the long one.
    assert backlog.first_token(0.3) == pytest.approx((0.2 + 0.3) / 0.75)
    assert backlog.first_token(60.0) == pytest.approx(90.2)
    slow = Backlog.of([0.1, 0.1, 30.0], pace=2.0, long_share=0.25)
    assert slow.first_token(0.3) == pytest.approx(2 * 0.5 / 0.75)
    assert Backlog.of([2 * CLASSES[-1]], 1.0, 0.25).total == pytest.approx(2 * CLASSES[-1])


def test_the_pace_is_what_passes_for_a_second_of_prompts() -> None:
    costs = measured(Machine())
    record = StepRecord(costs, follows=True)
    assert record.backlog([1.0], 0.25).pace == 1.0
    for _ in range(100):
        record.add_round(worked=0.1, seconds=0.15)
        record.add_round(worked=0.0, seconds=9.0)  # nobody's prompt waited
    assert record.backlog([1.0], 0.25).pace == pytest.approx(1.5)
    assert record.prompt_seconds([entry(0, 32), entry(99, 1, True)]) == pytest.approx(
        costs.prefill.seconds(0, 32)
    )


def test_nothing_is_predicted_where_nothing_is_known() -> None:
    record = StepRecord(None, follows=False)
    record.add([entry(0, 32)], None, 1.0)
    record.add_round(1.0, 1.0)
    assert record.prefill == PrefillCosts(0.0, 0.0, 0.0)
    assert record.prompt_seconds([entry(0, 32)]) == 0.0


def test_knots_rise() -> None:
    costs = measured(Machine())
    assert costs.table.linear == sorted(costs.table.linear)
    assert len(costs.table.linear) == len(KNOTS)
