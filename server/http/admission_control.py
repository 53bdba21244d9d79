"""AdmissionControl: the ASGI side of admission, right before the routes."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.server.http.access_log import noted_usage
from headstart.server.http.admission import Admission, Caller
from headstart.server.http.errors import APIError, is_anthropic
from headstart.server.http.rates import Bucket, duration
from headstart.server.http.refusals import body_size, refuse

PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v2/embed",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
    }
)
"""What asks the engine for tokens or vectors. Nothing else is ever refused here."""

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{name}"
    for name in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)


class AdmissionControl:
    """ASGI middleware: lets a request in, or refuses it before its body is read; sees that its
    place is free when it has ended; tells what is left of its caller's rates."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The router's patterns end with "$", which lets a newline (%0a) follow.
        asks = scope["type"] == "http" and scope["method"] == "POST"
        if not asks or scope["path"].rstrip("\n") not in PATHS:
            await self._app(scope, receive, send)
            return
        admission = self._admission
        caller = admission.caller(scope)

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._tell_rates(caller, scope, MutableHeaders(scope=message))
            await send(message)

        outward = send if caller.requests is None and caller.tokens is None else telling
        try:
            ticket = admission.let_in(scope, caller, body_size(scope) or 0)
        except APIError as error:
            await refuse(error, scope, receive, outward)
            return

        async def receiving() -> Message:
            message = await receive()
            if not message.get("more_body"):
                admission.received(ticket)
            return message

        try:
            await self._app(scope, receiving, outward)
        finally:
            admission.leave(ticket, sum(noted_usage(scope)))

    def _tell_rates(self, caller: Caller, scope: Scope, headers: MutableHeaders) -> None:
        now = self._admission.now()
        as_told = _anthropics if is_anthropic(scope["path"]) else _openais
        for name, bucket in (("requests", caller.requests), ("tokens", caller.tokens)):
            if bucket is not None:
                headers.update(as_told(name, bucket, now))


def _remaining(bucket: Bucket, now: float) -> str:
    return str(max(math.floor(bucket.level(now)), 0))


def _openais(name: str, bucket: Bucket, now: float) -> dict[str, str]:
    """A rate in OpenAI's headers."""
    return {
        f"x-ratelimit-limit-{name}": str(bucket.limit),
        f"x-ratelimit-remaining-{name}": _remaining(bucket, now),
        f"x-ratelimit-reset-{name}": duration(bucket.full_in(now)),
    }


def _anthropics(name: str, bucket: Bucket, now: float) -> dict[str, str]:
    """The same in Anthropic's: a moment instead of a duration."""
    reset = datetime.now(UTC) + timedelta(seconds=bucket.full_in(now))
    return {
        f"anthropic-ratelimit-{name}-limit": str(bucket.limit),
        f"anthropic-ratelimit-{name}-remaining": _remaining(bucket, now),
        f"anthropic-ratelimit-{name}-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
