"""The kernels' own test program (cpu/kernel_test.cpp), which needs no Python.

Built here quickly rather than well: what optimisation adds is tested through the Python module. It
shows that the program holds on this machine before it is run in an emulator
(deploy/aarch64_test.sh), and that results do not depend on where threads come from.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headstart.kernels import _cpu

ROOT = Path(__file__).resolve().parents[2]
PORTABLE = "-DHEADSTART_PORTABLE_ONLY=ON"
CMAKE = [sys.executable, "-m", "cmake"]


def results(build: Path, *options: str) -> str:
    """Build the program and run it; what it prints."""
    settings = ["-DHEADSTART_MODULE=OFF", "-DHEADSTART_KERNEL_TEST=ON"]
    for command in (
        [*CMAKE, "-S", ROOT, "-B", build, *settings, "-DHEADSTART_OPTIMISATION=-O1", *options],
        [*CMAKE, "--build", build, "--parallel", "2"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=500)
    program = [build / "kernel_test"]
    return subprocess.run(program, check=True, capture_output=True, text=True, timeout=500).stdout


def own_threads(tmp_path: Path) -> str:
    return results(tmp_path / "threads", PORTABLE, "-DHEADSTART_OPENMP=OFF")


def test_every_kernel_against_a_loop_with_threads_of_its_own(tmp_path: Path) -> None:
    assert "portable: 0 failures" in own_threads(tmp_path)


@pytest.mark.slow
def test_every_instruction_set_and_either_kind_of_threads(tmp_path: Path) -> None:
    """Those that this machine cannot run are compiled: an editable installation leaves them out."""
    printed = results(tmp_path / "openmp")
    for isa in _cpu.supported():
        assert f"{isa}: 0 failures" in printed
    assert own_threads(tmp_path) in printed
