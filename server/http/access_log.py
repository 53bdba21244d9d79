"""One line per request, without anything of its text, and the id that it has in there.

POST /v1/completions status=200 ms=812 prompt_tokens=1748 completion_tokens=64 client=10.0.0.7
request_id=5f0c... (one line), or the same as a JSON object with the time. One that went wrong has
code="invalid_value" param="max_tokens" error="..." before its id. What is logged is counted.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Container
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TextIO

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.server.http.deadline import STARTED, begun
from headstart.server.http.errors import (
    INTERNAL_MESSAGE,
    APIError,
    is_anthropic,
    note_error,
    noted_error,
)
from headstart.server.http.metrics import HttpMetrics
from headstart.server.http.policy import Notes

logger = logging.getLogger("headstart.access")
told = logging.getLogger(__name__)

# Asked every few seconds by machines: logged at debug level.
QUIET_PATHS = frozenset({"/health", "/live", "/load", "/metrics", "/ready"})
REQUEST_ID = "x-request-id"
ANTHROPIC_ID = "request-id"
REQUEST_ID_PATTERN = "[A-Za-z0-9._-]{1,128}"
_USAGE = "headstart.usage"
_ID = "headstart.request_id"
IGNORED = "x-headstart-ignored"
_IGNORED = "headstart.ignored"

MAX_ERROR_CHARS = 300
"""Of a message that is logged; the client gets all of it."""

MAX_TOLD = 256
"""Ignored fields that are told of, each once."""


def note_usage(scope: Scope, prompt_tokens: int, completion_tokens: int) -> None:
    """Leave the token counts of a request for its log line."""
    scope[_USAGE] = (prompt_tokens, completion_tokens)


def noted_usage(scope: Scope) -> tuple[int, int]:
    """Tokens of a request's prompts, and of its answer; 0 and 0 where it had none."""
    usage: tuple[int, int] = scope.get(_USAGE, (0, 0))
    return usage


def note_ignored(scope: Scope, notes: Notes) -> None:
    """Leave what there will be to say of the body's fields, for the answer's head."""
    scope[_IGNORED] = notes


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


class Answered(NamedTuple):
    """What became of a request. ``path``: of its route. ``usage``: tokens of prompt and answer."""

    path: str
    status: int
    request_id: str
    error: APIError | None
    usage: tuple[int, int] | None


class Tracer(Protocol):
    """Who is told of each request when it has ended."""

    def trace(self, scope: Scope, answered: Answered) -> None:
        """Must not wait."""


class AccessLog:
    """ASGI middleware. Status 499 (nginx's) is a client that hung up before any answer.

    ``paths``: of the routes, by which requests are counted. ``line_format``: "text" or "json".
    Answers carry the request's id.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        paths: Container[str],
        line_format: str = "text",
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._format = {"text": _text, "json": _json}[line_format]
        self._told: set[str] = set()
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = begun(scope)
        status = 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                scope[STARTED] = True
                headers = MutableHeaders(scope=message)
                for name in id_headers(scope):
                    headers[name] = request_id(scope)
                if _IGNORED in scope and (names := scope[_IGNORED].header()):
                    headers[IGNORED] = names
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            note_error(scope, APIError(500, INTERNAL_MESSAGE))
            raise
        finally:
            error = noted_error(scope)
            if status == 499:  # whatever there was to say
                error = APIError(499, "the client hung up before the answer", code="hang_up")
            self._metrics.answered(self._path(scope), status, error)
            self._log(scope, status, time.monotonic() - start, error)
            if _IGNORED in scope:
                self._tell_ignored(scope, scope[_IGNORED])
            if self._tracer is not None and scope["path"] not in QUIET_PATHS:
                answered = Answered(
                    self._path(scope), status, request_id(scope), error, scope.get(_USAGE)
                )
                self._tracer.trace(scope, answered)

    def _path(self, scope: Scope) -> str:
        """That of the request's route, of which there are few; "other" where there is none. Before
        it is found, which an error may be, the path alone has to tell."""
        path = str(getattr(scope.get("route"), "path", scope["path"]))
        return path if path in self._paths else "other"

    def _log(self, scope: Scope, status: int, seconds: float, error: APIError | None) -> None:
        level = logging.WARNING if error is not None and error.is_fault else logging.INFO
        if scope["path"] in QUIET_PATHS:
            level = logging.DEBUG
        if logger.isEnabledFor(level):
            fields = _fields(scope, status, seconds, error)
            logger.log(level, "%s", self._format(fields))

    def _tell_ignored(self, scope: Scope, notes: Notes) -> None:
        """Count the fields that had no effect, and tell of those that nobody has sent before."""
        for name, counted in notes.names().items():
            self._metrics.ignored(counted)
            if name not in self._told and len(self._told) < MAX_TOLD:
                self._told.add(name)
                path = self._path(scope)
                told.info("%s: the field %s is ignored (this is said once)", path, name)


def _of_error(error: APIError) -> dict[str, Any]:
    """What a log line says of what went wrong."""
    fields = {
        "code": error.name,
        "param": error.param and error.param[:200],
        "error": error.logged[:MAX_ERROR_CHARS],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fields(scope: Scope, status: int, seconds: float, error: APIError | None) -> dict[str, Any]:
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
    if error is not None:
        fields |= _of_error(error)
    return fields | {"request_id": request_id(scope)}


def _json(fields: dict[str, Any]) -> str:
    return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | fields)


def _text(fields: dict[str, Any]) -> str:
    method, path, *rest = fields.items()
    # The path is the client's: quoted when it has anything unusual, so that it stays one line.
    shown = path[1] if re.fullmatch(r"[!#-~]*", path[1]) else json.dumps(path[1])
    return " ".join([method[1], shown, *(f"{name}={_shown(name, x)}" for name, x in rest)])


def _shown(name: str, value: Any) -> Any:
    """What comes of an error quotes the client: on one line, whatever it is."""
    return json.dumps(value) if name in ("code", "param", "error") else value
