"""int8: an answer depends on its request alone, bit for bit.

Integer products are exact and every attention range is cut at the same keys, so neither the batch,
nor the chunks of a prompt, nor the prefix cache, nor reading shared prefixes once changes the last
bit of a logit. With segments the tiles of rows that go through a layer do not either.
"""

from __future__ import annotations

import random
import shutil
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.models.quantize import quantize
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampled
from headstart.engine.sequence import Sequence
from headstart.kernels.cpu.backend import CpuBackend
from headstart.kernels.devices import instruction_sets

pytestmark = pytest.mark.covering

LENGTHS = (31, 65, 300, 700, 1333)
PARAMS = SamplingParams(max_tokens=8, temperature=0.8, seed=5, ignore_eos=True)
Answer = list[tuple[int | None, int]]


def engine(folder: Path, **settings: object) -> Engine:
    config = {"weights": "int8", "kv_memory": 1 << 28, "threads": 2, **settings}
    return Engine(EngineConfig(model_path=str(folder), **config))  # type: ignore[arg-type]


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(300, 40000) for _ in range(length)] for length in LENGTHS]


def answers(
    engine: Engine,
    each: list[list[int]],
    spans: list[list[Span]] | None = None,
    params: SamplingParams = PARAMS,
) -> list[Answer]:
    """Per prompt, run together: each token with a checksum of the logits it was drawn from.

    ``spans``: the segments of each prompt; none if left out.
    """
    found: list[Answer] = [[] for _ in each]
    sample = engine._sampler.sample

    def recorded(logits: Tensor, sequences: list[Sequence], masks: None) -> list[Sampled]:
        sampled = sample(logits, sequences, masks)
        for row, seq, one in zip(logits, sequences, sampled, strict=True):
            found[seq.id].append((one.token_id, zlib.crc32(row.numpy().tobytes())))
        return sampled

    engine._sampler.sample = recorded  # type: ignore[method-assign]
    for index, prompt in enumerate(each):
        engine.add(index, array("i", prompt), params, segments=spans[index] if spans else ())
    while engine.has_work:
        engine.step()
    engine._sampler.sample = sample  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> list[Answer]:
    one = engine(smollm2, prefix_caching=False)
    return [answers(one, [prompt])[0] for prompt in prompts()]


@pytest.mark.slow
def test_together(smollm2: Path, alone: list[Answer]) -> None:
    assert answers(engine(smollm2, prefix_caching=False), prompts()) == alone


@pytest.mark.parametrize("budget", [17, 64, 200])
@pytest.mark.slow
def test_in_chunks(smollm2: Path, alone: list[Answer], budget: int) -> None:
    assert answers(engine(smollm2, max_batched_tokens=budget), prompts()) == alone


@pytest.mark.slow
def test_from_the_cache(smollm2: Path, alone: list[Answer]) -> None:
    cached = engine(smollm2)
    assert answers(cached, prompts()) == alone
    assert answers(cached, list(reversed(prompts()))) == alone[::-1]
    assert cached.stats.cached_tokens > 2000


@pytest.mark.slow
def test_preempted(smollm2: Path, alone: list[Answer]) -> None:
    small = engine(smollm2, kv_memory=36 << 20, max_model_len=1400)
    assert answers(small, prompts() + prompts()[::-1]) == alone + alone[::-1]


@pytest.mark.slow
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
@pytest.mark.slow
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


# ------------------------------------------------------------------------------- segments

TINY_PAGE = 2 * 32 * 2 * 2 * 16 * 2
"""Bytes of a page: layers, tokens, key and value, heads, their size, bf16."""

# EngineConfig fields, and the rows that go through a layer at a time.
SEGMENTED: dict[str, tuple[dict[str, Any], int]] = {
    "together": ({"prefix_caching": False}, 512),
    "tiles of 13": ({"prefix_caching": False}, 13),
    "chunks of 17": ({"max_batched_tokens": 17}, 512),
    "chunks of 64": ({"max_batched_tokens": 64}, 512),
    "few pages": ({"kv_memory": 30 * TINY_PAGE, "max_model_len": 800}, 512),
    "on one thread": ({"threads": 1}, 512),
    "relay": ({"relay": "on", "relay_check": 3}, 512),
    "chunks of 200, tiles of 64": ({"max_batched_tokens": 200}, 64),
    "relay, tiles of 13": ({"relay": "on"}, 13),
}


