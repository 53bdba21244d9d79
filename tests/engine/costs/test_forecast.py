"""Forecast: figures by hand from a made-up table, steps that are really run, and the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from headstart.engine import engine as engine_module
from headstart.engine.batch import Batch
from headstart.engine.config import EngineConfig
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.costs.forecast import Forecast, StepTime
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.sampling.params import SamplingParams

LAYERS, PAGE = 2, 32
PAGE_BYTES = LAYERS * PAGE * 2 * 2 * 16 * 4
COSTS = AttentionCosts([1, 4, 8], [3.0, 5.0, 7.0], [1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1], [1.0], 1)
DEAR = AttentionCosts([1, 1000], [9.0, 9.0], [1.0, 1e3], [1.0, 1e3], [1], [1.0], 1)


@pytest.fixture
def make_engine(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    def make(costs: AttentionCosts = COSTS, **settings: Any) -> Engine:
        monkeypatch.setattr(engine_module, "load_costs", lambda *_: costs)
        fields = {"backend": "cpu", "weights": "f32", "threads": 2, "kv_memory": 8 << 20}
        folder = str(tiny_model("llama"))
        return Engine(EngineConfig(model_path=folder, **(fields | settings)))

    return make


def ask(engine: Engine, **changes: Any) -> Forecast:
    return engine.forecast(
        **({"prefix": 256, "batch": 4, "suffix": 10, "measure": False} | changes)
    )


def test_figures_by_hand(make_engine: Callable[..., Engine]) -> None:
    result = ask(make_engine())
    own = 4 * (3.0 + 10.0)
    assert (result.prefix, result.batch, result.suffix) == (256, 4, 10)
    assert result.shared_keys == 256
    assert result.plain.attention == pytest.approx(LAYERS * (4 * 256.0 + own))
    assert result.relay.attention == pytest.approx(LAYERS * (5.0 + 256.0 + own))
    assert result.plain.rest == result.relay.rest > 0
    assert result.plain.total == result.plain.attention + result.plain.rest
    assert result.measured is None
    assert result.pays_from == 2


def test_what_is_not_a_whole_step_is_each_ones_own(make_engine: Callable[..., Engine]) -> None:
    """Of 200 tokens 192 are whole pages, and 128 of these can be a range."""
    result = ask(make_engine(), prefix=200)
    own = 4 * (3.0 + 18.0)
    assert result.shared_keys == 128
    assert result.plain.attention == pytest.approx(LAYERS * (4 * 192.0 + own))
    assert result.relay.attention == pytest.approx(LAYERS * (5.0 + 128.0 + 4 * 64.0 + own))


@pytest.mark.parametrize(
    ("changes", "costs"), [({"batch": 1}, COSTS), ({"prefix": 100}, COSTS), ({}, DEAR)]
)
def test_nothing_is_read_once(
    make_engine: Callable[..., Engine], changes: dict[str, Any], costs: AttentionCosts
) -> None:
    """One sequence; less than a range; a table by which sharing never pays."""
    result = ask(make_engine(costs), measure=True, **changes)
    assert result.shared_keys == 0
    assert result.relay == result.plain
    fixed = costs.of(1)[0]
    tokens = result.prefix + result.suffix
    assert result.plain.attention == pytest.approx(LAYERS * result.batch * (fixed + tokens))
    assert result.measured is not None
    assert result.pays_from == (2 if changes == {"batch": 1} else None)


def test_without_relay_nothing_is_read_once(make_engine: Callable[..., Engine]) -> None:
    result = ask(make_engine(relay="off"))
    assert result.shared_keys == 0
    assert result.relay == result.plain


def test_such_steps_are_run_if_asked_for(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    runner, batches = engine._runner, []
    run = runner.run

    def recorded(batch: Batch) -> Tensor:
        batches.append(batch)
        return run(batch)

    monkeypatch.setattr(runner, "run", recorded)
    assert ask(engine).measured is None
    assert {max(batch.positions.tolist()) for batch in batches} == {0}
    batches.clear()
    measured = ask(engine, prefix=200, suffix=30, measure=True).measured
    assert measured is not None
    for step in measured:
        assert 0 < step.attention < step.total < 1
        assert step.rest > 0
    long = [batch for batch in batches if max(batch.positions.tolist())]
    assert {tuple(batch.positions.tolist()) for batch in long} == {(229,) * 4}
    half = len(long) // 2
    assert [len(batch.kv_ranges) for batch in long] == [4] * half + [5] * half
    plain, relay = (set(batch.kv_ranges.pages.tolist()) for batch in (long[0], long[-1]))
    assert plain == relay == set(range(6 + 4 * 2))  # the prefix's pages, and two of its own each
    assert len(long[0].kv_ranges.pages) == 4 * 8
    assert len(long[-1].kv_ranges.pages) == 4 + 4 * 4
    assert len(set(long[0].slots.tolist())) == 4


def test_a_measured_step_is_attention_and_the_rest(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    runner = engine._runner
    forward = runner.decoder.forward

    def slow(batch: Batch, kv: Any) -> Tensor:
        runner.decoder.attention_seconds += 1000.0  # more than this step can have taken
        return forward(batch, kv)

    monkeypatch.setattr(runner.decoder, "forward", slow)
    measured = ask(engine, measure=True).measured
    assert measured is not None
    for step in measured:
        assert 1000 < step.attention < 1001
        assert 0 < step.total < 1


def test_as_long_as_the_model_and_no_longer(make_engine: Callable[..., Engine]) -> None:
    assert ask(make_engine(), prefix=384, suffix=128, measure=True).measured
    with pytest.raises(ConfigError, match=r"^384 \+ 129 tokens are more than the model's 512, or"):
        ask(make_engine(), prefix=384, suffix=129)
    with pytest.raises(ConfigError, match=r"^256 \+ 10 tokens are more than .* 265, or --max-mod"):
        ask(make_engine(max_model_len=265), measure=True)


def test_as_large_as_the_pool_and_no_larger(make_engine: Callable[..., Engine]) -> None:
    small = {"kv_memory": 20 * PAGE_BYTES, "max_model_len": 320}
    assert ask(make_engine(**small), batch=12, measure=True).measured
    with pytest.raises(ConfigError) as caught:
        ask(make_engine(**small), batch=13, measure=True)
    assert str(caught.value) == (
        "this needs KV memory for 672 tokens, and there is room for 640: use a larger --kv-memory"
    )
    # What is not run needs a page for each row of the rest of the model only.
    assert ask(make_engine(**small), batch=20).measured is None
    with pytest.raises(ConfigError, match="this needs KV memory for 672 tokens"):
        ask(make_engine(**small), batch=21)


def test_the_engine_works_after_it(make_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    prompts = [[7, 8, 9] * 50, [7, 8, 9] * 50 + [3]]
    expected = make_engine().generate(prompts, params)
    engine = make_engine()
    ask(engine, measure=True)
    engine.check()
    assert engine.generate(prompts, params) == expected
    engine.check()


TEXT = """\
16 sequences share 2048 tokens and have 128 of their own each; 2048 tokens are read once

                                   plain       relay   ratio
attention, predicted            20.00 ms     5.00 ms    4.00
step, predicted                 30.00 ms    15.00 ms    2.00
tokens, predicted                 533 /s     1067 /s\
"""
MEASURED = """
attention, measured             18.00 ms     6.00 ms    3.00
step, measured                  28.00 ms    16.00 ms    1.75
tokens, measured                  571 /s     1000 /s\
"""


@pytest.mark.parametrize(
    ("pays_from", "last"),
    [
        (3, "reading this prefix once pays from 3 sequences on"),
        (None, "reading this prefix once is predicted to pay at no batch size"),
    ],
)
def test_text(pays_from: int | None, last: str) -> None:
    predicted = StepTime(0.020, 0.010), StepTime(0.005, 0.010)
    measured = StepTime(0.018, 0.010), StepTime(0.006, 0.010)
    alone = Forecast(2048, 16, 128, 2048, *predicted, None, pays_from)
    assert str(alone) == f"{TEXT}\n\n{last}"
    both = Forecast(2048, 16, 128, 2048, *predicted, measured, pays_from)
    assert str(both) == f"{TEXT}{MEASURED}\n\n{last}"
