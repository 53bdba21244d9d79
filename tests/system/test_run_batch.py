"""headstart run-batch with the real model, whose engine is killed in between."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil


def engine_of(process: subprocess.Popen) -> psutil.Process | None:
    children = psutil.Process(process.pid).children()
    return next((c for c in children if "headstart.engine.process.service" in c.cmdline()), None)


def test_an_engine_that_is_killed_costs_no_line(default_flags, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    requests = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": body | {"prompt": f"{i}, {i + 1}, {i + 2},"},
        }
        for i in range(50)
    ]
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    model, *flags = default_flags
    command = [
        sys.executable,
        "-m",
        "headstart.server.cli",
        "run-batch",
        str(source),
        str(output),
    ]
    process = subprocess.Popen(
        [*command, "--model", model, *flags, "--concurrency", "8"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not output.exists() or output.read_bytes().count(b"\n") < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        engine = engine_of(process)
        assert engine is not None
        engine.kill()
        before = output.read_bytes().count(b"\n")
        assert before < 50
        _, log = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, log
    assert "the engine process ended (signal 9); starting it again" in log
    assert log.splitlines()[-1] == "headstart: 50 lines done, 0 failed"
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(a["custom_id"] for a in answers) == sorted(r["custom_id"] for r in requests)
    for answer in answers:
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["usage"]["completion_tokens"] == 8
    again = subprocess.run(
        [*command, "--model", model, *flags, "--resume"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert "0 lines done, 0 failed; 50 were there already" in again.stderr
    assert len(output.read_text().splitlines()) == 50
