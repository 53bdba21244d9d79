"""Refusals: what a client is told that was not let in, and how much of its body is read still.

OpenAI's and Anthropic's libraries ask again by themselves after a 429, a 503 or a 529, when
``retry-after-ms`` says, else ``retry-after``; they take no notice of more than a minute, and ask no
more where ``x-should-retry`` is false.
"""

from __future__ import annotations

import asyncio
import math

from starlette.types import Message, Receive, Scope, Send

from headstart.server.http.errors import OVERLOADED, APIError, error_response, is_anthropic

MOST_WAIT, LEAST_WAIT = 60.0, 0.1
"""Seconds after which a client is told to ask again."""

SMALL_BODY = 64 * 1024
"""Bytes of a body that are passed over so that the connection may be used again."""

LINGER_BYTES, LINGER_SECONDS = 1024 * 1024, 1.0
"""Of a larger body, what is passed over before the connection is closed: who is cut off while it
sends may never read the answer."""

OVERLOADED_ANTHROPIC = 529
"""Anthropic's own status for what is a 503 elsewhere."""


RETRY_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")


def retry_headers(wait: float | None) -> dict[str, str]:
    """``wait``: seconds until the request would be let in; None: it never would be."""
    if wait is None:
        return {"x-should-retry": "false"}
    seconds = min(max(wait, LEAST_WAIT), MOST_WAIT)
    return {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(1000 * seconds)),
    }


def overloaded(path: str, words: str, wait: float | None) -> APIError:
    """A 503, or 529, for a request at ``path`` that would come too late, or find no place."""
    again = " however long it waits" if wait is None else ""
    return APIError(
        OVERLOADED_ANTHROPIC if is_anthropic(path) else 503,
        f"the server is overloaded: {words}"
        if wait is not None
        else f"the request cannot be answered in time{again}: {words}",
        code=OVERLOADED,
        headers=retry_headers(wait),
    )


def rate_limited(what: str, limit: int, wait: float) -> APIError:
    """A 429. ``what``: requests or tokens."""
    return APIError(
        429,
        f"this key or address has had its {limit} {what} a minute; more may come in {wait:.1f} s",
        code="rate_limit_exceeded",
        headers=retry_headers(wait),
    )


def body_size(scope: Scope) -> int | None:
    """Of the request's body, as its head says; None where it does not."""
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            return int(value[:20]) if value.isdigit() else None
    return 0


async def refuse(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send ``error`` instead of an answer, without reading the body, or all of it."""
    size = body_size(scope)
    if size is not None and size <= SMALL_BODY:
        await error_response(error, scope)(scope, receive, send)
        return
    error.headers = (error.headers or {}) | {"connection": "close"}

    async def lingering(message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body")
        await send({**message, "more_body": True} if last else message)

    await error_response(error, scope)(scope, receive, lingering)
    await _pass_over(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _pass_over(receive: Receive) -> None:
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return
