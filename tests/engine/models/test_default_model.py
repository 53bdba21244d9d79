"""The default model, converted: the same weights as transformers reads from its GGUF."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.gguf_weights import GGUFWeights
from headstart.engine.models.formats.quantize import known_quality
from headstart.engine.models.rope import rope_tables
from headstart.engine.models.store import fetch

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing spaces  \n\n\t tabs\r\n",
    "The year 1999 had 365 days, 12345678 seconds and 3.14159 pies.",
    "def f(x: int) -> dict[str, list[int]]:\n    return {'a': [x ** 2 for _ in range(10)]}\n",
    '<div class="x">&amp;</div> // TO-DO: x != y && z <<= 3;',
    "naïve café Ünïcödé ß ﬁ Ω ≈ ç √ ∫",
    "漢字とひらがな、カタカナ。 你好，世界！ 안녕하세요",
    "👩‍👩‍👧‍👦 🦊🇩🇪 e\u0301 \u200b\ufeff \U0001f9ff",
    "Привет, мир! مرحبا بالعالم שלום",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|><repo_name>a/b<file_sep>x<|im_end",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    "\x00\x01\x7f�",
]


@pytest.fixture(scope="module")
def gguf_path(smollm2: Path, cache_folder: Path) -> Path:
    return fetch("smollm2-135m", cache_folder)


@pytest.fixture(scope="module")
def theirs(gguf_path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )


@pytest.mark.slow
def test_weights_are_equal(smollm2: Path, theirs: Any) -> None:
    weights = GGUFWeights.linked(smollm2, ModelConfig.from_folder(smollm2))
    state = theirs.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    for name, tensor in state.items():
        assert torch.equal(weights.take(name, tuple(tensor.shape)), tensor), name
    weights.finish()


@pytest.mark.slow
def test_config_is_equal(smollm2: Path, theirs: Any) -> None:
    config = ModelConfig.from_folder(smollm2)
    assert config.num_layers == theirs.config.num_hidden_layers == 30
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.rms_norm_eps == theirs.config.rms_norm_eps
    assert config.max_position_embeddings == theirs.config.max_position_embeddings == 8192
    assert config.tie_word_embeddings
    # And <|endoftext|>, by its name: llama.cpp ends there, too.
    assert config.eos_token_ids == (theirs.config.eos_token_id, 0)
    cos, sin = rope_tables(config, 8192)
    their_cos, their_sin = theirs.model.rotary_emb(torch.zeros(1), torch.arange(8192)[None])
    # Theirs are computed in float32, whose last bit depends on the CPU.
    torch.testing.assert_close(cos, their_cos[0, :, :32], rtol=0, atol=1.2e-7)
    torch.testing.assert_close(sin, their_sin[0, :, :32], rtol=0, atol=1.2e-7)


def test_text_and_template_come_back(smollm2: Path, gguf_path: Path) -> None:
    """Which tokens they are: test_gguf_tokenizer.py."""
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    metadata = GGUFFile(gguf_path).metadata
    for text in TEXTS:
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert ours.get_vocab_size() == len(metadata["tokenizer.ggml.tokens"])
    assert (smollm2 / "chat_template.jinja").read_text() == metadata["tokenizer.chat_template"]


def test_the_default_models_quality_is_known(smollm2: Path) -> None:
    """As it is converted today: otherwise its first start takes a minute longer."""
    known = known_quality(smollm2)
    assert known is not None
    assert known["int8"] == pytest.approx(known["f32"], rel=0.05)
