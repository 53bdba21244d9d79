"""Calls as Mistral's models write them, up to v3 of their tokenizer and since v11:

[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, ...]
[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]...

Some write the second one without [ARGS], or with [CALL_ID] and an id before it.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_call,
    json_calls,
    json_rule,
    quoted,
)
from headstart.server.text.tool_formats.reader import NAME, CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function, arguments_schema

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def short_id() -> str:
    """A new id of a call: Mistral's templates insist on nine letters or digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class MistralReader(CallReader):
    first = "["

    def _call(self, char: str) -> Chars[str]:
        char = yield from self._mark(char, CALLS)
        char = yield from self._spaces(char)
        if char == "[":
            return (yield from self._json_list())
        if char == "{":
            return (yield from self._json_call(char, marked=True))
        return (yield from self._named(char))

    def _named(self, char: str) -> Chars[str]:
        name = ""
        while NAME.fullmatch(char):
            name += char
            char = yield
        name = self._known(name, marked=True)
        if char == "[":
            char = yield
            if char == "C":
                char = yield from self._mark(char, ID[1:])
                while char.isalnum():
                    char = yield
                char = yield from self._mark(char, ARGUMENTS)
            else:
                char = yield from self._mark(char, ARGUMENTS[1:])
        char = yield from self._spaces(char)
        if char != "{":
            raise NoCall
        self._start(name)
        yield from self._nested(char, self._argue)
        self._end()
        return (yield)


class Mistral(ToolFormat):
    name = "mistral"
    marks = (CALLS, ID, ARGUMENTS)
    reader_type = MistralReader

    def new_id(self) -> str:
        return short_id()

    def written(self, calls: Sequence[Call]) -> str:
        if ARGUMENTS in self._tokens:
            return "".join(f"{CALLS}{name}{ARGUMENTS}{arguments}" for name, arguments in calls)
        return f"{CALLS} [{', '.join(json_call(call, 'arguments') for call in calls)}]"

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        lines = self._opening(CALLS, amid_text=amid_text)
        if ARGUMENTS not in self._tokens:
            more = f" ({quoted(', ')} call)*" if parallel else ""
            listed = f"({quoted(' ')})? {quoted('[')} call{more} {quoted(']')}"
            calls = json_calls(functions, "arguments")
            return "\n".join((f"calls: opening {listed}", *lines, calls))
        more = f" ({self._mark(CALLS)} call)*" if parallel else ""
        lines += [
            f"calls: opening call{more}",
            "call: " + " | ".join(f"call{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            rule = json_rule(arguments_schema(function), strict=bool(function.get("strict")))
            name = quoted(function["name"])
            lines.append(f"call{i}: {name} {self._mark(ARGUMENTS)} arguments{i}")
            lines.append(f"arguments{i}: {rule}")
        return "\n".join(lines)
