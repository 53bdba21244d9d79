"""The time of a request: one clock, one deadline and one watch, from its first byte to its last.

    first byte   head   body   template, tokens, grammar   queue, prefill   answer
        |----------------------------- Watch ----------------------------------|

``Attendance`` ends the work on a request, wherever it has come to, when its time is over, when its
client has gone, or when the time to drain is. Nothing is added to the engine after that.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.server.http.errors import APIError, bad_request, error_response, unavailable

BEGUN = "headstart.begun"
"""Where a scope says when its request's first byte came, by ``time.monotonic``."""

TIMEOUT_HEADER = "x-request-timeout"
STARTED = "headstart.started"
"""Where a scope says that the head of its answer is sent: the access log sees it anyway."""

_WATCH = "headstart.watch"


def begun(scope: Scope) -> float:
    """When the request's first byte came; now, if nobody has noted it before."""
    moment: float = scope.setdefault(BEGUN, time.monotonic())
    return moment


class Timer(Protocol):
    def cancel(self) -> None: ...


def _call_later(seconds: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, callback)


@dataclass(frozen=True, slots=True)
class Pings:
    """What a client hears of a stream that has nothing to say.

    head_after:  from the first byte of the request to the head of its answer, seconds
    interval:    the longest silence after that, seconds; 0: it may last
    """

    head_after: float = 2.0
    interval: float = 10.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    call_later: Callable[[float, Callable[[], None]], Timer] = _call_later


class Watch:
    """Over one request. ``begun``: when its first byte came. ``gone``: its client has."""

    def __init__(self, scope: Scope, receive: Receive, pings: Pings) -> None:
        self.begun = begun(scope)
        self.pings = pings
        self.gone = False
        self._scope = scope
        self._receive = receive
        self._seconds = math.inf
        self._timeout = asyncio.timeout(None)
        self._work: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Watch:
        watch: Watch = scope[_WATCH]
        return watch

    def limit(self, seconds: float | None) -> None:
        """The answer has to be complete so long after the request's first byte; the shortest time
        of all counts."""
        if seconds is not None and seconds < self._seconds:
            self._seconds = seconds
            left = self.begun + seconds - time.monotonic()
            self._timeout.reschedule(asyncio.get_running_loop().time() + left)

    @property
    def allowed(self) -> float:
        """Seconds from the request's first byte to the end of its answer; inf: no limit."""
        return self._seconds

    @property
    def left(self) -> float:
        """Those of them that are left now."""
        return self.begun + self._seconds - time.monotonic()

    def error(self) -> APIError | None:
        """What a client is told whose request was cancelled; None: there is nobody to tell."""
        if self.gone:
            return None
        if self._timeout.expired():
            words = f"the answer was not complete within {self._seconds:g} s"
            return APIError(504, words, code="timeout")
        return unavailable("the server is shutting down")

    async def run(self, app: ASGIApp, send: Send, seconds: float | None) -> None:
        """Let ``app`` answer, within ``seconds`` if there is a limit."""
        self._work = asyncio.current_task()
        try:
            async with self._timeout:
                self.limit(seconds)
                await app(self._scope, self._take, send)
        except TimeoutError:
            if not self._timeout.expired():
                raise
            await self._fail(send)
        except asyncio.CancelledError:
            if not self.gone:  # who else cancelled it may want to know that
                await self._fail(send)
            elif self._work is not None:
                self._work.uncancel()
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def _fail(self, send: Send) -> None:
        error = self.error()
        if error is not None and STARTED not in self._scope:
            await error_response(error, self._scope)(self._scope, self._take, send)

    async def _take(self) -> Message:
        """ASGI's receive. Behind the body there is nothing but the client's end, which is waited
        for beside the work."""
        if self._watcher is not None:
            await asyncio.wait((self._watcher,))
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._hang_up()
            await asyncio.sleep(0)  # which ends here
        elif not message.get("more_body"):
            self._watcher = asyncio.create_task(self._await_end())
        return message

    async def _await_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # It may also be told the end of its own answer; then the work has ended, or does now.
        self._hang_up()

    def _hang_up(self) -> None:
        self.gone = True
        assert self._work is not None
        self._work.cancel()


class Attendance:
    """ASGI middleware. ``seconds``: what any answer may take; None: as long as it does."""

    def __init__(self, app: ASGIApp, seconds: float | None, pings: Pings) -> None:
        self._app = app
        self._seconds = seconds
        self._pings = pings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            seconds = _shortest(self._seconds, _asked(scope))
        except APIError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        watch = scope[_WATCH] = Watch(scope, receive, self._pings)
        await watch.run(self._app, send, seconds)


def _asked(scope: Scope) -> float | None:
    """The time in the header, if it has one; raises a 400."""
    name = TIMEOUT_HEADER.encode()
    sent = next((value for key, value in scope["headers"] if key == name), None)
    if sent is None:
        return None
    text = sent.decode("latin-1")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise bad_request(
            f"{TIMEOUT_HEADER}: {text[:40]!r} is not a number of seconds above 0", TIMEOUT_HEADER
        )
    return seconds


def _shortest(*times: float | None) -> float | None:
    return min((seconds for seconds in times if seconds is not None), default=None)
