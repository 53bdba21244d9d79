"""deploy/install.py beside a pip that misbehaves."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "deploy" / "install.py"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.01)
    return module


def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A Python whose ``-m pip`` runs ``code``."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_failure_is_told(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(tmp_path, monkeypatch, "import sys; print('no such package'); sys.exit(1)")
    assert install.pip("install", "x") == "no such package\n"
    with pytest.raises(SystemExit, match="no such package\n\ninstall: error: this failed: pip"):
        install.run("install", "x")


def test_a_pip_that_dies_in_silence_has_failed(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 9)")
    assert install.pip("install", "x") == "pip ended with status -9\n"


def test_what_is_no_utf8_ends_nothing(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; os.write(1, b'f\\xfcr\\n'); raise SystemExit(1)"
    fake_pip(tmp_path, monkeypatch, code)
    assert install.pip("install", "x") == "f\ufffdr\n"


def test_wheels_may_go_while_they_are_counted(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, pathlib, shutil
root = pathlib.Path(os.environ["TMPDIR"])
for i in range(300):
    folder = root / f"pip-{i}"
    folder.mkdir()
    for name in "abcdefgh":
        (folder / f"{name}.whl").write_bytes(b"0" * 1000)
    shutil.rmtree(folder)
"""
    fake_pip(tmp_path, monkeypatch, code)
    monkeypatch.setattr(install, "QUIET_SECONDS", 0.0005)
    assert install.pip("install", "x") is None


def test_a_uv_that_cannot_be_run_is_no_end(
    install: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_pip(tmp_path, monkeypatch, "")  # installs nothing, and no uv beside it
    assert not install.cpu_torch_by_uv("torch==2.0")
    assert "install: uv cannot be run: " in capsys.readouterr().out
