"""A model of a known shape, its weights random: `python -m headstart.bench.random_model`.

Speed and memory do not depend on the values, so a size can be measured without its download. The
tokenizer and the chat template are the default model's, its vocabulary filled up with unused words.
A TARGET that ends in .gguf is one file, read by llama.cpp, OpenVINO GenAI and headstart alike; any
other is a folder of bfloat16 safetensors.

    python -m headstart.bench.random_model qwen2.5-1.5b /tmp/1.5b.gguf
    python -m headstart.bench.peers --model /tmp/1.5b.gguf --gguf /tmp/1.5b.gguf
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from headstart.engine.config import default_home
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.weights import SINGLE_FILE, TensorFile
from headstart.engine.models.store import fetch, resolve

TOKENIZER = "smollm2-135m"
"""The model whose tokenizer is taken."""
SPREAD = 0.02
"""Standard deviation of the weights, as many models are initialised with."""
POOL = 1 << 24
"""Random bytes that there are; all tensors repeat them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """As in the config.json of the model that it is named after."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool
    theta: float
    context: int
    qkv_bias: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """GGUF's name and the shape, rows first, of every tensor."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocabulary, self.hidden)
        yield "output_norm.weight", (self.hidden,)
        if not self.tied:
            yield "output.weight", (self.vocabulary, self.hidden)
        for i in range(self.layers):
            for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                yield f"blk.{i}.{name}.weight", (rows, self.hidden)
                if self.qkv_bias:
                    yield f"blk.{i}.{name}.bias", (rows,)
            yield f"blk.{i}.attn_output.weight", (self.hidden, q)
            yield f"blk.{i}.ffn_gate.weight", (self.inner, self.hidden)
            yield f"blk.{i}.ffn_up.weight", (self.inner, self.hidden)
            yield f"blk.{i}.ffn_down.weight", (self.hidden, self.inner)
            yield f"blk.{i}.attn_norm.weight", (self.hidden,)
            yield f"blk.{i}.ffn_norm.weight", (self.hidden,)


SHAPES = {
    "tiny": Shape("llama", 256, 2, 4, 2, 64, 512, 49152, True, 1e5, 2048),
    "smollm2-135m": Shape("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 1e5, 8192),
    "smollm2-135m-16k": Shape("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 1e5, 16384),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True, 1e6, 32768, True),
    "llama-3.1-8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, 5e5, 131072),
}
TYPES = {"q4_0": Type.Q4_0, "q4_k": Type.Q4_K, "q8_0": Type.Q8_0}

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def blocks(kind: Type, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """POOL bytes or so of blocks of ``kind``, ``[blocks, bytes]``, whose values have SPREAD."""
    _, size = GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (POOL // size, size), dtype=np.uint8)
    half = raw.view("<f2")
    if kind is Type.Q8_0:
        half[:, 0] = SPREAD / 74  # of bytes from -128 to 127
    elif kind is Type.Q4_0:
        half[:, 0] = SPREAD / 4.6  # of -8 to 7
    else:
        half[:, 0] = SPREAD / 4.6 / 32  # times a scale of 0 to 63
        half[:, 1] = 7.5 * SPREAD / 4.6 / 32  # the same, off the mean
    return raw


def write_gguf(shape: Shape, kind: Type, target: Path, home: Path) -> None:
    """One GGUF file with all matrices in ``kind``; norms are 1 and biases 0."""
    source = GGUFFile(fetch(TOKENIZER, home)).metadata
    writer = gguf.GGUFWriter(target, shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type({Type.Q4_0: 2, Type.Q8_0: 7, Type.Q4_K: 15}[kind])
    unused = shape.vocabulary - len(source["tokenizer.ggml.tokens"])
    writer.add_tokenizer_model(source["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(source["tokenizer.ggml.pre"])
    words = [f"<|unused_{i}|>" for i in range(unused)]
    writer.add_token_list([*source["tokenizer.ggml.tokens"], *words])
    types = source["tokenizer.ggml.token_type"].tolist()
    writer.add_token_types([*types, *[int(gguf.TokenType.UNUSED)] * unused])
    writer.add_token_merges(source["tokenizer.ggml.merges"])
    writer.add_bos_token_id(source["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(source["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template(source["tokenizer.chat_template"])

    pool = blocks(kind, np.random.default_rng(0))
    elements, size = GGML_QUANT_SIZES[kind]
    for name, dims in shape.tensors():
        if len(dims) == 1:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), dims[0] * 4)
        else:
            row = dims[1] // elements * size
            byte_type = np.dtype(np.uint8)
            writer.add_tensor_info(name, (dims[0], row), byte_type, dims[0] * row, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    first = 0
    for name, dims in shape.tensors():
        if len(dims) == 1:
            values = np.ones if name.endswith("norm.weight") else np.zeros
            writer.write_tensor_data(values(dims, np.float32))
        else:
            count = dims[0] * dims[1] // elements
            writer.write_tensor_data(pool[np.arange(first, first + count) % len(pool)])
            first += count
    writer.close()


def hf_config(shape: Shape) -> dict[str, Any]:
    """config.json of the model."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return {
        "architectures": [names[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "rope_theta": shape.theta,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def write_folder(shape: Shape, target: Path, home: Path) -> None:
    """A folder as on the Hugging Face hub, its weights in one file."""
    source = resolve(TOKENIZER, home)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, target / name)
    config = hf_config(shape)
    kept = json.loads((source / "config.json").read_text())
    config |= {name: kept[name] for name in ("bos_token_id", "eos_token_id")}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    tensors = [(_hf_name(name), dims) for name, dims in shape.tensors()]
    file = TensorFile(target / SINGLE_FILE, [(name, "BF16", dims) for name, dims in tensors])
    values = np.random.default_rng(0).normal(0, SPREAD, POOL // 2).astype("<f4")
    pool = (values.view("<u4") >> 16).astype("<u2")  # the upper half of a float32 is a bfloat16
    one = np.array([0x3F80], "<u2")
    for name, dims in tensors:
        left = int(np.prod(dims))
        if len(dims) == 1:
            file.write(name, np.tile(one if "norm" in name else 0 * one, left).data)
            continue
        while left:
            part = pool[:left]
            file.write(name, part.data)
            left -= len(part)
    file.close()


def _hf_name(name: str) -> str:
    *layer, tensor, kind = name.split(".")
    place = f"model.layers.{layer[1]}." if layer else ""
    return f"{place}{HF_NAMES[tensor]}.{kind}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.random_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path, help="NAME.gguf, or a folder")
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="of GGUF (%(default)s)")
    args = parser.parse_args()
    if args.target.suffix == ".gguf":
        write_gguf(SHAPES[args.shape], TYPES[args.type], args.target, default_home())
    else:
        write_folder(SHAPES[args.shape], args.target, default_home())


if __name__ == "__main__":
    main()
