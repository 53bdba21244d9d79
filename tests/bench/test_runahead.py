"""The KV-Runahead benchmark: its baseline computes the model, its figures, its command."""

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headstart.bench import runahead
from headstart.bench.allgather import DENSE, chunk_pages, start_gathering
from headstart.bench.http_client import BenchError
from headstart.bench.line_process import LineProcess
from headstart.bench.links import Place
from headstart.bench.plots import runahead_plots
from headstart.bench.prefill_run import PrefillRun
from headstart.bench.runahead import main
from headstart.bench.runahead_report import METHODS, Row, jitter_table, ratio, tables
from headstart.bench.runahead_worker import start_chain

HERE = Place((), "127.0.0.1")


# --- processes ---


def test_baseline_and_engine_agree_with_the_model(tiny_model: Any, greedy_reference: Any) -> None:
    """Two ranks gather; one engine has the prompt alone. Dense attention is another model."""
    folder = tiny_model("llama")
    chance = random.Random(0)
    prompts = [chance.choices(range(320), k=n) for n in (33, 64, 65, 200, 300)]
    expected = [greedy_reference(folder, prompt, 1)[0] for prompt in prompts]
    settings = {"max_tokens": 300, "weights": "f32"}
    with (
        start_gathering([HERE] * 2, str(folder), **settings) as gathering,
        start_chain([HERE], str(folder), **settings) as engine,
    ):
        assert (engine.page_size, engine.vocab_size) == (32, 320)
        for contestant in (gathering, engine):
            runs = [runahead.time_to_first_token(contestant, prompt) for prompt in prompts]
            assert [run.token for _, run in runs] == expected
            assert all(0 < seconds < math.inf for seconds, _ in runs)
        _, run = runahead.time_to_first_token(gathering, prompts[-1])
        # 5 of 10 pages of 32 tokens, keys and values of 2 heads of 16, float32, in 2 layers.
        assert run.sent_bytes == [2 * 5 * 32 * 2 * 2 * 16 * 4] * 2
        assert len(run.idle_s) == 2
        dense = gathering.with_attention(DENSE)
        assert [runahead.time_to_first_token(dense, p)[1].token for p in prompts] != expected


def test_chunks() -> None:
    assert chunk_pages(8176, 32, 4) == 64
    assert chunk_pages(33, 32, 2) == 1
    for tokens, ranks in ((32, 2), (5 * 32, 4)):
        with pytest.raises(ValueError, match=f"^{tokens} tokens are too few for {ranks} equal"):
            chunk_pages(tokens, 32, ranks)


def test_line_processes() -> None:
    echo = "import sys\nfor line in sys.stdin: print('noise'); print(line, end='', flush=True)"
    with LineProcess("echo", [sys.executable, "-c", echo], 20.0) as process:
        assert process.ask({"a": [1]}) == {"a": [1]}
        assert process.ask({}) == {}
    brief = [sys.executable, "-c", "raise SystemExit(3)"]
    ended = pytest.raises(BenchError, match=r"^brief ended with status 3")
    with ended, LineProcess("brief", brief, 20.0) as process:
        process.receive()
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    late = pytest.raises(BenchError, match=r"^silent: no answer within 0 s")
    with late, LineProcess("silent", silent, 0.1) as process:
        process.receive()


# --- rows ---


def row(method: str, seconds: Sequence[float], link: str = "1gbit", **more: Any) -> Row:
    fixed: dict[str, Any] = {"ranks": 2, "prompt_tokens": 1024, "threads": 1, "cores": 2}
    told = {"model": "m", "date": "2026-01-02T03:04:05", "seed": 1}
    return Row(**{**fixed, **told, **more}, link=link, method=method, ttft_s=list(seconds))


ROWS = [
    row("allgather", [2.0, 4.0, 3.0], idle_s=[0.5, 0.25], sent_bytes=[1_500_000] * 2),
    row("even", [2.0, 2.0, 2.0], idle_s=[0.0, 1.0], sent_bytes=[10**6, 0], bounds=[0, 512, 1024]),
    row("modelled", [1.5, 1.0, 1.5], predicted_s=1.25, bounds=[0, 640, 1024], differing=1),
    row("allgather", [6.0, 6.0, 6.0], link="1gbit+jitter"),
    row("even", [2.2, 2.2, 2.2], link="1gbit+jitter"),
]


def test_ratios_are_above_one_where_the_method_is_ahead() -> None:
    assert str(ratio(ROWS[0], ROWS[2])) == "2.00 (1.33–4.00)"
    assert ratio(None, ROWS[0]) is None
    assert ratio(ROWS[0], ROWS[0]) is None


