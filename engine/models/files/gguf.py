"""A GGUF file in Hugging Face's terms: its config.json, and which tensor is which.

    file = GGUFFile(path)
    config = hf_config(file)                    # dict, as config.json has it
    entries = tensor_entries(file, ModelConfig.from_dict(config, {}, source=str(path)))

The mapping is ours instead of transformers' because that one drops RoPE scaling, Qwen3's head size
and extra end tokens, and holds the whole model in memory. gguf_weights.py reads the tensors.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGMLQuantizationType as Type

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.gguf_file import GGUFFile, TensorInfo

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("LlamaForCausalLM", "llama"),  # llama.cpp's converter writes "llama" for both
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
TYPES = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1),
    *(Type.Q4_K, Type.Q5_K, Type.Q6_K),
)
END_TOKENS = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|endoftext|>",
        "</s>",
    ),
    *("<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>"),
    "<｜end▁of▁sentence｜>",
)
"""Tokens that end an answer by what they are called, as in llama.cpp (llama-vocab.cpp): many files
name an end of text and no end of turn."""
POOLING_MODES = {
    1: "pooling_mode_mean_tokens",
    2: "pooling_mode_cls_token",
    3: "pooling_mode_lasttoken",
}
"""llama.cpp's numbers of them, and the names that sentence-transformers has for them."""
IGNORED_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Not weights: they become RoPE settings in the config."""


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of the model in ``file``.

    Raises ModelError naming the architecture, metadata key or feature that is not supported.
    """
    meta = _Metadata(file)
    architecture, model_type = ARCHITECTURES[meta.architecture]
    if meta.get("expert_count"):
        meta.fail("mixture-of-experts models are not supported")
    heads = meta.integer("attention.head_count")
    hidden = meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            meta.fail(f"{key} {meta.get(key)} differs from the head size {head_dim}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.integer("context_length"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "torch_dtype": "float32",
        **_special_tokens(meta),
    }
    if meta.get("attention.causal") is False:
        config["is_causal"] = False
    scaling = _rope_scaling(meta, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    window = meta.integer("attention.sliding_window", 0)
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        if architecture == "LlamaForCausalLM":
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return config


def pooling_config(file: GGUFFile) -> dict[str, Any] | None:
    """How vectors are pooled, as sentence-transformers' 1_Pooling/config.json has it; None: the
    file does not say."""
    meta = _Metadata(file)
    mode = POOLING_MODES.get(meta.integer("pooling_type", 0))
    return None if mode is None else {mode: True}


class _Metadata:
    """Typed access to ``<architecture>.<key>``; complaints name the file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ModelError(
                f"{file.path}: GGUF architecture {architecture!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        self.architecture = architecture

    def fail(self, what: str) -> None:
        raise ModelError(f"{self.file.path}: {what}")

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            what = "is missing" if value is None else f"must be one integer, got {value!r:.40}"
            raise ModelError(f"{self.file.path}: {self.architecture}.{key} {what}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = "is missing" if value is None else f"must be a number, got {value!r:.40}"
            raise ModelError(f"{self.file.path}: {self.architecture}.{key} {what}")
        return float(value)


def _special_tokens(meta: _Metadata) -> dict[str, Any]:
    """bos, pad and end tokens: ends of turn and of message, too, and what END_TOKENS has."""
    ids: dict[str, int] = {}
    for name in ("bos", "padding", "eos", "eot", "eom"):
        value = meta.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            meta.fail(f"tokenizer.ggml.{name}_token_id must be a token id, got {value!r:.40}")
        ids[name] = value
    named = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    tokens = meta.file.metadata.get("tokenizer.ggml.tokens")
    by_text = {token: i for i, token in enumerate(tokens if isinstance(tokens, list) else ())}
    named += [by_text[token] for token in END_TOKENS if token in by_text]
    ends = list(dict.fromkeys(named))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding"),
    }


def _rope_scaling(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE settings under Hugging Face names.

    llama.cpp bakes Llama 3's scaling into one divisor per frequency, rope_freqs. That is what
    longrope computes when its short and long factors are the same and attention is not scaled.
    """
    factors = meta.file.tensors.get("rope_freqs.weight")
    long_factors = meta.file.tensors.get("rope_factors_long.weight")
    short_factors = meta.file.tensors.get("rope_factors_short.weight")
    kind = meta.get("rope.scaling.type")
    original = meta.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    if factors is not None:
        divisors = _factors(meta.file, factors)
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": original,
        }
    if long_factors is not None and short_factors is not None:
        return {
            "rope_type": "longrope",
            "short_factor": _factors(meta.file, short_factors),
            "long_factor": _factors(meta.file, long_factors),
            "attention_factor": meta.number("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        }
    if kind in (None, "none"):
        return None
    factor = meta.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    meta.fail(f"RoPE scaling {kind!r:.40} is not supported; supported are none, linear and yarn")
    return None


def _factors(file: GGUFFile, info: TensorInfo) -> list[float]:
    if info.type is not Type.F32 or len(info.shape) != 1:
        raise ModelError(f"{file.path}: tensor {info.name} must be a float32 vector")
    return [float(value) for value in file.rows(info).view("<f4")[0]]


@dataclass(frozen=True)
class TensorEntry:
    """Hugging Face's name of a tensor; ``heads`` is set where rows of each head are interleaved."""

    hf_name: str
    info: TensorInfo
    heads: int | None


def _tensor_table(
    config: ModelConfig, gguf_llama: bool
) -> Iterator[tuple[str, str, tuple[int, ...], int | None]]:
    """Hugging Face name, GGUF name, shape, heads to reorder: every tensor the model must have."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q_heads = config.num_heads if gguf_llama else None
    kv_heads = config.num_kv_heads if gguf_llama else None
    yield "model.embed_tokens.weight", "token_embd.weight", (config.vocab_size, hidden), None
    yield "model.norm.weight", "output_norm.weight", (hidden,), None
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "output.weight", (config.vocab_size, hidden), None
    matrices = (
        ("self_attn.q_proj", "attn_q", (q_rows, hidden), q_heads, config.qkv_bias),
        ("self_attn.k_proj", "attn_k", (kv_rows, hidden), kv_heads, config.qkv_bias),
        ("self_attn.v_proj", "attn_v", (kv_rows, hidden), None, config.qkv_bias),
        ("self_attn.o_proj", "attn_output", (hidden, q_rows), None, config.o_bias),
        ("mlp.gate_proj", "ffn_gate", (inter, hidden), None, config.mlp_bias),
        ("mlp.up_proj", "ffn_up", (inter, hidden), None, config.mlp_bias),
        ("mlp.down_proj", "ffn_down", (hidden, inter), None, config.mlp_bias),
    )
    norms: tuple[tuple[str, str, int], ...] = (
        ("input_layernorm", "attn_norm", hidden),
        ("post_attention_layernorm", "ffn_norm", hidden),
    )
    if config.qk_norm:
        norms += (
            ("self_attn.q_norm", "attn_q_norm", config.head_dim),
            ("self_attn.k_norm", "attn_k_norm", config.head_dim),
        )
    for layer in range(config.num_layers):
        hf, gg = f"model.layers.{layer}", f"blk.{layer}"
        for hf_name, gguf_name, shape, heads, bias in matrices:
            yield f"{hf}.{hf_name}.weight", f"{gg}.{gguf_name}.weight", shape, heads
            if bias:
                yield f"{hf}.{hf_name}.bias", f"{gg}.{gguf_name}.bias", shape[:1], heads
        for hf_name, gguf_name, size in norms:
            yield f"{hf}.{hf_name}.weight", f"{gg}.{gguf_name}.weight", (size,), None


def tensor_entries(file: GGUFFile, config: ModelConfig) -> list[TensorEntry]:
    """Match the file's tensors with what the config asks for; ModelError names the odd one."""
    gguf_llama = file.metadata["general.architecture"] in ("llama", "mistral")
    entries: list[TensorEntry] = []
    # One at a time, so that an absurd layer count ends at the first layer that is not there.
    for hf_name, gguf_name, shape, heads in _tensor_table(config, gguf_llama):
        info = file.tensors.get(gguf_name)
        if info is None:
            raise ModelError(f"{file.path}: tensor {gguf_name} is missing")
        if info.shape != shape:
            raise ModelError(
                f"{file.path}: tensor {gguf_name} has shape {list(info.shape)}, "
                f"the metadata asks for {list(shape)}"
            )
        if info.type not in TYPES:
            raise ModelError(
                f"{file.path}: tensor {gguf_name} has type {info.type.name}; "
                f"supported are {', '.join(kind.name for kind in TYPES)}"
            )
        entries.append(TensorEntry(hf_name, info, heads))
    extra = set(file.tensors) - {entry.info.name for entry in entries} - set(IGNORED_TENSORS)
    if extra:
        raise ModelError(
            f"{file.path}: holds tensors this architecture does not use: "
            f"{', '.join(sorted(extra)[:5])}"
        )
    return entries
