"""The relay benchmark: its grid, its ratios, what it prints, and the servers it starts."""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import headstart.bench
from headstart.bench import relay
from headstart.bench.prompts import Calibration
from headstart.bench.relay import main, workload
from headstart.bench.relay_report import Point, ratio_table, tables
from headstart.bench.samples import Result


def side(**figures: float | None) -> Result:
    """One server's figures; those not named are missing."""
    missing = dict.fromkeys(
        (
            "cached_tokens", "ttft_ms_median", "ttft_ms_p95", "tpot_ms_median", "tpot_ms_p95",
            "output_tokens_per_s", "decode_tokens_per_s", "client_cpu_share",
        )
    )  # fmt: skip
    fixed: dict[str, Any] = {"target": "t", "model": "m", "workload": "w", "date": "", "seed": 1}
    counts = dict.fromkeys(
        ("streams", "repetitions", "requests", "errors", "prompt_tokens", "output_tokens"), 0
    )
    return Result(**{**fixed, **counts, **missing, **figures})


def point(prefix: int = 512, streams: int = 4) -> Point:
    return Point(
        prefix,
        streams,
        auto=side(output_tokens_per_s=300.0, ttft_ms_median=50.0, tpot_ms_median=4.0),
        off=side(output_tokens_per_s=200.0, ttft_ms_median=40.0, tpot_ms_median=10.0),
    )


def test_ratios_are_above_one_where_auto_is_ahead() -> None:
    measured = point()
    assert measured.throughput_ratio == 1.5
    assert measured.ttft_ratio == 0.8
    assert measured.tpot_ratio == 2.5
    assert Point(0, 1, side(), side(output_tokens_per_s=1.0)).throughput_ratio is None
    assert Point(0, 1, side(tpot_ms_median=1.0), side()).tpot_ratio is None


def test_workloads_of_the_grid() -> None:
    calibration = Calibration(overhead=48, per_word=1)
    shared = workload(512, 8, 64, 2, calibration)
    assert (shared.prompt_tokens, shared.warm, shared.shared) == (560, True, True)
    assert (shared.streams, shared.output_tokens, shared.repetitions) == (8, 64, 2)
    alone = workload(0, 8, 64, 2, calibration)
    assert (alone.prompt_tokens, alone.warm, alone.shared) == (72, False, False)
    assert calibration.system_words(alone.prompt_tokens) == 24
    assert len({workload(p, s, 64, 2, calibration).name for p in (1, 11) for s in (1, 11)}) == 4


def test_tables() -> None:
    points = [point(0, 1), point(0, 4), point(512, 1)]
    points.append(Point(512, 4, side(), point().off))
    lines = tables(points, "the title").splitlines()
    assert lines[0] == "the title"
    assert "| 0 | 4 | 300.0 | 200.0 | 1.50 | 50.0 | 40.0 | 4.00 | 10.00 | 2.50 |" in lines
    assert "| 512 | 4 | - | 200.0 | - | - | 40.0 | - | 10.00 | - |" in lines
    assert ratio_table(points, lambda p: p.tpot_ratio).splitlines() == [
        "| prefix | 1 stream | 4 streams |",
        "|---:|---:|---:|",
        "| 0 | 2.50 | 2.50 |",
        "| 512 | 2.50 | - |",
    ]


def test_json_line() -> None:
    line = json.loads(point().as_json(2, "--threads 1"))
    assert (line["prefix_tokens"], line["streams"], line["threads"]) == (512, 4, 2)
    assert (line["throughput_ratio"], line["ttft_ratio"], line["tpot_ratio"]) == (1.5, 0.8, 2.5)
    assert (line["auto"]["tpot_ms_median"], line["off"]["tpot_ms_median"]) == (4.0, 10.0)
    assert line["serve_args"] == "--threads 1"


@pytest.fixture
def started(server: Any, other_server: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The two fake servers stand for auto and off; what they were started with is kept."""
    kept: list[list[str]] = []

    @asynccontextmanager
    async def start(serve_args: Sequence[str]) -> AsyncIterator[str]:
        kept.append(list(serve_args))
        yield (server if "auto" in serve_args else other_server).url

    server.pace, other_server.pace = 0.004, 0.016
    server.prefill = other_server.prefill = 0.01
    monkeypatch.setattr(relay, "start_headstart", start)
    monkeypatch.setattr(relay, "PAUSE", 0.0)
    return kept


SMALL = ["--prefix", "0", "64", "--streams", "1", "3", "1", "--output-tokens", "5"]
SMALL += ["--repetitions", "1", "--seed", "1"]


def test_a_run(
    started: list[list[str]],
    server: Any,
    other_server: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "relay.jsonl"
    flags = ["--out", str(out), "--plot", str(tmp_path / "plots"), "--serve-args", "--threads 1"]
    assert main([*SMALL, *flags]) == 0
    assert started == [
        ["smollm2-135m", "--relay", mode, "--max-running", "64", "--threads", "1"]
        for mode in ("auto", "off")
    ]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["prefix_tokens"], line["streams"]) for line in lines] == [
        (0, 1), (0, 3), (64, 1), (64, 3),
    ]  # fmt: skip
    for line in lines:
        assert line["auto"]["notes"] == line["off"]["notes"] == []
        assert line["auto"]["prompt_tokens"] == line["off"]["prompt_tokens"]
        assert line["auto"]["requests"] == line["streams"]
        assert line["tpot_ratio"] > 1.5
    # Both were asked the same, in the same order.
    assert server.bodies == other_server.bodies
    printed = capsys.readouterr()
    assert printed.out.startswith("fake, machine with ")
    assert ", 5 output tokens, --threads 1\n" in printed.out
    assert "| 64 | 3 | " in printed.out
    assert "relay-auto" in printed.err
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"relay-{what}.{kind}" for what in ("throughput", "latency") for kind in ("svg", "png")
    }


def test_more_streams_than_the_default_may_run(started: list[list[str]]) -> None:
    flags = ["--prefix", "64", "--streams", "70", "--output-tokens", "1", "--repetitions", "1"]
    assert main(flags) == 0
    assert started[0][-2:] == ["--max-running", "70"]


def test_failed_requests_are_told(
    started: list[list[str]], other_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other_server.fail_every = 4
    assert main([*SMALL, "--prefix", "64", "--streams", "1"]) == 1
    printed = capsys.readouterr()
    assert "first error: HTTP 400: no room" in printed.err
    assert "| - |" in printed.out


def test_nothing_starts_where_results_cannot_go(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "none" / "out.jsonl")]) == 1
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--plot", str(tmp_path / "file")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.startswith("error: ") for error in errors] == [True, True]
    assert started == []


def test_plots_without_matplotlib(
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "headstart.bench.plots", raising=False)
    monkeypatch.delattr(headstart.bench, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--plot", str(tmp_path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --plot: ")
    assert error.endswith("; it is in the extra `bench`")
    assert started == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streams", "0"], "must be 1 to"),
        (["--prefix", "-1"], "must be 0 to"),
        (["--repetitions", "0"], "must be 1 to"),
        (["--timeout", "0"], "must be above 0"),
        (["--serve-args", "--threads '2"], "--serve-args: No closing quotation"),
        (["--serve-args=--relay=on"], "--relay is what the two servers differ in"),
    ],
)
def test_wrong_arguments(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
