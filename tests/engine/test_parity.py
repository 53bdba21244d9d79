"""The engine's greedy tokens are those of transformers' own model in float32, however it runs.

Every output is checked in one pass of the reference over prompt + output: each token must be the
reference's best one, given the tokens before it. By induction that is what its own greedy decoding
gives; ``test_equal_to_decoding_by_transformers`` does that token by token, too.

conftest.py says how near ties are dealt with.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.formats.choice import INT8_TOLERANCE
from headstart.engine.models.formats.int8 import read_quality
from headstart.engine.models.formats.quality import perplexity, text_losses, text_tokens
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.devices import instruction_sets, load_backend

pytestmark = pytest.mark.covering

F32_LOGITS = 1e-4  # largest difference of a logit, relative to the largest logit; measured 1e-5
DEFAULT_NEW, TINY_NEW = 64, 24

# How the same prompts are computed: EngineConfig fields.
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "uncached": {"prefix_caching": False},
    "chunks of 16": {"max_batched_tokens": 16},
    "chunks of 33": {"max_batched_tokens": 33},
    "few at a time": {"max_running": 3},
}

BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, heads of 32": ("llama", {"head_dim": 32}),
    "llama, heads of 64, a group of 4": ("llama", {"head_dim": 64, "num_key_value_heads": 1}),
    "llama, heads of 80, biases": ("llama", {"head_dim": 80, **BIASES}),
    "llama, heads of 128, groups of 1": ("llama", {"head_dim": 128, "num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "initializer_range": 0.2}),
    "llama, a group of 3": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "llama 3 rope": ("llama3", {}),
    "mistral": ("mistral", {}),
    "mistral, heads of 32": ("mistral", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "initializer_range": 0.2}),
    "qwen3": ("qwen3", {}),
    "qwen3, heads of 128": ("qwen3", {"head_dim": 128, "attention_bias": True}),
}

References = Callable[[Path], Any]


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 2, "kv_memory": 256 << 20, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


# ------------------------------------------------------------------------------- tiny models


def tiny_prompts() -> list[list[int]]:
    """Around the ends of pages, with shared prefixes, of one token, of many."""
    generator = torch.Generator().manual_seed(7)

    def some(n: int) -> list[int]:
        ids: list[int] = torch.randint(0, 320, (n,), generator=generator).tolist()
        return ids

    shared = some(70)
    prompts = [some(n) for n in (1, 2, 31, 32, 33, 63, 64, 65, 150)]
    prompts += [shared[:n] + some(k) for n, k in ((70, 1), (70, 9), (64, 20), (40, 3))]
    return [*prompts, shared[:64], [5] * 40]


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    arch, overrides = MODELS[request.param]
    return tiny_model(arch, **overrides)


@pytest.mark.parametrize("mode", MODES)
def test_tiny_models(tiny: Path, references: References, mode: str) -> None:
    prompts = tiny_prompts()
    engine = make_engine(tiny, **MODES[mode])
    reference = references(tiny)
    reference.check(prompts, engine.generate(prompts, greedy(TINY_NEW)), TINY_NEW)
    engine.check()
    assert (engine.stats.cached_tokens > 0) is (mode != "uncached")


def test_tiny_models_alone_then_cached(tiny: Path, references: References) -> None:
    prompts = tiny_prompts()
    engine = make_engine(tiny)
    alone = [engine.generate([prompt], greedy(TINY_NEW))[0] for prompt in prompts]
    references(tiny).check(prompts, alone, TINY_NEW)
    before = engine.stats.cached_tokens
    again = engine.generate(prompts, greedy(TINY_NEW))
    references(tiny).check(prompts, again, TINY_NEW)
    # All full pages of all prompts, but never a prompt's last token.
    assert engine.stats.cached_tokens - before == sum((len(p) - 1) // 32 * 32 for p in prompts)
    # The next turn of a conversation: prompt, answer and more, answered from the cache.
    turns = [p + o + [7, 8, 9] for p, o in zip(prompts, again, strict=True)]
    references(tiny).check(turns, engine.generate(turns, greedy(TINY_NEW)), TINY_NEW)
    engine.check()


def test_tiny_models_preempted(tiny: Path, references: References) -> None:
    prompts = [prompt for prompt in tiny_prompts() if len(prompt) < 80]
    page = load_backend("cpu", isa="auto", weights="f32", threads=2).kv_bytes_per_page(
        load_shape(tiny), ModelConfig.from_folder(tiny).num_layers
    )
    engine = make_engine(tiny, kv_memory=6 * page, max_model_len=192)
    assert engine.model.num_pages == 6
    references(tiny).check(prompts, engine.generate(prompts, greedy(70)), 70)
    assert engine.stats.preemptions > 0
    engine.check()


@pytest.mark.parametrize("where", [*instruction_sets(), "reference"])
def test_tiny_models_on_every_backend(tiny: Path, references: References, where: str) -> None:
    backend = {"backend": "reference"} if where == "reference" else {"isa": where}
    prompts = tiny_prompts()
    new = 8 if where == "reference" else TINY_NEW
    outputs = make_engine(tiny, max_batched_tokens=100, **backend).generate(prompts, greedy(new))
    references(tiny).check(prompts, outputs, new)


def test_requests_that_come_and_go(tiny: Path, references: References) -> None:
    """Added one by one while others run, every third aborted on its way."""
    prompts = tiny_prompts()
    engine = make_engine(tiny, max_batched_tokens=33)
    outputs: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    step = 0
    while step < len(prompts) or engine.has_work:
        if step < len(prompts):
            engine.add(step, array("i", prompts[step]), greedy(TINY_NEW))
        engine.abort([i for i in range(0, len(prompts), 3) if len(outputs[i]) >= 5])
        for output in engine.step():
            outputs[output.id].extend(output.token_ids)
        engine.check()
        step += 1
    kept = [i for i in range(len(prompts)) if i % 3]
    references(tiny).check([prompts[i] for i in kept], [outputs[i] for i in kept], TINY_NEW)
    aborted = list(range(0, len(prompts), 3))
    references(tiny).check([prompts[i] for i in aborted], [outputs[i][:5] for i in aborted], 5)


def test_equal_to_decoding_by_transformers(
    tiny: Path, greedy_reference: Callable[..., list[int]]
) -> None:
    """No teacher and no near ties: the tokens of transformers' own cached decoding."""
    prompts = tiny_prompts()[:8:2]
    expected = [greedy_reference(tiny, prompt, 16) for prompt in prompts]
    assert make_engine(tiny).generate(prompts, greedy(16)) == expected


