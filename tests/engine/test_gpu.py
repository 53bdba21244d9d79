"""The engine on the gpu backend: greedy tokens are transformers' in float32, however it runs.

Where there is no GPU, kernels run in Triton's interpreter (tests/conftest.py): slowly, so prompts
are few and short. The kernels by themselves are in tests/kernels/gpu.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.costs.attention import AttentionCosts
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.models.loading import set_up
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

NEW = 4

# Spare rows compute whatever memory held, and the interpreter is numpy, which mentions infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring an interpreter says nothing, and takes minutes."""
    known = AttentionCosts([1, 64], [1e-5, 1e-5], [1e-7, 2e-7], [1e-8, 1e-8], [1], [1.0], 256)
    monkeypatch.setattr("headstart.engine.engine.load_costs", lambda *_: known)


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields: dict[str, Any] = {
        "backend": "gpu",
        "weights": "f32",
        "kv_memory": 16 << 20,
        "max_model_len": 256,
        "max_batched_tokens": 128,
    }
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def greedy(new: int = NEW) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def some_prompts() -> list[list[int]]:
    """Around the end of a page, with a shared prefix of two pages."""
    generator = torch.Generator().manual_seed(7)

    def some(n: int) -> list[int]:
        ids: list[int] = torch.randint(0, 320, (n,), generator=generator).tolist()
        return ids

    shared = some(70)
    return [some(1), some(31), some(33), shared, shared[:66] + some(9), shared[:64] + some(3)]


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"head_dim": 64, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 80, "attention_bias": True, "mlp_bias": True}),
        ("qwen3", {}),
    ],
)
def test_greedy_tokens(
    tiny_model: Callable[..., Path], references: Any, arch: str, overrides: dict[str, Any]
) -> None:
    folder = tiny_model(arch, **overrides)
    engine = make_engine(folder)
    prompts = some_prompts()
    references(folder).check(prompts, engine.generate(prompts, greedy()), NEW)
    engine.check()
    assert engine._runner.graphs.replayed > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"relay": "on"},
        {"max_batched_tokens": 16},
        {"prefix_caching": False, "kv_memory": 1 << 20, "max_model_len": 128},
    ],
    ids=str,
)
def test_however_it_is_computed(
    tiny_model: Callable[..., Path], references: Any, settings: dict[str, Any]
) -> None:
    """Shared prefixes read once, chunks, a pool that fills up."""
    folder = tiny_model("llama")
    engine = make_engine(folder, **settings)
    prompts = some_prompts()
    reference = references(folder)
    reference.check(prompts, engine.generate(prompts, greedy()), NEW)
    again = prompts[3:]  # now from the cache, where there is one
    reference.check(again, engine.generate(again, greedy()), NEW)
    engine.check()
    if settings.get("relay") == "on":
        assert engine.stats.relay.ranges > 0
    assert (engine.stats.cached_tokens > 0) is settings.get("prefix_caching", True)


def run(engine: Engine, requests: list[tuple[list[int], dict[str, Any]]]) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in requests]
    for index, (prompt, more) in enumerate(requests):
        engine.add(index, array("i", prompt), greedy(), **more)
    while engine.has_work:
        for output in engine.step():
            outputs[output.id] += output.token_ids
    engine.check()
    return outputs


def test_segments(tiny_model: Callable[..., Path], references: Any) -> None:
    """Turns that see themselves whole, one longer than a step's budget."""
    folder = tiny_model("llama")
    engine = make_engine(folder, max_batched_tokens=32)
    prompts = [prompt for prompt in some_prompts() if len(prompt) > 30]
    spans = [[(3, len(prompt) - 5)] for prompt in prompts]
    requests = [(p, {"segments": s}) for p, s in zip(prompts, spans, strict=True)]
    references(folder).check(prompts, run(engine, requests), NEW, spans)


def test_adapters(tiny_model: Callable[..., Path], references: Any, lora: Any) -> None:
    """Rows with two adapters of different ranks and rows with none, in one batch."""
    folder = tiny_model("llama")
    paths = {
        "a": lora.write(folder, seed=1, r=4),
        "b": lora.write(folder, seed=2, r=20, targets=("q_proj", "v_proj", "down_proj")),
    }
    engine = make_engine(folder, adapters={name: str(path) for name, path in paths.items()})
    names = [None, "a", "b", "a", None, "b"]
    prompts = some_prompts()
    requests = [(p, {"adapter": n}) for p, n in zip(prompts, names, strict=True)]
    outputs = run(engine, requests)
    for prompt, name, output in zip(prompts, names, outputs, strict=True):
        merged = lora.merged(folder, paths.get(name) if name else None)
        references(merged).check([prompt], [output], NEW)


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_keys_and_values_of_eight_bits(
    tiny_model: Callable[..., Path], references: Any, kv_format: str
) -> None:
    """Not exact, but a random model's first token mostly stays: chance would be 1 in 320. What
    is computed of them is compared in tests/kernels/gpu."""
    folder = tiny_model("llama", head_dim=64)
    prompts = some_prompts()
    plain = make_engine(folder)
    exact = plain.generate(prompts, greedy(1))
    engine = make_engine(folder, kv_format=kv_format)
    answers = engine.generate(prompts, greedy(1))
    engine.check()
    first = [a[0] == b[0] for a, b in zip(exact, answers, strict=True)]
    assert sum(first) >= 4
    assert engine.model.num_pages > 3 * plain.model.num_pages


