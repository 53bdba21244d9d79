"""Weights and KV are two choices: every combination that is offered computes the model."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.formats import quantize as quantizing
from headstart.engine.models.runner import ModelRunner, attention_shape, load_decoder
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.cpu.backend import ACTIVATIONS, KV_FORMATS
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

TOKENS = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(5)).tolist()
MOST = {"f32": 2e-5, "bf16": 0.02, "int8": 0.05}
"""Error of logits, relative to their root mean square, by the format of weights; KV in bf16 is
among the roundings of bf16 weights."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_model("llama", initializer_range=0.1)
    copy = Path(shutil.copytree(made, tmp_path_factory.mktemp("formats") / "model"))
    with pytest.MonkeyPatch.context() as patch:
        whole = quantizing.text_tokens
        patch.setattr(
            quantizing, "text_tokens", lambda folder, name, limit=None: whole(folder, name, 300)
        )
        quantizing.quantize(copy)
    return copy


def logits_of(folder: Path, weights: str, kv_format: str, isa: str) -> torch.Tensor:
    backend = load_backend("cpu", isa=isa, weights=weights, threads=2, kv_format=kv_format)
    config = ModelConfig.from_folder(folder)
    runner = ModelRunner(load_decoder(folder, config, backend, weights, 256), backend, 5)
    params = SamplingParams(max_tokens=1)
    seq = Sequence(0, array("i", TOKENS), len(TOKENS), params, pages=list(range(5)))
    found = []
    for start in range(0, len(TOKENS), 60):  # later chunks read what earlier ones wrote
        count = min(60, len(TOKENS) - start)
        batch = build_batch([ScheduledSequence(seq, start, count, False)], 32)
        found.append(runner.run(batch.with_all_logits()).clone())
    return torch.cat(found)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("weights", ACTIVATIONS)
def test_every_combination_computes_the_model(
    folder: Path, weights: str, kv_format: str, isa: str
) -> None:
    exact = logits_of(folder, "f32", "f32", "portable")
    found = logits_of(folder, weights, kv_format, isa)
    error = float((found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
    rounded = weights if weights != "f32" or kv_format != "bf16" else "bf16"
    assert error < MOST[rounded]
    engine = Engine(
        EngineConfig(
            model_path=str(folder),
            weights=weights,
            kv_format=kv_format,
            isa=isa,
            threads=2,
            kv_memory=1 << 24,
            max_model_len=256,
        )
    )
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [TOKENS[:n] for n in (1, 33, 90, 150)]
    together = engine.generate(prompts, params)
    again = engine.generate(prompts, params)
    assert engine.stats.cached_tokens >= 32 + 64 + 128
    if weights == "int8":  # bit for bit the same answers
        assert again == together
        assert [engine.generate([prompt], params)[0] for prompt in prompts] == together
    assert [len(output) for output in together] == [12] * 4


def test_pages_are_as_large_as_their_format(folder: Path) -> None:
    shape = attention_shape(ModelConfig.from_folder(folder))
    sizes = {}
    for kv_format in KV_FORMATS:
        backend = load_backend("cpu", isa="auto", weights="int8", threads=1, kv_format=kv_format)
        sizes[kv_format] = backend.kv_bytes_per_page(shape, 2)
        assert (kv_format if kv_format != "auto" else "bf16") in backend.kv_layout(shape)
    assert sizes["f32"] == 2 * sizes["bf16"] == 2 * sizes["auto"]


@pytest.mark.parametrize(
    ("backend", "kv_format", "said"),
    [
        ("cpu", "fp8", "the cpu backend has KV in auto, f32, bf16, not in fp8"),
        ("cpu", "int8", "the cpu backend has KV in auto, f32, bf16, not in int8"),
        ("reference", "bf16", "the reference backend has KV in f32 only, not in bf16"),
    ],
)
def test_others_are_refused_at_start(folder: Path, backend: str, kv_format: str, said: str) -> None:
    weights = "f32" if backend == "reference" else "auto"
    config = EngineConfig(
        model_path=str(folder), backend=backend, weights=weights, kv_format=kv_format
    )
    with pytest.raises(ConfigError, match=said):
        Engine(config)
