"""RelayGuard: what it compares, what it does about faults of several kinds, and when it looks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.engine import engine as engine_module
from headstart.engine.batch import Batch, SharedRange
from headstart.engine.config import EngineConfig
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.models.formats.quality import text_tokens
from headstart.engine.models.formats.quantize import quantize
from headstart.engine.process.messages import RelayStats
from headstart.engine.ranges import guard as relay_guard
from headstart.engine.ranges import shared as relay_module
from headstart.engine.ranges.guard import TOLERANCE, difference, prompt_tokens
from headstart.engine.ranges.shared import RelayPlan, shared_runs
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence
from headstart.kernels.backend import WEIGHT_FORMATS, AttentionShape
from headstart.kernels.ranges import KVRanges

PAGE = 32
PAGE_BYTES = 2 * PAGE * 2 * 2 * 16 * 4  # layers, keys, key and value, heads, head size, float32
PREFIX = [3 + i * 7 % 300 for i in range(150)]
PROMPTS = [[*PREFIX, 40 + i, 9, 60 - i] for i in range(3)] + [[5 + i % 250 for i in range(170)]]
"""Three that share four pages, and one that shares none and is as long."""
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
FREE = AttentionCosts([1, 1000], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1], [1.0], 1)
DEAR = AttentionCosts([1, 1000], [9.0, 9.0], [1.0, 1e3], [1.0, 1e3], [1], [1.0], 1)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test needs what this machine's costs are."""
    monkeypatch.setattr(engine_module, "load_costs", lambda *_: FREE)


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"backend": "cpu", "weights": "f32", "threads": 2, "max_model_len": 224}
    fields |= {"kv_memory": 8 << 20, "relay": "on", **settings}
    return Engine(EngineConfig(**{"model_path": str(folder), **fields}))


@pytest.fixture(scope="session")
def plain(llama: Path) -> list[list[int]]:
    """What the prompts are answered with where nothing is shared."""
    outputs = make_engine(llama, relay="off").generate(PROMPTS, GREEDY)
    assert len(set(map(tuple, outputs))) == len(PROMPTS)
    return outputs


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- faults

Fault = Callable[[KVRanges], KVRanges]


