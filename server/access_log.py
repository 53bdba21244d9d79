"""One line per request, without anything of its text.

POST /v1/completions status=200 ms=812 prompt_tokens=1748 completion_tokens=64 client=10.0.0.7
"""

from __future__ import annotations

import json
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("headstart.access")

# Asked every few seconds by machines: logged at debug level.
QUIET_PATHS = frozenset({"/health", "/metrics"})
_USAGE = "headstart.usage"


def note_usage(scope: Scope, prompt_tokens: int, completion_tokens: int) -> None:
    """Leave the token counts of a request for its log line."""
    scope[_USAGE] = (prompt_tokens, completion_tokens)


class AccessLog:
    """ASGI middleware. Status 499 (nginx's) is a client that hung up before any answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
            if logger.isEnabledFor(level):
                logger.log(level, _line(scope, status, time.perf_counter() - start))


def _line(scope: Scope, status: int, seconds: float) -> str:
    # The path is the client's: quoted when it has anything unusual, so that it stays one line.
    path = scope["path"][:200]
    if not re.fullmatch(r"[!#-~]*", path):
        path = json.dumps(path)
    line = f"{scope['method']} {path} status={status} ms={seconds * 1000:.0f}"
    if usage := scope.get(_USAGE):
        line += f" prompt_tokens={usage[0]} completion_tokens={usage[1]}"
    if client := scope.get("client"):
        line += f" client={client[0]}"
    return line
