"""What chat templates are written in: jinja2, and what transformers adds to it.

    tojson(value, indent=...)     JSON as it is; jinja2's own escapes what means something in HTML
    raise_exception(message)      the template refuses the chat
    strftime_now(format)          the time, in the server's time zone
    {% break %} {% continue %}    of loops
    {% generation %} ... {% endgeneration %}    marks an answer, for training: its text as it is
    dict, namespace               without what leads from them to Python's inner objects

transformers has this as a private function, and importing it takes a second. A test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # As a macro's, what is set inside is not seen outside.
        call = self.call_method("_text", lineno=line)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        text: str = caller()
        return text


class _Dict:
    """``dict`` without its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja2's, without names that begin with an underscore. Values may be called ``self``."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *first = args
        attributes = dict(*first, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template must not store {name!r} in a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


FILTERS: Mapping[str, Any] = {"tojson": _tojson}
GLOBALS: Mapping[str, Any] = {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "dict": _Dict(),
    "namespace": _Namespace,
}


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with the above."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        self.filters.update(FILTERS)
        self.globals.update(GLOBALS)
