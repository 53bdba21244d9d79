"""The load generator against a server whose pace is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.bench.serve import main


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_warm_and_cold(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", server.url, "--workload", "cold-1748", "warm-1748"]) == 0
    cold, warm = lines(capsys.readouterr().out)
    assert (cold["workload"], warm["workload"]) == ("cold-1748", "warm-1748")
    assert cold["prompt_tokens"] == warm["prompt_tokens"] == 1748
    assert (cold["repetitions"], warm["repetitions"]) == (5, 9)
    assert cold["cached_tokens"] == 0
    assert warm["cached_tokens"] > 1700
    assert cold["errors"] == warm["errors"] == 0
    assert cold["ttft_ms_median"] >= 50 > warm["ttft_ms_median"]
    assert cold["notes"] == warm["notes"] == []


def test_sixteen_streams(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", f"{server.url}/v1", "--workload", "streams16-248"]) == 0
    (result,) = lines(capsys.readouterr().out)
    assert result["prompt_tokens"] == 248
    assert result["requests"] == 16 * 3
    assert result["output_tokens"] == 16 * 3 * 128
    assert server.most_open == 16
    assert 5.0 <= result["tpot_ms_median"] < 8.0
    assert result["output_tokens_per_s"] <= result["decode_tokens_per_s"] * 1.02
    assert 16 / 0.008 < result["decode_tokens_per_s"] <= 16 / 0.0049
    measured = [body for body in server.bodies if body["max_tokens"] == 128]
    assert len({body["messages"][0]["content"] for body in measured}) == 1
    assert len({body["messages"][1]["content"] for body in measured}) == 48
    assert all(body["temperature"] == 0 and body["ignore_eos"] is True for body in measured)


def test_same_seed_same_prompts(server: Any) -> None:
    command = ["--url", server.url, "--workload", "warm-1748", "--seed"]
    main([*command, "7"])
    first = server.bodies[:]
    server.bodies.clear()
    main([*command, "7"])
    assert server.bodies == first
    server.bodies.clear()
    main([*command, "8"])
    assert not {b["messages"][0]["content"] for b in server.bodies} & {
        b["messages"][0]["content"] for b in first
    }


def test_cold_that_is_not_cold_is_said(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["--url", server.url, "--workload", "cold-1748", "--seed", "1"]) == 0
    first, second = lines(capsys.readouterr().out)
    assert first["notes"] == []
    assert "not cold" in second["notes"][0]


def test_own_load_bounds_streams(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "12", "--streams", "3", "--prompt-tokens", "100", "--output-tokens", "9"]
    assert main(["--url", server.url, *load]) == 0
    (result,) = lines(capsys.readouterr().out)
    assert (result["requests"], result["streams"], result["prompt_tokens"]) == (12, 3, 100)
    assert result["output_tokens"] == 12 * 9
    assert server.most_open == 3


def test_rate_spreads_arrivals(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--requests", "20", "--rate", "100", "--output-tokens", "2", "--seed", "3"]
    assert main(["--url", server.url, *load]) == 0
    (result,) = lines(capsys.readouterr().out)
    assert result["streams"] == 20
    # 20 Poisson arrivals at 100/s take about 0.2 s; all at once would end within 0.1 s.
    assert result["output_tokens_per_s"] < 40 / 0.1


def test_failed_requests_are_counted(
    server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server.fail_every = 5
    out = tmp_path / "results.jsonl"
    load = ["--requests", "8", "--prompt-tokens", "60", "--output-tokens", "3"]
    assert main(["--url", server.url, *load, "--out", str(out)]) == 1
    (result,) = lines(out.read_text())
    assert (result["errors"], result["error"]) == (2, "HTTP 400: no room")
    assert result["output_tokens"] == 6 * 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no room" in printed.err


def test_broken_stream_is_an_error(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.hang_up = True
    assert main(["--url", server.url, "--workload", "stream1-248"]) == 1
    (result,) = lines(capsys.readouterr().out)
    assert "without a finish_reason" in result["error"]
    assert result["ttft_ms_median"] is None


def test_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: no server at http://127.0.0.1:9: ")
    assert len(printed.err.splitlines()) == 1


def test_unknown_model(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", server.url, "--model", "other"]) == 1
    assert "does not serve other; it has: fake" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "nonsense"], "unknown workload 'nonsense'"),
        (["--streams", "4"], "--streams needs --requests"),
        (["--requests", "0"], "must be 1 to"),
        (["--requests", "2", "--workload", "warm-1748"], "exclude each other"),
        (["--requests", "2", "--rate", "nan"], "must be above 0"),
    ],
)
def test_wrong_arguments(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
