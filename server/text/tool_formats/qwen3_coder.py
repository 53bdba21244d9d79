"""Calls as Qwen3-Coder writes them, each argument between marks:

<tool_call>
<function=weather>
<parameter=city>
Rome
</parameter>
</function>
</tool_call>

The outer mark may be missing where there is a tool of that name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from headstart.server.text.tool_formats.format import Call, quoted
from headstart.server.text.tool_formats.reader import NAME, Chars
from headstart.server.text.tool_formats.schemas import Function
from headstart.server.text.tool_formats.typed import TypedFormat, TypedReader, plain_value

OPENS, CLOSES = "<tool_call>", "</tool_call>"
FUNCTION, ENDS = "<function=", "</function>"
ARGUMENT, VALUE_ENDS = "<parameter=", "</parameter>"


class Qwen3CoderReader(TypedReader):
    first = "<"

    def _call(self, char: str) -> Chars[str]:
        mark, char = yield from self._one_of(char, (OPENS, FUNCTION))
        marked = mark == OPENS
        if marked:
            char = yield from self._spaces(char)
            char = yield from self._mark(char, FUNCTION)
        while True:
            name = ""
            while NAME.fullmatch(char):
                name += char
                char = yield
            char = yield from self._mark(char, ">")
            char = yield from self._typed_call(self._known(name, marked=marked), char)
            char = yield from self._spaces(char)
            mark, char = yield from self._one_of(char, (CLOSES, FUNCTION))
            if mark == CLOSES:
                return char

    def _each_argument(self, char: str) -> Chars[str]:
        while True:
            char = yield from self._spaces(char)
            mark, char = yield from self._one_of(char, (ARGUMENT, ENDS))
            if mark == ENDS:
                return char
            key, char = yield from self._key(char, ">")
            char = yield from self._argument(char, key, VALUE_ENDS, lines=True)


class Qwen3Coder(TypedFormat):
    name = "qwen3_coder"
    marks = (OPENS, CLOSES)
    reader_type = Qwen3CoderReader
    closes = VALUE_ENDS
    line = after = "\n"

    def written(self, calls: Sequence[Call]) -> str:
        return "\n".join(f"{OPENS}\n{_written(call)}{ENDS}\n{CLOSES}" for call in calls)

    def _opens_value(self, key: str) -> str:
        return quoted(f"{ARGUMENT}{key}>")

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        opens, closes, line = self._mark(OPENS), self._mark(CLOSES), quoted("\n")
        more = f" ({line} {opens} rest)*" if parallel else ""
        return "\n".join(
            (
                f"calls: opening rest{more}",
                f"rest: {line} call {quoted(ENDS)} {line} {closes}",
                *self._opening(OPENS, amid_text=amid_text),
                self._typed_calls(functions, FUNCTION, ">\n"),
            )
        )


def _written(call: Call) -> str:
    name, arguments = call
    pairs = json.loads(arguments).items()
    values = (f"{ARGUMENT}{key}>\n{plain_value(value)}\n{VALUE_ENDS}\n" for key, value in pairs)
    return f"{FUNCTION}{name}>\n{''.join(values)}"
