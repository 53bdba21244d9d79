"""The engine's process: messages in, steps, messages out.

    python -m headstart.engine.process.service ENDPOINT < EngineConfig as one line of JSON

A process of its own, because a second busy Python thread beside the kernels' threads stalls them
by whole scheduler time slices. It waits without using the CPU while there is nothing to compute,
and only says now and then that it is alive: from the loop that computes, so that it is true.
Standard input stays open as long as the parent lives: its end is this process's end.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from array import array
from typing import TYPE_CHECKING

import msgspec
import zmq

from headstart.engine.config import EngineConfig
from headstart.engine.errors import HeadstartError, ModelError, RankError, RequestError
from headstart.engine.process.messages import (
    BEATS,
    Abort,
    AdapterLoaded,
    AdapterUnloaded,
    Add,
    Alive,
    Failed,
    LoadAdapter,
    Ready,
    Rejected,
    Shutdown,
    Step,
    ToEngine,
    ToServer,
    UnloadAdapter,
)

if TYPE_CHECKING:
    from headstart.engine.engine import Engine

logger = logging.getLogger(__name__)

ATTEND_MS = 100
"""How often prefill ranks are attended to while there is nothing to compute."""


class Service:
    """Connects an engine to the socket of its client."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), zmq.POLLIN)
        self._ranks: list[int] = []
        self._beat = math.inf
        self._spoke = 0.0
        self._heard = 0  # the last Add

    def run(self, config: EngineConfig) -> None:
        """Load the model, say so, and serve until told to stop. Raises HeadstartError."""
        # Imported here: torch takes a second, and a bad setting should be told before that.
        from headstart.engine.engine import Engine

        engine = Engine(config)
        if config.stuck_after:
            self._beat = config.stuck_after / BEATS
        try:
            self._ranks = engine.rank_descriptors()
            for descriptor in self._ranks:
                self._poller.register(descriptor, zmq.POLLIN)
            engine.warm_up()
            self._send(Ready(engine.model))
            self._serve(engine)
        finally:
            engine.close()

    def _serve(self, engine: Engine) -> None:
        busy = True
        try:
            while self._receive(engine, wait=not busy):
                if engine.has_work:
                    outputs = engine.step()
                    for request_id, error in engine.take_refused():
                        self._send(Rejected(request_id, str(error), error.param))
                    self._send(Step(outputs, engine.stats, self._heard))
                    busy = True
                else:
                    self._attend(engine)
                    busy = engine.prepare_memory()
                    if time.monotonic() >= self._spoke + self._beat:
                        self._send(Alive())
        except RankError as error:  # the client learns no more than that this process ended
            logger.error("%s", error)
            raise

    def fail(self, message: str) -> None:
        self._send(Failed(message))

    def _attend(self, engine: Engine) -> None:
        """Hear prefill ranks while nothing runs, and tell if one has come or gone."""
        if engine.runahead is not None:
            before = engine.runahead.stats
            engine.attend_chain()
            if engine.runahead.stats != before:
                self._send(Step([], engine.stats, self._heard))

    def _send(self, message: ToServer) -> None:
        self._spoke = time.monotonic()
        self._socket.send(self._encoder.encode(message))

    def _receive(self, engine: Engine, wait: bool) -> bool:
        """Handle what has arrived, waiting for it if asked to; False if it is time to end."""
        attend = math.inf if engine.runahead is None else ATTEND_MS
        least = min(attend, 1000 * self._beat)
        patience = None if math.isinf(least) else math.ceil(least) + 1
        ready = dict(self._poller.poll(patience if wait else 0))
        if any(descriptor in ready for descriptor in self._ranks):
            engine.check_ranks()
        if sys.stdin.fileno() in ready:  # the parent ended: nothing is ever written there
            return False
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = self._decoder.decode(self._socket.recv())
            match message:
                case Add():
                    self._add(engine, message)
                case Abort(ids):
                    engine.abort(ids)
                    self._send(Step([], engine.stats, self._heard))
                case LoadAdapter() | UnloadAdapter():
                    self._send(_change_adapters(engine, message))
                case Shutdown():
                    return False
        return True

    def _add(self, engine: Engine, message: Add) -> None:
        self._heard = message.id
        try:
            tokens = array("i")
            tokens.frombytes(message.token_ids)
            engine.add(
                message.id,
                tokens,
                message.params,
                salt=message.salt,
                segments=message.segments,
                adapter=message.adapter,
                priority=message.priority,
                owner=message.owner,
            )
        except RequestError as error:
            self._send(Rejected(message.id, str(error), error.param))


def _change_adapters(
    engine: Engine, message: LoadAdapter | UnloadAdapter
) -> AdapterLoaded | AdapterUnloaded | Rejected:
    """Do it now, between two steps; the answer."""
    try:
        if isinstance(message, LoadAdapter):
            return AdapterLoaded(message.id, engine.load_adapter(message.name, message.path))
        engine.unload_adapter(message.name)
        return AdapterUnloaded(message.id)
    except RequestError as error:
        return Rejected(message.id, str(error), error.param)
    except ModelError as error:  # what is wrong with the adapter's files
        return Rejected(message.id, str(error))


def main() -> None:
    """Serve one client; exit status 1 after a HeadstartError, which the client is told."""
    endpoint = sys.argv[1]
    # Ctrl-C, and what service managers send, reaches the whole process group; the parent drains
    # its requests first and decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.readline(), type=EngineConfig)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s: %(message)s")
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(endpoint)
    service = Service(socket)
    try:
        service.run(config)
    except HeadstartError as error:
        service.fail(str(error))
        socket.close(linger=60_000)  # it may have been begun long before somebody listens
        context.term()
        # At once: threads of torch.distributed may abort a process that ends in order while one of
        # its peers has gone, and then its exit status is not this.
        logging.shutdown()
        os._exit(1)
    socket.close(linger=0)
    context.term()


if __name__ == "__main__":
    main()
