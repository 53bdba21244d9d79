"""Outputs that tell of a prompt's progress, to those who asked; and of a request's times."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import RequestError
from headstart.engine.process.messages import Output
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.kernels.cpu.backend import CpuBackend

PROMPT = [3 + i % 300 for i in range(150)]
ASKS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_progress=True)
PLAIN = msgspec.structs.replace(ASKS, prompt_progress=False)


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Engine:
    return Engine(
        EngineConfig(
            model_path=str(tiny_model("llama", num_hidden_layers=4)),
            weights="f32",
            threads=1,
            kv_memory=4 << 20,
            max_batched_tokens=32,
        )
    )


def outputs_of(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def told(outputs: list[Output], request_id: int = 0) -> list[int]:
    return [o.computed for o in outputs if o.id == request_id and o.computed is not None]


def test_those_who_asked_are_told_of_each_chunk(engine: Engine) -> None:
    engine.add(0, array("i", PROMPT), ASKS)
    engine.add(1, array("i", [5, *PROMPT]), PLAIN)
    outputs = outputs_of(engine)
    assert told(outputs) == sorted(set(told(outputs)))
    assert len(told(outputs)) >= 4
    assert all(computed < len(PROMPT) for computed in told(outputs))
    assert told(outputs, 1) == []
    for output in outputs:
        if output.computed is not None:
            assert (output.token_ids, output.finish_reason) == ([], None)
    # All of it comes before the first token.
    first = next(i for i, o in enumerate(outputs) if o.id == 0 and o.token_ids)
    assert all(o.computed is None for o in outputs[first:])


def test_progress_begins_with_what_the_cache_has(engine: Engine) -> None:
    engine.add(0, array("i", PROMPT[:100]), PLAIN)
    outputs_of(engine)
    engine.add(1, array("i", PROMPT), ASKS)
    outputs = [output for output in outputs_of(engine) if output.computed is not None]
    assert outputs[0].cached_tokens >= 64
    assert outputs[0].computed >= outputs[0].cached_tokens


def test_a_long_segment_is_told_layer_by_layer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuBackend, "tile_rows", 8)
    engine.add(0, array("i", PROMPT), ASKS, segments=[(10, 140)])
    outputs = outputs_of(engine)
    assert any(10 < computed < 140 for computed in told(outputs))
    assert told(outputs) == sorted(set(told(outputs)))


def test_nothing_is_kept_of_those_that_ended(engine: Engine) -> None:
    engine.add(0, array("i", PROMPT), ASKS)
    engine.add(1, array("i", PROMPT), ASKS)
    engine.step()
    engine.abort([0])
    outputs = outputs_of(engine)
    assert told(outputs) == []
    engine.add(2, array("i", PROMPT), PLAIN)
    assert all(output.computed is None for output in outputs_of(engine))
    bad = msgspec.structs.replace(ASKS, grammar="start: (")
    with pytest.raises(RequestError):
        engine.generate([[5]], bad)
    assert not engine._progress._asked


@pytest.mark.parametrize("params", [PLAIN, ASKS, PoolingParams("mean")])
def test_times_come_with_the_first_output(engine: Engine, params: SamplingParams) -> None:
    for request_id in range(3):
        engine.add(request_id, array("i", [request_id + 5, *PROMPT]), params)
    outputs = [output for output in outputs_of(engine) if output.computed is None]
    for request_id in range(3):
        first, *others = [output for output in outputs if output.id == request_id]
        assert first.times is not None
        assert first.times.queue >= 0
        assert first.times.prefill > 0
        assert all(output.times is None for output in others)
    waited = [output.times.queue for output in outputs if output.times is not None]
    assert waited == sorted(waited)  # the later ones waited for the earlier ones
