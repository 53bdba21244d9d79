"""What ranks tell of themselves: models that differ in anything are told apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.engine.models.formats.quantize import quantize
from headstart.engine.runahead.measure import weights_digest
from headstart.engine.runahead.messages import Hello


def test_one_tensor_that_differs_is_another_model(tmp_path: Path) -> None:
    """However many there are: fine-tuning may leave most of them alone."""
    path = tmp_path / "model.safetensors"
    tensors = {f"layers.{i}.weight": torch.full((4096,), float(i)) for i in range(300)}
    save_file(tensors, path)
    digests = {weights_digest(tmp_path, "f32")}
    changed = list(tensors)[::23]
    for name in changed:
        save_file({**tensors, name: tensors[name] + 1}, path)
        digests.add(weights_digest(tmp_path, "f32"))
    assert len(digests) == 1 + len(changed)


def test_shapes_and_names_belong_to_a_model(tmp_path: Path) -> None:
    digests = set()
    for tensors in (
        {"a": torch.zeros(4, 2)},
        {"a": torch.zeros(2, 4)},
        {"b": torch.zeros(4, 2)},
        {"a": torch.zeros(4, 2, dtype=torch.int32)},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        digests.add(weights_digest(tmp_path, "f32"))
    assert len(digests) == 4


@pytest.fixture
def quantized(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    quantize(folder)
    return folder


def test_what_is_not_read_does_not_tell_models_apart(
    tiny_model: Callable[..., Path], quantized: Path
) -> None:
    plain = tiny_model("llama")
    assert weights_digest(plain, "f32") == weights_digest(quantized, "f32")
    assert weights_digest(plain, "f32") != weights_digest(quantized, "int8")


@pytest.mark.parametrize("file", ["model", "smoothing"])
def test_int8_weights_are_those_that_were_quantized(quantized: Path, file: str) -> None:
    before = weights_digest(quantized, "int8")
    path = quantized / "int8" / f"{file}.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, path)
    assert weights_digest(quantized, "int8") != before


def test_a_greeting_of_an_older_engine_is_answered() -> None:
    """One that lacks what has come since differs; it is not garbage."""
    old = {"version": "0.1", "model": "m", "weights": "f32", "page_size": 32, "kv_layout": "l"}
    hello = msgspec.msgpack.encode(["Hello", 1, old, "folder", "token"])
    message = msgspec.msgpack.decode(hello, type=Hello)
    own = msgspec.structs.replace(message.identity, max_model_len=512)
    assert own.difference(message.identity) == "its max model len is 512, the engine's is 0"
