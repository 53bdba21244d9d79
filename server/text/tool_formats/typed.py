"""What formats share that write each argument between marks, as XML does.

Texts stand there as they are, other values as JSON; which it is, the function's schema says. The
arguments become JSON as they grow.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from headstart.engine.errors import RequestError
from headstart.server.text.tool_formats.format import ToolFormat, json_rule, quoted
from headstart.server.text.tool_formats.reader import CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function, arguments_schema, kind, kinds

MAX_KEY = 256
_LITERALS = {"True": "true", "False": "false", "None": "null"}  # Python's, which models mix in
_OF_TEXTS = ("pattern", "format", "minLength", "maxLength")


class TypedReader(CallReader):
    """``_arguments`` between ``_begin`` and the end of a call."""

    _schema: Mapping[str, Any]
    _keys: set[str]

    @abstractmethod
    def _each_argument(self, char: str) -> Chars[str]:
        """Read the arguments and what closes the call; returns the character after it."""

    def _typed_call(self, name: str, char: str) -> Chars[str]:
        """Read a call behind its name; returns the character after it."""
        self._closing = False  # of the call before
        self._schema = arguments_schema(self._functions.get(name, {}))
        self._keys = set()
        self._start(name)
        self._argue("{")
        self._held = [char]
        try:
            char = yield from self._each_argument(char)
        except NoCall:
            held = self._held.copy()
            if self._last:
                self._argue("}")
                self._end()
            # What was cut short has no end, and is no text.
            self._held = held if self._last else []
            raise
        self._argue("}")
        self._end()
        self._held = [char]
        return char

    def _argument(self, char: str, key: str, closes: str, *, lines: bool) -> Chars[str]:
        """Read a value and the mark behind it; returns the character after that.

        ``lines``: a line end on either side of the value is not part of it.
        """
        again = key in self._keys
        head = f"{', ' if self._keys else ''}{json.dumps(key, ensure_ascii=False)}: "
        allowed = self._kinds(key)
        self._keys.add(key)
        if again:  # JSON has each key once
            return (yield from self._until(char, closes, lambda _: None, lines=lines))
        if allowed == {"string"}:
            self._argue(f'{head}"')
            char = yield from self._until(char, closes, self._argue_text, lines=lines)
            self._argue('"')
            self._held = [char]
            return char
        written: list[str] = []
        char = yield from self._until(char, closes, written.append, lines=lines)
        self._argue(head + json_value("".join(written), allowed))
        self._held = [char]
        return char

    def _argue_text(self, text: str) -> None:
        self._argue(json.dumps(text, ensure_ascii=False)[1:-1])

    def _kinds(self, key: str) -> set[str]:
        properties, others = (
            self._schema.get(name) for name in ("properties", "additionalProperties")
        )
        if isinstance(properties, Mapping) and key in properties:
            return kinds(properties[key], self._schema)
        return kinds(others, self._schema) or {"string"}

    def _until(
        self, char: str, closes: str, each: Callable[[str], None], *, lines: bool
    ) -> Chars[str]:
        """Read up to a mark, calling ``each`` with the characters before it; returns the character
        after it."""
        marks = (closes, "\n" + closes) if lines else (closes,)
        if lines and char == "\n":
            char = yield
        held = ""  # what a mark may begin with
        while True:
            if not char:
                raise NoCall
            held += char
            while held and not any(mark.startswith(held) for mark in marks):
                each(held[0])
                held = held[1:]
            char = yield
            if held in marks:
                return char

    def _key(self, char: str, closes: str) -> Chars[tuple[str, str]]:
        """Read the name of an argument and the mark behind it; returns it, and the character after
        the mark."""
        key = ""
        while char and char not in "<>\n" and len(key) < MAX_KEY:
            key += char
            char = yield
        char = yield from self._mark(char, closes)
        if not key.strip():
            raise NoCall
        return key.strip(), char


def json_value(text: str, allowed: set[str]) -> str:
    """What a model wrote for a value of these types, or of any, as JSON: a text if nothing else."""
    written = text.strip()
    written = _LITERALS.get(written, written)
    try:
        found = kind(json.loads(written, parse_constant=_no_number))
    except (ValueError, RecursionError):
        found = "string"
    else:
        if "string" not in allowed and (allowed or found != "string"):
            return written
        if found in allowed - {"string"} or (found == "integer" and "number" in allowed):
            return written
    return json.dumps(text, ensure_ascii=False)


def _no_number(name: str) -> Any:
    raise ValueError(name)


def plain_value(value: Any) -> str:
    """A value as it is written: the inverse."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class TypedFormat(ToolFormat):
    """``closes``: the mark behind a value. ``line``: what stands on either side of a value;
    ``after``: what stands behind the mark."""

    closes: ClassVar[str]
    line: ClassVar[str] = ""
    after: ClassVar[str] = ""

    @abstractmethod
    def _opens_value(self, key: str) -> str:
        """The part of a rule that stands before the value of an argument."""

    def _typed_calls(self, functions: Sequence[Function], opens: str, closes: str) -> str:
        """Rules: ``call`` is the name of a function between two literals, and its arguments in
        order, optional ones or not."""
        lines = ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
        for i, function in enumerate(functions):
            schema = arguments_schema(function)
            required = schema.get("required") or ()
            parts = [quoted(f"{opens}{function['name']}{closes}")]
            for j, (key, value) in enumerate((schema.get("properties") or {}).items()):
                parts.append(f"argument{i}_{j}{'' if key in required else '?'}")
                after = quoted(self.after) if self.after else ""
                lines.append(f"argument{i}_{j}: {self._opens_value(key)} value{i}_{j} {after}")
                lines += self._value(f"value{i}_{j}", key, value, schema, function)
            lines.append(f"call{i}: {' '.join(parts)}")
        return "\n".join((*lines, *self._up_to("text", "VALUE", self.closes)))

    def _value(
        self, rule: str, key: str, schema: Any, root: Mapping[str, Any], function: Function
    ) -> list[str]:
        """Rules of a value and the mark behind it."""
        line = quoted(self.line) if self.line else ""
        closes = f"{line} {self._mark(self.closes)}"
        allowed = kinds(schema, root)
        strict = bool(function.get("strict"))
        if allowed and "string" not in allowed:
            shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
            as_json = json_rule(schema | shared, strict=strict)
            return [f"{rule}: {line} {rule}_json {closes}", f"{rule}_json: {as_json}"]
        said = schema if isinstance(schema, Mapping) else {}
        texts = [said["const"]] if "const" in said else said.get("enum")
        if texts:
            each = " | ".join(quoted(self.line + plain_value(text)) for text in texts)
            return [f"{rule}: ({each}) {closes}"]
        limit = next((name for name in _OF_TEXTS if name in said), None)
        if strict and limit is not None:
            raise RequestError(
                f"tools: the keyword '{function['name']}.properties.{key}.{limit}' cannot be "
                "followed: this model writes texts in calls as they are",
                "tools",
            )
        return [f"{rule}: {line} text"]
