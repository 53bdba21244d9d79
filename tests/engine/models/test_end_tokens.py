"""Answers end where the model's tokenizer says that they do, whoever else says nothing."""

import json
from collections.abc import Callable
from pathlib import Path

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams


def test_an_end_that_only_the_tokenizer_names(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2", eos_token_id=None)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()).get("eos_token_id") is None
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    engine = Engine(
        EngineConfig(model_path=str(folder), weights="f32", threads=2, kv_memory=64 << 20)
    )
    assert engine.model.eos_token_ids == [2]
    # <|im_end|> as soon as it may come.
    params = SamplingParams(max_tokens=20, min_tokens=3, logit_bias={2: 100.0})
    [answer] = engine.generate([[5, 6, 7]], params)
    assert len(answer) == 4
    assert answer[-1] == 2