def test_tables() -> None:
    lines = tables(ROWS).splitlines()
    assert lines[0] == "m, ranks of 1 thread, 2 cores, 3 repeats, 2026-01-02"
    assert "**1gbit+jitter**" in lines
    even = "| 1,024 | 2 | even | 2000 | 1.50 (1.00–2.00) | – | – | – | – | 0 1000 | 1.0 0.0 | 512"
    assert f"{even} | – |" in lines
    modelled = "| 1,024 | 2 | modelled | 1500 | 2.00 (1.33–4.00) | – | – | – | 1250 | – | – | 640"
    assert f"{modelled} | 1 |" in lines
    assert lines[-1] == "| 1gbit | 1,024 | 2 | 2.000 | 1.100 |"
    assert "take turns" not in tables(ROWS)
    assert "with 4 ranks: they take turns" in tables([row("even", [1.0], ranks=4)])
    assert jitter_table(ROWS[:3], {}) is None


def test_rows_are_lines() -> None:
    assert [msgspec.json.decode(msgspec.json.encode(r), type=Row) for r in ROWS] == ROWS


def test_plots(tmp_path: Path) -> None:
    rows = [*ROWS, row("even", [1.0], ranks=4)]
    names = {path.name for path in runahead_plots(tmp_path, rows)}
    figures = ("ttft-2", "ratio-2", "idle-2", "ttft-4")
    assert names == {f"runahead-{f}.{kind}" for f in figures for kind in ("svg", "png")}
    text = (tmp_path / "runahead-ratio-2.svg").read_text()
    for words in ("1gbit+jitter", "all-gather ÷ method", "modelled", "prompt (tokens)"):
        assert f"<!-- {words}" in text


# --- the command ---


class Fake:
    """Answers at once, with a token of the prompt, or with a wrong one."""

    def __init__(self, token: int | None = None) -> None:
        self.token = token
        self.prompts: list[list[int]] = []

    def prepare(self, tokens: Sequence[int]) -> None:
        self.prompts.append(list(tokens))

    def start(self) -> PrefillRun:
        token = self.prompts[-1][0] if self.token is None else self.token
        return PrefillRun(end=runahead.time.perf_counter() + 0.25, token=token, idle_s=[0.5, 0.0])


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Fake]:
    made: dict[str, Fake] = {method: Fake() for method in METHODS}

    @contextmanager
    def contestants(setup: runahead.Setup, places: Sequence[Place]) -> Iterator[dict[str, Fake]]:
        yield {method: made[method] for method in setup.methods}

    monkeypatch.setattr(runahead, "contestants", contestants)
    monkeypatch.setattr(runahead, "resolve", lambda model, home: tmp_path)
    monkeypatch.setattr(runahead, "PAUSE", 0.0)
    return made


SMALL = ["--links", "loopback", "--ranks", "2", "--lengths", "8", "16", "--repeats", "2"]


def test_a_run_and_its_rows_again(
    fakes: dict[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = tmp_path / "rows.jsonl", tmp_path / "runahead.md"
    flags = [*SMALL, "--methods", "local", "even", "allgather-dense", "--seed", "7"]
    fakes["allgather-dense"].token = -1  # no result of the model's, and not taken for one
    assert main([*flags, "--json", str(file), "--markdown", str(text)]) == 0
    printed = capsys.readouterr()
    assert printed.out == text.read_text()
    assert printed.out.startswith("smollm2-135m, ranks of 1 thread, ")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["prompt_tokens"], line["method"]) for line in lines] == [
        (n, method) for n in (8, 16) for method in ("local", "even", "allgather-dense")
    ]
    assert all(len(line["ttft_s"]) == 2 and line["differing"] == 0 for line in lines)
    # The same prompts for all, and each but once: one that warms up, and two.
    assert fakes["local"].prompts == fakes["even"].prompts
    assert len({tuple(prompt) for prompt in fakes["local"].prompts}) == 6
    assert main(["--plot-only", str(file), "--plot", str(tmp_path / "plots")]) == 0
    assert capsys.readouterr().out == printed.out
    assert (tmp_path / "plots" / "runahead-ttft-2.svg").exists()


def test_other_tokens_are_told(fakes: dict[str, Fake], capsys: pytest.CaptureFixture[str]) -> None:
    fakes["even"].token = -1
    assert main([*SMALL, "--methods", "local", "even"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 2 |")


def test_wrong_arguments(fakes: dict[str, Fake], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--links", "1mbit"]) == 1
    assert "a link is loopback" in capsys.readouterr().err
    for flags in (["--methods", "best"], ["--ranks", "0"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            main(flags)
