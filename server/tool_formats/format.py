"""ToolFormat: how one kind of model writes calls, read and forced.

A grammar is rules for llguidance, in its variant of Lark (docs/syntax.md there), the first of which
is ``calls``. Marks that are tokens of their own are written by id, ``<[151657]>``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from headstart.server.structure import WHITESPACE
from headstart.server.tool_formats.reader import CallReader, call_id

Function = dict[str, Any]
"""``name``, maybe ``parameters``, a JSON schema of an object, and ``strict``."""


class ToolFormat(ABC):
    """``tokens``: those of ``marks`` that are added tokens of the vocabulary, and their ids."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    reader_type: ClassVar[type[CallReader]]

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens

    def reader(self, names: Collection[str]) -> CallReader:
        """What reads one answer; ``names`` are those of the tools."""
        return self.reader_type(names, self.new_id)

    def new_id(self) -> str:
        """An id for a call."""
        return call_id()

    @abstractmethod
    def grammar(self, functions: Sequence[Function], *, parallel: bool) -> str:
        """Rules of what calls one of the functions, or several in a row if ``parallel``."""

    def _mark(self, mark: str) -> str:
        token_id = self._tokens.get(mark)
        return quoted(mark) if token_id is None else f"<[{token_id}]>"


def quoted(text: str) -> str:
    """A literal of the grammar."""
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any], *, strict: bool) -> str:
    """A JSON text by its schema. What llguidance cannot enforce is an error if ``strict``."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments; without one it takes none."""
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"additionalProperties": False}
    return {"type": "object"} | parameters


def json_calls(functions: Sequence[Function], key: str) -> str:
    """Rules: ``call`` is an object with the name and the arguments, under ``key``, of one of the
    functions."""
    lines = ["call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
        arguments = json_rule(arguments_schema(function), strict=bool(function.get("strict")))
        lines.append(f"call{i}: {quoted(head)} arguments{i} {quoted('}')}")
        lines.append(f"arguments{i}: {arguments}")
    return "\n".join(lines)
