"""One line per request, without anything of its text, and the id that it has in there.

POST /v1/completions status=200 ms=812 prompt_tokens=1748 completion_tokens=64 client=10.0.0.7
request_id=5f0c... (one line), or the same as a JSON object with the time.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.server.http.errors import is_anthropic

logger = logging.getLogger("headstart.access")

# Asked every few seconds by machines: logged at debug level.
QUIET_PATHS = frozenset({"/health", "/live", "/load", "/metrics", "/ready"})
REQUEST_ID = "x-request-id"
ANTHROPIC_ID = "request-id"
REQUEST_ID_PATTERN = "[A-Za-z0-9._-]{1,128}"
_USAGE = "headstart.usage"
_ID = "headstart.request_id"
IGNORED = "x-headstart-ignored"
_IGNORED = "headstart.ignored"


def note_usage(scope: Scope, prompt_tokens: int, completion_tokens: int) -> None:
    """Leave the token counts of a request for its log line."""
    scope[_USAGE] = (prompt_tokens, completion_tokens)


def note_ignored(scope: Scope, names: Callable[[], str]) -> None:
    """Leave the names of the body's fields that have no effect, for the answer's head."""
    scope[_IGNORED] = names


def request_id(scope: Scope) -> str:
    """The client's ``x-request-id`` if it is short and harmless, else a new one; the same for a
    request, until it is named."""
    if _ID not in scope:
        scope[_ID] = _sent_id(scope) or uuid.uuid4().hex
    known: str = scope[_ID]
    return known


def id_headers(scope: Scope) -> tuple[str, ...]:
    """The headers that carry it; Anthropic's clients look for another than OpenAI's."""
    return (REQUEST_ID, ANTHROPIC_ID) if is_anthropic(scope["path"]) else (REQUEST_ID,)


def name_request(scope: Scope, name: str) -> None:
    """Let a request be called ``name``, from its body, unless its head has named it."""
    if _sent_id(scope) is None:
        scope[_ID] = name


def _sent_id(scope: Scope) -> str | None:
    sent = next((value for name, value in scope["headers"] if name == REQUEST_ID.encode()), b"")
    return sent.decode() if re.fullmatch(REQUEST_ID_PATTERN.encode(), sent) else None


def log_bare_lines(stream: TextIO) -> None:
    """Write lines to ``stream`` as they are, for programs that read JSON."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


class AccessLog:
    """ASGI middleware. Status 499 (nginx's) is a client that hung up before any answer.

    ``line_format``: "text" or "json". Answers carry the request's id.
    """

    def __init__(self, app: ASGIApp, line_format: str = "text") -> None:
        self._app = app
        self._format = {"text": _text, "json": _json}[line_format]

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
                headers = MutableHeaders(scope=message)
                for name in id_headers(scope):
                    headers[name] = request_id(scope)
                if _IGNORED in scope and (names := scope[_IGNORED]()):
                    headers[IGNORED] = names
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
            if logger.isEnabledFor(level):
                fields = _fields(scope, status, time.perf_counter() - start)
                logger.log(level, "%s", self._format(fields))


def _fields(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    fields = {
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(seconds * 1000),
    }
    if usage := scope.get(_USAGE):
        fields |= {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    if client := scope.get("client"):
        fields["client"] = client[0]
    return fields | {"request_id": request_id(scope)}


def _json(fields: dict[str, Any]) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | fields)


def _text(fields: dict[str, Any]) -> str:
    method, path, *rest = fields.items()
    # The path is the client's: quoted when it has anything unusual, so that it stays one line.
    shown = path[1] if re.fullmatch(r"[!#-~]*", path[1]) else json.dumps(path[1])
    return " ".join([method[1], shown, *(f"{name}={value}" for name, value in rest)])
