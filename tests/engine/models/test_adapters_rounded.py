"""LoRA adapters beside bf16 and int8 weights: as near to merged float32 weights as without them.

An int8 layer computes with smoothed inputs (quantize.py), which A and B have to follow.
"""

from __future__ import annotations

import copy
import random
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ModelError, RequestError
from headstart.engine.models.adapters import Adapter, load_adapter
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.formats import quantize as quantizing
from headstart.engine.models.formats.float_pass import FloatPass
from headstart.engine.models.formats.int8 import read_smoothing
from headstart.engine.models.formats.quality import windows
from headstart.engine.models.formats.quantize import quantize, smooth_layer
from headstart.engine.models.parameters import read_float
from headstart.engine.models.rope import rope_tables
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.backend import Backend, RopeTable
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "mistral": {"num_key_value_heads": 1},
    "qwen2": {},
    "qwen3": {},
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = random.Random(5).choices(range(3, 320), k=100)


@pytest.fixture(scope="module")
def short_text() -> Iterator[None]:
    """The bundled text is many tokens to a tokenizer of bytes."""
    whole = quantizing.text_tokens

    def part(folder: Path, name: str, limit: int | None = None) -> list[int]:
        return whole(folder, name, 300)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "text_tokens", part)
        yield


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    short_text: None,
) -> Path:
    """A model with int8 weights. Small initial ones: activations like a real model's."""
    made = tiny_model(request.param, initializer_range=0.1, **ARCHITECTURES[request.param])
    copy = Path(shutil.copytree(made, tmp_path_factory.mktemp("quantised") / "model"))
    quantize(copy)
    return copy


def make_runner(folder: Path, weights: str, isa: str = "auto", pages: int = 8) -> ModelRunner:
    backend = load_backend("cpu", isa=isa, weights=weights, threads=2)
    config = ModelConfig.from_folder(folder)
    return ModelRunner(load_decoder(folder, config, backend, weights, 256), backend, pages)


def load(path: Path, folder: Path, backend: Backend, weights: str) -> Adapter:
    config = ModelConfig.from_folder(folder)
    smoothing = read_smoothing(config, folder) if weights == "int8" else None
    return load_adapter("name", path, config, backend, smoothing)


