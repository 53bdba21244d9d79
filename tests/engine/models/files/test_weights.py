"""Weights: every tensor is taken once, of the right shape, and a broken file is one clear line."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headstart.engine.errors import ModelError
from headstart.engine.models.files.weights import Weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.ones(4, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights.open(folder)
    return {name: weights.take(name, shape) for name, shape in (("a", (2, 3)), ("b", (4,)))}


def test_takes_tensors_as_stored(folder: Path) -> None:
    weights = Weights.open(folder)
    assert torch.equal(weights.take("a", (2, 3)), torch.arange(6.0).reshape(2, 3))
    assert weights.take("b", (4,)).dtype == torch.bfloat16
    assert weights.take("c", (4,)).dtype == torch.float16
    assert weights.take("d", (4,), optional=True) is None
    weights.finish()


def test_sharded_model_reads_like_the_whole(tiny_model: Any, tmp_path: Path) -> None:
    import transformers

    whole = tiny_model("qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, many = Weights.open(whole), Weights.open(tmp_path)
    assert one.names() == many.names()
    for name, tensor in model.state_dict().items():
        for weights in (one, many):
            assert torch.equal(weights.take(name, tuple(tensor.shape)), tensor)
    many.finish()
    (next(tmp_path.glob("*-00002-*.safetensors"))).unlink()
    with pytest.raises(ModelError, match=r"00002.*no such file"):
        Weights.open(tmp_path)


def test_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="tensor d is missing"):
        Weights.open(folder).take("d", (1,))


def test_misshapen_tensor_shows_both_shapes(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor a .*\[2, 3\].*\[3, 2\]"):
        Weights.open(folder).take("a", (3, 2))


def test_extra_tensors_are_named(folder: Path) -> None:
    weights = Weights.open(folder)
    weights.take("a", (2, 3))
    with pytest.raises(ModelError, match=r"does not use: b, c$"):
        weights.finish()


def test_many_extra_tensors_are_counted(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.ones(1) for i in range(9)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="t4 and 4 more"):
        Weights.open(tmp_path).finish()


def test_harmless_extras(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": torch.ones(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    Weights.open(tmp_path).finish()


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "b": torch.zeros(2, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    with pytest.raises(ModelError, match=r"tensor a .* F8_E4M3"):
        weights.take("a", (2,))
    with pytest.raises(ModelError, match=r"tensor b .* I8"):
        weights.take("b", (2,))


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        Weights.open(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "absent.safetensors"}}',
    ],
)
def test_broken_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError):
        Weights.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in "xy":
        save_file({"a": torch.ones(1)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="tensor a is in both"):
        Weights.open(tmp_path)


def test_truncated_anywhere(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    target = tmp_path / "cut"
    target.mkdir()
    for length in range(len(whole)):
        (target / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors: truncated") as caught:
            load_all(target)
        assert "\n" not in str(caught.value)


def outcome(folder: Path) -> str:
    try:
        load_all(folder)
    except ModelError as error:
        return "refused" if "\n" not in str(error) else "several lines"
    return "loaded"


def test_flipped_bytes_give_a_valid_load_or_one_line(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    target = tmp_path / "flipped"
    target.mkdir()
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (target / "model.safetensors").unlink(missing_ok=True)  # a new inode: old maps stay valid
        (target / "model.safetensors").write_bytes(data)
        outcomes[outcome(target)] += 1
    assert min(outcomes.values()) > 20, outcomes
    shutil.rmtree(target)
