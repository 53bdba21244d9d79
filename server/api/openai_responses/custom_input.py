"""The input of a custom tool, read out of the arguments that a model writes it in."""

from __future__ import annotations

import json
import re

import msgspec

_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
# What of a JSON string is complete; surrogates come in pairs.
_COMPLETE = re.compile(
    r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)


class InputReader:
    """Reads ``{"input": "..."}`` as it grows. ``read``: the input so far; None: not begun."""

    def __init__(self) -> None:
        self.read: str | None = None
        self._pending = ""

    def push(self, text: str) -> str:
        """More of the arguments; returns what is new of the input."""
        self._pending += text
        if self.read is None:
            opening = _OPENING.match(self._pending)
            if opening is None:
                return ""
            self._pending = self._pending[opening.end() :]
            self.read = ""
        complete = _COMPLETE.match(self._pending)
        assert complete is not None  # it may be empty
        self._pending = self._pending[complete.end() :]
        new: str = json.loads(f'"{complete[0]}"')
        self.read += new
        return new


class _Arguments(msgspec.Struct):
    input: str


def custom_input(arguments: str) -> str:
    """The input; of arguments that are cut its beginning, and of others all that was written."""
    try:
        return msgspec.json.decode(arguments, type=_Arguments).input
    except (msgspec.MsgspecError, RecursionError):
        reader = InputReader()
        reader.push(arguments)
        return arguments if reader.read is None else reader.read
