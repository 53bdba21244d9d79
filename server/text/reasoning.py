"""Thoughts that a model writes before its answer, between two marks.

<think>\\nThe user asks ...\\n</think>\\n\\nThe answer is ...        Qwen3
The user asks ...\\n</think>\\n\\nThe answer is ...                 DeepSeek-R1: the prompt opens
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from headstart.server.text.answer import Part, Reasoning, Text


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """What stands before and after thoughts."""

    opens: str
    closes: str


THINK: Final = ThoughtMarks("<think>", "</think>")


class _At(Enum):
    START = auto()
    THOUGHT = auto()
    ANSWER = auto()


class ThoughtReader:
    """Parts thoughts from the answer that follows them.

    Space between a mark and what it parts is the mark's. Marks after the answer has begun are text.
    ``inside``: the prompt has opened the thoughts (a second opening mark is left out).
    """

    __slots__ = ("_at", "_held", "_inside", "_marks", "_strip")

    def __init__(self, marks: ThoughtMarks, *, inside: bool) -> None:
        self._marks = marks
        self._inside = inside
        self._at = _At.START
        self._held = ""
        self._strip = inside  # space that comes next belongs to a mark

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        parts: list[Part] = []
        if self._at is _At.START:
            self._begin()
        if self._at is _At.THOUGHT:
            parts += self._think()
        if self._at is _At.ANSWER and (text := self._stripped()):
            parts.append(Text(text))
            self._held = ""
        return parts

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        held, self._held = self._stripped(), ""
        if not held:
            return []
        thinks = self._at is _At.THOUGHT or (self._at is _At.START and self._inside)
        return [Reasoning(held) if thinks else Text(held)]

    def _begin(self) -> None:
        opens, text = self._marks.opens, self._held.lstrip()
        if text.startswith(opens):
            self._held, self._at, self._strip = text[len(opens) :], _At.THOUGHT, True
        elif not opens.startswith(text):
            self._at = _At.THOUGHT if self._inside else _At.ANSWER

    def _think(self) -> list[Part]:
        text, closes = self._stripped(), self._marks.closes
        end = text.find(closes)
        if end >= 0:
            thought = text[:end].rstrip()
            self._held, self._at, self._strip = text[end + len(closes) :], _At.ANSWER, True
        else:
            thought = text[: _cut_before(text, closes)].rstrip()
            self._held = text[len(thought) :]
        return [Reasoning(thought)] if thought else []

    def _stripped(self) -> str:
        """What is held, without the space of a mark before it."""
        text = self._held.lstrip() if self._strip else self._held
        self._strip = self._strip and not text
        return text


def _cut_before(text: str, mark: str) -> int:
    """Where the longest end of ``text`` starts that ``mark`` may begin with."""
    for start in range(max(0, len(text) - len(mark) + 1), len(text)):
        if mark.startswith(text[start:]):
            return start
    return len(text)
