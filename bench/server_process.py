"""A server for the time of a benchmark: started on a free port, stopped with SIGTERM."""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import IO

import aiohttp

from headstart.bench.http_client import BenchError
from headstart.engine.config import default_home

START_LIMIT = 600.0  # seconds, the first download and conversion of the model included
STOP_LIMIT = 30.0


def default_gguf() -> Path:
    """Where `headstart pull smollm2-135m` keeps the file it downloaded."""
    return default_home() / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _log_tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return "\n".join(line for line in lines[-15:] if line.strip())


async def _until_healthy(
    url: str, process: asyncio.subprocess.Process, log: IO[bytes], name: str
) -> None:
    """Return when /health answers 200; BenchError if the process ends or takes too long."""
    async with asyncio.timeout(START_LIMIT), aiohttp.ClientSession() as session:
        while process.returncode is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.2)
    raise BenchError(f"`{name}` ended with status {process.returncode}:\n{_log_tail(log)}")


@asynccontextmanager
async def _start(name: str, command: Sequence[str]) -> AsyncIterator[str]:
    """Run `command --port FREE`; yields its URL."""
    url = f"http://127.0.0.1:{(port := _free_port())}"
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--port", str(port), stdout=log, stderr=log
        )
        try:
            try:
                await _until_healthy(url, process, log, name)
            except TimeoutError as error:
                raise BenchError(
                    f"`{name}` is not ready after {START_LIMIT:.0f} s:\n{_log_tail(log)}"
                ) from error
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), STOP_LIMIT)
                except TimeoutError:
                    process.kill()
                    await process.wait()


def start_headstart(
    serve_args: Sequence[str], command: Sequence[str] = ()
) -> AbstractAsyncContextManager[str]:
    """Run `headstart serve ARGS`; gives its URL. `command` replaces `headstart`."""
    program = command or [sys.executable, "-m", "headstart.server.cli"]
    return _start("headstart serve", [*program, "serve", *serve_args])


def start_vllm(
    python: Path, folder: Path, serve_args: Sequence[str]
) -> AbstractAsyncContextManager[str]:
    """Run vLLM's server, with prefix caching, on a folder of safetensors; gives its URL."""
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    model = ["--model", str(folder), "--served-model-name", "model", "--host", "127.0.0.1"]
    return _start("vllm", [*server, *model, "--enable-prefix-caching", *serve_args])
