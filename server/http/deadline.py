"""Deadline: the time that a request has for its answer."""

from __future__ import annotations

import time

from headstart.server.http.errors import APIError


class Deadline:
    """``seconds`` from now on."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(self._end - time.monotonic(), 0.0)

    def error(self) -> APIError:
        """A 504."""
        return APIError(
            504, f"the answer was not complete within {self._seconds:g} s", code="timeout"
        )
