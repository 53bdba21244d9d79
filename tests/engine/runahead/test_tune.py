"""headstart runahead-tune finds cuts and keeps them, and a chain uses what was kept; placement."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.models import loading
from headstart.engine.runahead import tune as tune_module
from headstart.engine.runahead.placement import Placement
from headstart.engine.runahead.tune import await_chain, first_token_seconds, tune


@pytest.fixture
def chained(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Any]:
    """Engines with one prefill rank, a process, that keep measurements in one place."""
    started: list[Engine] = []

    def start(**options: Any) -> Engine:
        engine = Engine(
            EngineConfig(
                model_path=str(tiny_model("llama")),
                weights="f32",
                threads=1,
                kv_memory=16 << 20,
                runahead=2,
                runahead_min=64,
                cache_dir=str(tmp_path),
                **options,
            )
        )
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


def prompt(length: int) -> array[int]:
    draw = random.Random(length)
    return array("i", (draw.randrange(3, 300) for _ in range(length)))


def test_cuts_are_searched_kept_and_used(
    chained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would be measured: 96 tokens for rank 0, of 320, are best.
    monkeypatch.setattr(
        tune_module.Measurement, "seconds", lambda self, bounds: 1 + abs(bounds[1] - 96) / 1000
    )
    engine = chained()
    lines = list(tune(engine, [320], 1))
    assert lines[-2].startswith("320 tokens: best 96, 1.0")
    assert lines[-1] == f"kept in {tmp_path / 'machine'}"
    engine.close()

    again = chained(runahead_cuts="predicted")
    await_chain(again)
    first_token_seconds(again, prompt(320), 1)
    assert again.runahead.last.bounds == (0, 96, 320)
    # Between lengths, and beyond, by the same fractions.
    first_token_seconds(again, prompt(425), 2)
    assert again.runahead.last.bounds == (0, 128, 425)


def test_what_is_measured_is_the_time_of_prompts_cut_as_asked(chained: Any) -> None:
    engine = chained()
    lines = list(tune(engine, [192], 1))
    tried = {line.rpartition("cuts ")[2] for line in lines if "cuts" in line}
    assert tried <= {"32", "64", "96", "128", "160"}
    assert len(tried) > 2
    assert engine.runahead.forced_bounds is None
    assert not engine.has_work
    engine.check()


@pytest.mark.parametrize(
    ("options", "threads"),
    [({}, 8), ({"runahead": 4}, 2), ({"runahead": 16}, 1), ({"runahead": 4, "threads": 3}, 3)],
)
def test_processes_of_a_chain_share_the_cores(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
    threads: int,
) -> None:
    monkeypatch.setattr(loading, "usable_cores", lambda: 8)
    config = EngineConfig(
        model_path=str(tiny_model("llama")), weights="f32", kv_memory=16 << 20, **options
    )
    assert loading.load_model(config).threads == threads


@pytest.mark.parametrize("length", [63, 100_000])
def test_lengths_that_cannot_be(chained: Any, length: int) -> None:
    with pytest.raises(ConfigError, match=f"--lengths: {length} is not between 64 and"):
        list(tune(chained(), [length], 1))


def test_ranks_find_each_other_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[list[str]] = []

    def place(rank: int) -> Placement:
        names = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        return Placement.from_environment()

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    first, second, last = place(0), place(1), place(2)
    assert [p.serves for p in (first, second, last)] == [False, False, True]
    waiting = threading.Thread(target=lambda: found.append(last.others()))
    waiting.start()
    second.publish()
    first.publish()
    waiting.join(30)
    assert found == [[f"127.0.0.1:{port + 1}", f"127.0.0.1:{port + 2}"]]
