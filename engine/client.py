"""EngineClient: the engine process as the server's event loop sees it.

    client = EngineClient(config)
    await client.start()
    async for output in client.add(token_ids, params): ...

An engine that dies takes its running requests with it: their streams raise EngineDeadError. It is
started again at once; until it is ready, ``add`` raises. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

import msgspec
import zmq
import zmq.asyncio

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError, EngineDeadError, HeadstartError, RequestError
from headstart.engine.messages import (
    Abort,
    Add,
    Failed,
    ModelInfo,
    Output,
    Ready,
    Rejected,
    Shutdown,
    Stats,
    Step,
    ToServer,
)
from headstart.engine.sampling_params import SamplingParams
from headstart.engine.segments import Span

logger = logging.getLogger(__name__)

RESTART_PAUSE = 1.0
"""Seconds before a second start in a row, so that an engine that dies at once does not spin."""


class Stream:
    """The outputs of one request; see server/engine_client.py for the contract."""

    def __init__(self, client: EngineClient, request_id: int) -> None:
        self._client = client
        self._id = request_id
        self._outputs: deque[Output] = deque()
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def push(self, output: Output) -> None:
        self._outputs.append(output)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()

    def abort(self) -> None:
        if not self._ended:
            self._ended = True
            self._arrived.set()  # whoever waits for the next output
            self._client.abort(self._id)

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        while not self._outputs:
            if self._ended:
                raise StopAsyncIteration
            if self._error is not None:
                self._ended = True
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        output = self._outputs.popleft()
        if output.finish_reason is not None:
            self._ended = True
        return output


class EngineClient:
    """Starts the engine process, talks to it, and starts it again when it dies."""

    def __init__(self, config: EngineConfig) -> None:
        self.model: ModelInfo | None = None
        self.stats = Stats()
        self.restarts = 0
        self.ready = False
        self._config = config
        self._ids = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._folder = tempfile.mkdtemp(prefix="headstart-")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToServer)
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises HeadstartError when it cannot."""
        receive = await self._launch()
        self._watch = asyncio.create_task(self._keep_alive(receive))

    def add(
        self,
        token_ids: Iterable[int],
        params: SamplingParams,
        *,
        salt: bytes = b"",
        segments: Sequence[Span] = (),
        adapter: str | None = None,
    ) -> Stream:
        """Start a request. Raises EngineDeadError when the engine is not ready."""
        if not self.ready:
            raise EngineDeadError("the engine is not running; it is being started")
        request_id = next(self._ids)
        stream = self._streams[request_id] = Stream(self, request_id)
        tokens = array("i", token_ids).tobytes()
        self._send(Add(request_id, tokens, params, salt, list(segments), adapter))
        return stream

    def abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None and self.ready:
            self._send(Abort([request_id]))

    async def stop(self) -> None:
        """End the engine process; running requests are dropped."""
        self._stopping = True
        self.ready = False
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._process and self._process.returncode is None:
            self._send(Shutdown())
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._close_socket()
        self._fail_streams("the server is shutting down")
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> asyncio.Task[None]:
        """Spawn a process and wait for Ready; returns the task that receives from it."""
        self._close_socket()
        socket = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        endpoint = f"ipc://{self._folder}/engine-{next(self._ids)}.sock"
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot create a socket in {self._folder}: {error}") from error
        self._socket = socket
        # Workers wait for the next parallel region by spinning, but not for long: the server's
        # process needs the core, too.
        environment = {"GOMP_SPINCOUNT": "20000", "OMP_PROC_BIND": "false", **os.environ}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headstart.engine.service",
            endpoint,
            stdin=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdin is not None
        # A process that has ended already cannot be written to; its exit status says more.
        with contextlib.suppress(RuntimeError, OSError):
            self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        first = asyncio.create_task(self._first_message(socket))
        ended = asyncio.create_task(self._process.wait())
        try:
            done, _ = await asyncio.wait({first, ended}, return_when=asyncio.FIRST_COMPLETED)
            if first not in done:
                # It may have said why before it ended.
                done, _ = await asyncio.wait({first}, timeout=0.2)
            if first not in done:
                raise HeadstartError(f"the engine ended while starting{_cause(ended.result())}")
            message = first.result()
        finally:
            first.cancel()
            ended.cancel()
        if isinstance(message, Failed):
            await self._process.wait()
            raise HeadstartError(message.message)
        assert isinstance(message, Ready)
        self.model = message.model
        self.ready = True
        return asyncio.create_task(self._receive(socket))

    async def _first_message(self, socket: zmq.asyncio.Socket) -> object:
        return self._decoder.decode(await socket.recv())

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await socket.recv())
            if isinstance(message, Step):
                self.stats = message.stats
                for output in message.outputs:
                    stream = self._streams.get(output.id)
                    if stream is not None:
                        if output.finish_reason is not None:
                            del self._streams[output.id]
                        stream.push(output)
            elif isinstance(message, Rejected):
                stream = self._streams.pop(message.id, None)
                if stream is not None:
                    stream.fail(RequestError(message.message, message.param))

    async def _keep_alive(self, receive: asyncio.Task[None]) -> None:
        """Wait for the engine to die; fail its requests; start the next one."""
        while True:
            assert self._process is not None
            await self._process.wait()
            self.ready = False
            receive.cancel()
            cause = _cause(self._process.returncode)
            logger.error("the engine process ended%s; starting it again", cause)
            self._fail_streams(f"the engine process ended{cause}")
            while True:
                self.restarts += 1
                try:
                    receive = await self._launch()
                    break
                except (HeadstartError, OSError) as error:  # OSError: no memory for a process
                    logger.error("the engine cannot be started: %s", error)
                    await asyncio.sleep(RESTART_PAUSE)

    def _fail_streams(self, message: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(message))

    def _send(self, message: Add | Abort | Shutdown) -> None:
        # The queue is unbounded (hwm 0), so this never waits, and the future is done already. Not
        # zmq.Socket.send: sending may take the one event that tells of messages to receive (the
        # socket's descriptor is edge-triggered), and only the asyncio socket looks again.
        if self._socket is not None:
            self._socket.send(self._encoder.encode(message), zmq.DONTWAIT)

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def _cause(returncode: int | None) -> str:
    if returncode is None:
        return ""
    return f" (signal {-returncode})" if returncode < 0 else f" (exit status {returncode})"
