"""Installs headstart into the environment whose Python runs this; `make` and the Dockerfile do so.

    .venv/bin/python deploy/install.py                  torch's CPU build, headstart, no extras
    .venv/bin/python deploy/install.py --extras test    and what that extra of pyproject.toml needs
    .venv/bin/python deploy/install.py --cuda           torch's CUDA build from PyPI, and Triton

PyPI's torch for Linux is a CUDA build of several GB. A CPU build is sought where it may be:

    1. pip, as it is configured (a mirror, a folder of wheels; TORCH_INDEX names one more index)
    2. uv, a package on PyPI, which knows PyTorch's CPU index
    3. PyPI after all: that build computes on CPUs as well, it is only large

For macOS, PyPI has a CPU build. All versions are those of constraints.txt, uv's too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import queue
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
CUDA_SIZE = "2.7 GB to download, 5 GB on disk"
QUIET_SECONDS = 15

SHOWN = {
    r"Downloading (?:\S*/)?([^/\s]+?)-\S+\.whl \((\d+)(?:\.\d+)? MB\)": "downloading {} ({} MB)",
    r"Installing collected packages: (?!headstart)(.*)": "unpacking {}",
}
"""Of pip's lines, those that say what takes long; and how that is told."""


def say(text: str) -> None:
    print(f"install: {text}", flush=True)


def pinned(package: str) -> str:
    """The line of constraints.txt for ``package``."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def show(line: str) -> None:
    for pattern, text in SHOWN.items():
        if found := re.search(pattern, line):
            fields = found.groups()
            if text.startswith("unpacking") and fields[0].count(",") > 3:
                fields = (f"{fields[0].count(',') + 1} packages",)
            say("  " + text.format(*fields))


def pip(*arguments: str, doing: str = "packages") -> str | None:
    """Run pip and show how far it is; None, or the end of what it said when it failed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    begin, said = time.monotonic(), []
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="headstart-pip-") as folder:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            # pip keeps in TMPDIR what has come so far.
            env={**os.environ, "TMPDIR": folder, "PIP_PROGRESS_BAR": "off"},
        )

        def read() -> None:
            try:
                for line in process.stdout or ():
                    lines.put(line)
            finally:
                lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=QUIET_SECONDS)
                except queue.Empty:
                    megabytes = bytes_below(Path(folder)) // 10**6
                    downloads = f", {megabytes} MB downloaded" if megabytes else ""
                    say(f"  {doing}: {time.monotonic() - begin:.0f} s so far{downloads}")
                    continue
                if line is None:
                    break
                said.append(line)
                show(line)
            status = process.wait()
        finally:
            process.kill()
    return ("".join(said[-40:]) or f"pip ended with status {status}\n") if status else None


def bytes_below(folder: Path) -> int:
    """Of the wheels in ``folder`` so far, while pip moves and removes them."""
    total = 0
    with contextlib.suppress(OSError):
        for wheel in folder.rglob("*.whl"):
            total += wheel.stat().st_size
    return total


def run(*arguments: str) -> None:
    """pip, whose failure ends this."""
    if failure := pip(*arguments):
        sys.exit(f"{failure}\ninstall: error: this failed: pip {' '.join(arguments)}")


def installed_torch() -> str:
    """As constraints.txt would name it, with "+cpu" behind a build that says so; "": none."""
    for torch in importlib.metadata.distributions(name="torch"):
        return f"torch=={torch.version}"
    return ""


def install_cuda_torch() -> None:
    torch = pinned("torch")
    if installed_torch() == torch:
        return
    if installed_torch():
        run("uninstall", "--yes", "torch")
    say(f"{torch}, the CUDA build on PyPI: {CUDA_SIZE}")
    run("install", "--no-compile", torch.replace("==", "==="))  # not "+cpu", should pip find it


