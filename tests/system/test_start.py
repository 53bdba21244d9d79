"""What keeps the server from starting is one line on stderr and exit status 1."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

GUARD = 300
"""Seconds after which a wait is given up."""


def refusal(start_server, *argv: str) -> str:
    """The one line the server ends with."""
    # Of the log, only what the operator has to read.
    server = start_server(*map(str, argv), "--log-level", "error", ready=False)
    assert server.process.wait(GUARD) == 1
    lines = server.log.splitlines()
    errors = [line for line in lines if line.startswith("headstart: error: ")]
    assert "Traceback" not in server.log
    assert errors == lines[-1:]
    return errors[0]


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


def test_port_taken(start_server, tiny_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(start_server, tiny_folder, "--port", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose" in error


@pytest.mark.parametrize("command", ["a file", "a file above"])
def test_a_file_in_place_of_the_cache_folder(start_server, tiny_model, tmp_path, command):
    file = tmp_path / "cache"
    file.write_text("not a folder")
    cache = file if command == "a file" else file / "deeper"
    error = refusal(start_server, tiny_model("llama"), "--cache-dir", cache)
    assert str(file) in error


def test_unknown_model(start_server, tmp_path):
    error = refusal(start_server, "no-such-model", "--cache-dir", tmp_path)
    assert "no-such-model" in error
    assert "smollm2-135m" in error
    assert "/no/such/path" in refusal(start_server, "/no/such/path", "--cache-dir", tmp_path)


def rewrite(file: Path, data: bytes) -> None:
    file.unlink()  # it may be a link to the source's
    file.write_bytes(data)


@pytest.mark.covering
@pytest.mark.parametrize("keep", [100, -1])
@pytest.mark.parametrize(("name", "weights"), [("", "f32"), ("int8", "int8")])
def test_truncated_weights(start_server, tiny, name, weights, keep):
    file = tiny / name / "model.safetensors"
    rewrite(file, file.read_bytes()[:keep])
    assert str(file) in refusal(start_server, tiny, "--weights", weights)


@pytest.mark.slow
def test_tampered_header(start_server, tiny):
    file = tiny / "model.safetensors"
    rewrite(file, (2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    assert str(file) in refusal(start_server, tiny, "--weights", "f32")


def test_a_tensor_is_missing(start_server, tiny):
    from safetensors.torch import load_file, save_file

    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    file.unlink()
    save_file(tensors, file)
    error = refusal(start_server, tiny, "--weights", "f32")
    assert "model.layers.1.mlp.up_proj.weight" in error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(start_server, tiny, name):
    (tiny / name).write_bytes((tiny / name).read_bytes()[:40])
    assert name in refusal(start_server, tiny)


@pytest.mark.slow
def test_a_file_is_missing(start_server, tiny):
    (tiny / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(start_server, tiny)


@pytest.mark.parametrize("size", ["1KB", pytest.param("100000GiB", marks=pytest.mark.slow)])
def test_kv_memory(start_server, tiny_folder, size):
    error = refusal(start_server, tiny_folder, "--kv-memory", size)
    assert "--kv-memory" in error
    assert "0.00" not in error.replace("100000.00", "")


def test_max_model_len_beyond_the_model(start_server, tiny_folder):
    error = refusal(start_server, tiny_folder, "--max-model-len", "5000")
    assert "5000" in error
    assert "512" in error