# ------------------------------------------------------------------------------- logits


def load_shape(folder: Path) -> Any:
    from headstart.engine.models.runner import attention_shape

    return attention_shape(ModelConfig.from_folder(folder))


def make_runner(folder: Path, weights: str, isa: str = "auto", name: str = "cpu") -> ModelRunner:
    backend = load_backend(name, isa=isa, weights=weights, threads=2)
    decoder = load_decoder(folder, ModelConfig.from_folder(folder), backend, weights, 512)
    return ModelRunner(decoder, backend, 512 // backend.page_size)


def logits_of(runner: ModelRunner, tokens: list[int], chunk: int = 512) -> torch.Tensor:
    """Logits of every position, computed ``chunk`` tokens at a time."""
    pages = list(range(-(-len(tokens) // 32)))
    seq = Sequence(0, array("i", tokens), len(tokens), SamplingParams(max_tokens=1), pages=pages)
    parts = []
    for start in range(0, len(tokens), chunk):
        scheduled = ScheduledSequence(seq, start, min(chunk, len(tokens) - start), False)
        parts.append(runner.run(build_batch([scheduled], 32).with_all_logits()).clone())
    return torch.cat(parts)


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit."""
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("where", [*instruction_sets(), "reference"])
def test_tiny_logits(tiny: Path, references: References, where: str) -> None:
    tokens = tiny_prompts()[8]
    expected = references(tiny).logits(tokens)
    name, isa = ("reference", "auto") if where == "reference" else ("cpu", where)
    runner = make_runner(tiny, "f32", isa, name)
    for chunk in (512, 33, 1):
        assert difference(logits_of(runner, tokens, chunk), expected) < F32_LOGITS


@pytest.mark.parametrize("isa", instruction_sets())
def test_tiny_logits_in_bf16(tiny: Path, references: References, isa: str) -> None:
    tokens = tiny_prompts()[8]
    expected = references(tiny).logits(tokens)
    runner = make_runner(tiny, "bf16", isa)
    whole = logits_of(runner, tokens)
    # Root mean square: with random weights a single logit may be far off.
    error = (whole - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert float(error) < 0.08
    error = (logits_of(runner, tokens, 33) - whole).pow(2).mean().sqrt()
    assert float(error / expected.pow(2).mean().sqrt()) < 0.08


# ------------------------------------------------------------------------------- default model

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "1, 1, 2, 3, 5, 8, 13,",
    "Wie heißt die Hauptstadt von Deutschland?",
    "¿Dónde está la biblioteca? La biblioteca",
    "東京は日本の",
    '{"name": "Ada", "born": 1815, "field":',
    "<html>\n<head>\n<title>",
    "Water boils at 100 degrees because",
    "Q: What is 17 times 3?\nA:",
    "🦊 The quick brown fox 🐶",
    "aaaaaaaaaaaaaaaaaaaa",
)


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """24: short texts, two chats, a shared prefix, and English cut around the ends of pages."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    start = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
    questions = ("Give me three uses of a brick.", "Why is the sky blue? Answer in one sentence.")
    chats = [
        ids(f"{start}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        for question in questions
    ]
    english = text_tokens(smollm2, "evaluation", 2000)
    lengths = (31, 32, 33, 63, 64, 65, 128)
    pieces = [english[100 * i : 100 * i + n] for i, n in enumerate(lengths)]
    found = [ids(text) for text in TEXTS] + chats + pieces + [english[600:728] + ids(" In short,")]
    assert len(found) == 24
    return found


@pytest.fixture(scope="module")
def default_reference(smollm2: Path, references: References) -> Any:
    return references(smollm2)


@pytest.mark.slow
def test_default_model_together_then_cached(
    smollm2: Path, prompts: list[list[int]], default_reference: Any
) -> None:
    engine = make_engine(smollm2)  # 0.9 GB: of no longer than this test
    first = engine.generate(prompts, greedy(DEFAULT_NEW))
    default_reference.check(prompts, first, DEFAULT_NEW)
    before = engine.stats.cached_tokens
    again = engine.generate(prompts, greedy(DEFAULT_NEW))
    default_reference.check(prompts, again, DEFAULT_NEW)
    expected = sum((len(p) - 1) // 32 * 32 for p in prompts)
    assert engine.stats.cached_tokens - before == expected


@pytest.mark.slow
def test_default_model_alone(
    smollm2: Path, prompts: list[list[int]], default_reference: Any
) -> None:
    """A third of them: a step reads all the weights, however few rows it has."""
    some = prompts[::3]
    engine = make_engine(smollm2, prefix_caching=False)
    alone = [engine.generate([prompt], greedy(DEFAULT_NEW))[0] for prompt in some]
    default_reference.check(some, alone, DEFAULT_NEW)
    assert engine.stats.cached_tokens == 0


@pytest.mark.parametrize(("chunk", "new"), [(16, 16), (33, DEFAULT_NEW)])
@pytest.mark.slow
def test_default_model_in_chunks(
    smollm2: Path, prompts: list[list[int]], default_reference: Any, chunk: int, new: int
) -> None:
    engine = make_engine(smollm2, max_batched_tokens=chunk)
    default_reference.check(prompts, engine.generate(prompts, greedy(new)), new)


@pytest.mark.slow
def test_default_model_preempted(
    smollm2: Path, prompts: list[list[int]], default_reference: Any
) -> None:
    page = 32 * 2 * 3 * 64 * 30 * 4
    some = prompts[::3]
    engine = make_engine(smollm2, kv_memory=8 * page, max_model_len=256)
    outputs = engine.generate(some, greedy(DEFAULT_NEW))
    default_reference.check(some, outputs, DEFAULT_NEW)
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("where", [*instruction_sets()[1:], "reference"])
@pytest.mark.slow
def test_default_model_on_every_backend(
    smollm2: Path, prompts: list[list[int]], default_reference: Any, where: str
) -> None:
    backend = {"backend": "reference"} if where == "reference" else {"isa": where}
    some = prompts[1::3]
    outputs = make_engine(smollm2, **backend).generate(some, greedy(16))
    default_reference.check(some, outputs, 16)


@pytest.mark.slow
def test_default_model_logits(
    smollm2: Path, default_reference: Any, prompts: list[list[int]]
) -> None:
    tokens = text_tokens(smollm2, "evaluation", 150)
    expected = default_reference.logits(tokens)
    runner = make_runner(smollm2, "f32")
    for chunk in (512, 37):
        assert difference(logits_of(runner, tokens, chunk), expected) < F32_LOGITS


@pytest.mark.slow
def test_default_model_in_bf16_and_int8(smollm2: Path, default_reference: Any) -> None:
    """Logits near those of float32; perplexity of a part of the text as at pull time."""
    quality = read_quality(smollm2)
    assert quality is not None
    assert quality["tokens"] >= 4000
    assert quality["int8_least"] <= INT8_TOLERANCE
    assert quality["int8_most"] < 1.02
    tokens = text_tokens(smollm2, "evaluation", 512)
    expected = default_reference.logits(tokens)
    spread = expected.std(dim=-1).mean()
    found = {}
    for weights, most in (("bf16", 0.05), ("int8", 0.25)):
        runner = make_runner(smollm2, weights)
        error = (logits_of(runner, tokens) - expected).pow(2).mean().sqrt() / spread
        assert float(error) < most, weights
        found[weights] = perplexity(text_losses(runner, tokens))
    chosen = torch.log_softmax(expected[:-1].double(), dim=-1)
    exact = math.exp(-float(chosen.gather(1, torch.tensor(tokens[1:])[:, None]).mean()))
    assert found["bf16"] == pytest.approx(exact, rel=0.01)
    assert found["int8"] == pytest.approx(found["bf16"], rel=0.03)
    assert found["int8"] == pytest.approx(quality["int8"], rel=0.5)
