"""EngineClient and its socket; the engine's process itself is tested in tests/system."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
import zmq
import zmq.asyncio

from headstart.engine.client import EngineClient
from headstart.engine.config import EngineConfig
from headstart.engine.errors import HeadstartError
from headstart.engine.messages import Abort, Stats, Step


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
            async with asyncio.timeout(2):
                while client.stats.steps != steps:
                    await asyncio.sleep(0.001)
        receive.cancel()


async def test_an_engine_that_ends_at_once_is_one_error(client, monkeypatch):
    spawn = asyncio.create_subprocess_exec

    async def dead_on_arrival(*_, **kwargs):
        process = await spawn("false", **kwargs)
        process.stdin.close()  # what a loop does once it sees that the reader has gone
        await process.wait()
        await asyncio.sleep(0.05)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", dead_on_arrival)
    with pytest.raises(HeadstartError, match=r"ended while starting \(exit status 1\)"):
        await client.start()
