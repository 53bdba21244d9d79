"""The kernels' own test program (cpu/kernel_test.cpp), which needs no Python.

Built here for the portable kernels alone, and quickly rather than well: what instruction sets and
optimisation add is tested through the Python module. It shows that the program holds on this
machine before it is run in an emulator (deploy/aarch64_test.sh), and that results do not depend on
where threads come from.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CMAKE = [sys.executable, "-m", "cmake"]


def results(build: Path, *options: str) -> str:
    """Build the program and run it; what it prints."""
    settings = [
        "-DHEADSTART_MODULE=OFF",
        "-DHEADSTART_KERNEL_TEST=ON",
        "-DHEADSTART_PORTABLE_ONLY=ON",
    ]
    for command in (
        [*CMAKE, "-S", ROOT, "-B", build, *settings, "-DHEADSTART_OPTIMISATION=-O1", *options],
        [*CMAKE, "--build", build, "--parallel", "2"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    program = [build / "kernel_test"]
    return subprocess.run(program, check=True, capture_output=True, text=True, timeout=300).stdout


def test_every_kernel_against_a_loop_with_either_kind_of_threads(tmp_path: Path) -> None:
    shared = results(tmp_path / "openmp")
    own = results(tmp_path / "threads", "-DHEADSTART_OPENMP=OFF")
    assert "portable: 0 failures" in shared
    assert shared == own
