"""int8 weights: smoothing changes nothing but ranges, the error is bounded, damage is named."""

from __future__ import annotations

import json
import math
import shutil
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decoder import Decoder
from headstart.engine.models.formats import quantize as quantizing
from headstart.engine.models.formats.float_pass import FloatPass
from headstart.engine.models.formats.int8 import read_int8, read_quality, read_smoothing
from headstart.engine.models.formats.quality import excess, windows
from headstart.engine.models.formats.quantize import (
    ALPHA,
    model_digest,
    quantize,
    quantize_rows,
    smooth_layer,
    smoothing,
)
from headstart.engine.models.parameters import Checkpoint, Matrix, read_float
from headstart.engine.models.rope import rope_tables
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.backend import RopeTable
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

TEXT_TOKENS = 700
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 1},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled text is many tokens to a tokenizer of bytes."""
    whole = quantizing.text_tokens

    def part(folder: Path, name: str, limit: int | None = None) -> list[int]:
        return whole(folder, name, min(limit or TEXT_TOKENS, TEXT_TOKENS))

    monkeypatch.setattr(quantizing, "text_tokens", part)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that may be written into. Small initial weights: activations like a real model's."""
    made = tiny_model(request.param, initializer_range=0.1, **MODELS[request.param])
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def quantised(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    made = tiny_model("llama", initializer_range=0.1, **MODELS["llama"])
    copy = Path(shutil.copytree(made, tmp_path / "model"))
    quantize(copy)
    return copy


TOKENS = torch.randint(0, 320, (100,), generator=torch.Generator().manual_seed(5)).tolist()


def logits_of(runner: ModelRunner) -> torch.Tensor:
    seq = Sequence(0, array("i", TOKENS), 100, SamplingParams(max_tokens=1), pages=[0, 1, 2, 3])
    batch = build_batch([ScheduledSequence(seq, 0, 100, False)], 32)
    return runner.run(batch.with_all_logits()).clone()


def run(folder: Path, weights: str, isa: str = "auto") -> torch.Tensor:
    backend = load_backend("cpu", isa=isa, weights=weights, threads=2)
    config = ModelConfig.from_folder(folder)
    return logits_of(ModelRunner(load_decoder(folder, config, backend, weights, 512), backend, 4))


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected."""
    return float((result - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def test_smoothing_leaves_the_float_function_alone(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    parameters = read_float(config, folder)
    layers = list(parameters.layers)
    before = [layer.down.weight.clone() for layer in layers]
    text = FloatPass(config, windows(quantizing.text_tokens(folder, "calibration")), 1)
    text.embed(parameters.embedding)
    for layer in layers:
        smooth_layer(layer, config, text.layer(layer))
    head_range = text.finish(parameters.final_norm)
    assert not torch.equal(layers[0].down.weight, before[0])
    head = parameters.head.weight.float()
    factor = smoothing(head_range, head.abs().amax(dim=0), ALPHA["head"])
    smoothed = replace(
        parameters,
        layers=iter(layers),
        final_norm=parameters.final_norm / factor,
        head=Matrix(head * factor),
    )
    backend = load_backend("reference", isa="auto", weights="f32", threads=2)
    decoder = Decoder(config, backend, smoothed, RopeTable(*rope_tables(config, 512)))
    assert error(logits_of(ModelRunner(decoder, backend, 4)), run(folder, "f32")) < 1e-5


def test_channels_that_nothing_excites_or_reads_are_left_alone() -> None:
    factor = smoothing(torch.tensor([0.0, 2.0, 8.0]), torch.tensor([3.0, 0.0, 2.0]), 0.5)
    assert factor.tolist() == [1.0, 1.0, 2.0]


def test_the_error_of_a_weight_is_at_most_half_a_step() -> None:
    weight = torch.randn(50, 33, generator=torch.Generator().manual_seed(2)) * torch.logspace(
        -6, 6, 50
    ).unsqueeze(1)
    weight[4] = 0
    rounded, scale = quantize_rows(weight)
    assert rounded.dtype is torch.int8
    restored = rounded.float() * scale[:, None]
    assert ((restored - weight).abs() <= 0.501 * scale[:, None]).all()
    assert (restored[4] == 0).all()
    assert rounded.abs().amax(dim=1)[torch.arange(50) != 4].eq(127).all()


def test_the_float_pass_is_the_model(folder: Path, references: Callable[[Path], Any]) -> None:
    """Its losses are those of transformers, and its ranges those of the model's own inputs."""
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(config, folder)
    calibrating, judged = TOKENS[:37], [TOKENS[37:90], TOKENS[80:100]]
    text = FloatPass(config, [calibrating, *judged], 1)
    final_norm = checkpoint.final_norm()
    for rows in checkpoint.embedding().split(100):
        text.embed(rows)
    ranges = [text.layer(layer) for layer in checkpoint.layers()]
    head_range = text.finish(final_norm)
    for rows in checkpoint.head_rows():
        for part in rows.split(70):
            text.head(part)
    reference = references(folder)
    expected = []
    for window in judged:
        chosen = torch.log_softmax(reference.logits(window)[:-1].double(), dim=-1)
        expected += (-chosen.gather(1, torch.tensor(window[1:])[:, None])[:, 0]).tolist()
    assert text.losses() == pytest.approx(expected, rel=1e-5, abs=1e-5)

    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: Any) -> None:
            seen[name] = inputs[0].abs().flatten(0, -2).amax(dim=0)

        return hook

    modules = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj"}
    modules |= {"gate_up": "mlp.up_proj", "down": "mlp.down_proj"}
    hooks = [
        reference.model.get_submodule(f"model.layers.{i}.{module}").register_forward_pre_hook(
            note(f"{i}.{name}")
        )
        for i in range(config.num_layers)
        for name, module in modules.items()
    ]
    hooks.append(reference.model.lm_head.register_forward_pre_hook(note("head")))
    with torch.inference_mode():
        reference.model(input_ids=torch.tensor([calibrating]))
    for hook in hooks:
        hook.remove()
    found = {f"{i}.{name}": value for i, own in enumerate(ranges) for name, value in own.items()}
    found["head"] = head_range
    assert found.keys() == seen.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, seen[name], rtol=1e-4, atol=1e-5)


