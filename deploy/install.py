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
import importlib.metadata
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
CUDA_SIZE = "2.7 GB to download, 5 GB on disk"
QUIET_SECONDS = 15

SHOWN = {
    r"Downloading (?:\S*/)?([^/\s]+?)-\S+\.whl \((\d+)(?:\.\d+)? MB\)": "downloading {} ({} MB)",
    r"Building (?:editable|wheel) for headstart \(.*\): started": "compiling the kernels",
    r"Installing collected packages: (.*)": "unpacking {}",
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


def pip(*arguments: str) -> str | None:
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
            cwd=ROOT,
            # pip keeps in TMPDIR what has come so far.
            env={**os.environ, "TMPDIR": folder, "PIP_PROGRESS_BAR": "off"},
        )

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=QUIET_SECONDS)
            except queue.Empty:
                megabytes = sum(f.stat().st_size for f in Path(folder).rglob("*.whl")) // 10**6
                say(f"  {time.monotonic() - begin:.0f} s so far, {megabytes} MB downloaded")
                continue
            if line is None:
                break
            said.append(line)
            show(line)
        status = process.wait()
    return "".join(said[-40:]) if status else None


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
    if failure := pip("install", pinned("uv")):
        say(f"pip cannot install uv: {failure.splitlines()[-1]}")
        return False
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--python", sys.executable]
    result = subprocess.run(
        [*uv, "--no-deps", "--torch-backend", "cpu", torch],
        # Where PyTorch's index is cut off, that is to be known soon.
        env={"UV_HTTP_CONNECT_TIMEOUT": "10", "UV_HTTP_RETRIES": "1", **os.environ},
        check=False,
    )
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


def check_tools() -> None:
    """Name what no package brings before minutes are spent on the rest."""
    missing = []
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        missing.append("a C++20 compiler (Debian: g++; macOS: xcode-select --install)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python's headers (Debian: python3-dev)")
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
    install_cuda_torch() if args.cuda else install_cpu_torch()
    if not args.torch_only:
        extras = [*filter(None, args.extras.split(",")), *(["cuda"] if args.cuda else [])]
        target = f".[{','.join(extras)}]" if extras else "."
        say(f"headstart{target[1:]}")
        # Not compiled: Python does that to what it imports, which is a tenth of it all.
        run(
            "install",
            "--no-compile",
            "-c",
            str(CONSTRAINTS),
            *([] if args.copy else ["-e"]),
            target,
        )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.monotonic() - begin
    say(f"done in {seconds:.0f} s, with {used.ru_utime + used.ru_stime:.0f} s of processor time")


if __name__ == "__main__":
    main()
