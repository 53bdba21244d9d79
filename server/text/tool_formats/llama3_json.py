"""Calls as Llama 3.1 writes them, the whole answer being one, or several with semicolons between:

<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}

The tag is often missing. Without it, only an answer that begins with a call of a tool there is, is
read as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_call,
    json_calls,
    quoted,
    text_unlike,
    text_without,
)
from headstart.server.text.tool_formats.reader import CallReader, Chars
from headstart.server.text.tool_formats.schemas import Function

TAG = "<|python_tag|>"


class Llama3JsonReader(CallReader):
    first = "<{"

    def _opens(self, char: str) -> bool:
        return char == "<" or (char == "{" and not self._any_text)

    def _call(self, char: str) -> Chars[str]:
        marked = char == "<"
        if marked:
            char = yield from self._mark(char, TAG)
            char = yield from self._spaces(char)
        while True:
            char = yield from self._json_call(char, marked=marked)
            char = yield from self._spaces(char)
            if char != ";":
                return char
            char = yield from self._spaces((yield))


class Llama3Json(ToolFormat):
    name = "llama3_json"
    marks = (TAG,)
    reader_type = Llama3JsonReader

    @property
    def stands_out(self) -> bool:
        return False

    def written(self, calls: Sequence[Call]) -> str:
        return "; ".join(json_call(call, "parameters") for call in calls)

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        more = f" ({quoted('; ')} call)*" if parallel else ""
        lines = [f"calls: ({self._mark(TAG)})? call{more}", json_calls(functions, "parameters")]
        if amid_text:
            lines.append(f"TEXT: {text_unlike('{')} & {text_without(TAG)}")
        return "\n".join(lines)
