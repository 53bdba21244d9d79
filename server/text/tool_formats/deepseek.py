"""Calls as DeepSeek V3 and R1 write them, and as V3.1 does:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
```json
{"city": "Rome"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{...}<｜tool▁call▁end｜> ...
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_rule,
    quoted,
)
from headstart.server.text.tool_formats.reader import NAME, CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function, arguments_schema

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE, FENCE_END = "```json", "```"


class DeepSeekReader(CallReader):
    first = "<"

    def _call(self, char: str) -> Chars[str]:
        mark, char = yield from self._one_of(char, (ALL, ONE))
        if mark == ALL:
            char = yield from self._spaces(char)
            char = yield from self._mark(char, ONE)
        while True:
            char = yield from self._one(char)
            char = yield from self._spaces(char)
            char = yield from self._mark(char, ONE_END)
            self._held = [char]
            char = yield from self._spaces(char)
            mark, char = yield from self._one_of(char, (ONE, ALL_END))
            if mark == ALL_END:
                return char

    def _one(self, char: str) -> Chars[str]:
        """Read what is between the marks of one call; returns the character after it."""
        self._closing = False  # of the call before
        name, char = yield from self._name(char)
        char = yield from self._mark(char, SEPARATOR)
        char = yield from self._spaces(char)
        fenced = char != "{"
        if fenced:  # what was read is the kind of tool
            name, char = yield from self._name(char)
            char = yield from self._spaces(char)
            char = yield from self._mark(char, FENCE)
            char = yield from self._spaces(char)
        if char != "{":
            raise NoCall
        self._start(self._known(name, marked=True))
        yield from self._nested(char, self._argue)
        self._end()
        char = yield
        if fenced:
            char = yield from self._spaces(char)
            char = yield from self._mark(char, FENCE_END)
        return char

    def _name(self, char: str) -> Chars[tuple[str, str]]:
        name = ""
        while NAME.fullmatch(char):
            name += char
            char = yield
        return name, char


class DeepSeekV3(ToolFormat):
    name = "deepseek_v3"
    marks = (ALL, ALL_END, ONE, ONE_END, SEPARATOR)
    reader_type = DeepSeekReader
    between = "\n"

    def written(self, calls: Sequence[Call]) -> str:
        each = (f"{ONE}{''.join(self._pieces(*call))}{ONE_END}" for call in calls)
        return f"{ALL}{self.between.join(each)}{ALL_END}"

    def _pieces(self, name: str, arguments: str) -> tuple[str, str, str, str]:
        """What is between the marks of a call: before the separator, it, before the arguments and
        they, and after."""
        return "function", SEPARATOR, f"{name}\n{FENCE}\n{arguments}", f"\n{FENCE_END}"

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        one, end = self._mark(ONE), self._mark(ONE_END)
        between = quoted(self.between) if self.between else ""
        more = f" ({between} {one} call {end})*" if parallel else ""
        lines = [
            f"calls: opening {one} call {end}{more} {self._mark(ALL_END)}",
            *self._opening(ALL, amid_text=amid_text),
            "call: " + " | ".join(f"call{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            before, _, name, after = self._pieces(function["name"], "")
            literals = quoted(before), self._mark(SEPARATOR), quoted(name) if name else ""
            rest = quoted(after) if after else ""
            lines.append(f"call{i}: {' '.join(literals)} arguments{i} {rest}")
            rule = json_rule(arguments_schema(function), strict=bool(function.get("strict")))
            lines.append(f"arguments{i}: {rule}")
        return "\n".join(lines)


class DeepSeekV31(DeepSeekV3):
    name = "deepseek_v31"
    between = ""

    def _pieces(self, name: str, arguments: str) -> tuple[str, str, str, str]:
        return name, SEPARATOR, arguments, ""
