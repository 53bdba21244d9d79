"""write_gguf: a tiny Hugging Face model as a GGUF file, the way llama.cpp's converter does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type

WriteGGUF = Callable[..., dict[str, npt.NDArray[np.float32]]]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def permute(weights: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def encode(values: npt.NDArray[np.float32], kind: Type, rng: np.random.Generator) -> Any:
    """Quantise; K types, which gguf cannot make, become random blocks with small scales."""
    if kind not in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8)
    scale = np.frombuffer(rng.uniform(0.001, 0.01, blocks[..., 0].size).astype("<f2"), np.uint8)
    scale = scale.reshape(*blocks.shape[:-1], 2)
    if kind is Type.Q6_K:
        blocks[..., -2:] = scale
    else:
        blocks[..., 0:2] = blocks[..., 2:4] = scale
    return blocks.reshape(*values.shape[:-1], -1)


def add_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, templates: list[dict[str, str]] | None
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token_id < 3 else 1 for _, token_id in vocab])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(templates or tokenizer.chat_template)


@pytest.fixture(scope="session")
def write_gguf() -> WriteGGUF:
    """``write_gguf(folder, path, arch="llama", kind=F32, drop=(), extra={}, keys={})``.

    ``kind`` applies to matrices. ``drop``: GGUF tensor names left out; ``extra``: float32 tensors
    added; ``keys``: metadata under ``arch``; ``templates``: chat templates by name. Returns the
    values stored, by Hugging Face name.
    """

    def write(
        folder: Path,
        path: Path,
        arch: str = "llama",
        kind: Type = Type.F32,
        drop: tuple[str, ...] = (),
        extra: dict[str, npt.NDArray[np.float32]] | None = None,
        keys: dict[str, Any] | None = None,
        templates: list[dict[str, str]] | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rng = np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, arch)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        head_dim = getattr(config, "head_dim", None)
        if head_dim:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        for key, value in (keys or {}).items():
            add: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            add[type(value)](f"{arch}.{key}", value)
        add_tokenizer(writer, folder, templates)
        stored = {}
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads_here = heads.get(name.split(".")[-2]) if arch == "llama" else None
            matrix_kind = kind if values.ndim == 2 else Type.F32
            raw = encode(values, matrix_kind, rng)
            stored[name] = gguf.quants.dequantize(raw, matrix_kind)
            if heads_here:
                raw = permute(raw, heads_here)
            if gguf_name(name) not in drop:
                writer.add_tensor(gguf_name(name), raw, raw_dtype=matrix_kind)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return stored

    return write
