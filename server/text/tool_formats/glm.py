"""Calls as GLM 4.5 and later write them, each argument between marks:

<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Rome</arg_value>
</tool_call>

GLM 4.7 leaves out the line ends. Only a tool that there is can be called.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from headstart.server.text.tool_formats.format import Call, quoted
from headstart.server.text.tool_formats.reader import NAME, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function
from headstart.server.text.tool_formats.typed import TypedFormat, TypedReader, plain_value

OPENS, CLOSES = "<tool_call>", "</tool_call>"
KEY, KEY_ENDS = "<arg_key>", "</arg_key>"
VALUE, VALUE_ENDS = "<arg_value>", "</arg_value>"


class GlmReader(TypedReader):
    first = "<"

    def _call(self, char: str) -> Chars[str]:
        char = yield from self._mark(char, OPENS)
        char = yield from self._spaces(char)
        name = ""
        while NAME.fullmatch(char):
            name += char
            char = yield
        char = yield from self._spaces(char)
        if char != "<":
            raise NoCall
        return (yield from self._typed_call(self._known(name, marked=False), char))

    def _each_argument(self, char: str) -> Chars[str]:
        while True:
            char = yield from self._spaces(char)
            mark, char = yield from self._one_of(char, (KEY, CLOSES))
            if mark == CLOSES:
                return char
            key, char = yield from self._key(char, KEY_ENDS)
            char = yield from self._spaces(char)
            char = yield from self._mark(char, VALUE)
            char = yield from self._argument(char, key, VALUE_ENDS, lines=False)


class Glm(TypedFormat):
    name = "glm"
    marks = (OPENS, CLOSES, KEY, KEY_ENDS, VALUE, VALUE_ENDS)
    reader_type = GlmReader
    closes = VALUE_ENDS
    after = "\n"

    def written(self, calls: Sequence[Call]) -> str:
        return "\n".join(map(_written, calls))

    def _opens_value(self, key: str) -> str:
        marks = self._mark(KEY), quoted(key), self._mark(KEY_ENDS), quoted("\n"), self._mark(VALUE)
        return " ".join(marks)

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        opens, closes = self._mark(OPENS), self._mark(CLOSES)
        more = f" ({quoted(chr(10))} {opens} call {closes})*" if parallel else ""
        return "\n".join(
            (
                f"calls: opening call {closes}{more}",
                *self._opening(OPENS, amid_text=amid_text),
                self._typed_calls(functions, "", "\n"),
            )
        )


def _written(call: Call) -> str:
    name, arguments = call
    pairs = json.loads(arguments).items()
    values = (
        f"{KEY}{key}{KEY_ENDS}\n{VALUE}{plain_value(value)}{VALUE_ENDS}\n" for key, value in pairs
    )
    return f"{OPENS}{name}\n{''.join(values)}{CLOSES}"
