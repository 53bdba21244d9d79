"""EngineClient: the engine process as the server's event loop sees it.

    client = EngineClient(config)
    await client.start()
    async for output in client.add(token_ids, params): ...

An engine that dies takes its running requests with it: their streams raise EngineDeadError. It is
started again at once, with the adapters it had; until it is ready, whatever is asked raises that.
One that is silent for too long, with a step or without, is killed, which makes it one that died.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import tempfile
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from headstart.engine.config import EngineConfig
from headstart.engine.errors import ConfigError, EngineDeadError, HeadstartError, RequestError
from headstart.engine.process.engine_process import EngineProcess
from headstart.engine.process.messages import (
    BEATS,
    Abort,
    AdapterInfo,
    AdapterLoaded,
    AdapterUnloaded,
    Add,
    Alive,
    Failed,
    LoadAdapter,
    ModelInfo,
    Output,
    Ready,
    Rejected,
    Shutdown,
    Stats,
    Step,
    ToEngine,
    ToServer,
    UnloadAdapter,
)
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams

logger = logging.getLogger(__name__)

SILENT_BEATS = 4 * BEATS
"""How finely the time of an engine's silence is counted."""

RESTART_PAUSE = 1.0
"""Seconds before a second start in a row, so that an engine that dies at once does not spin."""


class Stream:
    """The outputs of one request; see server/generation/engine_client.py for the contract."""

    def __init__(self, client: EngineClient, request_id: int) -> None:
        self._client = client
        self._id = request_id
        self._outputs: deque[Output] = deque()
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    @property
    def reported(self) -> bool:
        return self._id <= self._client.heard

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


@dataclass(frozen=True, slots=True)
class Asked:
    """What the engine has not answered yet: load, or unload, the adapter ``name``."""

    name: str
    answer: asyncio.Future[AdapterInfo | None]


