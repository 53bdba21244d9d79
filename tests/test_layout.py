"""What holds for the whole: imports go one way, the server is light, one OpenMP runtime runs."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import headstart

ROOT = Path(headstart.__file__).parent
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine"},
    "bench": {"bench", "server", "engine", "kernels"},
}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).resolve().rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module named in an import statement of ``path``, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder: str) -> None:
    for path in modules(folder):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "headstart" and len(parts) > 1 and (ROOT / parts[1]).is_dir():
                assert parts[1] in ALLOWED[folder], f"{path} imports {name}"


@pytest.mark.parametrize(
    ("folder", "above"),
    [("text", {"generation", "http", "api", "cli"}), ("generation", {"api", "cli"})],
)
def test_the_servers_rooms_know_none_above_them(folder: str, above: set[str]) -> None:
    for path in modules(f"server/{folder}"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[:2] != ["headstart", "server"] or parts[2] not in above, f"{path}: {name}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent.parent).with_suffix("").parts
    return ".".join(("headstart", *parts)).removesuffix(".__init__")


def imported_modules(path: Path, known: Iterable[str]) -> set[str]:
    """The modules among ``known`` that ``path`` imports: names and what they are names in."""
    names = set(imports(path))
    return (names | {name.rpartition(".")[0] for name in names}) & set(known)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count, and those for types alone."""
    paths = {module_name(path): path for folder in ALLOWED for path in modules(folder)}
    graph = {
        name: imported_modules(path, paths) - {name.rpartition(".")[0]}
        for name, path in paths.items()
    }
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_server_process_loads_no_torch() -> None:
    """All of the server and what it takes from the engine, imported at once."""
    server = (ROOT / "server").resolve()
    names = [
        ".".join(("headstart.server", *path.relative_to(server).with_suffix("").parts))
        for path in modules("server")
    ]
    names = [name.removesuffix(".__init__") for name in names] + ["headstart.engine.process.client"]
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps('torch' in sys.modules))"
    )
    assert json.loads(run(code, *names)) is False


def test_one_openmp_runtime_in_the_engine_process() -> None:
    """Two teams on the same cores stall each other for whole time slices."""
    code = (
        "import json, torch\n"
        "import headstart.engine.process.service, headstart.engine.engine\n"
        "from headstart.kernels.devices import load_backend\n"
        "from threadpoolctl import threadpool_info\n"
        "backend = load_backend('cpu', isa='auto', weights='f32', threads=2)\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "backend.argmax(torch.randn(64, 4096))\n"
        "print(json.dumps([i['filepath'] for i in threadpool_info() if i['user_api'] == 'openmp']))"
    )
    runtimes = json.loads(run(code))
    assert len(runtimes) == 1, runtimes
