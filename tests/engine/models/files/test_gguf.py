"""GGUF: every block type, every architecture, and damage of any kind."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

from headstart.engine.errors import ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.files.gguf import TYPES, hf_config
from headstart.engine.models.files.gguf_file import GGUFFile
from headstart.engine.models.files.gguf_tokenizer import write_tokenizer
from headstart.engine.models.files.gguf_weights import GGUFWeights, write_safetensors
from headstart.engine.models.rope import rope_tables

pytestmark = pytest.mark.covering


def convert(path: Path) -> tuple[ModelConfig, dict[str, npt.NDArray[np.float32]]]:
    file = GGUFFile(path)
    config = ModelConfig.from_dict(hf_config(file), {}, source="test")
    target = path.with_suffix(".safetensors")
    write_safetensors(GGUFWeights(file, config), target)
    write_tokenizer(file, path.parent)
    return config, load_file(target)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype == np.float32
        np.testing.assert_array_equal(values, right[name], err_msg=name)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type(tiny_model: Any, write_gguf: Any, tmp_path: Path, kind: Type) -> None:
    folder = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    stored = write_gguf(folder, tmp_path / "m.gguf", kind=kind)
    types = {info.type for info in GGUFFile(tmp_path / "m.gguf").tensors.values()}
    assert types == {kind, Type.F32}
    assert_same(convert(tmp_path / "m.gguf")[1], stored)


@pytest.mark.parametrize(
    ("arch", "gguf_arch", "settings"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "llama", {"num_key_value_heads": 1}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
    ],
)
def test_every_architecture_round_trips(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, arch: str, gguf_arch: str, settings: Any
) -> None:
    folder = tiny_model(arch, **settings)
    write_gguf(folder, tmp_path / "m.gguf", arch=gguf_arch)
    config, tensors = convert(tmp_path / "m.gguf")
    assert_same(tensors, load_file(folder / "model.safetensors"))
    original = ModelConfig.from_folder(folder)
    for field in ModelConfig.__dataclass_fields__:
        if field == "architecture" and arch == "mistral":
            assert config.architecture == "LlamaForCausalLM"  # the same computation
        elif field == "eos_token_ids":  # and <|endoftext|>, by its name
            assert config.eos_token_ids == (*original.eos_token_ids, 0)
        elif field == "rms_norm_eps":
            assert config.rms_norm_eps == np.float32(original.rms_norm_eps)
        else:
            assert getattr(config, field) == getattr(original, field), field


def test_llama3_scaling_comes_as_divisors(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    original = ModelConfig.from_folder(tiny_model("llama3"))
    plain = original.rope.theta ** -(np.arange(0, 16, 2, dtype=np.float64) / 16)
    cos, sin = rope_tables(original, 2)
    scaled = torch.atan2(sin[1], cos[1]).numpy()  # the angle at position 1 is the frequency
    divisors = (plain / scaled).astype(np.float32)
    assert divisors.max() > 3.9
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama3"), path, extra={"rope_freqs.weight": divisors})
    config, _ = convert(path)
    for ours, theirs in zip(rope_tables(config, 512), rope_tables(original, 512), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_rope_scaling_keys(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
    }
    write_gguf(tiny_model("llama"), path, keys=yarn)
    rope = convert(path)[0].rope
    assert rope.type == "yarn"
    assert rope.parameters == {"factor": 4.0, "original_max_position_embeddings": 128}
    write_gguf(
        tiny_model("llama"), path, keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    )
    assert convert(path)[0].rope.parameters == {"factor": 2.0}


def test_sliding_window_limits_the_context(
    tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    for arch in ("llama", "qwen2"):
        path = tmp_path / f"{arch}.gguf"
        write_gguf(tiny_model(arch), path, arch=arch, keys={"attention.sliding_window": 64})
        assert convert(path)[0].max_position_embeddings == 64


@pytest.mark.parametrize("causal", [False, True, None])
def test_attention_in_both_directions(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, causal: bool | None
) -> None:
    keys = {} if causal is None else {"attention.causal": causal}
    write_gguf(tiny_model("qwen2"), tmp_path / "m.gguf", arch="qwen2", keys=keys)
    assert convert(tmp_path / "m.gguf")[0].causal is (causal is not False)


def test_end_of_turn_ends_generation(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama"), path)
    file = GGUFFile(path)
    file.metadata["tokenizer.ggml.eot_token_id"] = 7
    config = ModelConfig.from_dict(hf_config(file), {}, source="test")
    assert config.eos_token_ids == (2, 7, 0)  # and <|endoftext|>, by its name


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "</s>"]
)
def test_an_end_of_turn_that_no_key_names(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, token: str
) -> None:
    """It is known by what it is called, as in llama.cpp."""
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    tokens = file.metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("<|im_end|>")] = "something"
    tokens[9] = token
    file.metadata["tokenizer.ggml.eos_token_id"] = 5
    config = ModelConfig.from_dict(hf_config(file), {}, source="test")
    assert config.eos_token_ids[0] == 5
    assert set(config.eos_token_ids) == {5, 9, 0}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"drop": ("blk.1.ffn_up.weight",)}, "tensor blk.1.ffn_up.weight is missing"),
        ({"drop": ("token_embd.weight",)}, "tensor token_embd.weight is missing"),
        ({"extra": {"blk.0.spare.weight": np.ones(3, np.float32)}}, "blk.0.spare.weight"),
        ({"extra": {"blk.2.attn_norm.weight": np.ones(3, np.float32)}}, "blk.2.attn_norm.weight"),
        (
            {
                "drop": ("blk.0.attn_v.weight",),
                "extra": {"blk.0.attn_v.weight": np.ones((4, 64), np.float32)},
            },
            "tensor blk.0.attn_v.weight has shape [4, 64], the metadata asks for [32, 64]",
        ),
        (
            {
                "drop": ("output_norm.weight",),
                "extra": {"output_norm.weight": np.full(64, np.nan, np.float32)},
            },
            "output_norm.weight holds values that are not finite",
        ),
        (
            {
                "drop": ("output_norm.weight",),
                "extra": {"output_norm.weight": np.ones(64, np.int32)},
            },
            "tensor output_norm.weight has type I32",
        ),
        ({"keys": {"expert_count": 8}}, "mixture-of-experts"),
        ({"keys": {"rope.dimension_count": 8}}, "rope.dimension_count 8"),
        ({"keys": {"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0}}, "'spiral'"),
        ({"arch": "gemma"}, "GGUF architecture 'gemma' is not supported"),
    ],
)
def test_refused_by_name(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama"), path, **options)
    with pytest.raises(ModelError) as caught:
        convert(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def header(*parts: bytes | int) -> bytes:
    """A GGUF v3 header; integers are 64 bits wide."""
    start = b"GGUF" + struct.pack("<I", 3)
    return start + b"".join(p if isinstance(p, bytes) else struct.pack("<Q", p) for p in parts)


KEY = header(0, 1, 1, b"k")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGU",
        b"PK\x03\x04" * 10,
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        header(2**60, 0),
        header(0, 2**60),
        header(0, 1, 2**60, b"k"),
        KEY + struct.pack("<I", 8) + struct.pack("<Q", 2**63),
        KEY + struct.pack("<IIQ", 9, 8, 2**60),  # an array of that many strings
        KEY + struct.pack("<IIQ", 9, 8, 2**20) + bytes(100),
        KEY + struct.pack("<IIQ", 9, 0, 2**60),  # of bytes
        KEY + struct.pack("<IIQ", 9, 9, 2**60),  # of arrays
        KEY + struct.pack("<I", 99),
        header(1, 0, 1, b"t") + struct.pack("<I", 2**31),
        header(1, 0, 1, b"t") + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0),
        header(1, 0, 1, b"t") + struct.pack("<IQIQ", 1, 0, 0, 0),
        header(1, 0, 1, b"t") + struct.pack("<IQIQ", 1, 32, 0, 2**64 - 64),
        header(1, 0, 1, b"t") + struct.pack("<IQIQ", 1, 32, 250, 0),
        header(0, 1, 1, b"\xff") + struct.pack("<IB", 0, 0),
    ],
)
def test_absurd_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)


def test_absurd_layer_count_ends_at_the_first_missing_layer(
    tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    file.metadata["llama.block_count"] = 2**31 - 1
    with pytest.raises(ModelError, match=r"blk\.2\."):
        GGUFWeights(file, ModelConfig.from_dict(hf_config(file), {}, source="test"))


def outcome(path: Path) -> str:
    try:
        convert(path)
    except ModelError as error:
        return "refused" if "\n" not in str(error) else "several lines"
    return "loaded"


def test_truncated_anywhere(tiny_model: Any, write_gguf: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama", num_hidden_layers=1), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    lengths = [*range(200), *(rng.randrange(len(whole)) for _ in range(200)), len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert outcome(path) == "refused", length


def test_flipped_bytes_give_a_valid_load_or_one_line(
    tiny_model: Any, write_gguf: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama", num_hidden_layers=1), path, kind=Type.Q8_0)
    whole = path.read_bytes()
    header_end = min(info.offset for info in GGUFFile(path).tensors.values())
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for round_ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            # Half in the short metadata before the vocabulary, where every byte matters.
            end = (600, header_end, len(data))[min(round_ % 4, 2)]
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        outcomes[outcome(path)] += 1
    assert min(outcomes.values()) > 50, outcomes


# Scalar forms of ggml's dequantize_row_q*_K (ggml-quants.c).


def scale_min(j: int, q: Any) -> tuple[int, int]:
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4


def reference_q4_q5(block: list[int], five: bool) -> list[float]:
    d, dmin = np.frombuffer(bytes(block[:4]), "<f2").astype(np.float32)
    scales, rest = block[4:16], block[16:]
    high, low = (rest[:32], rest[32:]) if five else ([0] * 32, rest)
    values = []
    for j in range(8):
        scale, minimum = scale_min(j, scales)
        for i in range(32):
            byte = low[32 * (j // 2) + i]
            quant = (byte >> 4 if j % 2 else byte & 15) + 16 * (high[i] >> j & 1)
            values.append(float(d * np.float32(scale) * quant - dmin * np.float32(minimum)))
    return values


def reference_q6(block: list[int]) -> list[float]:
    low, high = block[:128], block[128:192]
    scales = np.array(block[192:208], np.uint8).view(np.int8)
    d = np.frombuffer(bytes(block[208:]), "<f2").astype(np.float32)[0]
    values = []
    for i in range(256):
        half, quarter, lane = i // 128, i % 128 // 32, i % 32
        byte = low[64 * half + 32 * (quarter % 2) + lane]
        quant = byte >> 4 if quarter >= 2 else byte & 15
        quant |= (high[32 * half + lane] >> 2 * quarter & 3) << 4
        values.append(float(d * np.float32(scales[i // 16]) * (quant - 32)))
    return values


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_blocks_against_a_scalar_reference(
    tiny_model: Any, write_gguf: Any, tmp_path: Path, kind: Type
) -> None:
    folder = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    write_gguf(folder, tmp_path / "m.gguf", kind=kind)
    file = GGUFFile(tmp_path / "m.gguf")
    info = file.tensors["blk.0.ffn_up.weight"]
    ours = convert(tmp_path / "m.gguf")[1]["model.layers.0.mlp.up_proj.weight"]
    for row in range(0, 256, 37):
        block = file.rows(info)[row].tolist()
        theirs = (
            reference_q6(block)
            if kind is Type.Q6_K
            else reference_q4_q5(block, five=kind is Type.Q5_K)
        )
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-5, atol=1e-6)


def test_reads_what_the_gguf_package_reads(smollm2: Path, cache_folder: Path) -> None:
    from headstart.engine.models.store import fetch

    path = fetch("smollm2-135m", cache_folder)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            value = value.tolist() if isinstance(value, np.ndarray) else value
            assert value == field.contents(), key
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.offset == tensor.data_offset
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
    assert json.loads((smollm2 / "config.json").read_text()) == hf_config(ours)
