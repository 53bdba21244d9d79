"""Bounds on what all requests together, and each before it is looked at, may hold.

Bodies          bytes of bodies that are being read: beyond them a 503
Places          requests that wait for a thread or a process: beyond them a 503
Crowd           connections: those beyond are told so, but for probes
check_values    values in a body, counted before one of them becomes an object of Python's
check_messages  messages of a chat, likewise
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.server.http.auth import OPEN_PATHS
from headstart.server.http.errors import APIError, bad_request, error_response, unavailable

LIST_VALUES = 4
OBJECT_VALUES = 16
"""What they count as: Python's garbage collector goes through them, and each object may be checked
field by field."""

PIECE = 64 * 1024
"""Bytes that are counted at once."""

_BACKSLASHES = re.compile(rb"\\+")

CROWDED = "headstart.crowded"
"""In the state of a scope: its connection is one too many."""


class Bodies:
    """``most``: bytes of bodies that are held at once, from the first one until they are parsed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0

    @contextlib.contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """What is to be told of each piece that has come; it raises a 503."""
        size = 0

        def add(count: int) -> None:
            nonlocal size
            if self._size + count > self._most:
                raise unavailable("too many large requests are being read; try again")
            self._size += count
            size += count

        try:
            yield add
        finally:
            self._size -= size


class Places:
    """``most``: requests that wait for ``what``, or have it, at once."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._taken = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Raises a 503."""
        if self._taken >= self._most:
            raise unavailable(f"too many requests wait for {self._what}; try again")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Crowd:
    """ASGI middleware: a 503 for requests of a connection that is one too many, but for probes:
    who sees them fail would end the server. ``refused``: where they are counted."""

    def __init__(self, app: ASGIApp, refused: Counter[str]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        crowded = scope["type"] == "http" and scope.get("state", {}).get(CROWDED)
        if not crowded or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        self._refused["connections"] += 1
        refusal = unavailable("too many connections are open; try again")
        refusal.headers = {"retry-after": "1", "connection": "close"}
        await error_response(refusal, scope)(scope, receive, send)


def check_values(body: bytes, most: int) -> None:
    """Raise a 413 for JSON of more values than ``most``, of which an object counts as many.

    Whoever holds the GIL while a million of them are made holds up all streams.
    """
    if not has_values(body, most):
        return
    raise APIError(
        413,
        f"the body has more than {most} numbers and texts, where a list counts as {LIST_VALUES}, "
        f"an object as {OBJECT_VALUES}; see --max-body-values",
        code="request_too_large",
    )


class _Messages(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw(b"null")


def check_messages(body: bytes, most: int) -> None:
    """Raise a 400 for more messages than ``most``, each of which would become an object first. What
    is no list of messages is for others to say."""
    try:
        given = msgspec.json.decode(body, type=_Messages).messages
        count = len(msgspec.json.decode(given, type=list[msgspec.Raw]))
    except (msgspec.MsgspecError, RecursionError):
        return
    if count > most:
        raise bad_request(f"messages has {count} entries; at most {most} are allowed", "messages")


def has_values(body: bytes, most: int) -> bool:
    """There are more than ``most`` values in this JSON; objects count as several. Of what is not
    JSON, what a parser reads before it sees that is counted."""
    if len(body) * OBJECT_VALUES <= most or _weight(np.frombuffer(body, np.uint8)) <= most:
        return False
    # Most of it may stand in texts: the same without them.
    weight = inside = end = 0
    while end < len(body):  # piece by piece: the GIL is given away between them, and in them
        start, end = end, min(end + PIECE, len(body))
        if (rest := _BACKSLASHES.match(body, end - 1)) is not None:  # none is cut off from its own
            end = max(end, rest.end())
            end = min(end + 1, len(body))
        piece = body[start:end]
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        data = np.frombuffer(piece, np.uint8)
        texts = (inside + np.cumsum(data == ord('"'), dtype=np.uint32)) & 1
        inside = int(texts[-1]) if len(texts) else inside
        weight += _weight(data[texts == 0])
        if weight > most:
            return True
    return False


def _weight(data: npt.NDArray[np.uint8]) -> int:
    """About as many values as there are: each but the first of a list or object is after a comma,
    the first after what opens it; names are before a colon."""
    commas, colons, lists, objects = (int(np.count_nonzero(data == ord(mark))) for mark in ",:[{")
    return commas + colons + LIST_VALUES * lists + OBJECT_VALUES * objects
