"""What steps of a model take here: kept for the next start, as measured and as learned."""

import itertools
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.costs import model, record
from headstart.engine.costs.steps import StepTable
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


def start(folder: Path, cache: Path) -> Engine:
    return Engine(
        EngineConfig(
            model_path=str(folder),
            weights="f32",
            threads=1,
            kv_memory=16 << 20,
            step_time=0.05,
            cache_dir=str(cache),
        )
    )


def kept(cache: Path) -> StepTable:
    [path] = (cache / "machine").glob("steps-*.json")
    return msgspec.convert(msgspec.json.decode(path.read_bytes())["measured"], StepTable)


def test_measured_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(llama, tmp_path)
    assert engine.step_costs is not None
    assert engine.step_costs.table == kept(tmp_path)
    engine.close()

    def measure(*args: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(model, "chunk_seconds", measure)
    engine = start(llama, tmp_path)
    assert engine.step_costs is not None
    assert engine.step_costs.table == kept(tmp_path)


def test_what_was_learned_is_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, measured = start(llama, tmp_path), kept(tmp_path)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.generate([list(range(3, 60))], params)
    engine.close()
    assert kept(tmp_path) == measured  # a few steps are not enough
    monkeypatch.setattr(record, "LEARNED", 5)
    engine = start(llama, tmp_path)
    engine.generate([list(range(3, 60))], params)
    engine.close()
    assert engine.step_costs is not None
    assert kept(tmp_path) == engine.step_costs.table != measured


def test_a_server_is_told_what_prompts_take_and_what_waits(llama: Path, tmp_path: Path) -> None:
    engine = start(llama, tmp_path)
    prefill = engine.stats.prefill
    assert prefill.seconds(0, 100) > 0
    assert engine.stats.backlog.total == 0
    engine.add(0, array("i", range(3, 300)), SamplingParams(max_tokens=1))
    waiting = engine.stats.backlog
    assert waiting.total == pytest.approx(prefill.seconds(0, 297))
    while engine.has_work:
        engine.step()
    assert engine.stats.backlog.total == 0


def test_the_pace_is_that_of_prompts_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither steps that only decode nor a night without requests make it slower."""
    engine = start(llama, tmp_path)
    clock = itertools.count(1000.0, 0.001)
    monkeypatch.setattr("headstart.engine.engine.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(record.StepRecord, "add", lambda *_: None)  # costs stay as they are

    def pace(first: int, max_tokens: int) -> float:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        engine.generate([list(range(first, first + 57))], params)
        return engine.stats.backlog.pace

    alone = [pace(first, 1) for first in (3, 20, 40)][-1]
    assert pace(60, 50) == pytest.approx(alone, rel=0.5)
    clock = itertools.count(next(clock) + 36_000, 0.001)
    assert pace(80, 2) == pytest.approx(alone, rel=0.5)
