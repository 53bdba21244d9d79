"""Calls as Gemma writes them where it is told to, Python in a fence, a list or a line each:

```tool_code
weather(city="Rome")
```
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.server.text.tool_formats.format import Call, ToolFormat, quoted
from headstart.server.text.tool_formats.pythonic import PythonicReader, call_rules, python_call
from headstart.server.text.tool_formats.reader import Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function

OPENS, CLOSES = "```tool_code", "```"


class ToolCodeReader(PythonicReader):
    first = "`"

    def _opens(self, char: str) -> bool:
        return char == "`"

    def _call(self, char: str) -> Chars[str]:
        char = yield from self._mark(char, OPENS)
        char = yield from self._spaces(char)
        listed = char == "["
        if listed:
            char = yield from self._spaces((yield))
        while True:
            char = yield from self._named(char, marked=True)
            if listed:
                if char not in (",", "]"):
                    raise NoCall
                listed = char == ","
                char = yield from self._spaces((yield))
            if char == "`":
                return (yield from self._mark(char, CLOSES))


class ToolCode(ToolFormat):
    name = "tool_code"
    marks = (OPENS,)
    reader_type = ToolCodeReader

    def written(self, calls: Sequence[Call]) -> str:
        return "\n".join((OPENS, *map(python_call, calls), CLOSES))

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        line = quoted("\n")
        more = f" ({line} call)*" if parallel else ""
        return "\n".join(
            (
                f"calls: opening {line} call{more} {line} {quoted(CLOSES)}",
                *self._opening(OPENS, amid_text=amid_text),
                *call_rules(functions),
            )
        )
