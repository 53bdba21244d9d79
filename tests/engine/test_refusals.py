"""What keeps a model from being served is one line that names it, before any process is asked.

That the line reaches the operator, and with which exit status: tests/system/test_start.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import HeadstartError
from headstart.engine.models.store import pull, resolve


@pytest.fixture(scope="module")
def pulled(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pull(str(tiny_model("llama")), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(pulled: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(pulled, tmp_path / "tiny"))


def line_of(refused: Callable[[], object]) -> str:
    with pytest.raises(HeadstartError) as caught:
        refused()
    line = str(caught.value)
    assert "\n" not in line
    return line


def refusal(folder: Path, **settings: Any) -> str:
    config = EngineConfig(model_path=str(folder), threads=1, **settings)
    return line_of(lambda: Engine(config))


def rewrite(file: Path, data: bytes) -> None:
    file.unlink()  # it may be a link to the source's
    file.write_bytes(data)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize(("name", "weights"), [("", "f32"), ("", "bf16"), ("int8", "int8")])
def test_truncated_weights(tiny: Path, name: str, weights: str, keep: int) -> None:
    file = tiny / name / "model.safetensors"
    rewrite(file, file.read_bytes()[:keep])
    assert str(file) in refusal(tiny, weights=weights)


@pytest.mark.parametrize("size", [0, 2**31, 2**62, 2**64 - 1])
def test_tampered_header(tiny: Path, size: int) -> None:
    file = tiny / "model.safetensors"
    rewrite(file, size.to_bytes(8, "little") + file.read_bytes()[8:])
    assert str(file) in refusal(tiny, weights="f32")


def test_a_tensor_is_missing(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    file.unlink()
    save_file(tensors, file)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(tiny, weights="f32")


def test_damaged_config(tiny: Path) -> None:
    (tiny / "config.json").write_bytes((tiny / "config.json").read_bytes()[:40])
    assert "config.json" in refusal(tiny)


@pytest.mark.parametrize("size", [1000, 100_000 << 30])
def test_kv_memory(pulled: Path, size: int) -> None:
    line = refusal(pulled, kv_memory=size)
    assert "--kv-memory" in line
    assert "0.00" not in line.replace("100000.00", "")


def test_max_model_len_beyond_the_model(pulled: Path) -> None:
    line = refusal(pulled, max_model_len=5000)
    assert "5000" in line
    assert "512" in line


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_place_of_the_cache_folder(
    tiny_model: Callable[..., Path], tmp_path: Path, below: str
) -> None:
    file = tmp_path / "cache"
    file.write_text("not a folder")
    model = str(tiny_model("llama"))
    assert str(file) in line_of(lambda: resolve(model, file / below if below else file))


def test_an_unknown_model(tmp_path: Path) -> None:
    line = line_of(lambda: resolve("no-such-model", tmp_path))
    assert "no-such-model" in line
    assert "smollm2-135m" in line
    assert "/no/such/path" in line_of(lambda: resolve("/no/such/path", tmp_path))
