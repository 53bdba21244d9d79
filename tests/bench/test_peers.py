"""Peers: the order of measurement, the comparison, and the processes it starts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headstart.bench import worker_target
from headstart.bench.http_client import BenchError
from headstart.bench.peers import main
from headstart.bench.prompts import Calibration, Messages, PromptSource
from headstart.bench.report import print_comparison
from headstart.bench.samples import Burst, Sample, summarise
from headstart.bench.server_process import start_headstart, start_vllm
from headstart.bench.worker_target import OpenVinoSettings, start_worker
from headstart.bench.workloads import Workload, alternate

FAKE_WORKER = """
import json, sys
assert json.loads(sys.argv[2])["cache_gb"] == 4
print("a library's chatter", flush=True)
print(json.dumps({"ready": True, "version": "1.0", "load_s": 0.1}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "count" in request:
        reply = {"prompt_tokens": sum(len(m["content"].split()) for m in request["count"])}
    else:
        n = request["output_tokens"]
        reply = {"samples": [
            {"prompt_tokens": 9, "output_tokens": min(n, 50), "sent": 1.0,
             "times": [1.5 + i / 100 for i in range(min(n, 50))]}
            for _ in request["burst"]]}
    print(json.dumps(reply), flush=True)
"""

KILLED = """
import json, os, signal
print(json.dumps({"ready": True, "version": "1.0", "load_s": 0.1}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

FAKE_SERVE = """
import http.server, signal, sys, pathlib
port = int(sys.argv[sys.argv.index("--port") + 1])
pathlib.Path(sys.argv[1]).write_text(" ".join(sys.argv[2:-2]))
def end(*_):
    pathlib.Path(sys.argv[1]).write_text("ended")
    sys.exit()
signal.signal(signal.SIGTERM, end)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@dataclass
class Recorder:
    """A target that writes down when it is asked for what."""

    name: str
    log: list[tuple[str, str, int]]
    model: str = "m"
    calls: list[int] = field(default_factory=list)

    async def count(self, messages: Messages) -> int:
        return 1

    async def burst(self, conversations: list[Messages], output_tokens: int) -> Burst:
        self.log.append((self.name, conversations[0][0]["content"][:20], len(conversations)))
        sample = Sample(sent=0.0, times=(1.0, 2.0), prompt_tokens=60, output_tokens=2)
        return Burst([sample] * len(conversations))


async def alternated(warm: bool) -> list[tuple[str, str, int]]:
    log: list[tuple[str, str, int]] = []
    workload = Workload("w", "ttft_ms_median", 4, 60, 2, warm, 3)
    bursts = await alternate(
        [Recorder("a", log), Recorder("b", log)],
        workload,
        PromptSource(1),
        Calibration(overhead=10, per_word=1),
        60,
    )
    assert [len(mine) for mine in bursts] == [3, 3]
    return log


async def test_cold_alternates_with_fresh_prompts() -> None:
    log = await alternated(warm=False)
    assert [name for name, _, _ in log] == ["a", "b", "b", "a", "a", "b"]
    assert len({text for _, text, _ in log}) == 3
    assert [text for name, text, _ in log if name == "a"] == [
        text for name, text, _ in log if name == "b"
    ]


async def test_warm_alternates_after_one_warm_up_request() -> None:
    log = await alternated(warm=True)
    order = ["a", "b", "b", "a", "a", "b"]
    assert [(name, count) for name, _, count in log] == [(n, c) for n in order for c in (1, 4)]
    assert len({text for _, text, _ in log}) == 1


async def test_own_system_turns_share_nothing() -> None:
    seen: list[Messages] = []

    class Keeper(Recorder):
        async def burst(self, conversations: list[Messages], output_tokens: int) -> Burst:
            seen.extend(conversations)
            return await super().burst(conversations, output_tokens)

    workload = Workload("w", "ttft_ms_median", 4, 60, 2, warm=False, repetitions=2, shared=False)
    calibration = Calibration(overhead=10, per_word=1)
    await alternate([Keeper("a", [])], workload, PromptSource(1), calibration, 60)
    assert len({messages[0]["content"] for messages in seen}) == len(seen) == 8
    with pytest.raises(ValueError, match="nobody shares cannot be warm"):
        Workload("w", "ttft_ms_median", 4, 60, 2, warm=True, repetitions=2, shared=False)


def result(name: str, sample: Sample) -> Any:
    return summarise(
        [Burst([sample])],
        target=Recorder(name, []),
        workload="w",
        streams=1,
        seed=1,
        date="",
    )


def test_comparison_is_above_one_when_the_first_is_ahead(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fast = result("a", Sample(sent=0.0, times=(1.0, 2.0), output_tokens=2))
    slow = result("b", Sample(sent=0.0, times=(2.0, 4.0), output_tokens=2))
    print_comparison(
        [
            ("w1", "ttft_ms_median", [fast, slow]),
            ("w2", "output_tokens_per_s", [fast, slow]),
            ("w3", "decode_tokens_per_s", [slow, fast]),
        ]
    )
    rows = [line.split() for line in capsys.readouterr().err.splitlines() if line]
    assert rows[1] == ["w1", "ttft_ms_median", "1000.00", "2000.00", "2.00x"]
    assert rows[2][-1] == "2.00x"
    assert rows[3][-1] == "0.50x"


def test_every_other_target_has_its_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        result(n, Sample(0.0, times=(t, 9.0), output_tokens=2))
        for n, t in zip("abc", (1.0, 2.0, 0.5), strict=True)
    ]
    print_comparison([("w", "ttft_ms_median", results)])
    head, row = [line.split() for line in capsys.readouterr().err.splitlines() if line]
    assert head == ["workload", "figure", "a", "b", "c", "/b", "/c"]
    assert row[-2:] == ["2.00x", "0.50x"]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    monkeypatch.setitem(worker_target.WORKERS, "openvino", (OpenVinoSettings, str(path)))
    return path


async def test_a_worker_is_a_target(worker: Path, tmp_path: Path) -> None:
    gguf, python = tmp_path / "m.gguf", Path(sys.executable)
    async with start_worker("openvino", python, gguf, {}, timeout=300) as target:
        assert (target.name, target.model, target.version) == ("openvino", "m.gguf", "1.0")
        messages = PromptSource(1).conversation("s", 30, "u")
        assert await target.count(messages) == 54
        burst = await target.burst([messages] * 3, 50)
        assert [s.ttft for s in burst.good] == [0.5] * 3
        assert burst.good[0].tpot == pytest.approx(0.01)
        short = await target.burst([messages], 51)
        assert "50 tokens instead of 51" in str(short.samples[0].error)
    assert target.process.returncode is not None


async def test_a_worker_that_dies(worker: Path, tmp_path: Path) -> None:
    worker.write_text("raise SystemExit(3)")
    python = Path(sys.executable)
    with pytest.raises(BenchError, match="openvino: the worker ended with status 3"):
        async with start_worker("openvino", python, tmp_path / "m", {}, timeout=300):
            pass
    worker.write_text(KILLED)
    async with start_worker("openvino", python, tmp_path / "m", {}, timeout=300) as target:
        await target.process.wait()
        with pytest.raises(BenchError, match=r"openvino: the worker was killed, .* memory"):
            await target.count([])
    with pytest.raises(BenchError, match=r"settings of llama: .*'depth'"):
        async with start_worker("llama", python, tmp_path / "m", {"depth": 1}, timeout=300):
            pass


def fake_serve(tmp_path: Path, text: str) -> Sequence[str]:
    script = tmp_path / "serve.py"
    script.write_text(text)
    return [sys.executable, str(script), str(tmp_path / "state")]


async def test_headstart_is_started_and_stopped(tmp_path: Path) -> None:
    async with start_headstart(["tiny"], fake_serve(tmp_path, FAKE_SERVE)) as url:
        assert url.startswith("http://127.0.0.1:")
        assert (tmp_path / "state").read_text() == "serve tiny"
    assert (tmp_path / "state").read_text() == "ended"


async def test_headstart_that_cannot_start(tmp_path: Path) -> None:
    command = fake_serve(tmp_path, "raise SystemExit('error: no such model')")
    with pytest.raises(BenchError, match="ended with status 1:\nerror: no such model"):
        async with start_headstart(["tiny"], command):
            pass


async def test_vllm_is_started_from_its_own_python(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(FAKE_SERVE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {tmp_path}/state "$@"\n')
    python.chmod(0o755)
    async with start_vllm(python, Path("/models/m"), ["--dtype", "bfloat16"]):
        assert (tmp_path / "state").read_text() == (
            "-m vllm.entrypoints.openai.api_server --model /models/m --served-model-name model "
            "--host 127.0.0.1 --enable-prefix-caching --dtype bfloat16"
        )
    assert (tmp_path / "state").read_text() == "ended"


def test_no_vllm_is_one_line(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = str(tmp_path / "none")
    assert main(["--url", server.url, "--beside", "vllm", "--python", python]) == 1
    assert capsys.readouterr().err == f"error: {python} does not exist; give --python\n"


def test_against_a_running_server(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--only", "headstart", "--url", server.url, "--workload", "cold-1748"]
    assert main(flags) == 0
    (line,) = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (line["target"], line["prompt_tokens"], line["repetitions"]) == ("headstart", 1748, 5)


def test_missing_environment_is_one_line(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", server.url, "--python", str(tmp_path / "none"), "--gguf", str(tmp_path)]
    assert main(flags) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} does not exist; `make peers` creates it\n"
    )


def test_unknown_openvino_setting(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--python", sys.executable, "--gguf", __file__, "--openvino", '{"cach": 1}']
    assert main(["--url", server.url, *given]) == 1
    assert "settings of openvino: " in capsys.readouterr().err
