"""serve: uvicorn on a bound socket, with a shutdown that lets running requests end.

    SIGTERM, SIGINT  ->  new requests get 503, the socket closes, running ones go on
                     ->  when all have ended, or the time is over: the engine stops, return
    a second one     ->  running ones end with an error, now

uvicorn by itself would end the process by the signal, which a supervisor takes for a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from headstart.engine.errors import HeadstartError
from headstart.server.runtime import Runtime
from headstart.server.tls import Certificate

logger = logging.getLogger(__name__)


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


def serve(
    app: FastAPI,
    listener: socket.socket,
    failures: Sequence[HeadstartError],
    *,
    drain_seconds: int,
    keep_alive_seconds: int = 5,
    certificate: Certificate | None = None,
) -> None:
    """Serve until a signal, or until something is in ``failures``."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=keep_alive_seconds,
        ssl_certfile=certificate.certfile if certificate else None,
        ssl_keyfile=certificate.keyfile if certificate else None,
        ssl_keyfile_password=certificate.password if certificate else None,
    )
    host, port = listener.getsockname()[:2]
    scheme = "http" if certificate is None else "https"
    logger.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    DrainingServer(config, app.state.runtime, failures).run(sockets=[listener])
