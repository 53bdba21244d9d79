"""EngineClient and a real engine process: streams, refusals, deaths, ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import EngineDeadError, HeadstartError, RequestError
from headstart.engine.process.client import EngineClient
from headstart.engine.sampling.params import PoolingParams, SamplingParams

pytestmark = pytest.mark.process

PROMPT = [7, 8, 9] * 30


def config_of(folder: Path, **settings: object) -> EngineConfig:
    base = EngineConfig(
        model_path=str(folder), weights="f32", threads=2, kv_memory=1 << 24, max_model_len=512
    )
    return msgspec.structs.replace(base, **settings)


def params(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


async def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def tokens_of(stream: AsyncIterator) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
async def client(model: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(config_of(model))
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


def ended(pid: int) -> bool:
    """No such process, or one that nobody has waited for yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_lower_priorities_come_first(model: Path) -> None:
    client = EngineClient(config_of(model, scheduling_policy="priority", max_running=1))
    order: list[int] = []

    async def noting(stream: AsyncIterator, number: int) -> None:
        await tokens_of(stream)
        order.append(number)

    try:
        await client.start()
        streams = [client.add([5 + p], params(20), priority=p) for p in (2, -1, 1, 0)]
        await asyncio.gather(*map(noting, streams, (2, -1, 1, 0)))
    finally:
        await client.stop()
    # The engine may have begun with the first one before the others came.
    assert order in ([2, -1, 0, 1], [-1, 0, 1, 2])


async def test_streams_refusals_aborts_and_rest(client: EngineClient, model: Path) -> None:
    assert client.ready
    assert client.model is not None
    assert client.model.max_model_len == 512
    expected = Engine(config_of(model)).generate([PROMPT, [5]], params(20))
    assert (
        await asyncio.gather(
            tokens_of(client.add(PROMPT, params(20))), tokens_of(client.add([5], params(20)))
        )
        == expected
    )

    # One refused; its neighbour does not notice.
    running = asyncio.create_task(tokens_of(client.add([5], params(20))))
    for prompt, message in (
        ([1] * 512, "512 tokens; this model takes at most 511"),
        ([], "no tokens"),
        ([1, 320], "token id 320 is not in the vocabulary of 320"),
        ([-1], "token id -1"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            await tokens_of(client.add(prompt, params(1)))
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="temperature"):
        await tokens_of(client.add([1], SamplingParams(max_tokens=1, temperature=-1.0)))
    with pytest.raises(RequestError, match="goes by arrival") as caught:
        await tokens_of(client.add([1], params(1), priority=-1))
    assert caught.value.param == "priority"
    assert await running == expected[1]

    # A vector instead of tokens; log-probabilities of the prompt beside them.
    [pooled] = [output async for output in client.add(PROMPT, PoolingParams("mean"))]
    assert (pooled.token_ids, pooled.finish_reason) == ([], "stop")
    assert len(pooled.pooled or b"") == 4 * client.model.hidden_size
    scored = SamplingParams(max_tokens=1, prompt_logprobs=2)
    [output] = [output async for output in client.add(PROMPT, scored)]
    scores = output.prompt_logprobs or []
    assert [score.token_id for score in scores] == PROMPT[1:]
    assert all(len(score.top) == 2 and score.rank >= 1 for score in scores)

    # A salt of its own finds nothing in the cache; the same one does.
    async def cached(salt: bytes) -> int:
        outputs = [o async for o in client.add(PROMPT, params(1), salt=salt)]
        assert outputs[-1].finish_reason == "length"
        return int(outputs[-1].cached_tokens)

    assert [await cached(b""), await cached(b"tenant"), await cached(b"tenant")] == [64, 0, 64]

    # Aborted while it runs: pages are free again, nothing more comes, again is no error.
    stream = client.add([3] * 40, params(450))
    for _ in range(3):
        assert (await anext(stream)).finish_reason is None
    assert client.stats.running == 1
    assert client.stats.pages_used > client.stats.pages_cached
    stream.abort()
    stream.abort()
    await until(lambda: client.stats.running == 0)
    assert client.stats.pages_used == client.stats.pages_cached
    remaining = [o async for o in stream]
    assert all(output.finish_reason is None for output in remaining)

    # Aborted by somebody else while its reader waits.
    stream = client.add([4] * 40, params(450))
    reader = asyncio.create_task(tokens_of(stream))
    await until(lambda: client.stats.running == 1)
    stream.abort()
    assert len(await asyncio.wait_for(reader, 300)) < 450

    # At rest it computes nothing.
    await until(lambda: client.stats.running == 0)
    assert client.pid is not None
    process = psutil.Process(client.pid)
    await asyncio.sleep(0.3)
    before = process.cpu_times()
    await asyncio.sleep(2)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.05


async def test_stop_leaves_nothing(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client = EngineClient(config_of(model))
    await client.start()
    assert len(list(tmp_path.iterdir())) == 1
    pid, reader = client.pid, asyncio.create_task(tokens_of(client.add([1], params(500))))
    assert pid is not None
    await until(lambda: client.stats.running == 1)
    await client.stop()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await reader
    assert ended(pid)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineDeadError, match="not running"):
        client.add([1], params(1))


async def test_a_start_that_fails_says_why(
    model: Path, tmp_path: Path, tmp_path_factory, monkeypatch
) -> None:
    temporary = tmp_path_factory.mktemp("t")  # a socket's path has 107 characters at most
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    broken = Path(shutil.copytree(model, tmp_path / "model"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for config, message in (
        (config_of(broken), r"model\.safetensors: truncated"),
        (config_of(model, isa="z80"), "no z80 kernels"),
        (config_of(model, kv_memory=1000), "too little memory"),
    ):
        client = EngineClient(config)
        try:
            with pytest.raises(HeadstartError, match=message) as caught:
                await client.start()
            assert "\n" not in str(caught.value)
            assert not client.ready
            assert client.pid is not None
            assert ended(client.pid)
        finally:
            await client.stop()
    assert list(temporary.iterdir()) == []


async def test_a_killed_engine_fails_its_streams_and_comes_back(client: EngineClient) -> None:
    expected = await tokens_of(client.add(PROMPT, params(20)))
    readers = [asyncio.create_task(tokens_of(client.add([i], params(500)))) for i in (3, 4)]
    await until(lambda: client.stats.running == 2)
    first = client.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    for reader in readers:
        with pytest.raises(EngineDeadError, match="signal 9"):
            await reader
    assert not client.ready
    with pytest.raises(EngineDeadError, match="being started"):
        client.add([1], params(1))
    await until(lambda: client.ready)
    assert client.restarts == 1
    assert client.pid != first
    assert await tokens_of(client.add(PROMPT, params(20))) == expected
    assert client.stats.running == 0


async def test_killed_again_and_again(client: EngineClient) -> None:
    """Also while it is starting."""
    for _ in range(3):
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda pid=pid: client.pid != pid)
    await until(lambda: client.ready)
    assert client.restarts == 3
    assert len(await tokens_of(client.add([1], params(5)))) == 5


def test_an_engine_outlives_its_parent_by_little(model: Path, tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, msgspec\n"
        "from headstart.engine.process.client import EngineClient\n"
        "from headstart.engine.config import EngineConfig\n"
        "async def main():\n"
        "    client = EngineClient(msgspec.json.decode(sys.argv[1], type=EngineConfig))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TMPDIR": str(tmp_path),
    }
    config = msgspec.json.encode(config_of(model)).decode()
    with subprocess.Popen(
        [sys.executable, "-c", code, config], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid)
        parent.kill()
    deadline = time.monotonic() + 300
    while not ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
