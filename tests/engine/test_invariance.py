"""int8: an answer depends on its request alone, bit for bit.

Integer products are exact and every attention range is cut at the same keys, so neither the batch,
nor the chunks of a prompt, nor the prefix cache, nor reading shared prefixes once changes the last
bit of a logit.
"""

from __future__ import annotations

import random
import zlib
from array import array
from pathlib import Path

import pytest
from torch import Tensor

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampler import Sampled
from headstart.engine.sampling_params import SamplingParams
from headstart.engine.sequence import Sequence

LENGTHS = (31, 65, 300, 700, 1333)
PARAMS = SamplingParams(max_tokens=8, temperature=0.8, seed=5, ignore_eos=True)
Answer = list[tuple[int | None, int]]


def engine(folder: Path, **settings: object) -> Engine:
    config = {"weights": "int8", "kv_memory": 1 << 28, "threads": 2, **settings}
    return Engine(EngineConfig(model_path=str(folder), **config))  # type: ignore[arg-type]


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(300, 40000) for _ in range(length)] for length in LENGTHS]


def answers(engine: Engine, each: list[list[int]]) -> list[Answer]:
    """Per prompt, run together: each token with a checksum of the logits it was drawn from."""
    found: list[Answer] = [[] for _ in each]
    sample = engine._sampler.sample

    def recorded(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
        sampled = sample(logits, sequences)
        for row, seq, one in zip(logits, sequences, sampled, strict=True):
            found[seq.id].append((one.token_id, zlib.crc32(row.numpy().tobytes())))
        return sampled

    engine._sampler.sample = recorded  # type: ignore[method-assign]
    for index, prompt in enumerate(each):
        engine.add(index, array("i", prompt), PARAMS)
    while engine.has_work:
        engine.step()
    engine._sampler.sample = sample  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> list[Answer]:
    one = engine(smollm2, prefix_caching=False)
    return [answers(one, [prompt])[0] for prompt in prompts()]


def test_together(smollm2: Path, alone: list[Answer]) -> None:
    assert answers(engine(smollm2, prefix_caching=False), prompts()) == alone


@pytest.mark.parametrize("budget", [17, 64, 200])
def test_in_chunks(smollm2: Path, alone: list[Answer], budget: int) -> None:
    assert answers(engine(smollm2, max_batched_tokens=budget), prompts()) == alone


def test_from_the_cache(smollm2: Path, alone: list[Answer]) -> None:
    cached = engine(smollm2)
    assert answers(cached, prompts()) == alone
    assert answers(cached, list(reversed(prompts()))) == alone[::-1]
    assert cached.stats.cached_tokens > 2000


def test_preempted(smollm2: Path, alone: list[Answer]) -> None:
    small = engine(smollm2, kv_memory=36 << 20, max_model_len=1400)
    assert answers(small, prompts() + prompts()[::-1]) == alone + alone[::-1]


def test_on_one_thread(smollm2: Path, alone: list[Answer]) -> None:
    assert answers(engine(smollm2, threads=1), prompts()) == alone


def nested() -> list[list[int]]:
    """Two prompts below each of two prefixes below one, and one beside them."""
    draw = random.Random(9)

    def some(n: int) -> list[int]:
        return [draw.randrange(300, 40000) for _ in range(n)]

    system = some(700)
    tenants = [system + some(333) for _ in range(2)]
    return [tenant + some(n) for tenant in tenants for n in (9, 150)] + [some(200)]


@pytest.mark.parametrize("relay", ["on", "auto"])
def test_with_prefixes_read_once(smollm2: Path, relay: str, tmp_path: Path) -> None:
    plain = engine(smollm2, prefix_caching=False)
    expected = [answers(plain, [prompt])[0] for prompt in nested()]
    shared = engine(smollm2, relay=relay, relay_check=3, cache_dir=str(tmp_path))
    assert answers(shared, nested()) == expected
    stats = shared.stats.relay
    if relay == "on":
        assert stats.ranges > 2 * stats.steps
        assert stats.steps >= 8
        assert stats.checks >= 2
    assert stats.largest_difference == 0.0
