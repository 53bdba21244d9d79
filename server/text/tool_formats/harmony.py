"""Answers as gpt-oss writes them, messages on channels, of which one may be a call:

<|channel|>analysis<|message|>The user asks ...<|end|><|start|>assistant
<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>

(without the line end). ``analysis`` is reasoning, ``commentary`` and ``final`` are text. The prompt
ends with <|start|>assistant, and what ends the answer, <|call|> or <|return|>, ends generation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from headstart.server.text.answer import (
    Part,
    Reader,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_rule,
    quoted,
)
from headstart.server.text.tool_formats.reader import NoCall, object_text
from headstart.server.text.tool_formats.schemas import Function, arguments_schema

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)
MAX_HEADER = 1024
_MARK = re.compile("|".join(map(re.escape, MARKS)))
_RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_-]+)")


class HarmonyReader:
    """Tells the channels apart. Text without any mark is text."""

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        self._names = names
        self._new_id = new_id
        self._held = ""  # what a mark may begin with
        self._header: str | None = ""  # of the message that comes; None amid one
        self._marked = False
        self._thinks = False
        self._arguments: list[str] | None = None  # of a call that is open
        self._num_calls = 0
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        self._held += text
        at = 0
        for found in _MARK.finditer(self._held):
            self._read(self._held[at : found.start()])
            self._turn(found[0])
            at = found.end()
        rest = self._held[at:]
        cut = _may_begin_mark(rest)
        self._read(rest[:cut])
        self._held = rest[cut:]
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        self._read(self._held)
        self._held = ""
        if self._header is not None and not self._marked:
            self._say(Text(self._header))
        self._close()
        return self._taken()

    def _read(self, text: str) -> None:
        if not text:
            return
        if self._arguments is not None:
            self._arguments.append(text)
            self._parts.append(ToolCallArguments(self._num_calls - 1, text))
        elif self._header is None:
            self._say(Reasoning(text) if self._thinks else Text(text))
        elif self._marked:
            self._header = (self._header + text)[:MAX_HEADER]
        else:
            self._header += text
            begun = self._header.lstrip()
            if not begun.startswith("to=") and not "to=".startswith(begun):
                self._say(Text(self._header))
                self._header = None

    def _turn(self, mark: str) -> None:
        self._marked = True
        if self._header is None:
            self._close()
        self._header = self._header or ""
        if mark == MESSAGE:
            self._begin(self._header)
        else:
            self._header = f"{self._header} " if mark in (CHANNEL, CONSTRAIN) else ""

    def _begin(self, header: str) -> None:
        self._header = None
        found = _RECIPIENT.search(header)
        self._thinks = "analysis" in header.split()
        if found and found[1] in self._names:
            self._parts.append(ToolCallStart(self._num_calls, self._new_id(), found[1]))
            self._num_calls += 1
            self._arguments = []

    def _close(self) -> None:
        """End the message, and the call that it is if nothing of that is missing."""
        if self._arguments is None:
            return
        text, self._arguments = "".join(self._arguments), None
        try:
            object_text(text)
        except NoCall:
            return
        self._parts.append(ToolCallEnd(self._num_calls - 1))

    def _say(self, part: Text | Reasoning) -> None:
        if part.text:
            self._parts.append(part)

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


def _may_begin_mark(text: str) -> int:
    """Where the longest end of ``text`` is that a mark may begin with."""
    for start in range(max(0, len(text) - max(map(len, MARKS)) + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in MARKS):
            return start
    return len(text)


class Harmony(ToolFormat):
    """One call ends the answer, so there are never several."""

    name = "harmony"
    marks = MARKS
    frames_text = True

    def reader(self, functions: Sequence[Function]) -> Reader:
        return HarmonyReader([function["name"] for function in functions], self.new_id)

    def written(self, calls: Sequence[Call]) -> str:
        return f"{START}assistant".join(
            f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}"
            for name, arguments in calls
        )

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        channel, message = self._mark(CHANNEL), self._mark(MESSAGE)
        analysis, *others = (quoted(name) for name in ("analysis", "commentary", "final"))
        said = f"({' | '.join((analysis, *others))})" if amid_text else analysis
        last = f"{channel} ({' | '.join(others)}) {message} /(.|\\n)*/"
        lines = [
            f"calls: said* ({channel} call | {last})"
            if amid_text
            else f"calls: said? {channel} call",
            f"said: {channel} {said} {message} words {self._mark(START)} {quoted('assistant')}",
            *self._up_to("words", "WORDS", END),
            "call: " + " | ".join(f"call{i}" for i in range(len(functions))),
        ]
        if amid_text:
            lines.append("TEXT: /(.|\\n)+/")
        for i, function in enumerate(functions):
            rule = json_rule(arguments_schema(function), strict=bool(function.get("strict")))
            head = quoted(f"commentary to=functions.{function['name']} ")
            json_mark = f"{self._mark(CONSTRAIN)} {quoted('json')} {message}"
            lines += [f"call{i}: {head} {json_mark} arguments{i}", f"arguments{i}: {rule}"]
        return "\n".join(lines)
