"""EngineClient, its socket, and the service at the other end with an engine that computes nothing.

The real engine in its process: test_service.py, and tests/system.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import sys
import time

import msgspec
import pytest
import zmq
import zmq.asyncio

from headstart.engine.config import EngineConfig
from headstart.engine.errors import EngineDeadError, HeadstartError, RequestError
from headstart.engine.process.client import EngineClient
from headstart.engine.process.engine_process import EngineProcess
from headstart.engine.process.messages import Abort, AdapterInfo, Stats, Step
from headstart.engine.sampling.params import SamplingParams

pytestmark = pytest.mark.process


@pytest.fixture
async def client():
    client = EngineClient(EngineConfig(model_path="none"))
    yield client
    await client.stop()


async def test_a_message_that_comes_while_one_is_sent_is_received(client, tmp_path):
    """The descriptor of a ZeroMQ socket tells of a message once, and sending may consume that."""
    endpoint = f"ipc://{tmp_path}/engine.sock"
    client._socket = client._context.socket(zmq.PAIR)
    client._socket.bind(endpoint)
    with zmq.Context() as context, context.socket(zmq.PAIR) as engine:
        engine.linger = 0
        engine.connect(endpoint)
        receive = asyncio.create_task(client._receive(client._socket))
        for steps in range(1, 6):
            await asyncio.sleep(0.02)  # the loop waits for the descriptor
            engine.send(msgspec.msgpack.encode(Step([], Stats(steps=steps))))
            time.sleep(0.02)  # the message arrives while the loop is busy
            client._send(Abort([1]))
            async with asyncio.timeout(300):
                while client.stats.steps != steps:
                    await asyncio.sleep(0.001)
        receive.cancel()


def runs(monkeypatch, *program: str) -> None:
    """What engines are from now on: a Python program, and its arguments."""
    monkeypatch.setattr(EngineProcess, "COMMAND", (sys.executable, "-c", *program))


@pytest.mark.parametrize("begun", [False, True])
async def test_an_engine_that_ends_at_once_is_one_error(client, monkeypatch, begun):
    runs(monkeypatch, "raise SystemExit(1)")
    if begun:
        client.begin()
        while client._process._process.poll() is None:
            await asyncio.sleep(0.01)
    with pytest.raises(HeadstartError, match=r"ended while starting \(exit status 1\)"):
        await client.start()


async def test_an_engine_that_has_not_connected_yet_is_ended_in_silence(
    client, monkeypatch, caplog
):
    runs(monkeypatch, "import time; time.sleep(1000)")
    starting = asyncio.create_task(client.start())
    while client.pid is None:
        await asyncio.sleep(0.01)
    process = client._process
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await client.stop()
    assert process.returncode == -signal.SIGKILL
    gc.collect()  # when a future says that nobody has asked for its exception
    await asyncio.sleep(0)
    assert not caplog.records


SERVICE = """
import json, os, signal, sys, time, types
from pathlib import Path
from headstart.engine.process import service
from headstart.engine.errors import ModelError, RequestError
from headstart.engine.process.messages import AdapterInfo, ModelInfo, Output, Stats

class Engine:
    stats = property(lambda self: Stats(running=len(self.running), pages_used=7))

    def __init__(self, config):
        self.loaded, self.running = {}, {}
        for name, path in config.adapters.items():
            self.load_adapter(name, path)
        self.model = ModelInfo(max_model_len=9, vocab_size=9, hidden_size=9, page_size=9,
                               num_pages=9, eos_token_ids=[], backend="fake", weights="f32",
                               version="0", adapters=list(self.loaded.values()))

    def warm_up(self): pass
    def rank_descriptors(self): return []
    def prepare_memory(self): return False
    def take_refused(self): return []
    def close(self): pass
    runahead = None
    has_work = property(lambda self: self.running)

    # The answer: rank of the adapter, segments, then the number of adapters at each step.
    def add(self, id, token_ids, params, *, salt, segments, adapter, priority, owner):
        if adapter is not None and adapter not in self.loaded:
            raise RequestError(f"no adapter {adapter!r}", "model")
        rank = self.loaded[adapter].rank if adapter else 0
        self.running[id] = [params.max_tokens, [rank, *(x for span in segments for x in span)]]

    def step(self):
        time.sleep(0.001)
        outputs = []
        for id, state in list(self.running.items()):
            state[0] -= 1
            tokens, state[1] = [*state[1], len(self.loaded)], []
            outputs.append(Output(id, tokens, None if state[0] else "length"))
            if not state[0]:
                del self.running[id]
        return outputs

    def load_adapter(self, name, path):
        if name == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if name in self.loaded:
            raise RequestError(f"{name!r} is loaded already", "lora_name")
        file = Path(path) / "adapter_config.json"
        if not file.exists():
            raise ModelError(f"{file}: no such file")
        rank = json.loads(file.read_text())["r"]
        info = AdapterInfo(name=name, path=path, rank=rank, targets=["q_proj"], num_bytes=1)
        self.loaded[name] = info
        return info

    def unload_adapter(self, name):
        if self.loaded.pop(name, None) is None:
            raise RequestError(f"no adapter {name!r} is loaded", "lora_name")

