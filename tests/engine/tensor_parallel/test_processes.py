"""Ranks as the processes that they are: killed, stopped, left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import EngineDeadError, RankError
from headstart.engine.process.client import EngineClient
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.tensor_parallel import collective

pytestmark = pytest.mark.process

PROMPT = [7, 8, 9] * 30
SECONDS = 300.0
"""A deadline, for what takes some seconds."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_key_value_heads=4)


def config_of(folder: Path, count: int) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder),
        weights="f32",
        threads=1,
        kv_memory=16 << 20,
        max_model_len=512,
        relay="off",
        log_level="warning",
        tensor_parallel=count,
    )


def params(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def followers(pid: int | None) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def tokens_of(stream: AsyncIterator) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def test_an_engine_that_loses_a_process_ends_and_comes_back(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A follower killed within a request, and while nothing runs; then rank 0 itself."""
    expected = Engine(config_of(model, 1)).generate([PROMPT], params(20))[0]
    client = EngineClient(config_of(model, 2))
    try:
        await client.start()
        assert await tokens_of(client.add(PROMPT, params(20))) == expected
        for running in (True, False):
            if running:
                reader = asyncio.create_task(tokens_of(client.add([3], params(500))))
                await until(lambda: client.stats.generation_tokens > 30)
            restarts, ranks = client.restarts, followers(client.pid)
            assert len(ranks) == 1
            ranks[0].kill()
            if running:
                with pytest.raises(EngineDeadError, match="exit status 1"):
                    await reader
            await until(lambda before=restarts: client.ready and client.restarts > before)
            assert await tokens_of(client.add(PROMPT, params(20))) == expected
        # Beside them, a process that an earlier test killed the peers of may say so.
        said = capfd.readouterr().err.splitlines()
        told = [line for line in said if "tensor parallel" in line]
        assert told == ["ERROR: tensor parallel: rank 1 ended (signal 9)"] * 2
        ranks = followers(client.pid)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: gone(ranks[0]))
    finally:
        await client.stop()


ENGINE = """
import sys
from array import array
import msgspec
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.sampling.params import SamplingParams
engine = Engine(msgspec.json.decode(sys.argv[1], type=EngineConfig))
engine.add(0, array("i", [7, 8, 9] * 30), SamplingParams(max_tokens=400, ignore_eos=True))
while engine.has_work:
    engine.step()
    print(".", end="", flush=True)
"""


def test_no_process_outlives_an_engine_killed_while_it_computes(model: Path) -> None:
    config = msgspec.json.encode(config_of(model, 4)).decode()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", ENGINE, config]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None
        assert engine.stdout.read(3) == b"..."
        ranks = followers(engine.pid)
        assert len(ranks) == 3
        engine.kill()
    wait_until(lambda: all(gone(rank) for rank in ranks))


@pytest.mark.parametrize(
    ("count", "number", "message"),
    [
        (2, signal.SIGSTOP, r"^tensor parallel: a rank does not answer \(.*\)$"),
        # One of three: the others end for its sake, and are not to blame.
        (4, signal.SIGKILL, r"^tensor parallel: rank 2 ended \(signal 9\)$"),
    ],
)
def test_a_rank_that_hangs_or_dies(
    model: Path, monkeypatch: pytest.MonkeyPatch, count: int, number: int, message: str
) -> None:
    monkeypatch.setattr(collective, "HANG_SECONDS", 1.5)
    before = {process.pid for process in followers(os.getpid())}
    engine = Engine(config_of(model, count))
    ranks = [one for one in followers(os.getpid()) if one.pid not in before]
    ranks.sort(key=lambda process: process.create_time())
    engine.add(0, array("i", PROMPT), params(400))
    engine.step()
    ranks[count // 2 - 1].send_signal(number)
    with pytest.raises(RankError, match=message) as caught:
        finish(engine)
    assert "\n" not in str(caught.value)
    engine.close()
    assert all(gone(rank) for rank in ranks)


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
