"""Calls as Hermes, Qwen2.5 and Qwen3 write them:

<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_call,
    json_calls,
    quoted,
)
from headstart.server.text.tool_formats.reader import CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function

OPENS, CLOSES = "<tool_call>", "</tool_call>"


class HermesReader(CallReader):
    first = "<"

    def _call(self, char: str) -> Chars[str]:
        char = yield from self._mark(char, OPENS)
        char = yield from self._spaces(char)
        before = self.num_calls
        try:
            char = yield from self._json_call(char, marked=True)
        except NoCall:
            if self.num_calls == before:
                raise
            char = self._last  # small models forget the last bracket
        char = yield from self._spaces(char)
        return (yield from self._mark(char, CLOSES))


class Hermes(ToolFormat):
    name = "hermes"
    marks = (OPENS, CLOSES)
    reader_type = HermesReader
    never = ("<tool_r",)  # small models make up <tool_response> in place of a call

    def written(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{OPENS}\n{json_call(call, 'arguments')}\n{CLOSES}" for call in calls)

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        opens, closes, line = self._mark(OPENS), self._mark(CLOSES), quoted("\n")
        more = f" ({line} {opens} rest)*" if parallel else ""
        return "\n".join(
            (
                f"calls: opening rest{more}",
                f"rest: {line} call {line} {closes}",
                *self._opening(OPENS, amid_text=amid_text),
                json_calls(functions, "arguments"),
            )
        )
