"""Calls as Phi-4-mini writes them, a list behind a mark, and Granite 3 without the closing one:

<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]<|/tool_call|>

Phi-4-mini may begin its answer with ``functools[`` instead. Granite may write the arguments as the
text of their JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_call,
    json_calls,
    quoted,
)
from headstart.server.text.tool_formats.reader import CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function

OPENS, CLOSES, BARE = "<|tool_call|>", "<|/tool_call|>", "functools"


class Phi4Reader(CallReader):
    first = "<f"

    def _opens(self, char: str) -> bool:
        return char == "<" or (char == "f" and not self._any_text)

    def _call(self, char: str) -> Chars[str]:
        mark, char = yield from self._one_of(char, (OPENS, BARE))
        if mark == OPENS:
            char = yield from self._spaces(char)
        if char == "{" and mark == OPENS:
            char = yield from self._json_call(char, marked=True)
        elif char == "[":
            char = yield from self._json_list()
        else:
            raise NoCall
        char = yield from self._spaces(char)
        return (yield from self._mark(char, CLOSES))  # or what follows is text


class Phi4(ToolFormat):
    name = "phi4"
    marks: ClassVar[tuple[str, ...]] = (OPENS, CLOSES)
    reader_type = Phi4Reader

    def written(self, calls: Sequence[Call]) -> str:
        listed = ", ".join(json_call(call, "arguments") for call in calls)
        return f"{OPENS}[{listed}]{''.join(self.marks[1:])}"

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        more = f" ({quoted(', ')} call)*" if parallel else ""
        closes = " ".join(map(self._mark, self.marks[1:]))
        return "\n".join(
            (
                f"calls: opening {quoted('[')} call{more} {quoted(']')} {closes}",
                *self._opening(OPENS, amid_text=amid_text),
                json_calls(functions, "arguments"),
            )
        )


class Granite(Phi4):
    name = "granite"
    marks = (OPENS,)
