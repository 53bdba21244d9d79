"""What is installed: bounds of versions, extras, the files of the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in extra)]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found
    return found[0].replace("-", "_").lower()


def private_parts(path: Path) -> set[str]:
    """Packages of others of which ``path`` imports something that begins with an underscore."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        if any(part.startswith("_") and not part.startswith("__") for part in names):
            packages.add(names[0])
    return packages - {"headstart"}


def test_private_parts_of_libraries_have_upper_bounds() -> None:
    used = set()
    for folder in ("kernels", "engine", "server", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= private_parts(path)
    assert "torch" in used
    bounded = {name_of(requirement) for requirement in REQUIREMENTS if "<" in requirement}
    assert used <= bounded


@pytest.mark.parametrize("name", ["triton", "pytest", "matplotlib", "flash_attn"])
def test_serving_needs_no(name: str) -> None:
    assert name not in map(name_of, PROJECT["dependencies"])


def test_the_wheel_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    """Built without the C++ module, which takes a minute: it is no question of that one."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--no-index", "-C", "wheel.cmake=false", "-w", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {"/".join(name.split("/")[:2]) for name in names if name.count("/") > 1}
    assert {"headstart/server", "headstart/engine", "headstart/kernels"} <= folders
    assert "headstart/tests" not in folders
    assert not [name for name in names if "results/" in name or "__pycache__" in name]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".so"))]
    assert sum(zipfile.ZipFile(wheel).getinfo(name).file_size for name in names) < 4 * 2**20
