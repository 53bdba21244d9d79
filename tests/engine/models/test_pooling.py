"""Vectors of prompts are transformers' hidden states behind the final norm, or the mean of them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ModelError
from headstart.engine.models.config import declared_pooling
from headstart.engine.process.messages import Output
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import POOLINGS, Pooling, PoolingParams, SamplingParams


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 2, "kv_memory": 64 << 20, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def some_tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, 320, (n,), generator=generator).tolist()
    return ids


def run(engine: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    return outputs


def vector(outputs: list[Output]) -> torch.Tensor:
    [output] = outputs
    assert (output.token_ids, output.finish_reason, output.logprobs) == ([], "stop", None)
    assert output.pooled is not None
    return torch.from_numpy(np.frombuffer(output.pooled, dtype="<f4").copy())


def expected(
    reference: Any, prompt: list[int], how: Pooling, spans: Sequence[Span] = ()
) -> torch.Tensor:
    states = reference.states(prompt, spans)
    vectors: dict[Pooling, torch.Tensor] = {
        "last": states[-1],
        "mean": states.mean(0),
        "cls": states[0],
    }
    return vectors[how]


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-4) -> bool:
    return float((found - wanted).abs().max()) < within * float(wanted.abs().max())


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of 33": {"max_batched_tokens": 33},
    "uncached": {"prefix_caching": False, "max_batched_tokens": 64},
    "overlapping": {"async_scheduling": "on", "max_batched_tokens": 48},
}


@pytest.mark.parametrize("mode", MODES)
def test_as_transformers_has_them(llama: Path, references: Any, mode: str) -> None:
    """Beside others that decode, and share the prompts."""
    engine, reference = make_engine(llama, **MODES[mode]), references(llama)
    prompts = [some_tokens(n) for n in (1, 32, 70, 150)]
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(i, array("i", prompt), greedy)
        for j, how in enumerate(POOLINGS, 1):
            engine.add(10 * j + i, array("i", prompt), PoolingParams(how))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        for j, how in enumerate(POOLINGS, 1):
            assert close(vector(outputs[10 * j + i]), expected(reference, prompt, how)), how
    answers = [[t for o in outputs[i] for t in o.token_ids] for i in range(len(prompts))]
    reference.check(prompts, answers, 8)
    assert engine.stats.generation_tokens == 8 * len(prompts)


def test_what_the_cache_may_save(llama: Path, references: Any) -> None:
    """The last state needs the last row alone, the mean every one."""
    engine, prompt = make_engine(llama), some_tokens(100)
    for i, (how, cached) in enumerate({"mean": 0, "last": 96, "cls": 0}.items()):
        engine.add(i, array("i", prompt), PoolingParams(how))  # type: ignore[arg-type]
        outputs = run(engine)[i]
        assert outputs[0].cached_tokens == cached
        assert close(vector(outputs), expected(references(llama), prompt, how))  # type: ignore[arg-type]


def test_long_segments(llama: Path, references: Any) -> None:
    """Computed beside the steps of one that decodes."""
    engine = make_engine(llama, max_batched_tokens=40)
    prompt, spans = some_tokens(200), [(10, 120), (120, 190)]
    engine.add(9, array("i", some_tokens(5, 1)), SamplingParams(max_tokens=30))
    engine.step()
    for i, how in enumerate(POOLINGS):
        engine.add(i, array("i", prompt), PoolingParams(how), segments=spans)
    outputs = run(engine)
    for i, how in enumerate(POOLINGS):
        assert close(vector(outputs[i]), expected(references(llama), prompt, how, spans))


def test_an_adapter_changes_them(llama: Path, references: Any, lora: Any) -> None:
    adapter = lora.write(llama)
    engine, prompt = make_engine(llama, adapters={"other": str(adapter)}), some_tokens(50)
    engine.add(0, array("i", prompt), PoolingParams("mean"), adapter="other")
    merged = references(lora.merged(llama, adapter))
    assert close(vector(run(engine)[0]), expected(merged, prompt, "mean"))
    assert not close(expected(references(llama), prompt, "mean"), expected(merged, prompt, "mean"))


@pytest.mark.slow
def test_int8_is_near(smollm2: Path, references: Any) -> None:
    """The final norm of the int8 model is not that of the hidden states: it smooths the head."""
    engine, prompt = make_engine(smollm2, weights="int8"), list(range(100, 160))
    for i, how in enumerate(POOLINGS):
        engine.add(i, array("i", prompt), PoolingParams(how))
    outputs = run(engine)
    for i, how in enumerate(POOLINGS):
        found, wanted = vector(outputs[i]), expected(references(smollm2), prompt, how)
        assert torch.cosine_similarity(found, wanted, dim=0) > 0.99, how
        assert float(found.norm()) == pytest.approx(float(wanted.norm()), rel=0.05)


def test_aborted(llama: Path) -> None:
    engine = make_engine(llama, max_batched_tokens=32, async_scheduling="on")
    engine.add(0, array("i", some_tokens(150)), PoolingParams("mean"))
    engine.step()
    engine.abort([0])
    assert run(engine) == {}
    assert engine.stats.running == 0


def test_states_that_are_no_numbers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for that prompt, whose KV nobody else gets."""
    engine, prompt = make_engine(llama), some_tokens(70)
    norm = engine.decoder._hidden_norm
    monkeypatch.setattr(engine.decoder, "_hidden_norm", norm * float("nan"))
    engine.add(0, array("i", prompt), PoolingParams("mean"))
    [output] = run(engine)[0]
    assert (output.finish_reason, output.pooled) == ("error", None)
    monkeypatch.setattr(engine.decoder, "_hidden_norm", norm)
    engine.add(1, array("i", prompt), PoolingParams("last"))
    assert run(engine)[1][0].cached_tokens == 0


@pytest.mark.parametrize(("last", "said"), [("Normalize", False), ("Dense", True)])
def test_modules_behind_the_pooling_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: str, said: bool
) -> None:
    names = ("Transformer", "Pooling", last)
    modules = [{"idx": i, "type": f"sentence_transformers.models.{n}"} for i, n in enumerate(names)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert declared_pooling(tmp_path) is None
    assert any("vectors are made without Dense" in m for m in caplog.messages) is said
    (tmp_path / "modules.json").write_text("[3]")
    with pytest.raises(ModelError, match="not a list of modules"):
        declared_pooling(tmp_path)


@pytest.mark.parametrize(
    ("modes", "found"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode_max_tokens": True}, None),
        (None, None),
    ],
)
def test_what_a_model_declares(tmp_path: Path, modes: Any, found: Pooling | None) -> None:
    if modes is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    assert declared_pooling(tmp_path) == found
