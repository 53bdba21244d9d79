"""What keeps the server from starting is one line on stderr and exit status 1, whoever finds it.

What is found, and named how: tests/engine/test_refusals.py.
"""

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


def test_found_while_the_model_is_fetched(start_server, tmp_path):
    assert "no-such-model" in refusal(start_server, "no-such-model", "--cache-dir", tmp_path)


@pytest.mark.parametrize("damage", ["cut", pytest.param("gone", marks=pytest.mark.slow)])
def test_found_by_the_server_beside_an_engine_that_starts(start_server, tiny, damage):
    file = tiny / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:40]) if damage == "cut" else file.unlink()
    assert "tokenizer.json" in refusal(start_server, tiny)


def test_found_by_the_engine(start_server, tiny_folder):
    assert "5000" in refusal(start_server, tiny_folder, "--max-model-len", "5000")


def test_found_by_the_engine_while_it_reads_weights(start_server, tiny):
    file = tiny / "model.safetensors"
    data = file.read_bytes()
    file.unlink()  # it may be a link to the source's
    file.write_bytes(data[:-1])
    assert str(file) in refusal(start_server, tiny, "--weights", "f32")
