"""RelayAttention gives the tokens of plain attention and of transformers, whatever comes and goes.

A workload is a tree of prefixes, no, one or three levels deep, under requests that arrive and
finish at random among unrelated ones. Some share a part of a prefix only, which splits its node;
the KV pool is small, so nodes are evicted and sequences preempted.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams
from headstart.kernels.devices import instruction_sets

pytestmark = pytest.mark.covering

PART = 130
"""Tokens of a prefix's level: more than a range must have, and no multiple of a page."""


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    max_tokens: int
    aborted_at: int | None


def workload(levels: int, seed: int, vocabulary: int = 320) -> list[Arrival]:
    draw = random.Random(seed)

    def some(n: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(n)]

    prefixes: list[list[int]] = [[]]
    for _ in range(levels):
        prefixes = [p + some(PART) for p in prefixes for _ in range(2 if p or levels == 1 else 1)]
    arrivals = []
    step = 0
    for _ in range(26):
        step += draw.choice((0, 0, 0, 1, 3))
        kind = draw.random()
        prefix = draw.choice(prefixes)
        if kind < 0.15:
            prefix = []
        elif kind < 0.3:
            prefix = prefix[: draw.randint(0, len(prefix))]
        prompt = prefix + some(draw.choice((1, 5, 31, 40)))
        aborted_at = step + 4 if draw.random() < 0.1 else None
        arrivals.append(Arrival(step, prompt, draw.randint(2, 75), aborted_at))
    return arrivals


def run(engine: Engine, arrivals: list[Arrival]) -> tuple[list[list[int]], int]:
    """The output of each request, and the most prefixes read once in one step."""
    outputs: list[list[int]] = [[] for _ in arrivals]
    step = most = 0
    while step <= arrivals[-1].step or engine.has_work:
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                params = SamplingParams(
                    max_tokens=arrival.max_tokens, temperature=0.0, ignore_eos=True
                )
                engine.add(i, array("i", arrival.prompt), params)
            elif arrival.aborted_at == step:
                engine.abort([i])
        if engine.has_work:
            before = engine.stats.relay.ranges
            for output in engine.step():
                outputs[output.id].extend(output.token_ids)
            most = max(most, engine.stats.relay.ranges - before)
            engine.check()
        step += 1
    return outputs, most


Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(folder, relay, **settings)``: an engine; attention costs are measured once."""
    cache = str(tmp_path_factory.mktemp("machine"))

    def made(folder: Path, relay: str, **settings: Any) -> Engine:
        fields: dict[str, Any] = {
            "weights": "f32",
            "threads": 2,
            "max_model_len": 512,
            "max_batched_tokens": 200,
            "kv_memory": 64 << 20,
            "cache_dir": cache,
        }
        return Engine(EngineConfig(model_path=str(folder), relay=relay, **{**fields, **settings}))

    return made


@pytest.fixture(params=["llama", "qwen3"])
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param)


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_workloads(
    tiny: Path, make: Make, references: Callable[[Path], Any], levels: int, seed: int
) -> None:
    arrivals = workload(levels, seed)
    memory = 36 * make(tiny, "off")._page_bytes
    plain, none = run(make(tiny, "off", kv_memory=memory), arrivals)
    assert none == 0
    on = make(tiny, "on", kv_memory=memory, relay_check=5)
    shared, most = run(on, arrivals)
    assert shared == plain
    assert most >= levels
    stats = on.stats
    assert stats.relay.largest_difference == 0.0
    assert not stats.relay.refused
    assert stats.relay.bytes_distinct <= stats.relay.bytes_read
    # More was computed than the pool holds: nodes were evicted.
    computed = stats.prompt_tokens - stats.cached_tokens + stats.generation_tokens
    assert computed > stats.pages_total * 32
    kept = [i for i, arrival in enumerate(arrivals) if arrival.aborted_at is None]
    references(tiny).check([arrivals[i].prompt for i in kept], [shared[i] for i in kept])
    assert all(len(shared[i]) == arrivals[i].max_tokens for i in kept)


@pytest.mark.parametrize("where", [*instruction_sets(), "reference"])
def test_on_every_backend(
    tiny_model: Callable[..., Path],
    make: Make,
    references: Callable[[Path], Any],
    where: str,
) -> None:
    tiny = tiny_model("llama", num_key_value_heads=1)
    backend = {"backend": "reference"} if where == "reference" else {"isa": where}
    arrivals = [a for a in workload(3, 11) if a.aborted_at is None][:14]
    engine = make(tiny, "on", **backend)
    outputs, most = run(engine, arrivals)
    assert most >= 2
    references(tiny).check([arrival.prompt for arrival in arrivals], outputs)


def test_the_same_cold_prefix_at_once(
    tiny: Path, make: Make, references: Callable[[Path], Any]
) -> None:
    """It is computed once, and read once from the moment it is there."""
    prefix = [(7 * i + 3) % 300 for i in range(300)]
    prompts = [[*prefix, i + 5, 9] for i in range(6)]
    engine = make(tiny, "on")
    outputs = engine.generate(
        prompts, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    )
    references(tiny).check(prompts, outputs, 12)
    stats = engine.stats
    assert stats.cached_tokens == 5 * (300 // 32 * 32)
    assert stats.relay.steps >= 11


def test_preempted(tiny: Path, make: Make, references: Callable[[Path], Any]) -> None:
    prefix = [(11 * i + 3) % 300 for i in range(PART)]
    prompts = [[*prefix, i + 5] for i in range(10)]
    settings = {"kv_memory": 20 * make(tiny, "off")._page_bytes}
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    engine = make(tiny, "on", **settings)
    outputs = engine.generate(prompts, params)
    assert outputs == make(tiny, "off", **settings).generate(prompts, params)
    references(tiny).check(prompts, outputs, 100)
    assert engine.stats.preemptions > 0
    assert engine.stats.relay.steps > 50


def test_tenants_of_other_namespaces_share_nothing(tiny: Path, make: Make) -> None:
    prompt = [(5 * i + 1) % 300 for i in range(290)]
    engine = make(tiny, "on")
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for i, salt in enumerate((b"a", b"b")):
        engine.add(i, array("i", prompt), params, salt=salt)
    while engine.has_work:
        engine.step()
    assert engine.stats.relay.ranges == 0
