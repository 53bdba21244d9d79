"""int8: an answer depends on its request alone, bit for bit.

Integer products are exact and every attention range is cut at the same keys, so neither the batch,
nor the chunks of a prompt, nor the prefix cache, nor reading shared prefixes once changes the last
bit of a logit. With segments the tiles of rows that go through a layer do not either. Nor does the
instruction set, and a layer is the same in one call as in nine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.weights import TensorFile
from headstart.engine.models.formats.int8 import FOLDER, WEIGHTS, matrix_sizes, tensor_specs
from headstart.engine.models.formats.quantize import quantize
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampled
from headstart.engine.sequence import Sequence
from headstart.kernels.backend import HostMemory
from headstart.kernels.cpu.backend import CpuBackend
from headstart.kernels.devices import instruction_sets
from headstart.kernels.packing import pack_int8

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
@pytest.mark.parametrize("seconds", [0.002, 0.02])
def test_in_steps_of_a_time(smollm2: Path, alone: list[Answer], seconds: float) -> None:
    """Chunks are of whatever size fits; most of them are computed beside the steps, layer by
    layer, several at a time."""
    paced = engine(smollm2, step_time=seconds)
    assert answers(paced, prompts()) == alone
    paced.check()


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
    "steps of 3 ms": ({"step_time": 0.003}, 64),
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


# ----------------------------------------------------------------------- instruction sets

DIGESTS = {"f32": "c9647487e1e893d7", "bf16": "cb1de674780ca3df"}
"""By the format of KV: of all logits behind the answers to ``nested`` by the model of
``made_of_integers``, on any machine. They change where the arithmetic of an operation does, on
purpose, and then on all of them."""

FUSED = [isa for isa in instruction_sets() if isa != "portable" or platform.machine() == "aarch64"]
"""Those with a fused multiply-add, which attention's sums are made of (kernels/cpu/simd.h)."""
KNOWN = [
    *((isa, "f32") for isa in FUSED),
    # Its product of bf16 pairs is documented to be what the others compute, but was not seen to.
    *((isa, "bf16") for isa in FUSED if isa != "avx512_bf16"),
]

WAYS: dict[str, dict[str, Any]] = {
    "together": {"prefix_caching": False},
    "chunks of 17": {"max_batched_tokens": 17},
    "on one thread": {"threads": 1},
    "relay": {"relay": "on"},
    "an operation at a time": {},
}


@pytest.fixture(scope="module")
def made_of_integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 model none of whose numbers was computed in floating point: the same everywhere."""
    folder = tmp_path_factory.mktemp("integers")
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 144,
        "intermediate_size": 208,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 65536,  # its powers are exact
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    config = ModelConfig.from_folder(folder)
    draw = random.Random(13)

    def integers(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        values = torch.frombuffer(bytearray(draw.randbytes(size)), dtype=torch.int8)
        return values.clamp(min=-127).view(shape)

    tensors: dict[str, Tensor] = {}
    matrices = {
        f"layers.{i}.{name}": size
        for i in range(config.num_layers)
        for name, size in matrix_sizes(config).items()
    }
    for name, (rows, columns) in {**matrices, "head": (320, config.hidden_size)}.items():
        scale = (integers(rows).float() + 256) / 2**18  # about 1 / (73 * sqrt(columns))
        panels = pack_int8(integers(rows, columns), scale, None)
        tensors |= {f"{name}.panels": panels.data, f"{name}.scale": panels.scale}
        tensors[f"{name}.sums"] = panels.sums
    tensors["embedding"] = (integers(320, config.hidden_size).float() / 64).bfloat16()
    (folder / FOLDER).mkdir()
    specs = tensor_specs(config)
    file = TensorFile(folder / FOLDER / WEIGHTS, specs)
    for name, _, shape in specs:
        tensor = tensors[name] if name in tensors else 1 + integers(*shape).float() / 256
        bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        file.write(name, bits.numpy().data)
    file.close()
    return folder


def digest(found: list[Answer]) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("isa", "kv_format"), KNOWN)
@pytest.mark.parametrize("way", WAYS)
def test_on_every_instruction_set(
    made_of_integers: Path,
    isa: str,
    kv_format: str,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "an operation at a time":
        monkeypatch.setattr(CpuBackend, "fuse", HostMemory.fuse)
    settings = {"isa": isa, "kv_format": kv_format, "cache_dir": str(tmp_path)}
    other = engine(made_of_integers, **settings, **WAYS[way])
    prompts = [[token % 320 for token in prompt] for prompt in nested()]
    for _ in range(2):  # the second time from the cache
        assert digest(answers(other, prompts)) == DIGESTS[kv_format]
    assert (other.stats.cached_tokens > 1000) is WAYS[way].get("prefix_caching", True)


@pytest.mark.parametrize(("isa", "kv_format"), KNOWN)
def test_on_every_instruction_set_alone(made_of_integers: Path, isa: str, kv_format: str) -> None:
    one = engine(made_of_integers, isa=isa, kv_format=kv_format, prefix_caching=False)
    each = [[token % 320 for token in prompt] for prompt in nested()]
    assert digest([answers(one, [prompt])[0] for prompt in each]) == DIGESTS[kv_format]
