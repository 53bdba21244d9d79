"""The parts of an answer: text, thoughts and calls of tools, told apart as the text grows.

    text -> ThoughtReader -> CallReader -> Text, Reasoning, ToolCallStart, ToolCallArguments, ...

How the text is cut into pieces never changes the parts but for where texts are cut in two: those of
``push`` and ``finish``, joined, are those of the whole text. Knows nothing of any API's JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """What the answer says."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; calls are counted from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the JSON text of a call's arguments, as the model writes it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is complete; one that was cut short has no end."""

    index: int


Part = Text | Reasoning | ToolCallStart | ToolCallArguments | ToolCallEnd


class Reader(Protocol):
    """Reads growing text."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""


class AnswerParser:
    """Reads one answer: first its thoughts, then, of what is text, calls.

    ``thoughts`` and ``calls``: None where there are none to be read. ``only_first``: the answer
    ends with its first call. ``calls_tools``: a call has begun. ``done``: it has ended, and nothing
    more is to be pushed.
    """

    __slots__ = ("_calls", "_only_first", "_thoughts", "calls_tools", "done")

    def __init__(
        self, thoughts: Reader | None, calls: Reader | None, *, only_first: bool = False
    ) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._only_first = only_first
        self.calls_tools = False
        self.done = False

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        return self._noted(
            self._read(self._thoughts.push(text) if self._thoughts else [Text(text)])
        )

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        parts = self._read(self._thoughts.finish() if self._thoughts else [])
        return self._noted(parts + (self._calls.finish() if self._calls else []))

    def _read(self, parts: Iterable[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            if self._calls is not None and isinstance(part, Text):
                found += self._calls.push(part.text)
            elif not isinstance(part, Text) or part.text:
                found.append(part)
        return found

    def _noted(self, parts: list[Part]) -> list[Part]:
        for i, part in enumerate(parts):
            if isinstance(part, ToolCallStart):
                self.calls_tools = True
            elif isinstance(part, ToolCallEnd) and self._only_first:
                self.done = True
                return parts[: i + 1]
        return parts
