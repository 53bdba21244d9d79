"""serve: uvicorn on a bound socket, with a shutdown that lets running requests end.

The port opens when the model's files are there, and says 503 while the engine loads them: probes
are answered from then on, and clients are told why. Before that, connections are refused.

    SIGTERM, SIGINT  ->  new requests get 503, the socket closes, running ones go on
                     ->  when all have ended, or the time is over: the engine stops, return
    a second one     ->  running ones end with an error, now

uvicorn by itself would end the process by the signal, which a supervisor takes for a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headstart.engine.errors import ConfigError, HeadstartError
from headstart.server.http.bounds import CROWDED
from headstart.server.http.deadline import BEGUN
from headstart.server.http.runtime import Runtime
from headstart.server.http.tls import Certificate

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that the system takes while the event loop is busy."""

SPARE_CONNECTIONS = 64
"""Beyond the limit, for those who are told of it, and for probes."""

OTHER_FILES = 256
"""Open beside connections, at most."""


class ServingConfig(uvicorn.Config):
    """uvicorn's settings; ``head_seconds``: within which a request has to send its head.

    ``idle``: connections that wait for a request, those that have waited longest first.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        head_seconds: float,
        max_connections: int = sys.maxsize,
        **settings: Any,
    ) -> None:
        super().__init__(app, http=LimitedProtocol, **settings)
        self.head_seconds = head_seconds
        self.max_connections = max_connections
        self.idle: dict[LimitedProtocol, None] = {}


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits that it lacks.

    Of the time from a connection, or from the first byte behind an answer, to the end of a
    request's head: then the connection is closed. And of connections: one too many takes the place
    of one that waits for a request; if there is none it is marked for Crowd, and closed where even
    those are many.
    """

    config: ServingConfig
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        beyond = len(self.connections) - self.config.max_connections
        if beyond > 0 and self.config.idle:
            next(iter(self.config.idle))._end()
        elif beyond > SPARE_CONNECTIONS:
            self._end()
            return
        elif beyond > 0:
            self.app_state = self.app_state | {CROWDED: True}
        self._wait()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # While an answer is under way its end, and then the keep-alive timer, see to the rest.
        answered = self.cycle is None or self.cycle.response_complete
        if answered and not self.transport.is_closing():
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[BEGUN] = time.monotonic()  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._forget_head()
        self.config.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self.config.idle.pop(self, None)
        super().connection_lost(exc)

    def _wait(self) -> None:
        if CROWDED not in self.app_state:
            self.config.idle[self] = None

    def _end(self) -> None:
        self._forget_head()
        self.config.idle.pop(self, None)
        self.connections.discard(self)  # now: those that come at the same time are counted
        self.transport.abort()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.config.head_seconds, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class DrainingServer(uvicorn.Server):
    """uvicorn's server; ``failures`` that turn up end it too."""

    def __init__(
        self, config: uvicorn.Config, runtime: Runtime, failures: Sequence[HeadstartError]
    ) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._failures = failures

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        if self.should_exit:
            for task in self.server_state.tasks:
                task.cancel()
            return
        logger.info("%s: ending when the running requests have", number.name)
        self._runtime.draining = True
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._failures:
            return True
        return await super().on_tick(counter)


def url(listener: socket.socket, certificate: Certificate | None = None) -> str:
    """Where the server is asked."""
    host, port = listener.getsockname()[:2]
    scheme = "http" if certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _allow_files(wanted: int) -> None:
    """Have as many files open as connections need, if the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        allowed = soft
    if allowed < wanted:
        logger.warning(
            "the system allows %d open files: --max-connections needs %d (ulimit -n)",
            allowed,
            wanted,
        )


def serve(
    app: FastAPI,
    listener: socket.socket,
    failures: Sequence[HeadstartError],
    *,
    drain_seconds: int,
    keep_alive_seconds: int = 5,
    head_seconds: float = 20.0,
    max_connections: int = 1024,
    certificate: Certificate | None = None,
) -> None:
    """Serve until a signal, or until something is in ``failures``.

    Raises ConfigError where another process has begun to listen at the address meanwhile.
    """
    config = ServingConfig(
        app,
        head_seconds=head_seconds,
        max_connections=max_connections,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",  # its "startup complete" says nothing of the model
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=keep_alive_seconds,
        ssl_certfile=certificate.certfile if certificate else None,
        ssl_keyfile=certificate.keyfile if certificate else None,
        ssl_keyfile_password=certificate.password if certificate else None,
    )
    _allow_files(max_connections + SPARE_CONNECTIONS + OTHER_FILES)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {url(listener)}: {error.strerror}") from error
    logger.info(
        "listening on %s (not ready: the model is loading, requests get a 503 until it has)",
        url(listener, certificate),
    )
    # What start has made stays: a collection while requests come need not go through it.
    gc.collect()
    gc.freeze()
    DrainingServer(config, app.state.runtime, failures).run(sockets=[listener])