def segmented(vocabulary: int) -> tuple[list[list[int]], list[list[Span]]]:
    """Prompts of one and several turns, two below one system turn; one turn of 600 tokens; a causal
    prompt."""
    draw = random.Random(11)

    def some(n: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(n)]

    system = some(290)
    prompts = [some(74), system + some(75), system + some(12), some(610), some(200)]
    prompts.append(prompts[1] + some(60))
    return prompts, [
        [(1, 41), (41, 70)],
        [(0, 290), (290, 360)],
        [(0, 290), (290, 300)],
        [(1, 601)],
        [],
        [(0, 290), (290, 360), (380, 422)],
    ]


@pytest.fixture(scope="module")
def tiny_int8(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_model("llama", max_position_embeddings=2048)
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("int8") / "model"))
    quantize(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_alone(tiny_int8: Path) -> Callable[[str], list[Answer]]:
    """By instruction set: the answers to ``segmented``, each computed alone, once."""
    known: dict[str, list[Answer]] = {}

    def get(isa: str) -> list[Answer]:
        if isa not in known:
            one = engine(tiny_int8, isa=isa, prefix_caching=False)
            each = zip(*segmented(320), strict=True)
            known[isa] = [answers(one, [prompt], [spans])[0] for prompt, spans in each]
        return known[isa]

    return get


@pytest.mark.parametrize(
    ("isa", "how"),
    [
        *((instruction_sets()[0], how) for how in SEGMENTED),
        *((isa, how) for isa in instruction_sets()[1:] for how in list(SEGMENTED)[-2:]),
    ],
)
def test_segments(
    tiny_int8: Path,
    tiny_alone: Callable[[str], list[Answer]],
    isa: str,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, rows = SEGMENTED[how]
    alone = tiny_alone(isa)
    monkeypatch.setattr(CpuBackend, "tile_rows", rows)
    other = engine(tiny_int8, isa=isa, cache_dir=str(tmp_path), **settings)
    prompts, spans = segmented(320)
    assert answers(other, prompts, spans) == alone
    assert answers(other, prompts[::-1], spans[::-1]) == alone[::-1]
    stats = other.stats
    assert (stats.cached_tokens > 1000) is settings.get("prefix_caching", True)
    assert stats.relay.largest_difference == 0.0
    if "relay" in settings:
        assert stats.relay.steps > 5


def test_segments_preempted(tiny_int8: Path) -> None:
    draw = random.Random(12)
    prompts = [[draw.randrange(3, 320) for _ in range(n)] for n in (70, 75, 80, 85)]
    spans = [[(1, 40), (40, len(prompt) - 3)] for prompt in prompts]
    params = SamplingParams(max_tokens=120, temperature=0.8, seed=5, ignore_eos=True)
    one = engine(tiny_int8, prefix_caching=False)
    alone = [answers(one, [p], [s], params)[0] for p, s in zip(prompts, spans, strict=True)]
    small = engine(tiny_int8, kv_memory=14 * TINY_PAGE, max_model_len=300, max_batched_tokens=50)
    assert answers(small, prompts, spans, params) == alone
    assert small.stats.preemptions > 0


@pytest.mark.slow
def test_segments_of_the_default_model(smollm2: Path) -> None:
    """Together, then from the cache, in chunks; the longest segment is of two tiles."""
    prompts, spans = (each[1:4] for each in segmented(40000))
    one = engine(smollm2, prefix_caching=False)
    alone = [answers(one, [p], [s])[0] for p, s in zip(prompts, spans, strict=True)]
    other = engine(smollm2, max_batched_tokens=200)
    for _ in range(2):
        assert answers(other, prompts, spans) == alone
    assert other.stats.cached_tokens > 1000  # 288 of the second, then 352, 288 and 608
