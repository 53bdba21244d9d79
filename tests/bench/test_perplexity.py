"""The perplexity of a model in every weight format that a CPU has."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.bench import perplexity
from headstart.engine.models.formats.quantize import quantize


def test_every_format_has_a_line(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama", max_position_embeddings=1024), folder)
    quantize(folder)
    monkeypatch.setattr(sys, "argv", ["perplexity", str(folder)])
    monkeypatch.setattr(perplexity, "INT8_TOLERANCE", 2.0)  # random weights round badly
    perplexity.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["f32", "bf16", "int8"]
    assert all(float(line[1]) > 1 for line in lines)
