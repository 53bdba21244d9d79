"""RoPE tables against transformers' rotary modules, each variant in both config spellings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.rope import rope_tables

HEAD_DIM = 16
FACTORS = [1.0 + 0.25 * i for i in range(HEAD_DIM // 2)]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 16,
        "truncate": False,
    },
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": [2 * factor for factor in FACTORS],
        "original_max_position_embeddings": 128,
    },
    "longrope-factor": {
        "short_factor": FACTORS,
        "long_factor": [2 * factor for factor in FACTORS],
        "factor": 3.0,
        "original_max_position_embeddings": 128,
    },
}


def read(tmp_path: Path, variant: str, spelling: str, **extra: Any) -> ModelConfig:
    settings = {"rope_type": variant.split("-")[0], **VARIANTS[variant], **extra}
    if spelling == "rope_parameters":
        rope: dict[str, Any] = {"rope_parameters": {**settings, "rope_theta": 50000.0}}
    elif variant == "default":
        rope = {"rope_theta": 50000.0, "rope_scaling": None}
    else:
        settings["type"] = settings.pop("rope_type")
        rope = {"rope_theta": 50000.0, "rope_scaling": settings}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 4 * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        **rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_folder(tmp_path)


def assert_one_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the last bit: torch's float32 cosine, which transformers takes, has another one
    from one instruction set to the next, and ours is the nearest everywhere. A frequency that is
    off by its last bit makes hundreds of times more."""
    largest = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= 2**-23 * largest


@pytest.mark.parametrize("max_len", [100, 512])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(tmp_path: Path, variant: str, spelling: str, max_len: int) -> None:
    config = read(tmp_path, variant, spelling)
    cos, sin = rope_tables(config, max_len)
    module = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    their_cos, their_sin = module(torch.zeros(1), torch.arange(max_len)[None])
    half = HEAD_DIM // 2
    assert cos.shape == sin.shape == (max_len, half)
    assert cos.dtype == sin.dtype == torch.float32
    assert_one_rounding(cos, their_cos[0, :, :half])
    assert_one_rounding(sin, their_sin[0, :, :half])


def test_variants_differ(tmp_path: Path) -> None:
    tables = {name: rope_tables(read(tmp_path, name, "rope_parameters"), 512) for name in VARIANTS}
    same = [
        (a, b) for a in VARIANTS for b in VARIANTS if a < b and tables[a][0].equal(tables[b][0])
    ]
    assert same == [("default", "dynamic")]


def test_longrope_choice_is_made_by_length(tmp_path: Path) -> None:
    config = read(tmp_path, "longrope", "rope_parameters")
    short, _ = rope_tables(config, 128)
    long, _ = rope_tables(config, 129)
    assert not torch.equal(short, long[:128])


def test_dynamic_beyond_the_original_length_is_refused(tmp_path: Path) -> None:
    config = read(tmp_path, "dynamic", "rope_parameters")
    with pytest.raises(ModelError, match="dynamic RoPE scaling beyond 512"):
        rope_tables(config, 513)


def test_original_length_beside_the_rope_settings(tmp_path: Path) -> None:
    read(tmp_path, "yarn", "rope_parameters")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["original_max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_folder(tmp_path)
    assert config.rope.original_length == 64
    module = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    their_cos, _ = module(torch.zeros(1), torch.arange(9)[None])
    assert_one_rounding(rope_tables(config, 9)[0], their_cos[0, :, : HEAD_DIM // 2])


@pytest.mark.parametrize(
    ("variant", "broken"),
    [
        ("linear", {"factor": None}),
        ("linear", {"factor": "four"}),
        ("linear", {"factor": 0}),
        ("llama3", {"low_freq_factor": None}),
        ("yarn", {"beta_fast": "fast"}),
        ("longrope", {"short_factor": [1.0], "long_factor": [1.0, 2.0]}),
        ("longrope", {"long_factor": None}),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, variant: str, broken: dict[str, Any]) -> None:
    config = read(tmp_path, variant, "rope_parameters", **broken)
    with pytest.raises(ModelError, match=f"type {variant}") as caught:
        rope_tables(config, 512)
    assert "\n" not in str(caught.value)
