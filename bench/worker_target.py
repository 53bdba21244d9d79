"""WorkerTarget: an engine in a process of its own, as a benchmark target.

The process (openvino_worker.py, llama_engine_worker.py) runs in an environment that has the engine,
gets the model and its settings on its command line, and answers JSON lines.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headstart.bench.http_client import BenchError
from headstart.bench.prompts import Messages
from headstart.bench.samples import Burst, Sample

LINE_LIMIT = 2**26


@dataclass(frozen=True, slots=True)
class OpenVinoSettings:
    """How the pipeline is set up; the defaults did best (see bench/results/README.md).

    `cache_gb` is the KV cache in GB; `properties` go to the CPU plugin as they are.
    """

    cache_gb: int = 4
    max_batched_tokens: int = 8192
    split_fuse: bool = False
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """llama.cpp's context: `batch` and `ubatch` are its server's defaults."""

    context: int = 24576
    batch: int = 2048
    ubatch: int = 512
    threads: int | None = None


WORKERS = {
    "openvino": (OpenVinoSettings, "openvino_worker.py"),
    "llama": (LlamaSettings, "llama_engine_worker.py"),
}
"""By the name of the target: its settings and the program."""


@dataclass(frozen=True, slots=True)
class WorkerTarget:
    """A loaded worker; made by `start_worker`. Answers come within `timeout` seconds or not."""

    process: asyncio.subprocess.Process
    name: str
    model: str
    version: str
    timeout: float

    async def count(self, messages: Messages) -> int:
        """Prompt tokens by the engine's own tokenizer and chat template."""
        return int((await self._ask({"count": messages}))["prompt_tokens"])

    async def burst(self, conversations: list[Messages], output_tokens: int) -> Burst:
        """All conversations at once; times are taken inside the worker."""
        reply = await self._ask({"burst": conversations, "output_tokens": output_tokens})
        return Burst([_sample(raw, output_tokens) for raw in reply["samples"]])

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        if self.process.returncode is None:  # else `_answer` says how it ended
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return await _answer(self.name, self.process, self.timeout)


def _sample(raw: dict[str, Any], wanted: int) -> Sample:
    if raw["output_tokens"] != wanted:
        error = f"{raw['output_tokens']} tokens instead of {wanted}: out of KV cache?"
        return Sample(sent=raw["sent"], error=error)
    return Sample(
        sent=raw["sent"],
        times=tuple(raw["times"]),
        prompt_tokens=raw["prompt_tokens"],
        output_tokens=raw["output_tokens"],
        cached_tokens=raw.get("cached_tokens"),
    )


async def _answer(name: str, process: asyncio.subprocess.Process, timeout: float) -> dict[str, Any]:
    """The next JSON line of the worker; anything else it prints is passed over."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(timeout):
            while line := await process.stdout.readline():
                if line.startswith(b"{"):
                    reply: dict[str, Any] = json.loads(line)
                    return reply
    except TimeoutError as error:
        raise BenchError(f"{name}: no answer within {timeout:.0f} s") from error
    status = await process.wait()
    killed = "was killed, which happens when memory runs out"
    how = killed if status == -signal.SIGKILL else f"ended with status {status} (see above)"
    raise BenchError(f"{name}: the worker {how}")


@asynccontextmanager
async def start_worker(
    name: str, python: Path, gguf: Path, settings: dict[str, Any], *, timeout: float
) -> AsyncIterator[WorkerTarget]:
    """Load the model with the interpreter `python` of an environment that has the engine.

    Raises BenchError for unknown settings.
    """
    kind, program = WORKERS[name]
    try:
        complete = kind(**settings)
    except TypeError as error:
        raise BenchError(f"settings of {name}: {error}") from error
    process = await asyncio.create_subprocess_exec(
        str(python),
        str(Path(__file__).parent / program),
        str(gguf),
        json.dumps(asdict(complete)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT,
    )
    try:
        ready = await _answer(name, process, timeout)
        yield WorkerTarget(process, name, gguf.name, ready["version"], timeout)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
