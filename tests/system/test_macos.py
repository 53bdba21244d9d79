"""Nothing that only Linux has is needed to import headstart, or to serve.

As far as Linux can show it: macos/sitecustomize.py hides what macOS lacks in every process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import headstart

ROOT = Path(headstart.__file__).parent


@pytest.fixture
def as_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("macos")))


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_linux_is_hidden(as_on_macos: None) -> None:
    code = (
        "import os, pathlib, mmap\n"
        "print(hasattr(os, 'sched_getaffinity'), hasattr(mmap, 'MADV_HUGEPAGE'))\n"
        "for path in '/proc/cpuinfo', '/sys/fs/cgroup/cpu.max':\n"
        "    try: open(path)\n"
        "    except FileNotFoundError: print('no', path)\n"
        "try: import triton\n"
        "except ImportError: print('no triton')\n"
    )
    assert run(code).splitlines() == [
        "False False",
        "no /proc/cpuinfo",
        "no /sys/fs/cgroup/cpu.max",
        "no triton",
    ]


def test_everything_but_the_gpu_backend_is_imported(as_on_macos: None) -> None:
    names = []
    for folder in ("kernels", "engine", "server"):
        base = (ROOT / folder).resolve()
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base.parent).with_suffix("").parts
            if parts[:2] != ("kernels", "gpu"):
                names.append(".".join(("headstart", *parts)).removesuffix(".__init__"))
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    run(code, *names)


def test_a_model_is_served(as_on_macos: None, start_server, tiny_folder: Path) -> None:
    server = start_server(str(tiny_folder), "--kv-memory", "64MiB")
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            response_format={"type": "json_object"},  # checked in a process of its own
        )
    assert answer.usage.completion_tokens > 0
    assert server.metrics()["num_requests_running"] == 0


def test_runahead_says_that_it_needs_linux(as_on_macos: None, start_server, tiny_folder) -> None:
    server = start_server(str(tiny_folder), "--kv-memory", "64MiB", "--runahead", "2", ready=False)
    assert server.process.wait(60) == 1
    assert "KV-Runahead needs Linux" in server.log
