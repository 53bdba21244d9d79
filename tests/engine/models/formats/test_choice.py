"""choose_weights: the format that "auto" takes, and what it says of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError
from headstart.engine.models.formats.choice import WeightChoice, choose_weights
from headstart.engine.models.loading import set_up
from headstart.kernels import _cpu


def record_quality(folder: Path, int8: float) -> None:
    (folder / "int8").mkdir()
    recorded = {"tokens": 5000, "f32": 20.0, "int8": int8}
    (folder / "int8" / "quality.json").write_text(json.dumps(recorded))


@pytest.mark.parametrize(
    ("backend", "isa", "int8", "expected"),
    [
        ("cpu", "avx512_bf16", 20.19, "int8"),
        ("cpu", "avx512_vnni", 20.19, "int8"),
        ("cpu", "avx512_bf16", 20.21, "bf16"),
        ("cpu", "avx512_vnni", 20.21, "f32"),
        ("cpu", "avx512_bf16", float("nan"), "bf16"),
        ("cpu", "avx512_bf16", None, "bf16"),
        ("cpu", "avx512", 20.0, "int8"),
        ("cpu", "avx_vnni", 20.0, "int8"),
        ("cpu", "avx2", 20.0, "int8"),
        ("cpu", "avx2", 20.21, "f32"),
        ("cpu", "neon_dotprod", 20.0, "int8"),
        ("cpu", "portable", 20.0, "f32"),
        ("reference", "avx512_bf16", 20.0, "f32"),
    ],
)
def test_auto_takes_int8_where_it_is_fast_and_good(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    isa: str,
    int8: float | None,
    expected: str,
) -> None:
    monkeypatch.delenv("HEADSTART_AUTO_WEIGHTS", raising=False)
    if int8 is not None:
        record_quality(tmp_path, int8)
    assert choose_weights("auto", backend, isa, tmp_path).format == expected
    assert choose_weights("bf16", backend, isa, tmp_path).format == "bf16"


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(1.005, 1.016, "int8"), (1.0101, 1.02, "f32")]
)
def test_int8_is_left_only_where_it_is_shown_to_cost_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, most: float, expected: str
) -> None:
    """What two perplexities differ by is noise, too: the interval of paired differences decides."""
    monkeypatch.delenv("HEADSTART_AUTO_WEIGHTS", raising=False)
    record_quality(tmp_path, 20.21)
    path = tmp_path / "int8" / "quality.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"int8_least": least, "int8_most": most})
    )
    assert choose_weights("auto", "cpu", "avx2", tmp_path).format == expected


@pytest.mark.parametrize(
    ("held", "isa", "int8", "expected"),
    [
        ("f32", "avx512_vnni", 20.0, "f32"),
        ("bf16", "avx2", 20.0, "bf16"),
        ("int8", "avx2", 20.0, "int8"),
        ("int8", "avx2", 21.0, "f32"),
        ("int8", "avx2", None, "f32"),
    ],
)
def test_what_auto_takes_can_be_held(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: str,
    isa: str,
    int8: float | None,
    expected: str,
) -> None:
    monkeypatch.setenv("HEADSTART_AUTO_WEIGHTS", held)
    if int8 is not None:
        record_quality(tmp_path, int8)
    assert choose_weights("auto", "cpu", isa, tmp_path).format == expected
    assert choose_weights("auto", "reference", isa, tmp_path).format == "f32"
    assert choose_weights("bf16", "cpu", isa, tmp_path).format == "bf16"


def test_the_choice_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADSTART_AUTO_WEIGHTS", raising=False)
    assert choose_weights("int8", "cpu", "avx2", tmp_path) == WeightChoice("int8", "")
    said = "not int8, because the model has no int8 weights"
    assert choose_weights("auto", "cpu", "avx2", tmp_path) == ("f32", said)
    assert choose_weights("auto", "cpu", "portable", tmp_path).reason == (
        "the fastest with portable kernels"
    )
    record_quality(tmp_path, 20.2)
    said = "the fastest with avx2 kernels; perplexity +1.0% to +1.0% of float32's"
    assert choose_weights("auto", "cpu", "avx2", tmp_path) == ("int8", said)
    (tmp_path / "int8" / "quality.json").unlink()
    (tmp_path / "int8").rmdir()
    record_quality(tmp_path, 20.6)
    said = "not int8, because int8 has perplexity +3.0% to +3.0% of float32's"
    assert choose_weights("auto", "cpu", "avx512_bf16", tmp_path) == ("bf16", said)
    monkeypatch.setenv("HEADSTART_AUTO_WEIGHTS", "bf16")
    assert (
        choose_weights("auto", "cpu", "avx2", tmp_path).reason == "HEADSTART_AUTO_WEIGHTS says so"
    )


def test_the_engine_tells_of_kernels_that_were_not_compiled(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("HEADSTART_AUTO_ISA", raising=False)
    monkeypatch.setattr(_cpu, "missing", lambda: ["avx999"])
    set_up(EngineConfig(model_path=str(tiny_model("llama")), backend="cpu"))
    assert "this machine has avx999, for which no kernels" in caplog.text


def test_an_unknown_weight_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--weights must be auto, f32, f16, bf16, int8; got int3"):
        choose_weights("int3", "cpu", "avx2", tmp_path)
    monkeypatch.setenv("HEADSTART_AUTO_WEIGHTS", "int3")
    with pytest.raises(ConfigError, match="HEADSTART_AUTO_WEIGHTS must be f32, bf16, int8"):
        choose_weights("auto", "cpu", "avx2", tmp_path)
