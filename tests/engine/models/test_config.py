"""ModelConfig against transformers' own reading of the same config.json, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from headstart.engine.errors import ModelError
from headstart.engine.models.config import FAMILIES, ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
MODEL_TYPES = dict(zip(FAMILIES, ("llama", "mistral", "qwen2", "qwen3"), strict=True))


def read(tmp_path: Path, generation: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    architecture = values.setdefault("architectures", ["LlamaForCausalLM"])
    if isinstance(architecture, str):
        values["architectures"] = [architecture]
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **values}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(tmp_path)


def assert_like_transformers(config: ModelConfig, folder: Path) -> None:
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // config.num_heads
    assert config.head_dim == head_dim
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.max_position_embeddings == theirs.max_position_embeddings
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.bos_token_id == theirs.bos_token_id
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.type == theirs.rope_parameters["rope_type"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_have_transformers_defaults(tmp_path: Path, architecture: str) -> None:
    config = read(tmp_path, architectures=architecture, model_type=MODEL_TYPES[architecture])
    assert_like_transformers(config, tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert config.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("arch", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_saved_models_read_like_transformers(tiny_model: Any, arch: str) -> None:
    folder = tiny_model(arch)
    config = ModelConfig.from_folder(folder)
    assert_like_transformers(config, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    assert config.qkv_bias == (layer.self_attn.q_proj.bias is not None)
    assert config.o_bias == (layer.self_attn.o_proj.bias is not None)
    assert config.mlp_bias == (layer.mlp.gate_proj.bias is not None)
    assert config.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert config.sliding_window is None
    assert config.context_limit is None


def test_llama_biases(tiny_model: Any) -> None:
    config = ModelConfig.from_folder(tiny_model("llama", attention_bias=True, mlp_bias=True))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_eos_tokens_of_both_files(tmp_path: Path) -> None:
    config = read(tmp_path, {"eos_token_id": [5, 7]}, eos_token_id=7)
    assert config.eos_token_ids == (5, 7)


def test_mistral_window_limits_the_context(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        architectures="MistralForCausalLM",
        sliding_window=64,
        max_position_embeddings=512,
    )
    assert config.sliding_window == 64
    assert config.max_position_embeddings == 64
    assert config.rope.max_position_embeddings == 512
    assert config.context_limit is not None
    assert "64" in config.context_limit
    assert "512" in config.context_limit


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": True}, None),  # transformers slides from layer 28 on
        ({"use_sliding_window": True, "max_window_layers": 1}, 64),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            64,
        ),
    ],
)
def test_qwen_window_only_where_a_layer_uses_it(
    tmp_path: Path, settings: dict[str, Any], window: int | None
) -> None:
    config = read(
        tmp_path,
        architectures="Qwen2ForCausalLM",
        sliding_window=64,
        max_position_embeddings=512,
        **settings,
    )
    assert config.sliding_window == window
    assert config.max_position_embeddings == (window or 512)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architectures": "GemmaForCausalLM"}, "GemmaForCausalLM is not supported; supported are"),
        ({"architectures": []}, "unnamed (model_type"),
        ({"architectures": [3]}, "unnamed"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "5 KV heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type 'spiral'"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ],
)
def test_refused_by_name(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, **values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 7, 2**70, 1e300, float("nan"), float("inf"), "", "x"),
    *([], {}, [None], [1.5], ["x"], [[1]], {"a": {}}, {"type": []}, {"rope_type": 3}),
    *({"type": "yarn", "factor": "x"}, {"type": "llama3"}, {"rope_theta": []}),
]


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(
    ("generation", "ends"), [(None, (7, 9)), ({"eos_token_id": [8, 9]}, (8, 9, 7))]
)
def test_an_end_that_the_tokenizer_names(
    tmp_path: Path, generation: dict[str, Any] | None, ends: tuple[int, ...], as_object: bool
) -> None:
    eos = {"content": "<|im_end|>", "lstrip": False} if as_object else "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    added = [{"id": 5, "content": "<s>"}, {"id": 9, "content": "<|im_end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert read(tmp_path, generation, eos_token_id=7).eos_token_ids == ends


@pytest.mark.parametrize(
    ("settings", "tokenizer"),
    [
        ({}, {"added_tokens": [{"id": 9, "content": "</s>"}]}),
        ({"eos_token": None}, {"added_tokens": [{"id": 9, "content": "</s>"}]}),
        ({"eos_token": "</s>"}, {}),
        ({"eos_token": "</s>"}, {"added_tokens": []}),
        # Beyond the vocabulary the model was made with, so that it never comes.
        ({"eos_token": "</s>"}, {"added_tokens": [{"id": 320, "content": "</s>"}]}),
    ],
)
def test_a_tokenizer_that_names_no_end(
    tmp_path: Path, settings: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read(tmp_path, eos_token_id=7).eos_token_ids == (7,)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_saved_without_its_head(tmp_path: Path, architecture: str) -> None:
    bare = architecture.replace("ForCausalLM", "Model")
    found = read(tmp_path, architectures=bare, model_type=MODEL_TYPES[architecture])
    assert found == read(tmp_path, architectures=architecture, model_type=MODEL_TYPES[architecture])


@pytest.mark.parametrize(("value", "causal"), [(False, False), (True, True), (None, True)])
def test_is_causal(tmp_path: Path, value: bool | None, causal: bool) -> None:
    assert read(tmp_path, is_causal=value).causal is causal


@pytest.mark.parametrize("architecture", FAMILIES)
def test_any_value_of_any_key_is_read_or_refused(tmp_path: Path, architecture: str) -> None:
    keys = (
        *("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        *("attention_bias", "mlp_bias", "tie_word_embeddings", "quantization_config"),
        *("partial_rotary_factor", "original_max_position_embeddings", "model_type"),
        *("bos_token_id", "eos_token_id"),
    )
    outcomes = {"read": 0, "refused": 0}
    for key in keys:
        for value in ODD_VALUES:
            values = {"architectures": [architecture], "use_sliding_window": True, key: value}
            outcomes[outcome(tmp_path, values)] += 1
    assert min(outcomes.values()) > 50, outcomes


def outcome(tmp_path: Path, values: dict[str, Any]) -> str:
    try:
        config = read(tmp_path, **values)
    except ModelError as error:
        return "refused" if "\n" not in str(error) else "several lines"
    assert config.num_layers > 0
    return "read"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: not"):
        ModelConfig.from_folder(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        ModelConfig.from_folder(tmp_path)
