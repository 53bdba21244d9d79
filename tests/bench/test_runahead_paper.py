"""The simulated tables of KV-Runahead: what goes in, what is printed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from headstart.bench.runahead_paper import FALCON, LLAMA, Calibration, grid, main, point
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.runahead.costs import LinkCosts

FEW = ["--ranks", "2", "--lengths", "1024"]


def test_the_models_are_what_they_are_called() -> None:
    """7B: 6.7 and 6.9 with embeddings, which prefill does not multiply by."""
    assert LLAMA.weights == pytest.approx(6.48e9, rel=0.01)
    assert FALCON.weights == pytest.approx(6.63e9, rel=0.01)
    assert LLAMA.token_bytes == 64 * FALCON.token_bytes  # 32 KV heads of 128, one of 64
    calibration = LLAMA.on_a100(10e9)
    assert calibration.rank.per_token == pytest.approx(2 * 6.48e9 / (312e12 * 0.6), rel=0.01)
    assert calibration.link.seconds(10**10) == pytest.approx(1, rel=1e-3)


def test_what_a_point_says() -> None:
    calibration = Calibration(4, 8, PrefillCosts(0.0, 1e-3, 1e-6), LinkCosts(1e-6, 1e-9))
    found = point(calibration, 4, 1024)
    assert found.alone == pytest.approx(1.024 + 1e-6 * 1024 * 512)
    assert found.dense > found.causal > found.even > found.ours > found.alone / 4
    assert found.gathered_bytes == 3 * 1024 * 4 * 8
    assert found.our_bytes < found.gathered_bytes
    assert found.dense_noise > found.ours_noise >= 0


def test_the_grid_is_whole() -> None:
    points = grid(LLAMA.on_a100(300e9), [1, 2], [64, 128])
    assert [(p.ranks, p.tokens) for p in points] == [(1, 64), (1, 128), (2, 64), (2, 128)]


def test_all_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FEW) == 0
    out = capsys.readouterr().out
    for title in ("Llama 7B, A100, 300 GB/s", "Falcon 7B, A100, 10 GB/s", "Beside the paper"):
        assert f"**{title}**" in out
    assert out.count("| 2 | 1024 |") == 4
    assert "up to 1.42" in out


def test_other_hardware_by_file_and_by_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = Calibration(9, 64, PrefillCosts(0.0, 1e-3, 1e-7), LinkCosts(1e-4, 1e-9))
    file = tmp_path / "calibration.json"
    file.write_bytes(msgspec.json.encode(calibration))
    assert main([*FEW, "--calibration", str(file)]) == 0
    by_file = capsys.readouterr().out
    figures = "--per-token 1e-3 --per-pair 1e-7 --latency 1e-4 --bandwidth 1e9"
    assert main([*FEW, *figures.split(), "--layers", "9", "--kv-bytes", "64"]) == 0
    assert capsys.readouterr().out == by_file
    assert by_file.count("\n") == 3
    assert "Llama" not in by_file


@pytest.mark.parametrize("content", ["", "[]", '{"layers": 1}', '{"layers": "x"}'])
def test_a_file_that_says_something_else(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    assert main([*FEW, "--calibration", str(file)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--bandwidth", "1e9"],
        ["--layers", "3"],
        ["--calibration", "x.json", "--per-token", "1"],
        ["--per-token", "0"],
        ["--ranks", "0"],
    ],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(wrong)
    assert exited.value.code == 2
    assert capsys.readouterr().out == ""


def test_too_few_tokens_and_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4", "--lengths", "17"]) == 1
    assert "too few for 4 ranks" in capsys.readouterr().err
    assert main(["--calibration", "/nowhere/x.json"]) == 1