def logits_of(
    runner: ModelRunner, adapter: Adapter | None = None, tokens: list[int] = TOKENS
) -> Tensor:
    pages = list(range(-(-len(tokens) // 32)))
    seq = Sequence(
        0,
        array("i", tokens),
        len(tokens),
        SamplingParams(max_tokens=1),
        pages=pages,
        adapter=adapter,
    )
    batch = build_batch([ScheduledSequence(seq, 0, len(tokens), False)], 32)
    return runner.run(batch.with_all_logits()).clone()


def error(result: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected."""
    return float((result - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


# ------------------------------------------------------------------------------- smoothing


@pytest.mark.parametrize("target", [*TARGETS, "all"])
def test_in_smoothed_layers_adapters_are_the_same_function(
    folder: Path, lora: Any, references: Callable[[Path], Any], target: str
) -> None:
    """Smoothed weights before they are rounded, in float32: nothing but the last bits differ."""
    config = ModelConfig.from_folder(folder)
    parameters = read_float(config, folder)
    layers = list(parameters.layers)
    text = FloatPass(config, windows(quantizing.text_tokens(folder, "calibration")), 1)
    text.embed(parameters.embedding)
    factors = [smooth_layer(layer, config, text.layer(layer)) for layer in layers]
    assert factors[1].keys() == read_smoothing(config, folder)[1].keys()
    for smoothed, stored in zip(factors, read_smoothing(config, folder), strict=True):
        for name, factor in smoothed.items():
            assert torch.allclose(factor, stored[name], rtol=1e-4)
            assert factor.max() > 1.2 * factor.min()  # not all alike: who ignores them fails here
    parameters.layers = iter(layers)
    backend = load_backend("reference", isa="auto", weights="f32", threads=2)
    decoder = Decoder(config, backend, parameters, RopeTable(*rope_tables(config, 256)))
    path = lora.write(folder, size=0.5, targets=TARGETS if target == "all" else (target,))
    adapter = load_adapter("name", path, config, backend, factors)
    expected = references(lora.merged(folder, path)).logits(TOKENS)
    assert error(references(folder).logits(TOKENS), expected) > 0.01
    assert error(logits_of(ModelRunner(decoder, backend, 4), adapter), expected) < 2e-5


# ------------------------------------------------------------------------------- tiny models


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_as_near_to_float32_as_without(
    folder: Path, lora: Any, references: Callable[[Path], Any], weights: str
) -> None:
    path = lora.write(folder, size=0.5)
    merged = lora.merged(folder, path)
    base, expected = (references(f).logits(TOKENS) for f in (folder, merged))
    assert error(base, expected) > 0.3
    for isa in instruction_sets():
        runner = make_runner(folder, weights, isa)
        adapter = load(path, folder, runner.backend, weights)
        without = error(logits_of(runner), base)
        assert without < 0.05
        assert error(logits_of(runner, adapter), expected) < 2 * without


def test_near_to_the_merged_model_in_int8(
    folder: Path, lora: Any, references: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Weights of both are rounded, the terms of one to bf16: errors of the same size."""
    path = lora.write(folder, size=0.5)
    merged = Path(shutil.copytree(lora.merged(folder, path), tmp_path / "merged"))
    quantize(merged)
    expected = references(lora.merged(folder, path)).logits(TOKENS)
    runner = make_runner(folder, "int8")
    result = logits_of(runner, load(path, folder, runner.backend, "int8"))
    rounded = logits_of(make_runner(merged, "int8"))
    assert error(result, expected) < 1.5 * error(rounded, expected)
    assert error(result, rounded) < 0.06


def checksums(engine: Engine, requests: list[tuple[list[int], str | None]]) -> list[list[int]]:
    """Per request, run together: a checksum of the logits of each of its tokens."""
    found: list[list[int]] = [[] for _ in requests]
    sample = engine._sampler.sample

    def recorded(logits: Tensor, sequences: list[Sequence], masks: None) -> Any:
        for row, seq in zip(logits, sequences, strict=True):
            found[seq.id].append(zlib.crc32(row.numpy().tobytes()))
        return sample(logits, sequences, masks)

    engine._sampler.sample = recorded  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for i, (prompt, adapter) in enumerate(requests):
        engine.add(i, array("i", prompt), params, adapter=adapter)
    while engine.has_work:
        engine.step()
    engine._sampler.sample = sample  # type: ignore[method-assign]
    return found


def test_an_int8_answer_does_not_depend_on_the_batch(folder: Path, lora: Any) -> None:
    """Bit for bit: alone, beside others, in chunks, from the cache."""

    def engine(**settings: Any) -> Engine:
        fields = {"weights": "int8", "threads": 2, "kv_memory": 1 << 24, "max_model_len": 256}
        paths = {
            name: str(lora.write(folder, seed=i, r=4 + 9 * i, size=0.5))
            for i, name in enumerate("abc")
        }
        return Engine(
            EngineConfig(model_path=str(folder), adapters=paths, **{**fields, **settings})
        )

    draw = random.Random(3)
    names = ("a", None, "b", "a", "c", "b", None, "a", "c")
    requests = [([draw.randrange(3, 320) for _ in range(9 * i + 1)], names[i]) for i in range(9)]
    one = engine(prefix_caching=False)
    alone = [checksums(one, [request])[0] for request in requests]
    together = engine()
    assert checksums(together, requests) == alone
    assert checksums(together, requests[::-1]) == alone[::-1]
    assert together.stats.cached_tokens > 0
    assert checksums(engine(max_batched_tokens=17, threads=1), requests) == alone


def test_without_its_smoothing_an_int8_model_takes_no_adapter(
    folder: Path, lora: Any, tmp_path: Path
) -> None:
    """As converted by an earlier version; it serves requests without adapters as before."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "int8" / "smoothing.safetensors").unlink()
    config = EngineConfig(model_path=str(copy), weights="int8", kv_memory=1 << 24)
    engine = Engine(config)
    with pytest.raises(ModelError, match=r"smoothing\.safetensors is missing: pull the model"):
        engine.load_adapter("name", str(lora.write(folder, size=0.5)))
    assert engine.generate([TOKENS], SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="no adapter called 'name'"):
        engine.add(0, array("i", TOKENS), SamplingParams(max_tokens=2), adapter="name")


# ------------------------------------------------------------------------------- default model


@pytest.mark.slow
def test_the_default_model(
    smollm2: Path,
    lora: Any,
    references: Callable[[Path], Any],
    merge_into: Callable[[Any, Path], None],
) -> None:
    """Logits near those of transformers in float32 with merged weights."""
    path = lora.write(smollm2, seed=1, r=16, lora_alpha=32, size=0.5)
    tokens = quantizing.text_tokens(smollm2, "evaluation")[:120]
    model = copy.deepcopy(references(smollm2).model)

    def reference(model: Any) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
        return logits

    base = reference(model)
    merge_into(model, path)
    expected = reference(model)
    del model  # hundreds of megabytes
    spread = expected.std(dim=-1).mean()

    def distance(result: Tensor, expected: Tensor) -> float:
        return float((result - expected).pow(2).mean().sqrt() / spread)

    assert distance(base, expected) > 0.5
    for weights, most in (("bf16", 0.05), ("int8", 0.25)):  # as in test_parity.py
        runner = make_runner(smollm2, weights)
        adapter = load(path, smollm2, runner.backend, weights)
        near = distance(logits_of(runner, adapter, tokens), expected)
        assert near < most, weights
        assert near < 1.5 * distance(logits_of(runner, None, tokens), base)