def fault_in_plans(engine: Engine, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Change the ranges of every batch that shares some, before the kernels see them."""
    backend = engine._runner.backend
    plan = backend.plan_attention

    def plan_attention(num_rows: int, ranges: KVRanges, shape: AttentionShape) -> Any:
        if len(ranges.rows) > num_rows:
            ranges = fault(ranges)
        return plan(num_rows, ranges, shape)

    monkeypatch.setattr(backend, "plan_attention", plan_attention)


def with_field(ranges: KVRanges, name: str, change: Callable[[np.ndarray], None]) -> KVRanges:
    fields = {field: getattr(ranges, field).copy() for field in KVRanges.__slots__}
    change(fields[name])
    return KVRanges(**fields)


def cut_short(ranges: KVRanges) -> KVRanges:
    """A shared range ends a page early: its rows never see those keys."""

    def change(visible: np.ndarray) -> None:
        visible[: ranges.row_start[1]] -= PAGE

    return with_field(ranges, "visible", change)


def pages_in_another_order(ranges: KVRanges) -> KVRanges:
    """A shared range reads the page of its first member's last keys in place of its own first."""

    def change(pages: np.ndarray) -> None:
        pages[0] = pages[-1]

    return with_field(ranges, "pages", change)


def one_row_forgotten(ranges: KVRanges) -> KVRanges:
    """The last member's rows see nothing of what is shared."""

    def change(visible: np.ndarray) -> None:
        visible[ranges.row_start[1] - 1] = 0

    return with_field(ranges, "visible", change)


def not_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over shared ranges merges an empty part into a NaN."""
    backend = engine._runner.backend
    plan, attend = backend.plan_attention, backend.attend
    shares = False

    def plan_attention(num_rows: int, ranges: KVRanges, shape: AttentionShape) -> Any:
        nonlocal shares
        shares = len(ranges.rows) > num_rows
        return plan(num_rows, ranges, shape)

    def attended(*args: Any) -> Any:
        rows = attend(*args)
        if shares:
            rows.data[0, 0] = float("nan")
        return rows

    monkeypatch.setattr(backend, "plan_attention", plan_attention)
    monkeypatch.setattr(backend, "attend", attended)


FAULTS = [cut_short, pages_in_another_order, one_row_forgotten]


def a_stranger_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner takes the sequence with other tokens for a member of each run."""

    def runs(scheduled: list[ScheduledSequence]) -> Any:
        found = shared_runs(scheduled)
        for i, entry in enumerate(scheduled):
            if list(entry.seq.token_ids[:PAGE]) == PROMPTS[3][:PAGE]:
                for run in found:
                    run.members.append(i)
        return found

    monkeypatch.setattr(relay_module, "shared_runs", runs)


# ---------------------------------------------------------------- at start-up


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_the_cpu_kernels_differ_by_nothing(
    tiny_model: Callable[..., Path], arch: str, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny_model(arch), weights=weights)
    caplog.set_level(logging.INFO, "headstart.engine.engine")
    engine.warm_up()
    assert engine.stats.relay == RelayStats(enabled=True, checks=1, largest_difference=0.0)
    assert caplog.messages[-1] == "relay: on; 2048 shared tokens are read once from 2 sequences on"
    assert errors(caplog) == []


def in_format(weights: str, model: Path, folder: Path) -> dict[str, str]:
    """Settings of an engine with such weights, of ``model``, or of a copy that has them."""
    if weights == "int8":
        shutil.copytree(model, folder)
        quantize(folder)
        return {"model_path": str(folder), "weights": weights}
    return {"backend": "gpu" if weights == "f16" else "cpu", "weights": weights}


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # Triton's interpreter
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_every_weight_format_is_checked(
    llama: Path, tmp_path: Path, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(llama, **in_format(weights, llama, tmp_path / "copy"))
    engine.warm_up()
    relay = engine.stats.relay
    assert (relay.enabled, relay.refused, relay.checks) == (True, False, 1)
    assert relay.largest_difference < TOLERANCE[weights] / 2
    assert errors(caplog) == []


def test_the_reference_backend_differs_by_rounding(llama: Path) -> None:
    engine = make_engine(llama, backend="reference")
    engine.warm_up()
    assert engine.stats.relay.checks == 1
    assert 0 < engine.stats.relay.largest_difference < 1e-5
    assert engine.stats.relay.enabled


def test_what_runs_first_finds_the_pool_as_it_should_be(
    llama: Path, plain: list[list[int]]
) -> None:
    """The check leaves its keys in pages that are nobody's."""
    engine = make_engine(llama)
    engine.warm_up()
    engine.check()
    assert engine.generate(PROMPTS, GREEDY) == plain
    relay = engine.stats.relay
    assert relay.steps == relay.ranges > 0
    engine.check()


def refuses(engine: Engine, caplog: pytest.LogCaptureFixture, when: str) -> None:
    relay = engine.stats.relay
    assert (relay.enabled, relay.refused) == (False, True)
    assert engine._relay.mode == "off"
    [error] = errors(caplog)
    assert error.startswith("relay: off, since its logits differ from those of plain attention by")
    assert when in error
    assert "\n" not in error
    assert relay.largest_difference > 1e-4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_start(
    llama: Path, plain: list[list[int]], fault: Fault, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = make_engine(llama)
    fault_in_plans(engine, monkeypatch, fault)
    engine.warm_up()
    refuses(engine, caplog, "at start-up")
    assert engine.generate(PROMPTS, GREEDY) == plain
    assert engine.stats.relay.steps == 0
    refuses(engine, caplog, "at start-up")


def test_not_a_number_is_found_at_start(
    llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = make_engine(llama)
    not_numbers(engine, monkeypatch)
    engine.warm_up()
    refuses(engine, caplog, "by inf at start-up")
    assert engine.stats.relay.largest_difference == float("inf")
    assert engine.generate(PROMPTS, GREEDY) == plain


@pytest.mark.parametrize(
    "settings",
    [
        {"max_model_len": 160, "kv_memory": 6 * PAGE_BYTES},
        {"max_model_len": 128 + 5 - 1},
        {"max_model_len": 40},
    ],
    ids=["pool", "a token too few", "much too short"],
)
def test_off_where_a_check_does_not_fit(
    llama: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(llama, **settings)
    caplog.set_level(logging.INFO, "headstart.engine.ranges.guard")
    engine.warm_up()
    assert engine.stats.relay == RelayStats(enabled=False, refused=False, checks=0)
    assert caplog.messages == ["relay: off, since nothing long enough to share fits"]
    assert len(engine.generate([[3] * 20, [3] * 21], GREEDY)[1]) == 6


@pytest.mark.parametrize(
    "settings",
    [{"max_model_len": 160, "kv_memory": 7 * PAGE_BYTES}, {"max_model_len": 128 + 5}],
    ids=["pool", "length"],
)
def test_on_where_a_check_just_fits(llama: Path, settings: dict[str, Any]) -> None:
    engine = make_engine(llama, **settings)
    engine.warm_up()
    assert engine.stats.relay == RelayStats(enabled=True, checks=1)


@pytest.mark.parametrize("settings", [{"relay": "off"}, {"prefix_caching": False}])
def test_nothing_is_checked_where_nothing_can_be_shared(
    llama: Path, settings: dict[str, Any], plain: list[list[int]]
) -> None:
    engine = make_engine(llama, relay_check=1, **settings)
    engine.warm_up()
    assert engine.generate(PROMPTS, GREEDY) == plain
    assert engine.stats.relay == RelayStats()


def test_a_mode_there_is_not(llama: Path) -> None:
    with pytest.raises(ConfigError, match="--relay must be auto, on, off; got sometimes"):
        make_engine(llama, relay="sometimes")


# ---------------------------------------------------------------- the text


def test_the_text_is_the_models_own(llama: Path) -> None:
    tokens = prompt_tokens(llama, 135, 320)
    assert tokens == text_tokens(llama, "evaluation", 135)
    assert len(set(tokens)) > 20


@pytest.mark.parametrize("vocab_size", [97, 49152])
def test_made_up_without_a_tokenizer(tmp_path: Path, vocab_size: int) -> None:
    tokens = prompt_tokens(tmp_path, 135, vocab_size)
    assert len(tokens) == 135
    assert len(set(tokens)) > 40
    assert 0 <= min(tokens) <= max(tokens) < vocab_size


def test_made_up_where_the_text_is_too_short_or_the_vocabulary_too_small(llama: Path) -> None:
    whole = text_tokens(llama, "evaluation")
    longer = prompt_tokens(llama, len(whole) + 1, 320)
    assert len(longer) == len(whole) + 1
    assert longer[: len(whole)] != whole
    small = prompt_tokens(llama, 135, 50)
    assert max(small) < 50


def test_a_model_without_a_tokenizer_starts(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    engine = make_engine(folder)
    engine.warm_up()
    assert engine.stats.relay == RelayStats(enabled=True, checks=1)


# ---------------------------------------------------------------- --relay-check


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_comes_later_is_found_by_the_next_check(
    llama: Path, plain: list[list[int]], fault: Fault, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    checked, unchecked = make_engine(llama, relay_check=1), make_engine(llama)
    for engine in (checked, unchecked):
        engine.warm_up()
        fault_in_plans(engine, monkeypatch, fault)
    # The step that shows the fault answers with the plain logits, and no other step has it.
    assert checked.generate(PROMPTS, GREEDY) == plain
    refuses(checked, caplog, "at check 2")
    assert (checked.stats.relay.checks, checked.stats.relay.steps) == (2, 1)
    assert unchecked.generate(PROMPTS, GREEDY) != plain
    assert not unchecked.stats.relay.refused


def test_a_stranger_who_reads_a_prefix_is_found(
    llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    checked, unchecked = make_engine(llama, relay_check=1), make_engine(llama)
    a_stranger_in_every_run(monkeypatch)
    for engine in (checked, unchecked):
        engine.warm_up()  # which shares among its own
    wrong = unchecked.generate(PROMPTS, GREEDY)
    assert wrong[:3] == plain[:3]
    assert wrong[3] != plain[3]
    assert checked.generate(PROMPTS, GREEDY) == plain
    refuses(checked, caplog, "at check")


def test_not_a_number_in_a_step_is_found(
    llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = make_engine(llama, relay_check=1)
    engine.warm_up()
    not_numbers(engine, monkeypatch)
    assert engine.generate(PROMPTS, GREEDY) == plain
    refuses(engine, caplog, "by inf at check 2")


@pytest.mark.parametrize("start", [True, False])
def test_logits_that_the_next_run_overwrites_are_compared(
    llama: Path, plain: list[list[int]], start: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A runner's logits are valid until its next call: here they lie in one buffer."""
    engine = make_engine(llama, relay_check=1)
    run, buffer = engine._runner.run, torch.empty(64, 320)

    def run_into_buffer(batch: Batch) -> Tensor:
        result = run(batch)
        return result if len(result) > len(buffer) else buffer[: len(result)].copy_(result)

    monkeypatch.setattr(engine._runner, "run", run_into_buffer)
    if not start:
        engine.warm_up()
    fault_in_plans(engine, monkeypatch, cut_short)
    if start:
        engine.warm_up()
    assert engine.generate(PROMPTS, GREEDY) == plain
    refuses(engine, caplog, "at start-up" if start else "at check 2")


def test_the_largest_difference_stays(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([1e-5, 9e-5, 2e-5])
    monkeypatch.setattr(relay_guard, "difference", lambda *_: next(found, 0.0))
    engine = make_engine(llama, relay_check=1)
    engine.warm_up()
    assert engine.stats.relay.largest_difference == 1e-5
    engine.generate(PROMPTS, GREEDY)
    assert engine.stats.relay.checks > 3
    assert engine.stats.relay.largest_difference == 9e-5
    assert engine.stats.relay.enabled  # all of them below the tolerance


@pytest.mark.parametrize("every", [1, 2, 4])
def test_every_so_many_sharing_steps_are_checked(
    llama: Path, plain: list[list[int]], every: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(llama, relay_check=every)
    engine.warm_up()
    assert engine.generate(PROMPTS, GREEDY) == plain
    relay = engine.stats.relay
    assert relay.steps >= 5
    assert relay.checks == 1 + relay.steps // every
    assert relay.largest_difference == 0.0
    assert relay.enabled
    assert errors(caplog) == []


def test_only_steps_that_share_are_counted(llama: Path) -> None:
    guard = make_engine(llama, relay_check=2)._guard
    idle, sharing = (
        RelayPlan([], 1.0, 1.0, 9, 9),
        RelayPlan([SharedRange(0, 128, [0, 1])], *4 * [1]),
    )
    due = [guard.is_due(plan) for plan in (sharing, idle, None, idle, sharing, sharing, None)]
    assert due == [False] * 4 + [True] + [False] * 2
    assert guard.is_due(sharing)
    never = make_engine(llama)._guard
    assert not any(never.is_due(sharing) for _ in range(9))


def test_a_step_without_logits_has_nothing_to_compare(llama: Path) -> None:
    """Two long prompts in small chunks: most of their rows are nobody's last."""
    prompts = [[*PREFIX[:128], 9 + i, *range(20, 220)] for i in range(2)]
    settings = {"max_batched_tokens": 80, "max_model_len": 400}
    expected = make_engine(llama, relay="off", **settings).generate(prompts, GREEDY)
    engine = make_engine(llama, relay_check=1, **settings)
    engine.warm_up()
    assert engine.generate(prompts, GREEDY) == expected
    relay = engine.stats.relay
    assert 5 <= relay.checks - 1 < relay.steps
    assert relay.largest_difference == 0.0


# ---------------------------------------------------------------- what is counted


def test_steps_that_share_are_counted(
    llama: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, refrained = (make_engine(llama, relay="auto") for _ in range(2))
    assert taken.generate(PROMPTS, GREEDY) == plain
    monkeypatch.setattr(engine_module, "load_costs", lambda *_: DEAR)
    assert refrained.generate(PROMPTS, GREEDY) == plain
    a, b = taken.stats.relay, refrained.stats.relay
    assert a.steps == a.ranges > 0
    assert (b.steps, b.ranges, b.enabled) == (0, 0, True)
    assert a.predicted_seconds < a.predicted_plain_seconds
    assert b.predicted_seconds == pytest.approx(b.predicted_plain_seconds)
    # Both are counted in the same steps, of which one read four pages once and not three times.
    assert a.bytes_distinct == b.bytes_distinct > 0
    assert a.bytes_distinct <= a.bytes_read < b.bytes_read
    assert (b.bytes_read - a.bytes_read) % (4 * PAGE_BYTES) == 0
    assert 0 < a.seconds < taken.stats.step_seconds
    assert a.checks == 0


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("found", "expected", "size"),
    [
        (logits([1.0, -4.0]), logits([1.0, -4.0]), 0.0),
        (logits([1.5, -4.0]), logits([1.0, -4.0]), 0.125),
        (logits([1.0, 2.0], [0.0, 0.0]), logits([1.0, 2.0], [-1.0, 0.0]), 0.5),
        (logits([float("nan"), 1.0]), logits([1.0, 1.0]), float("inf")),
        (logits([1.0, 1.0]), logits([float("nan"), 1.0]), float("inf")),
        (logits([float("nan")]), logits([float("nan")]), float("inf")),
        (logits([float("inf"), 1.0]), logits([2.0, 1.0]), float("inf")),
        (logits([float("inf")]), logits([float("inf")]), float("inf")),
    ],
)
def test_difference(found: Tensor, expected: Tensor, size: float) -> None:
    assert difference(found, expected) == size