def test_every_architecture_stays_close(folder: Path) -> None:
    found = quantize(folder)
    assert read_quality(folder) == found
    assert found["tokens"] == TEXT_TOKENS
    assert found["int8"] == pytest.approx(found["f32"], rel=0.05)
    assert found["int8_least"] <= found["int8"] / found["f32"] <= found["int8_most"]
    expected = run(folder, "f32")
    results = [run(folder, "int8", isa) for isa in instruction_sets()]
    for result in results:
        assert error(result, expected) < 0.05
        # bf16 KV is rounded alike everywhere; the sums differ in their order.
        assert error(result, results[0]) < 0.02
    engine = Engine(
        EngineConfig(
            model_path=str(folder), weights="int8", threads=2, kv_memory=1 << 24, max_model_len=256
        )
    )
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompts = [TOKENS[:n] for n in (1, 33, 64, 90)]
    together = engine.generate(prompts, params)
    assert engine.model.weights == "int8"
    # A row's int8 products do not depend on its neighbours.
    assert [engine.generate([prompt], params)[0] for prompt in prompts] == together


def test_known_quality_is_not_measured_again(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [Path(shutil.copytree(tiny_model("llama"), tmp_path / name)) for name in "abc"]
    known = {"tokens": 7.0, "f32": 2.0, "int8": 4.0}
    known |= {"int8_least": 1.25, "int8_most": 1.5}
    (tmp_path / "known.json").write_text(json.dumps({model_digest(copies[0]): known}))
    monkeypatch.setattr(quantizing, "KNOWN", tmp_path / "known.json")
    assert quantize(copies[0]) == known
    assert read_quality(copies[0]) == known
    weights = copies[1] / "model.safetensors"
    changed = load_file(weights)
    changed["model.norm.weight"] += 1
    save_file(changed, weights)
    assert quantize(copies[1]) != known
    # Other ids of the same text.
    tokenizer = json.loads((copies[2] / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:4]
    (copies[2] / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert quantize(copies[2]) != known


def test_a_context_shorter_than_a_window(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The windows of the text follow the model: no position and no page beyond its own."""
    made = tiny_model("llama", max_position_embeddings=80)
    copy = Path(shutil.copytree(made, tmp_path / "model"))
    assert quantize(copy)["int8"] > 1


def test_missing_weights(tiny_model: Callable[..., Path]) -> None:
    made = tiny_model("llama")
    with pytest.raises(ModelError, match="no int8 weights: pull the model again"):
        read_int8(ModelConfig.from_folder(made), made)
    assert read_quality(made) is None


def read_all(folder: Path) -> None:
    list(read_int8(ModelConfig.from_folder(folder), folder).layers)


def test_damaged_weights_are_named(quantised: Path) -> None:
    path = quantised / "int8" / "model.safetensors"
    good = path.read_bytes()
    tensors = load_file(path)
    read_all(quantised)
    for size in (0, 5, 1000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors.*truncated"):
            read_all(quantised)

    def damaged(**changes: torch.Tensor | None) -> None:
        changed = {**tensors, **changes}
        save_file({name: t for name, t in changed.items() if t is not None}, path)

    down = "layers.1.down.panels"
    damaged(**{down: None})
    with pytest.raises(ModelError, match=rf"{down} is missing"):
        read_all(quantised)
    damaged(**{down: tensors[down][:, :-4].contiguous()})
    with pytest.raises(ModelError, match=rf"{down} .* has shape"):
        read_all(quantised)
    # As long in elements, not in bytes: the kernels would read past its end.
    damaged(final_norm=tensors["final_norm"].half())
    with pytest.raises(ModelError, match=r"final_norm .*float16, not torch\.float32"):
        read_all(quantised)
    damaged(stray=torch.zeros(1))
    with pytest.raises(ModelError, match="stray"):
        read_all(quantised)


def test_the_smoothing_is_kept(folder: Path) -> None:
    """The int8 weights without it are the model's own, within half a step of rounding."""
    quantize(folder)
    config = ModelConfig.from_folder(folder)
    factors = read_smoothing(config, folder)
    originals, rounded = read_float(config, folder).layers, read_int8(config, folder).layers
    # Rows that are not divided themselves: q of qkv, gate of gate_up, all of the other two.
    rows = {"qkv": config.num_heads * config.head_dim, "gate_up": config.intermediate_size}
    for kept, original, layer in zip(factors, originals, rounded, strict=True):
        assert kept.keys() == {"qkv", "o", "gate_up", "down"}
        for name, factor in kept.items():
            assert factor.dtype is torch.float32
            assert factor.max() > 1.2 * factor.min()
            matrix, weight = getattr(layer, name), getattr(original, name).weight
            scale = matrix.scale[: matrix.out_features, None]
            error = (matrix.weight() * scale / factor - weight).abs()
            within = error <= 0.501 * scale / factor
            assert within[: rows.get(name)].all()


def test_missing_and_damaged_smoothing_is_named(quantised: Path) -> None:
    config = ModelConfig.from_folder(quantised)
    path = quantised / "int8" / "smoothing.safetensors"
    good, tensors = path.read_bytes(), load_file(path)
    name = "layers.1.down"
    for size in (0, 5, 300, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ModelError, match=r"smoothing\.safetensors: truncated"):
            read_smoothing(config, quantised)
    for changes, said in (
        ({name: tensors[name][:-1]}, rf"{name} in .*smoothing\.safetensors has shape \[95\]"),
        ({name: None}, rf"{name} is missing from .*smoothing\.safetensors"),
        ({name: tensors[name].int()}, rf"{name} in .*smoothing\.safetensors is stored as I32"),
        ({"layers.2.down": torch.ones(96)}, r"smoothing\.safetensors: holds .* layers\.2\.down"),
    ):
        changed = {**tensors, **changes}
        path.unlink()
        save_file({k: t.contiguous() for k, t in changed.items() if t is not None}, path)
        with pytest.raises(ModelError, match=said):
            read_smoothing(config, quantised)
    path.unlink()
    with pytest.raises(ModelError, match=r"smoothing\.safetensors is missing: pull the model ag"):
        read_smoothing(config, quantised)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"int8": "many"}', "null"])
def test_a_damaged_quality_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "quality.json").write_text(text)
    with pytest.raises(ModelError, match=r"quality\.json is damaged"):
        read_quality(tmp_path)


def test_the_interval_of_paired_losses() -> None:
    random = numpy.random.default_rng(0)
    inside = 0
    for _ in range(200):
        others = random.normal(3, 2, 2048)  # what is hard is hard in both
        least, most = excess((others + random.normal(0.01, 0.1, 2048)).tolist(), others.tolist())
        assert 1.004 < most / least < 1.014
        inside += least <= math.exp(0.01) <= most
    assert 180 <= inside <= 198  # 95% of them, and a little less by few runs
    assert excess([1.0] * 100, [1.0] * 100) == (0.0, math.inf)  # one run says nothing
