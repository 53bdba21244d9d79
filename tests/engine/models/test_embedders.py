"""Models made for vectors: tokens that see the whole prompt, checkpoints without a head."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ModelError, RequestError
from headstart.engine.models.formats.quantize import UnsuitableError, quantize
from headstart.engine.sampling.params import POOLINGS, Pooling, PoolingParams, SamplingParams

TinyModel = Callable[..., Path]
Reshape = Callable[..., Path]


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 2, "kv_memory": 64 << 20, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def some_tokens(n: int) -> list[int]:
    ids: list[int] = torch.randint(
        3, 320, (n,), generator=torch.Generator().manual_seed(n)
    ).tolist()
    return ids


PROMPTS = [some_tokens(n) for n in (1, 2, 32, 70, 150)]


def vectors(
    engine: Engine, how: Pooling, adapter: str | None = None
) -> tuple[list[torch.Tensor], list[int]]:
    """Of each of PROMPTS; and how many of its tokens the cache had."""
    for i, prompt in enumerate(PROMPTS):
        engine.add(i, array("i", prompt), PoolingParams(how), adapter=adapter)
    outputs = {}
    while engine.has_work:
        outputs |= {output.id: output for output in engine.step()}
        engine.check()
    found = [outputs[i].pooled or b"" for i in range(len(PROMPTS))]
    rows = [torch.from_numpy(np.frombuffer(row, dtype="<f4").copy()) for row in found]
    return rows, [outputs[i].cached_tokens for i in range(len(PROMPTS))]


def expected(folder: Path, how: Pooling) -> list[torch.Tensor]:
    """transformers' in float32, by its own reading of the config."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    take: dict[Pooling, Callable[[torch.Tensor], torch.Tensor]] = {
        "last": lambda states: states[-1],
        "mean": lambda states: states.mean(0),
        "cls": lambda states: states[0],
    }
    with torch.inference_mode():
        return [
            take[how](model(input_ids=torch.tensor([prompt])).last_hidden_state[0])
            for prompt in PROMPTS
        ]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for row, right in zip(found, wanted, strict=True):
        assert float((row - right).abs().max()) < 1e-4 * float(right.abs().max())


# ------------------------------------------------------------------------------- both directions


@pytest.fixture
def bidirectional(tiny_model: TinyModel) -> Path:
    folder = tiny_model("qwen2", is_causal=False)
    assert json.loads((folder / "config.json").read_text())["is_causal"] is False
    return folder


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batched_tokens": 33},
        {"prefix_caching": False, "async_scheduling": "on", "max_batched_tokens": 64},
    ],
    ids=["whole", "longer than a step", "overlapping"],
)
def test_tokens_that_see_the_whole_prompt(
    bidirectional: Path, tiny_model: TinyModel, how: Pooling, settings: dict[str, Any]
) -> None:
    """As transformers has them, and far from what a causal mask gives; from the cache, too."""
    engine, wanted = make_engine(bidirectional, **settings), expected(bidirectional, how)
    found, _ = vectors(engine, how)
    assert_close(found, wanted)
    causal = expected(tiny_model("qwen2"), how)
    assert float((found[-1] - causal[-1]).abs().max()) > 0.1 * float(causal[-1].abs().max())
    again, cached = vectors(engine, how)
    assert_close(again, wanted)
    assert (cached[-1] > 0) is (how == "last" and settings.get("prefix_caching", True))


def test_text_from_a_bidirectional_model_is_refused(bidirectional: Path) -> None:
    engine = make_engine(bidirectional)
    assert "is_causal" in (engine.model.no_text or "")
    for params in (SamplingParams(max_tokens=4), SamplingParams(max_tokens=0, prompt_logprobs=1)):
        with pytest.raises(RequestError, match=r"does not generate text.*is_causal") as caught:
            engine.add(0, array("i", [5, 6, 7]), params)
        assert caught.value.param == "model"
    assert not engine.has_work


# ------------------------------------------------------------------------------- no head


@pytest.fixture
def headless(tiny_model: TinyModel, tmp_path: Path) -> Reshape:
    """A tiny Qwen3 without its head: ``prefix`` of the tensors' names, config's architecture."""

    def make(*, prefix: str = "", architecture: str = "Qwen3ForCausalLM") -> Path:
        folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "headless"))
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        named = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [architecture]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_without_a_head(
    headless: Reshape, tiny_model: TinyModel, prefix: str, architecture: str
) -> None:
    engine = make_engine(headless(prefix=prefix, architecture=architecture))
    engine.warm_up()
    for how in POOLINGS:
        assert_close(vectors(engine, how)[0], expected(tiny_model("qwen3"), how))
    with pytest.raises(RequestError, match=r"no language-model head \(lm_head\.weight\)"):
        engine.add(0, array("i", [5, 6, 7]), SamplingParams(max_tokens=4))
    assert not engine.has_work


def test_tied_embeddings_are_the_head_of_a_bare_checkpoint(
    tiny_model: TinyModel, references: Any, tmp_path: Path
) -> None:
    """As AutoModel saves it: it can write text."""
    whole = tiny_model("qwen3", tie_word_embeddings=True)
    transformers.AutoModel.from_pretrained(whole, dtype=torch.float32).save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    shutil.copy(whole / "tokenizer.json", tmp_path)
    engine = make_engine(tmp_path)
    assert engine.model.no_text is None
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    references(whole).check(PROMPTS, engine.generate(PROMPTS, greedy), 8)


def test_an_adapter_trained_without_a_head(
    headless: Reshape, tiny_model: TinyModel, lora: Any, tmp_path: Path
) -> None:
    """PEFT names its tensors by the model it has wrapped."""
    whole = tiny_model("qwen3")
    trained = lora.write(whole)
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    bare = {name.replace("model.model.layers", "model.layers"): t for name, t in tensors.items()}
    save_file(bare, adapter / "adapter_model.safetensors")
    engine = make_engine(headless(), adapters={"other": str(adapter)})
    assert_close(vectors(engine, "mean", "other")[0], expected(lora.merged(whole, trained), "mean"))


def test_a_missing_tensor_of_the_trunk_is_named(headless: Reshape) -> None:
    folder = headless()
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor layers\.1\.mlp\.up_proj\.weight is missing"):
        make_engine(folder)


def test_no_int8_weights_without_text_to_judge_them_by(
    headless: Reshape, bidirectional: Path
) -> None:
    for folder in (headless(), bidirectional):
        with pytest.raises(UnsuitableError, match="how well text is predicted"):
            quantize(folder)
        assert not (folder / "int8").exists()