def test_memory_is_planned_from_the_device_s_own_figures(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the largest batch took when it was run, what long segments and long contexts take beside
    it, and 0.9 of what is left."""

    def peak(self: object, work: Callable[[], None]) -> int:
        work()
        return 8 << 20

    backend = "headstart.kernels.gpu.backend.GpuBackend"
    monkeypatch.setattr(f"{backend}.free_memory", lambda _: 64 << 20)
    monkeypatch.setattr(f"{backend}.peak_memory", peak)
    folder = tiny_model("llama")
    engine = make_engine(folder, kv_memory=None, max_batched_tokens=40)
    page = 2 * 32 * 2 * 2 * 16 * 4  # layers, tokens, key and value, heads, size, float32
    tokens = engine.model.max_model_len
    segment = tokens * (64 + 64) * 4  # the hidden state and the queries of each token, float32
    shape = engine.decoder.shape
    scratch = engine._runner.backend.attention_scratch(tokens, tokens, shape)
    assert 0 < scratch < 4 << 20
    assert engine.model.num_pages == int(((56 << 20) - segment - scratch) * 0.9) // page
    with pytest.raises(ConfigError, match=r"^--runahead 2 needs 2 GPUs; there are \d$"):
        make_engine(folder, max_batched_tokens=40, runahead=2)
    with pytest.raises(ConfigError, match=r"asks for 57.00 MiB; 64.00 MiB of memory"):
        make_engine(folder, max_batched_tokens=40, kv_memory=57 << 20)


def test_steps_are_larger_than_a_cpu_s(tiny_model: Callable[..., Path]) -> None:
    folder = str(tiny_model("llama"))
    for backend, expected in (("gpu", (2048, 256)), ("cpu", (512, 64)), ("reference", (512, 64))):
        setup = set_up(EngineConfig(model_path=folder, backend=backend, weights="f32"))
        assert (setup.max_batched_tokens, setup.max_running) == expected
    asked = EngineConfig(model_path=folder, backend="gpu", max_batched_tokens=40, max_running=3)
    setup = set_up(asked)
    assert (setup.max_batched_tokens, setup.max_running) == (40, 3)


def test_what_the_backend_does_not_have(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    with pytest.raises(ConfigError, match="has weights in f32, f16, bf16, not in int8"):
        make_engine(folder, weights="int8")
    with pytest.raises(ConfigError, match="the cpu backend has KV in auto, f32, bf16, not in fp8"):
        make_engine(folder, backend="cpu", kv_format="fp8")


def test_tensor_parallel(tiny_model: Callable[..., Path], references: Any) -> None:
    """Two processes with half of each layer: nothing is captured, and no steps overlap."""
    folder = tiny_model("llama", head_dim=64)
    engine = make_engine(folder, tensor_parallel=2)
    try:
        prompts = some_prompts()
        references(folder).check(prompts, engine.generate(prompts, greedy()), NEW)
        engine.check()
        assert engine._runner.graphs.replayed == 0
    finally:
        engine.close()


def test_runahead(tiny_model: Callable[..., Path], references: Any, tmp_path: Path) -> None:
    """A prompt computed by a chain of two processes; its KV travels as it lies in their pools."""
    folder = tiny_model("llama", head_dim=64)
    engine = make_engine(folder, runahead=2, runahead_min=64, cache_dir=str(tmp_path))
    try:
        chain = engine.runahead
        assert chain is not None
        deadline = time.monotonic() + 120
        while not chain.whole:
            assert time.monotonic() < deadline, str(chain)
            engine.attend_chain()
            time.sleep(0.01)
        generator = torch.Generator().manual_seed(8)
        prompts = [torch.randint(0, 320, (n,), generator=generator).tolist() for n in (150, 101)]
        references(folder).check(prompts, engine.generate(prompts, greedy()), NEW)
        engine.check()
        assert (chain.stats.prompts, chain.stats.failed) == (2, 0)
        assert chain.stats.bytes_sent > 0
    finally:
        engine.close()


def test_attention_is_waited_for_only_when_it_is_timed(tiny_model: Callable[..., Path]) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.generate([[5, 6, 7]], greedy())
    runner = engine._runner
    assert engine._overlaps
    assert runner.decoder.attention_seconds == 0.0
    seq = Sequence(0, array("i", [5, 6, 7]), 3, greedy(), pages=[0])
    batch = build_batch([ScheduledSequence(seq, 0, 3, True)], runner.backend.page_size)
    seconds, attention = runner.timed(batch)
    assert 0.0 < attention < seconds
    assert not runner.decoder.times_attention


def test_prompts_that_are_read(tiny_model: Callable[..., Path], references: Any) -> None:
    """Where the logits are, in steps that overlap, beside one that decodes."""
    folder = tiny_model("llama", head_dim=64, num_key_value_heads=1)
    engine, reference = make_engine(folder, max_batched_tokens=24), references(folder)
    prompt, scored = some_prompts()[2], SamplingParams(max_tokens=2, prompt_logprobs=1)
    engine.add(0, array("i", [5]), greedy())
    engine.add(1, array("i", prompt), scored)
    engine.add(2, array("i", prompt), PoolingParams("mean"))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    scores = next(o.prompt_logprobs for o in outputs if o.id == 1) or []
    rows = torch.log_softmax(reference.logits(prompt)[:-1].double(), dim=-1)
    for row, token, score in zip(rows, prompt[1:], scores, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert score.top[0][1] == pytest.approx(float(row.max()), abs=1e-3)
    [pooled] = [o.pooled for o in outputs if o.id == 2]
    found = torch.frombuffer(bytearray(pooled or b""), dtype=torch.float32)
    wanted = reference.states(prompt).mean(0)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3
