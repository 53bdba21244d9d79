"""Engine.add: nobody's step waits while a long prompt is checked."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import RequestError
from headstart.engine.sampling.params import PoolingParams, SamplingParams

PARAMS = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=0, prompt_logprobs=1)]


class Prompt(array):  # type: ignore[type-arg]
    """Tokens that nobody may go through one by one."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("token by token")


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Engine:
    folder = str(tiny_model("llama"))
    return Engine(EngineConfig(model_path=folder, weights="f32", threads=1, kv_memory=4 << 20))


@pytest.mark.parametrize("params", [*PARAMS, PoolingParams("mean")])
def test_tokens_are_not_looked_at_one_by_one(engine: Engine, params: Any) -> None:
    prompt = Prompt("i", [3 + i % 300 for i in range(500)])
    engine.add(0, prompt, params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].finish_reason in ("length", "stop")
    assert len(prompt) == 500 + len(outputs[-1].token_ids)  # it could grow


@pytest.mark.parametrize("wrong", [320, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [0, 250, 499])
def test_a_foreign_token_is_named_wherever_it_is(engine: Engine, wrong: int, place: int) -> None:
    tokens = [3] * place + [wrong] + [999] * (499 - place)
    prompt = Prompt("i", tokens)
    with pytest.raises(RequestError) as caught:
        engine.add(0, prompt, PARAMS[0])
    assert str(caught.value) == f"token id {wrong} is not in the vocabulary of 320"
    assert caught.value.param == "prompt"
    assert not engine.has_work
