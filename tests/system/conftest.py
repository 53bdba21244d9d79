"""The real server: ``python -m headstart.server.cli serve``, with its engine process.

start_server  factory of server processes on free ports; whatever is left at the test's end is ended
default_model/ has servers that all of its tests ask
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

if sys.platform != "linux" or platform.machine() != "x86_64" or sys.version_info >= (3, 14):
    collect_ignore = ["test_collector.py"]  # the collector is a program for these alone

MODEL = "smollm2-135m"
KV_MEMORY = "512MiB"
GUARD = 300
"""Seconds after which a wait is given up. No test is about how long anything takes: a slow or busy
machine is no failure."""

WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing"),
    *("woman", "life", "child", "world", "school", "state"),
)


class Server:
    """A server process, its log and its address."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.started = time.perf_counter()
        self._log = log
        port = [] if "--port" in argv else ["--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headstart.server.cli", "serve", *argv, *port],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log.open("wb"),
        )
        self.model = Path(argv[0]).name

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        deadline = time.monotonic() + GUARD
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(r"listening on (http://\S+)", self.log):
                return match[1]
            time.sleep(0.01)
        raise AssertionError(f"the server does not listen:\n{self.log}")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def engine(self) -> psutil.Process:
        """The engine's process. Fails when there is none."""
        (child,) = (
            p
            for p in psutil.Process(self.process.pid).children()
            if p.status() != psutil.STATUS_ZOMBIE
            and "headstart.engine.process.service" in p.cmdline()
        )
        return child

    def health(self) -> int:
        """Status of /health; 0 when nobody answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=GUARD).status_code
        except httpx.TransportError:
            return 0

    def wait_ready(self) -> float:
        """Seconds since the process was started."""
        url = self.url
        deadline = time.monotonic() + GUARD
        with httpx.Client(timeout=GUARD) as client:
            while client.get(f"{url}/health").status_code != 200:
                assert self.process.poll() is None, f"the server ended:\n{self.log}"
                assert time.monotonic() < deadline, f"not ready after {GUARD} s:\n{self.log}"
                time.sleep(0.02)
        return time.perf_counter() - self.started

    def metrics(self) -> dict[str, float]:
        """Metric name, without ``headstart:`` and labels -> value; histograms left out."""
        values = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=GUARD).text.splitlines():
            if not line.startswith("#") and "_bucket{" not in line:
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0].removeprefix("headstart:")] = float(value)
        return values

    def wait_for(self, condition: Callable[[dict[str, float]], bool]) -> float:
        """Poll /metrics until ``condition``; seconds it took."""
        begin = time.monotonic()
        while not condition(values := self.metrics()):
            assert time.monotonic() - begin < GUARD, values
            time.sleep(0.005)
        return time.monotonic() - begin

    def wait_idle(self) -> float:
        """Until no request holds a page; seconds it took."""
        return self.wait_for(
            lambda m: (
                m["num_requests_running"] == m["num_requests_waiting"] == 0
                and m["kv_cache_usage_perc"] == 0
            )
        )

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=GUARD
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=GUARD
        )

    def open_stream(self, prompt: str, max_tokens: int) -> Stream:
        """A streamed completion whose connection the test can close."""
        return Stream(self, prompt, max_tokens)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill both processes, whatever state they are in."""
        if self.process.poll() is not None:
            return  # the number may be another process's by now
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait()


class Stream:
    """One streamed request on a bare socket, so that nothing reads or closes it unasked."""

    def __init__(self, server: Server, prompt: str, max_tokens: int) -> None:
        body = json.dumps(
            {
                "model": server.model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=GUARD)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)
        self._data = b""

    def wait_for_text(self) -> None:
        """Until the first event has come."""
        while b"data: " not in self._data:
            chunk = self._socket.recv(65536)
            assert chunk, f"the stream ended: {self._data!r}"
            self._data += chunk

    def read(self) -> tuple[int, list[dict[str, Any]]]:
        """Status, and every event to the end; checks that the stream ends with [DONE]."""
        while chunk := self._socket.recv(65536):
            self._data += chunk
        self._socket.close()
        status = int(self._data.split(b" ", 2)[1])
        events = re.findall(rb"^data: (.*)$", self._data, re.MULTILINE)
        if status == 200:
            assert events.pop() == b"[DONE]"
        return status, [json.loads(event) for event in events]

    def close(self) -> None:
        self._socket.close()


StartServer = Callable[..., Server]
Servers = Callable[[Path], contextlib.AbstractContextManager[StartServer]]


@pytest.fixture(scope="session")
def quiet_environment() -> Iterator[None]:
    """No colours, no proxies for localhost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("NO_COLOR", "1")
        yield


@pytest.fixture(scope="session")
def servers(quiet_environment: None) -> Servers:
    """``with servers(folder) as start``: ``start_server`` for servers that end with the block."""
    return _servers


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[StartServer]:
    running: list[Server] = []

    def start(*argv: str, ready: bool = True) -> Server:
        server = Server(list(argv), folder / f"server-{len(running)}.log")
        running.append(server)
        if ready:
            server.wait_ready()
        return server

    try:
        yield start
    finally:
        for server in running:
            server.end()


@pytest.fixture
def start_server(tmp_path: Path, quiet_environment: None) -> Iterator[StartServer]:
    """``start_server(model, *flags, ready=True) -> Server``; ended with the test."""
    with _servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def shared_server_factory(
    tmp_path_factory: pytest.TempPathFactory, quiet_environment: None
) -> Iterator[StartServer]:
    """``start_server`` for servers that are ended with the module."""
    with _servers(tmp_path_factory.mktemp("servers")) as start:
        yield start


@pytest.fixture(scope="session")
def default_flags(smollm2: Path) -> list[str]:
    """The default model by its name, out of the user's cache, with a small KV pool."""
    flags = [MODEL, "--cache-dir", str(smollm2.parent.parent), "--kv-memory", KV_MEMORY]
    # One thread of kernels: two wait for each other where the tests share the cores with others.
    return [*flags, "--threads", "1"]


@pytest.fixture(scope="session")
def text() -> Callable[[int, int], str]:
    """``text(words, seed)``: words of one token each, different for each seed from the start."""

    def make(count: int, seed: int) -> str:
        # The digits make the beginning unique; the words follow a sequence without short period.
        words = [WORDS[(seed * 7919 + i * i + i // 3) % len(WORDS)] for i in range(count)]
        return f"Story {seed}: " + " ".join(words)

    return make


@pytest.fixture(scope="session")
def default_setup(smollm2: Path) -> Any:
    """What is decided of the default model on this machine: `engine.models.loading.Setup`."""
    from headstart.engine.config import EngineConfig
    from headstart.engine.models.loading import set_up

    return set_up(EngineConfig(model_path=str(smollm2)))


@pytest.fixture(scope="session")
def token_bytes(default_setup: Any) -> int:
    """Bytes of KV of one token of the default model, in the format that is chosen here."""
    from headstart.engine.models.runner import attention_shape

    setup = default_setup
    page = setup.backend.kv_bytes_per_page(attention_shape(setup.model), setup.model.num_layers)
    return page // setup.backend.page_size


@pytest.fixture(scope="session")
def long_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context: its answers last as long as a test needs."""
    from headstart.engine.models.store import pull

    folder = tiny_model("llama", max_position_embeddings=65536)
    return pull(str(folder), tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny model; copy it before changing it."""
    from headstart.engine.models.store import pull

    return pull(str(tiny_model("llama")), tmp_path_factory.mktemp("cache"))
