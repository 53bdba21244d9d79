"""The context that fits: without --max-model-len it is what the KV pool holds."""

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.kv.memory import SHORTEST_CONTEXT, plan_memory
from headstart.engine.models.loading import load_model
from headstart.engine.sampling.params import SamplingParams

LONG = 131072
"""Tokens that the model is made for."""


@pytest.fixture
def config(tiny_model: Callable[..., Path]) -> Callable[..., EngineConfig]:
    folder = str(tiny_model("llama", max_position_embeddings=LONG))

    def make(tokens: int, max_model_len: int | None = None) -> EngineConfig:
        """With a KV pool of so many tokens."""
        loaded = load_model(EngineConfig(model_path=folder, weights="f32", max_model_len=64))
        page = loaded.backend.kv_bytes_per_page(
            loaded.runner.decoder.shape, loaded.config.num_layers
        )
        size = tokens // loaded.backend.page_size * page
        return EngineConfig(
            model_path=folder, weights="f32", kv_memory=size, max_model_len=max_model_len
        )

    return make


def test_the_context_is_what_the_pool_holds(config, caplog):
    tokens = SHORTEST_CONTEXT + 1024
    with caplog.at_level("WARNING"):
        engine = Engine(config(tokens))
    try:
        assert (engine.model.max_model_len, engine.model.trained_context) == (tokens, LONG)
        assert f"context: {tokens} of the model's {LONG} tokens" in caplog.text
        # A sequence as long as that has its pages.
        new = 4
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        engine.add(1, array("i", (5 + i % 90 for i in range(tokens - new))), params)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert sum(len(output.token_ids) for output in outputs) == new
        assert outputs[-1].finish_reason == "length"
    finally:
        engine.close()


def test_what_was_asked_for_is_not_cut(config):
    with pytest.raises(ConfigError, match="one sequence of 3072 tokens needs"):
        load_model(config(2560, max_model_len=3072))


def test_a_chain_of_ranks_has_the_whole_context(config):
    with pytest.raises(ConfigError, match=f"one sequence of {LONG} tokens needs"):
        load_model(config(2560), shared=True)


def test_too_little_for_any_use(config):
    with pytest.raises(ConfigError, match=f"one sequence of {SHORTEST_CONTEXT} tokens needs"):
        load_model(config(SHORTEST_CONTEXT - 512))


def test_sizes_of_all_ranks_are_named():
    plan = plan_memory(
        available=None,
        weights=0,
        activations=0,
        scratch=0,
        bytes_per_page=1 << 20,
        page_size=32,
        kv_memory=8 << 20,
        processes=2,
    )
    assert plan.tokens == 4 * 32
    plan.require(4 * 32)
    with pytest.raises(ConfigError, match=r"129 tokens needs 10\.00 MiB .* 8\.00 MiB are there"):
        plan.require(4 * 32 + 1)
