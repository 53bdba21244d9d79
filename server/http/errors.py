"""Errors as the OpenAI API shows them: ``{"error": {"message", "type", "param", "code"}}``.

Below /v1/messages they are Anthropic's: ``{"type": "error", "error": {"type", "message"}}``.
Everything that goes wrong reaches the client through ``to_api_error``, so that a status and a
body are chosen in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Scope

from headstart.engine.errors import EngineDeadError, HeadstartError, RequestError

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
    504: "timeout_error",
}
OVERLOADED = "overloaded"
"""The code of requests that are not let in."""
INTERNAL_MESSAGE = "internal error; the server's log says more"
_ERROR = "headstart.error"


class APIError(Exception):
    """An error with its HTTP status. ``param`` is the path of the body field at fault. ``logged``:
    the message without what it may repeat of the request's text."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        logged: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.splitlines())  # may quote the client, or a template
        self.param = param
        self.code = code
        self.headers = headers
        self.logged = self.message if logged is None else logged

    @property
    def type(self) -> str:
        """OpenAI's name for the class of error."""
        if self.status == HTTPStatus.NOT_FOUND:
            return "not_found_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return "service_unavailable_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def is_fault(self) -> bool:
        """Something went wrong here; what is refused since there is too much of it did not."""
        return self.status >= 500 and self.code != OVERLOADED

    @property
    def name(self) -> str:
        """What logs and metrics call it: one of few names."""
        return self.code or self.type

    def body(self) -> bytes:
        """The error as JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def anthropic_body(self) -> bytes:
        """The error as JSON, as Anthropic's API has it."""
        kind = _ANTHROPIC_TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "api_error"
        return msgspec.json.encode(
            {"type": "error", "error": {"type": kind, "message": self.message}}
        )


def is_anthropic(path: str) -> bool:
    """Whether answers at ``path`` are Anthropic's."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


class ContextLengthError(APIError):
    """A 400 for a prompt that leaves no room for an answer. Clients that compact their chats, or
    cut them, know it by its code and these words."""

    def __init__(self, num_tokens: int, limit: int, param: str, remedy: str = "") -> None:
        super().__init__(
            400,
            f"{param}: the prompt has {num_tokens} tokens; this model's maximum context length is "
            f"{limit} tokens, the answer included{remedy}",
            param=param,
            code="context_length_exceeded",
        )
        self._told = f"prompt is too long: {num_tokens} tokens > {limit - 1} maximum"

    def anthropic_body(self) -> bytes:
        error = {"type": "invalid_request_error", "message": f"{self._told}; {self.message}"}
        return msgspec.json.encode({"type": "error", "error": error})


def note_error(scope: Scope, error: APIError) -> None:
    """Leave what went wrong with a request for its log line and the metrics."""
    scope[_ERROR] = error


def noted_error(scope: Scope) -> APIError | None:
    error: APIError | None = scope.get(_ERROR)
    return error


def error_response(error: APIError, scope: Scope) -> Response:
    """The error as a response that has not started yet, in the words of the request's API."""
    note_error(scope, error)
    body = error.anthropic_body() if is_anthropic(scope["path"]) else error.body()
    return Response(body, error.status, error.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A 400."""
    return APIError(400, message, param=param, code=code)


def invalid(path: str, words: str) -> APIError:
    """A 400 for a value that is not what it has to be."""
    return bad_request(f"{path} {words}", path, "invalid_value")


def string_at(value: Mapping[str, Any], key: str, path: str) -> str:
    """A string of the object at ``path``; raises APIError."""
    found = value.get(key)
    if not isinstance(found, str):
        raise invalid(f"{path}.{key}", "must be a string")
    return found


def unavailable(message: str) -> APIError:
    """A 503 that asks the client to come back."""
    return APIError(503, message, code="service_unavailable", headers={"retry-after": "1"})


def field_path(loc: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def from_validation(error: ValidationError, at: str = "") -> APIError:
    """The first thing pydantic found wrong with a body. ``at``: the path of what was validated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    path = ".".join(filter(None, (at, field_path(first["loc"]))))
    if not path:
        return bad_request("the body must be a JSON object", code="invalid_type")
    if first["type"] == "missing":
        return bad_request(f"{path} is required", path, "missing_required_parameter")
    if first["type"] == "model_type":  # pydantic's words name a Python class
        return bad_request(f"{path} must be an object", path, "invalid_value")
    return bad_request(f"{path}: {first['msg']}", path, "invalid_value")


def to_api_error(error: BaseException) -> APIError:
    """Any exception as what the client gets to see. Unknown ones tell nothing: they are logged."""
    match error:
        case APIError():
            return error
        case ValidationError():
            return from_validation(error)
        case RequestError():
            return APIError(400, str(error), param=error.param, logged=error.message)
        case EngineDeadError():
            return unavailable(str(error))
        case HeadstartError():
            return APIError(500, str(error))
        case _:
            return APIError(500, INTERNAL_MESSAGE)
