"""ToolFormat: how one kind of model writes calls, read and forced.

A grammar is rules for llguidance, in its variant of Lark (docs/syntax.md there), the first of which
is ``calls``. Marks that are tokens of their own are written by id, ``<[151657]>``.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from headstart.server.text.answer import Reader
from headstart.server.text.tool_formats.reader import CallReader, call_id
from headstart.server.text.tool_formats.schemas import WHITESPACE, Function, arguments_schema

Call = tuple[str, str]
"""A name, and the JSON text of the arguments."""


class ToolFormat(ABC):
    """``tokens``: those of ``marks`` that are added tokens of the vocabulary, and their ids."""

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    reader_type: ClassVar[type[CallReader]]

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens

    never: ClassVar[tuple[str, ...]] = ()
    """What the text beside calls that follow a grammar has not."""

    frames_text: ClassVar[bool] = False
    """Whether what is no call has marks, too, so that every answer has to be read."""

    def reader(self, functions: Sequence[Function]) -> Reader:
        """What reads one answer; ``functions``: the tools."""
        return self.reader_type(functions, self.new_id)

    def new_id(self) -> str:
        """An id for a call."""
        return call_id()

    @abstractmethod
    def written(self, calls: Sequence[Call]) -> str:
        """Calls as the model writes them."""

    @abstractmethod
    def grammar(
        self, functions: Sequence[Function], *, parallel: bool, amid_text: bool = False
    ) -> str:
        """Rules of what calls one of the functions, or several in a row if ``parallel``.

        ``amid_text``: text may come before the calls where a mark ends it, and there is a terminal
        ``TEXT`` of what is no call.
        """

    def _up_to(self, rule: str, terminal: str, mark: str) -> list[str]:
        """Rules: ``rule`` is any text up to a mark, and that."""
        if mark not in self._tokens:
            return [f"{rule}[suffix={quoted(mark)}]: /(.|\\n)*/"]
        without = f"{terminal}: /(.|\\n)+/ & {text_without(mark)}"
        return [f"{rule}: {terminal}? {self._mark(mark)}", without]

    @property
    def stands_out(self) -> bool:
        """Whether calls begin with a mark, so that no other structured output looks like one."""
        return True

    def _mark(self, mark: str) -> str:
        token_id = self._tokens.get(mark)
        return quoted(mark) if token_id is None else f"<[{token_id}]>"

    def _opening(self, mark: str, *, amid_text: bool) -> list[str]:
        """Rules: ``opening`` is a mark, and may be text that it ends; ``TEXT`` is text without."""
        if not amid_text:
            return [f"opening: {self._mark(mark)}"]
        text = f"TEXT: /(.|\\n)+/ & {text_without(mark, *self.never)}"
        if mark in self._tokens:
            return [f"opening: TEXT? {self._mark(mark)}", text]
        # A text that ends with something else than a token ends where that is there first.
        said = f" & {text_without(*self.never)}" if self.never else ""
        return [f"opening[suffix={quoted(mark)}]: SAID", f"SAID: /(.|\\n)*/{said}", text]


def text_without(*marks: str) -> str:
    """A regex of texts without these; a mark spelled out in other tokens would be read as one."""
    return f"~/(.|\\n)*({'|'.join(map(_escaped, marks))})(.|\\n)*/"


def text_unlike(first: str) -> str:
    """A regex of texts that begin with another character, behind space."""
    return f"/[ \\t\\r\\n]*[^ \\t\\r\\n{_escaped(first)}](.|\\n)*/"


def _escaped(mark: str) -> str:
    return re.sub(r"[][|\\/]", r"\\\g<0>", mark)


def quoted(text: str) -> str:
    """A literal of the grammar."""
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any], *, strict: bool) -> str:
    """A JSON text by its schema. What llguidance cannot enforce is an error if ``strict``."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def json_call(call: Call, key: str) -> str:
    """A call as an object, its arguments under ``key``."""
    name, arguments = call
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


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