class EngineClient:
    """Starts the engine process, talks to it, and starts it again when it dies.

    ``adapters``: those loaded, by name. While the engine is being started again: those it had.
    ``heard``: the id of the last request that ``stats`` know.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.model: ModelInfo | None = None
        self.adapters: dict[str, AdapterInfo] = {}
        self.stats = Stats()
        self.heard = 0
        self.restarts = 0
        self.ready = False
        self._config = config
        self._ids = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._asked: dict[int, Asked] = {}
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: EngineProcess | None = None
        self._begun = False
        self._watch: asyncio.Task[None] | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._folder = tempfile.mkdtemp(prefix="headstart-")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToServer)
        self._silent = 0  # signs of life that are missing
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._process.pid if self._process else None

    def begin(self) -> None:
        """Begin the engine's process already, for ``start`` to go on with; ``kill`` ends it.
        Raises OSError."""
        self._spawn(self._config)
        self._begun = True

    def kill(self) -> None:
        """End the process where there will be no ``start``."""
        if self._process:
            self._process.kill()

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises HeadstartError when it cannot."""
        socket = await self._launch(self._config)
        assert self.model is not None
        self.adapters = {adapter.name: adapter for adapter in self.model.adapters}
        self._serve(socket)
        self._watch = asyncio.create_task(self._keep_alive())

    def add(
        self,
        token_ids: Iterable[int],
        params: SamplingParams | PoolingParams,
        *,
        salt: bytes = b"",
        segments: Sequence[Span] = (),
        adapter: str | None = None,
        priority: int = 0,
        owner: bytes = b"",
    ) -> Stream:
        """Start a request. Raises EngineDeadError when the engine is not ready."""
        self._require_ready()
        request_id = next(self._ids)
        stream = self._streams[request_id] = Stream(self, request_id)
        tokens = array("i", token_ids).tobytes()
        spans = list(segments)
        self._send(Add(request_id, tokens, params, salt, spans, adapter, priority, owner))
        return stream

    def abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None and self.ready:
            self._send(Abort([request_id]))

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the LoRA adapter in folder ``path``, for ``add``.

        Raises RequestError, which says what is wrong with its name or its files, or
        EngineDeadError.
        """
        adapter = await self._ask(LoadAdapter(next(self._ids), name, path))
        assert adapter is not None
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it run to their end.

        Raises RequestError for one that is not loaded, or EngineDeadError.
        """
        await self._ask(UnloadAdapter(next(self._ids), name))

    async def _ask(self, message: LoadAdapter | UnloadAdapter) -> AdapterInfo | None:
        self._require_ready()
        asked = Asked(message.name, asyncio.get_running_loop().create_future())
        self._asked[message.id] = asked
        self._send(message)
        return await asked.answer

    def _require_ready(self) -> None:
        if not self.ready:
            raise EngineDeadError("the engine is not running; it is being started")

    async def stop(self) -> None:
        """End the engine process; running requests are dropped."""
        self._stopping = True
        self.ready = False
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        self._stop_receiving()
        if self._process and self._process.returncode is None:
            if not self._send(Shutdown()):
                self._process.kill()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._close_socket()
        self._fail_all("the server is shutting down")
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, config: EngineConfig) -> EngineProcess:
        endpoint = f"ipc://{self._folder}/engine-{next(self._ids)}.sock"
        self._process = EngineProcess(endpoint, config)
        return self._process

    async def _launch(self, config: EngineConfig) -> zmq.asyncio.Socket:
        """Spawn a process, or take the one begun, and wait for Ready; returns the socket to it."""
        self._close_socket()
        process = self._process if self._begun else self._spawn(config)
        self._begun = False
        assert process is not None
        socket = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        try:
            socket.bind(process.endpoint)  # the process may try to connect already
        except zmq.ZMQError as error:
            process.kill()
            raise ConfigError(f"cannot create a socket in {self._folder}: {error}") from error
        self._socket = socket
        message = await self._next_message(socket)
        if isinstance(message, Failed):
            await process.wait()
            raise HeadstartError(message.message)
        assert isinstance(message, Ready)
        self.model = message.model
        return socket

    async def _next_message(self, socket: zmq.asyncio.Socket) -> ToServer:
        """What the engine says next while it starts; raises HeadstartError when it ends first."""
        assert self._process is not None
        message = asyncio.ensure_future(socket.recv())
        ended = asyncio.create_task(self._process.wait())
        try:
            done, _ = await asyncio.wait({message, ended}, return_when=asyncio.FIRST_COMPLETED)
            if message not in done:
                # It may have said why before it ended.
                done, _ = await asyncio.wait({message}, timeout=0.2)
            if message not in done:
                raise HeadstartError(f"the engine ended while starting{_cause(ended.result())}")
            received: ToServer = self._decoder.decode(message.result())
        finally:
            message.cancel()
            ended.cancel()
        return await self._next_message(socket) if isinstance(received, Alive) else received

    async def _load_again(self, socket: zmq.asyncio.Socket) -> None:
        """Give a new engine the adapters of the one that died, those that can still be loaded."""
        for name, adapter in list(self.adapters.items()):
            self._send(LoadAdapter(next(self._ids), name, adapter.path))
            match await self._next_message(socket):
                case AdapterLoaded(_, again):
                    self.adapters[name] = again
                case Rejected(_, reason):
                    logger.error("adapter %r is not loaded any more: %s", name, reason)
                    del self.adapters[name]

    def _serve(self, socket: zmq.asyncio.Socket) -> None:
        """Take requests from now on, and receive what comes of them."""
        self.ready = True
        self._receiver = asyncio.create_task(self._receive_alive(socket))

    async def _receive_alive(self, socket: zmq.asyncio.Socket) -> None:
        """Receive until the engine falls silent, and then kill it."""
        if not self._config.stuck_after:
            await self._receive(socket)
        receive = asyncio.create_task(self._receive(socket))
        try:
            self._silent = 0
            # Counted, not timed: while this process was stopped, too, nothing was received.
            while self._silent < SILENT_BEATS:
                await asyncio.sleep(self._config.stuck_after / SILENT_BEATS)
                self._silent += 1
        finally:
            receive.cancel()
        logger.error(
            "the engine has shown no sign of life for %g s (--engine-stuck-after): it is killed",
            self._config.stuck_after,
        )
        self.ready = False
        self.kill()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await socket.recv())
            self._silent = 0
            if isinstance(message, Step):
                self.stats, self.heard = message.stats, message.heard
                for output in message.outputs:
                    stream = self._streams.get(output.id)
                    if stream is not None:
                        if output.finish_reason is not None:
                            del self._streams[output.id]
                        stream.push(output)
            elif isinstance(message, Rejected):
                error = RequestError(message.message, message.param)
                stream = self._streams.pop(message.id, None)
                if stream is not None:
                    stream.fail(error)
                elif message.id in self._asked:
                    self._answer(message.id, error)
            elif isinstance(message, AdapterLoaded):
                self.adapters[message.adapter.name] = message.adapter
                self._answer(message.id, message.adapter)
            elif isinstance(message, AdapterUnloaded):
                self.adapters.pop(self._asked[message.id].name, None)
                self._answer(message.id, None)

    def _answer(self, question: int, answer: AdapterInfo | Exception | None) -> None:
        future = self._asked.pop(question).answer
        if future.done():  # who asked was cancelled
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    async def _keep_alive(self) -> None:
        """Wait for the engine to die; fail what it was asked; start the next one."""
        # Adapters come afterwards: one whose files have gone must not keep an engine from starting.
        config = msgspec.structs.replace(self._config, adapters={})
        while True:
            assert self._process is not None
            await self._process.wait()
            self.ready = False
            self.stats = Stats()  # nothing runs, and totals begin again
            self._stop_receiving()
            cause = _cause(self._process.returncode)
            logger.error("the engine process ended%s; starting it again", cause)
            self._fail_all(f"the engine process ended{cause}")
            while True:
                self.restarts += 1
                try:
                    socket = await self._launch(config)
                    await self._load_again(socket)
                    self._serve(socket)
                    break
                except (HeadstartError, OSError) as error:  # OSError: no memory for a process
                    logger.error("the engine cannot be started: %s", error)
                    await asyncio.sleep(RESTART_PAUSE)

    def _stop_receiving(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()

    def _fail_all(self, message: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(message))
        for question in list(self._asked):
            self._answer(question, EngineDeadError(message))

    def _send(self, message: ToEngine) -> bool:
        """Whether it is on its way; not where the process has not got as far as to connect."""
        # The queue is unbounded (hwm 0), so this never waits, and the future is done already. Not
        # zmq.Socket.send: sending may take the one event that tells of messages to receive (the
        # socket's descriptor is edge-triggered), and only the asyncio socket looks again.
        if self._socket is None:
            return False
        sent = self._socket.send(self._encoder.encode(message), zmq.DONTWAIT)
        assert isinstance(sent, asyncio.Future)
        return sent.exception() is None

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def _cause(returncode: int | None) -> str:
    if returncode is None:
        return ""
    return f" (signal {-returncode})" if returncode < 0 else f" (exit status {returncode})"