sys.modules["headstart.engine.engine"] = types.SimpleNamespace(Engine=Engine)
service.main()
"""


@pytest.fixture
def adapter(tmp_path):
    """``adapter(name, rank)``: a folder that the engine above loads."""

    def make(name: str, rank: int) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
        return str(tmp_path / name)

    return make


@pytest.fixture
async def launch(monkeypatch):
    """``await launch(adapters)``: a client of a service with the engine above."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    runs(monkeypatch, SERVICE)
    clients = []

    async def start(adapters=None, *, begun=False, **settings) -> EngineClient:
        config = EngineConfig(model_path="none", adapters=adapters or {}, **settings)
        client = EngineClient(config)
        clients.append(client)
        if begun:
            client.begin()
            await asyncio.sleep(0.5)  # it asks for a connection before anybody listens
        await client.start()
        return client

    yield start
    for client in clients:
        await client.stop()


async def answer(client: EngineClient, new: int = 1, **where) -> list[int]:
    return await tokens_of(client.add([1], SamplingParams(max_tokens=new), **where))


async def tokens_of(stream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def ready_again(client: EngineClient) -> None:
    async with asyncio.timeout(300):
        while not client.ready:
            await asyncio.sleep(0.005)


async def test_adapters_come_and_go(launch, adapter):
    client = await launch({"first": adapter("a", 4)})
    assert list(client.adapters) == ["first"]
    loaded = await client.load_adapter("second", adapter("b", 8))
    assert isinstance(loaded, AdapterInfo)
    assert (loaded.name, loaded.rank) == ("second", 8)
    assert client.adapters["second"] == loaded
    assert await answer(client, adapter="second", segments=[(0, 2), (5, 7)]) == [8, 0, 2, 5, 7, 2]
    assert await answer(client, adapter="first") == [4, 2]
    assert await answer(client) == [0, 2]
    await client.unload_adapter("first")
    assert list(client.adapters) == ["second"]
    with pytest.raises(RequestError, match="no adapter 'first'"):
        await answer(client, adapter="first")


async def test_a_request_is_reported_once_the_engines_counters_know_of_it(launch):
    """Not by a step that began before it was sent, however late that is heard of."""
    client = await launch()
    first = client.add([1], SamplingParams(max_tokens=1))
    assert not first.reported
    assert await tokens_of(first) == [0, 0]
    assert first.reported
    second = client.add([1], SamplingParams(max_tokens=1000))
    assert (first.reported, second.reported) == (True, False)
    await anext(second)
    assert second.reported
    assert client.stats.running == 1
    os.kill(client.pid, signal.SIGKILL)
    await asyncio.sleep(0)
    while client.restarts == 0:
        await asyncio.sleep(0.005)
    await ready_again(client)
    third = client.add([1], SamplingParams(max_tokens=1))
    assert not third.reported
    await tokens_of(third)
    assert third.reported


async def test_an_engine_may_be_begun_before_it_is_started(launch, adapter):
    client = await launch({"first": adapter("a", 4)}, begun=True)
    assert await answer(client, adapter="first") == [4, 1]
    os.kill(client.pid, signal.SIGKILL)
    await asyncio.sleep(0)
    while client.restarts == 0:
        await asyncio.sleep(0.005)
    await ready_again(client)
    assert await answer(client, adapter="first") == [4, 1]


async def test_an_engine_that_is_begun_for_nothing_can_be_ended(client, monkeypatch):
    runs(monkeypatch, "import time; time.sleep(1000)")
    client.begin()
    client.kill()
    assert await client._process.wait() == -signal.SIGKILL


async def test_what_the_engine_refuses_is_a_request_error(launch, adapter, tmp_path):
    folder = adapter("a", 4)
    client = await launch({"taken": folder})
    with pytest.raises(RequestError, match="loaded already") as caught:
        await client.load_adapter("taken", folder)
    assert caught.value.param == "lora_name"
    with pytest.raises(RequestError, match=r"missing/adapter_config\.json: no such file"):
        await client.load_adapter("new", str(tmp_path / "missing"))
    with pytest.raises(RequestError, match="no adapter 'new' is loaded"):
        await client.unload_adapter("new")
    assert list(client.adapters) == ["taken"]
    assert client.restarts == 0


async def test_an_adapter_that_cannot_be_loaded_ends_the_first_start(launch, tmp_path):
    with pytest.raises(HeadstartError, match=r"adapter_config\.json: no such file"):
        await launch({"gone": str(tmp_path)})


async def test_loading_comes_between_steps(launch, adapter):
    client = await launch()
    stream = client.add([1], SamplingParams(max_tokens=200))
    assert (await anext(stream)).token_ids == [0, 0]
    await client.load_adapter("a", adapter("a", 4))
    counts = [token async for output in stream for token in output.token_ids]
    assert len(counts) == 199
    assert counts == sorted(counts)
    assert counts[-1] == 1


async def test_who_asked_may_be_gone(launch, adapter):
    client = await launch()
    for ask in (client.load_adapter("a", adapter("a", 4)), client.unload_adapter("a")):
        task = asyncio.create_task(ask)
        await asyncio.sleep(0)
        task.cancel()
    assert await answer(client) == [0, 0]
    await client.load_adapter("b", adapter("b", 4))
    assert list(client.adapters) == ["b"]
    assert client._asked == {}


async def test_an_engine_that_died_gets_its_adapters_back(launch, adapter, caplog):
    folders = {name: adapter(name, rank) for rank, name in enumerate("abcd", 1)}
    client = await launch({name: folders[name] for name in "ab"})
    await client.load_adapter("c", folders["c"])
    await client.load_adapter("d", folders["d"])
    await client.unload_adapter("a")
    shutil.rmtree(folders["c"])
    os.kill(client.pid, signal.SIGKILL)
    while client.ready:
        await asyncio.sleep(0.001)
    assert list(client.adapters) == ["b", "c", "d"]  # what it will have, as far as is known
    for ask in (client.load_adapter("e", folders["b"]), client.unload_adapter("b")):
        with pytest.raises(EngineDeadError, match="being started"):
            await ask
    await ready_again(client)
    assert list(client.adapters) == ["b", "d"]
    assert await answer(client, adapter="d") == [4, 2]
    errors = [record.getMessage() for record in caplog.records if "not loaded" in record.message]
    assert len(errors) == 1
    assert errors[0].startswith("adapter 'c' is not loaded any more: ")
    assert f"{folders['c']}/adapter_config.json: no such file" in errors[0]
    # And again, one that was on the command line.
    shutil.rmtree(folders["b"])
    os.kill(client.pid, signal.SIGKILL)
    while client.ready:
        await asyncio.sleep(0.001)
    await ready_again(client)
    assert list(client.adapters) == ["d"]
    assert client.restarts == 2


async def test_the_counters_end_with_the_engine(launch):
    client = await launch()
    stream = client.add([1], SamplingParams(max_tokens=10**6))
    async for _ in stream:
        if client.stats.running:
            break
    assert client.stats == Stats(running=1, pages_used=7)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await tokens_of(stream)
    assert client.stats == Stats()
    await ready_again(client)
    assert client.stats == Stats()


async def test_an_engine_that_dies_loading_fails_all_who_asked(launch, adapter):
    client = await launch()
    folder = adapter("a", 4)
    asked = [
        asyncio.create_task(ask)
        for ask in (
            client.load_adapter("deadly", folder),
            client.load_adapter("a", folder),
            client.unload_adapter("a"),
        )
    ]
    for task in asked:
        with pytest.raises(EngineDeadError, match="signal 9"):
            await task
    await ready_again(client)
    assert client.adapters == {}
    assert client.restarts == 1


async def test_stopping_fails_who_asked(launch, adapter):
    client = await launch()
    os.kill(client.pid, signal.SIGSTOP)
    asked = asyncio.create_task(client.load_adapter("a", adapter("a", 4)))
    await asyncio.sleep(0)
    pid = client.pid
    stopping = asyncio.create_task(client.stop())
    await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    await stopping
    with pytest.raises(EngineDeadError, match="shutting down"):
        await asked


STUCK = 2.0
"""Seconds of silence; a quarter of them is the longest between two signs of life."""


async def test_an_engine_that_shows_no_sign_of_life_is_replaced(launch, caplog):
    """A process that the system, or a fault, has stopped: with a step to compute, or at rest."""
    client = await launch(stuck_after=STUCK)
    stream = client.add([1], SamplingParams(max_tokens=10**6))
    await anext(stream)
    for restarts in (1, 2):
        stopped = client.pid
        os.kill(stopped, signal.SIGSTOP)
        if restarts == 1:
            with pytest.raises(EngineDeadError, match="signal 9"):
                await tokens_of(stream)
        async with asyncio.timeout(300):
            while client.restarts < restarts:
                await asyncio.sleep(0.005)
        await ready_again(client)
        assert client.pid != stopped
        assert await answer(client) == [0, 0]
    said = [r.getMessage() for r in caplog.records if "no sign of life for 2 s" in r.getMessage()]
    assert len(said) == 2


async def test_an_engine_that_is_busy_or_at_rest_is_alive(launch):
    client = await launch(stuck_after=STUCK)
    pid = client.pid
    await asyncio.sleep(1.5 * STUCK)
    stream = client.add([1], SamplingParams(max_tokens=10**6))
    await asyncio.sleep(1.5 * STUCK)
    stream.abort()
    assert (client.pid, client.restarts, client.ready) == (pid, 0, True)


async def test_engines_may_be_silent_for_ever(launch):
    client = await launch(stuck_after=0.0)
    os.kill(client.pid, signal.SIGSTOP)
    await asyncio.sleep(0.5)
    os.kill(client.pid, signal.SIGCONT)
    assert await answer(client) == [0, 0]
    assert client.restarts == 0
