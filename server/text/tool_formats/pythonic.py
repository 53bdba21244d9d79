"""Calls as Llama 3.2 and Llama 4 write them, a list of Python's:

[weather(city="Rome"), clock()]

Llama 4 may put <|python_start|> and <|python_end|> around it. Without them, only an answer that
begins with a call of a tool there is, is read as one. Arguments are literals; they become JSON when
the call is complete, which is when it begins, too: before, it may still turn out to be none.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from headstart.server.text.tool_formats.format import (
    Call,
    ToolFormat,
    json_rule,
    quoted,
    text_unlike,
    text_without,
)
from headstart.server.text.tool_formats.reader import NAME, CallReader, Chars, NoCall
from headstart.server.text.tool_formats.schemas import Function, arguments_schema

OPENS, CLOSES = "<|python_start|>", "<|python_end|>"
MAX_DEPTH = 64
_KEY = re.compile(r"""[^\s=,:;()\[\]{}"'#\\]+""")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": "true", "false": "false", "null": "null"}  # as in JSON, which models mix in


class PythonicReader(CallReader):
    first = "<["

    def _opens(self, char: str) -> bool:
        return char == "<" or (char == "[" and not self._any_text)

    def _call(self, char: str) -> Chars[str]:
        marked = char == "<"
        if marked:
            char = yield from self._mark(char, OPENS)
            char = yield from self._spaces(char)
        if char != "[":
            raise NoCall
        char = yield from self._spaces((yield))
        while True:
            char = yield from self._named(char, marked=marked)
            if char == ",":
                char = yield from self._spaces((yield))
            elif char != "]":
                raise NoCall
            if char == "]":
                char = yield
                break
        if marked:
            char = yield from self._spaces(char)
            char = yield from self._mark(char, CLOSES)
        return char

    def _named(self, char: str, *, marked: bool) -> Chars[str]:
        """Read one call; returns what comes after it and after space."""
        name = ""
        while NAME.fullmatch(char):
            self._closing = False  # of the call before
            name += char
            char = yield
        if char != "(":
            raise NoCall
        name = self._known(name, marked=marked)
        self._whole(name, json_arguments((yield from self._pieces())))
        return (yield from self._spaces((yield)))

    def _pieces(self) -> Chars[list[str]]:
        """Read up to the bracket that closes a call; returns what is between the commas."""
        pieces: list[list[str]] = [[]]
        depth, quote, escaped = 1, "", False
        while True:
            char = yield
            if not char:
                raise NoCall
            if quote:
                if char == quote and not escaped:
                    quote = ""
                escaped = char == "\\" and not escaped
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise NoCall
            elif char in ")]}":
                depth -= 1
                if not depth:
                    return ["".join(piece) for piece in pieces]
            elif char == "," and depth == 1:
                pieces.append([])
                continue
            pieces[-1].append(char)


def json_arguments(pieces: Sequence[str]) -> str:
    """``["a=1", " b='x'"]`` as a JSON object; raises NoCall for what is no literal by name."""
    found: dict[str, str] = {}
    for i, piece in enumerate(pieces):
        if not piece.strip() and i == len(pieces) - 1:
            continue  # no arguments, or a comma behind the last
        key, _, value = piece.partition("=")
        key = key.strip()
        if not _KEY.fullmatch(key) or key in found:
            raise NoCall
        found[key] = _json_of(value.strip())
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in found.items())
    return "{" + ", ".join(pairs) + "}"


def python_call(call: Call) -> str:
    """A call as Python's."""
    name, arguments = call
    pairs = json.loads(arguments).items()
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in pairs)})"


def _json_of(source: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\d", which Python takes as it is, too
            node = ast.parse(source, mode="eval").body
        return _literal(node, source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoCall from None


def _literal(node: ast.expr, source: str) -> str:
    """The JSON of a literal; raises ValueError for everything else."""
    match node:
        case ast.Constant(value=bool() | None as value):
            return json.dumps(value)
        case ast.Constant(value=str(text)):
            # Python's \ud83d\ude00 are two halves of a character, JSON's are one.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16")
            return json.dumps(whole, ensure_ascii=False)
        case ast.Constant(value=int() | float() as value):
            written = ast.get_source_segment(source, node) or ""
            if _JSON_NUMBER.fullmatch(written):
                return written
            return json.dumps(value, allow_nan=False)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if (
            not isinstance(value, bool)
        ):
            return "-" + _literal(node.operand, source)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return "[" + ", ".join(_literal(item, source) for item in items) + "]"
        case ast.Dict(keys=keys, values=values):
            pairs = []
            for key, item in zip(keys, values, strict=True):
                if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                    raise ValueError("a key that is no text")
                pairs.append(f"{_literal(key, source)}: {_literal(item, source)}")
            return "{" + ", ".join(pairs) + "}"
    raise ValueError("no literal")


class Pythonic(ToolFormat):
    """The grammar writes values as JSON, which are Python's but for true, false and null; of a
    function's schema it knows ``properties``, ``required`` and ``$defs``. Text does not begin with
    a bracket beside it."""

    name = "pythonic"
    marks = (OPENS, CLOSES)
    reader_type = PythonicReader

    def written(self, calls: Sequence[Call]) -> str:
        return f"[{', '.join(map(python_call, calls))}]"

    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        more = f" ({quoted(', ')} call)*" if parallel else ""
        lines = [f"calls: {quoted('[')} call{more} {quoted(']')}", *call_rules(functions)]
        if amid_text:
            lines.append(f"TEXT: {text_unlike('[')} & {text_without(OPENS)}")
        return "\n".join(lines)


def call_rules(functions: Sequence[Function]) -> list[str]:
    """Rules: ``call`` is the call of one of the functions, in Python."""
    lines = ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        lines += _call_rules(i, function)
    return lines


def _call_rules(i: int, function: Function) -> list[str]:
    """Rules for the call of a function: its arguments in order, optional ones or not.

    ``first<j>`` are those from j on if there was none before, ``more<j>`` if there was.
    """
    schema = arguments_schema(function)
    properties: dict[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or ()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    lines = [f"call{i}: {quoted(function['name'] + '(')} first{i}_0 {quoted(')')}"]
    for j, (key, value) in enumerate(properties.items()):
        schema_of = (value if isinstance(value, dict) else {}) | shared
        rule = json_rule(schema_of, strict=bool(function.get("strict")))
        lines.append(f"argument{i}_{j}: {quoted(key + '=')} value{i}_{j}")
        lines.append(f"value{i}_{j}: {rule}")
        given = f"argument{i}_{j} more{i}_{j + 1}"
        without = "" if key in required else f" | first{i}_{j + 1}"
        lines.append(f"first{i}_{j}: {given}{without}")
        without = "" if key in required else f" | more{i}_{j + 1}"
        lines.append(f"more{i}_{j}: {quoted(', ')} {given}{without}")
    last = len(properties)
    return [*lines, f'first{i}_{last}: ""', f'more{i}_{last}: ""']