def cpu_torch_by_uv(torch: str) -> bool:
    """Step 2, of torch alone: uv does not know how pip is configured."""
    was_there = any(importlib.metadata.distributions(name="uv"))
    if failure := pip("install", pinned("uv")):
        say(f"pip cannot install uv: {failure.splitlines()[-1]}")
        return False
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--python", sys.executable]
    try:
        result = subprocess.run(
            [*uv, "--no-deps", "--torch-backend", "cpu", torch],
            # Where PyTorch's index is cut off, that is to be known soon.
            env={"UV_HTTP_CONNECT_TIMEOUT": "10", "UV_HTTP_RETRIES": "1", **os.environ},
            check=False,
        )
    except OSError as error:  # pip may be configured to put programs elsewhere
        say(f"uv cannot be run: {error}")
        return False
    if not was_there:
        pip("uninstall", "--yes", "uv")
    return result.returncode == 0


def install_cpu_torch() -> None:
    torch = pinned("torch")
    if installed_torch() in (torch, f"{torch}+cpu"):
        return
    if sys.platform == "darwin":
        say(f"{torch} from PyPI")
        run("install", "--no-compile", torch)
        return
    if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        say("an NVIDIA GPU is here; this installs for CPUs. For the GPU: make serve CUDA=1")
    index = os.environ.get("TORCH_INDEX")
    say(f"{torch}, a CPU build: asking pip")
    more = ["--extra-index-url", index] if index else []
    if not pip("install", "--no-compile", f"{torch}+cpu", *more):
        return
    say("pip finds none; asking uv, which knows PyTorch's CPU index")
    if cpu_torch_by_uv(torch):
        return
    say(f"uv did not bring it. Taking {torch} from PyPI, a CUDA build: {CUDA_SIZE}.")
    say("It computes on CPUs as well. TORCH_INDEX=ADDRESS names another index with CPU builds.")
    run("install", "--no-compile", torch)


def requirements(extras: list[str]) -> list[str]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def check_tools() -> None:
    """Name what no package brings before minutes are spent on the rest."""
    missing = []
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing.append("a C++20 compiler (Debian: g++; macOS: xcode-select --install)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python's headers (Debian: python3-dev)")
    if importlib.util.find_spec("pip") is None:
        sys.exit(
            f"install: error: {sys.executable} has no pip: remove .venv and make it again "
            "(Debian: python3-venv), or run python -m ensurepip"
        )
    if missing:
        sys.exit(f"install: error: headstart is compiled here; missing: {', '.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", action="store_true", help="for NVIDIA GPUs")
    parser.add_argument("--extras", default="", help="of pyproject.toml, separated by commas")
    parser.add_argument("--torch-only", action="store_true", help="and headstart later")
    parser.add_argument("--copy", action="store_true", help="headstart itself, not a link to here")
    args = parser.parse_args()
    begin = time.monotonic()
    check_tools()
    with ThreadPoolExecutor(1) as beside:
        compiling: Future[str | None] | None = None
        if not args.torch_only:
            say("headstart: compiling the kernels beside what follows")
            how = ["--no-deps", "--no-compile", *([] if args.copy else ["-e"]), "."]
            compiling = beside.submit(pip, "install", *how, doing="compiling the kernels")
        install_cuda_torch() if args.cuda else install_cpu_torch()
        if compiling:
            extras = [*filter(None, args.extras.split(",")), *(["cuda"] if args.cuda else [])]
            say(f"what headstart needs{' for ' if extras else ''}{', '.join(extras)}")
            # Not compiled: Python does that to what it imports, which is a tenth of it all.
            run("install", "--no-compile", "-c", str(CONSTRAINTS), *requirements(extras))
            if failure := compiling.result():
                sys.exit(f"{failure}\ninstall: error: headstart could not be built")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.monotonic() - begin
    say(f"done in {seconds:.0f} s, with {used.ru_utime + used.ru_stime:.0f} s of processor time")


if __name__ == "__main__":
    main()
