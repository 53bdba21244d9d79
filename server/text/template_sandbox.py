"""Chat templates run within limits: of time, of size, and of what a single operation may make.

Templates are programs that come with models, and what users write goes through them. They run in
jinja2's sandbox (template_language.py), which has no limits beside that of ``range``. So this one
adds them where a template spends its time and memory:

    loops, calls, filters     look at the clock, in every round
    + * ** % ~                refuse what would be too large before it is made
    filters, methods of text  take no huge number, and join, replace, ... no huge result
    output, macros, blocks    are counted while they are put together

One operation on texts that are within the limit is never interrupted; it takes milliseconds.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE
from jinja2.visitor import NodeTransformer

from headstart.engine.errors import RequestError
from headstart.server.text.template_language import TemplateEnvironment

MAX_BITS = 4096
"""Of a number that is multiplied or raised to a power: such operations hold the GIL."""

_WIDTH = re.compile(r"[%{][^%{}a-zA-Z]*(\d{5}|\*)")
"""A width of five digits or more in a format, or one that is an argument."""

_COUNTING = frozenset(
    ("batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap")
)
"""Filters whose numbers say how much of something they make."""


class TemplateLimitError(RequestError):
    """A template took too long, or made too much of a chat."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the model's chat template {what}", "messages")


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """seconds: of one request's renderings. chars: of a rendering, and of any value on the way."""

    seconds: float = 5.0
    chars: int = 4 * 1024 * 1024


class _Paced(NodeTransformer):
    """Has every round of a loop look at the clock, and ``~`` go through ``text_sum``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._statement(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("text_sum", node.nodes, node)

    def _statement(self, at: nodes.Node) -> nodes.Node:
        return nodes.ExprStmt(self._call("pace", [], at), lineno=at.lineno)

    def _call(self, method: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Expr:
        function = nodes.EnvironmentAttribute(method, lineno=at.lineno)
        call = nodes.Call(function, args, [], None, None, lineno=at.lineno)
        return call.set_environment(at.environment)  # type: ignore[return-value, arg-type]


class LimitedEnvironment(TemplateEnvironment):
    """Templates' language with limits; render within ``running``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: TemplateLimits) -> None:
        super().__init__()
        self._limits = limits
        self._run = threading.local()
        self.pace = self._pace  # one object, to be told from others
        self.filters.update(
            {name: self._bounded(name, filter_) for name, filter_ in self.filters.items()}
        )
        self.concat = self._concat  # type: ignore[method-assign]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Renderings in this thread have the time limit, all of them together."""
        self._run.deadline = time.monotonic() + self._limits.seconds
        try:
            yield
        finally:
            del self._run.deadline

    # ---------------------------------------------------------------- time

    def _pace(self) -> str:
        """Raise TemplateLimitError when the time is over."""
        deadline = getattr(self._run, "deadline", None)
        if deadline is not None and time.monotonic() > deadline:
            raise TemplateLimitError(f"took longer than {self._limits.seconds:g} s")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        return _Paced().visit(parsed)  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- size

    def _fits(self, size: int) -> None:
        if size > self._limits.chars:
            raise TemplateLimitError(f"makes more than {self._limits.chars} characters of it")

    def _concat(self, pieces: Iterable[str]) -> str:
        size, most = 0, self._limits.chars
        kept: list[str] = []
        for piece in pieces:
            size += len(piece)
            if size > most:
                self._fits(size)
            kept.append(piece)
        return "".join(kept)

    def text_sum(self, *values: Any) -> str:
        """What ``~`` makes of them."""
        return self._concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if type(left) is type(right) is str:  # nearly always
                self._fits(len(left) + len(right))
            case "+" if isinstance(left, Sized) and isinstance(right, Sized):
                self._fits(len(left) + len(right))
            case "*" | "**" if isinstance(left, int) and isinstance(right, int):
                times = abs(right) if operator == "**" else 1
                if max(left.bit_length() * times, right.bit_length()) > MAX_BITS:
                    raise TemplateLimitError("computes too large a number")
            case "*" if isinstance(left, Sized) and isinstance(right, int):
                self._fits(len(left) * right)
            case "*" if isinstance(left, int) and isinstance(right, Sized):
                self._fits(left * len(right))
            case "%" if isinstance(left, str):
                self._check_format(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._check_format(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are the base class's: a template's arguments may be called self and context.
        if __obj is __self.pace:
            return __obj()
        __self.pace()
        owner = getattr(__obj, "__self__", None)
        # Not macros, nor methods of containers: they hand on what they are given.
        if isinstance(owner, str | bytes | int) or isinstance(__obj, FunctionType):
            __self._check_numbers(args, kwargs)
        if isinstance(owner, str | bytes):
            args = __self._checked(__obj.__name__, owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def _bounded(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(filter_, "jinja_pass_arg") else 0  # what jinja passes comes first

        @wraps(filter_)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.pace()
            if name in _COUNTING:
                self._check_numbers(args[first + 1 :], kwargs)
            if name in ("join", "replace", "format", "indent"):
                value, rest = args[first], (*args[first + 1 :], *kwargs.values())
                if name == "join" and rest:
                    value = list(value)
                    args = (*args[:first], value, *args[first + 1 :])
                    self._fits(len(value) * _size(rest[0]))
                elif name != "join":
                    self._checked(name, str(value), rest)
            return filter_(*args, **kwargs)

        return bounded

    def _checked(self, name: str, owner: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a method of text ``owner``, which may not make too much of it."""
        if name == "join" and args:
            args = (list(args[0]), *args[1:])
            self._fits(len(args[0]) * len(owner))
        elif name == "replace" and len(args) > 1 and type(args[0]) is type(owner):
            self._fits(owner.count(args[0]) * _size(args[1]))
        elif name in ("expandtabs", "indent"):
            lines = max(owner.count(char) for char in "\t\n") if isinstance(owner, str) else 1
            self._fits((lines + 1) * _size(args[0] if args else 8))
        elif name == "format":
            self._check_format(owner)
        return args

    def _check_numbers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not (args or kwargs):
            return
        most = max(self._limits.chars, MAX_RANGE)
        for value in (*args, *kwargs.values()):
            if type(value) is int and not -most <= value <= most:
                raise TemplateLimitError(f"asks for {value:.3g} of something")

    def _check_format(self, text: str) -> None:
        if _WIDTH.search(text):
            raise TemplateLimitError("formats with too large a width")


class LimitedTemplate:
    """A chat template, compiled. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        self._environment = LimitedEnvironment(limits)
        with self._environment.running():  # compiling computes constants
            self._template = self._environment.from_string(source)
        read = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        self.variables = frozenset(read - self._environment.globals.keys())
        """The names that the template reads and does not define."""
        self.running = self._environment.running

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateLimitError, and whatever the template raises."""
        return self._template.render(variables)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value
    return len(value) if isinstance(value, Sized) else 0
