"""Client programs as others wrote them against a server on this machine: `make clients`.

Each is installed from PyPI or npm into a folder of its own (--cache), then run with an empty
environment, a home of its own and keys that mean nothing. It passes if it ends with status 0,
prints an answer, and the server refused none of its requests. Whoever else it wants to reach is
refused by a proxy that notes whom; a program that uses no proxy is not kept from it.

Agents' prompts are longer than the default model's context, and it would call none of their tools:
these talk to a model that is written for it (scripted_model.py).

Exit status: 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from programs_table import CALLS, CLIENTS, DEFAULT, SCRIPTED, Client
from scripted_model import NOTE, write_model

from headstart.engine.config import default_home
from headstart.engine.models.store import resolve

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "clients"
LIMIT = 300
"""Seconds that a run of a program, or the start of a server, may take."""
LINES = 15
"""Of the output of what failed."""
INSTALLED = ".installed"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens, and its log."""

    url: str
    log: Path

    def answered(self, begin: int) -> list[str]:
        """The lines about requests, from this place of the log on."""
        lines = self.log.read_text()[begin:].splitlines()
        return [line for line in lines if "headstart.access: " in line]


@contextlib.contextmanager
def serving(name: str, model: str, folder: Path, *flags: str) -> Iterator[Server]:
    """A server process with ``model``, served as ``name``, until the block ends."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "headstart.server.cli", "serve", model, "--port", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--served-model-name", name, *flags],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield Server(_ready(process, log), log)
    finally:
        process.terminate()
        process.wait(60)


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"listening on (http://\S+)", log.read_text()):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{match[1]}/ready"):
                return match[1]
        time.sleep(0.2)
    raise SystemExit(f"the server is not ready:\n{log.read_text()}")


class Refusal(socketserver.StreamRequestHandler):
    """Answers whoever wants to reach somebody else through this proxy, and notes whom."""

    def handle(self) -> None:
        words = self.rfile.readline(4096).decode(errors="replace").split()
        self.server.hosts += words[1:2]
        self.wfile.write(
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )


class RefusingProxy(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        self.hosts: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def install(client: Client, cache: Path) -> Path:
    """The folder in which the client's packages are."""
    folder = cache / client.folder
    wanted = json.dumps(client.packages)
    noted = folder / INSTALLED
    if not noted.is_file() or noted.read_text() != wanted:
        print(f"installing {client.name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if client.kind == "npm":
            npm = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund"]
            _do([*npm, "--save-exact", *client.packages])
        else:
            _do([sys.executable, "-m", "venv", str(folder)])
            _do([f"{folder}/bin/pip", "install", *client.packages])
        noted.write_text(wanted)
    if client.kind == "npm":  # which looks for packages beside a program
        for program in (HERE / "programs").glob("*.mjs"):
            shutil.copy(program, folder)
    return folder


def _do(command: list[str]) -> None:
    """Run a step of an installation; what it printed matters if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def run(client: Client, server: Server, folder: Path, proxy: RefusingProxy) -> str:
    """What went wrong; nothing if it passed."""
    begin = len(server.log.read_text())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        known = {
            "url": server.url,
            "model": client.model,
            "home": home,
            "folder": str(folder),
            "site": f"{folder}/lib/{python}/site-packages",
            "programs": str(HERE / "programs"),
        }

        def filled(text: str) -> str:
            return Template(text).substitute(known)

        work = Path(home, "work")
        work.mkdir()
        (work / "notes.txt").write_text(f"The answer is {NOTE}.\n")
        for name, text in client.files.items():
            Path(home, name).parent.mkdir(parents=True, exist_ok=True)
            Path(home, name).write_text(filled(text))
        paths = [str(Path(shutil.which("node") or "node").parent), "/usr/local/bin:/usr/bin:/bin"]
        environment = {
            "HOME": home,
            "PATH": ":".join(paths),
            "LANG": "C.UTF-8",
            "NO_PROXY": "127.0.0.1,localhost",
            "HTTP_PROXY": proxy.url,
            "HTTPS_PROXY": proxy.url,
        } | {name: filled(value) for name, value in client.environment.items()}
        for words in client.runs:
            status, output = _output([filled(word) for word in words], work, environment)
            if status != 0 or client.says not in output or not output.strip():
                tail = "\n".join(output.splitlines()[-LINES:])
                return f"ended with status {status}:\n{tail}"
    lines = server.answered(begin)
    wrong = [line for line in lines if " status=2" not in line]
    return "\n".join(wrong) if wrong or lines else "sent no request"


def _output(
    command: list[str], folder: Path, environment: dict[str, str]
) -> tuple[int | None, str]:
    """The status of a program, None if it took too long, and what it printed."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    return status, output


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="begin of names")
    parser.add_argument("--cache", type=Path, default=CACHE, help="of packages (%(default)s)")
    args = parser.parse_args()
    chosen = [
        client
        for client in CLIENTS
        if not args.only or client.name.lower().startswith(tuple(x.lower() for x in args.only))
    ]
    folders = {client.name: install(client, args.cache.resolve()) for client in chosen}
    failed = 0
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary)
        write_model(resolve(DEFAULT, default_home()), root / SCRIPTED, CALLS)
        defaults = root / "defaults.json"  # so that nobody waits for a small model that goes on
        defaults.write_text(json.dumps({"temperature": 0, "max_new_tokens": 256}))
        shared = ("--kv-memory", "2GiB", "--generation-config", str(defaults))
        models = {DEFAULT: (DEFAULT,), SCRIPTED: (str(root / SCRIPTED), "--weights", "f32")}
        servers = {
            name: stack.enter_context(serving(name, model, root, *flags, *shared))
            for name, (model, *flags) in models.items()
            if name in {client.model for client in chosen}
        }
        for client in chosen:
            proxy = stack.enter_context(RefusingProxy())
            began = time.monotonic()
            error = run(client, servers[client.model], folders[client.name], proxy)
            failed += bool(error)
            columns = (client.name, client.version, client.model, client.done)
            result = "failed" if error else "passed"
            print(*columns, f"{result} in {time.monotonic() - began:.0f} s", sep=" | ", flush=True)
            if proxy.hosts:
                print(f"    wanted to reach {', '.join(sorted(set(proxy.hosts)))}", flush=True)
            if error:
                print("    " + error.replace("\n", "\n    "), flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
