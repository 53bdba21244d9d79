"""CallReader: calls of tools amid growing text, read a character at a time.

A format is a generator that is sent characters ("" at the end) and raises NoCall at the first one
that cannot belong to a call. What was read since the last part is then given back as text, and
reading goes on with that character; so the time it takes grows with the text and no faster.
"""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from headstart.server.text.answer import Part, Text, ToolCallArguments, ToolCallEnd, ToolCallStart
from headstart.server.text.tool_formats.schemas import Function

T = TypeVar("T")
Chars = Generator[None, str, T]

NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
ARGUMENT_KEYS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class NoCall(Exception):
    """What was read is no call; the character read last is not part of it."""


def call_id() -> str:
    """A new id of a call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def object_text(text: str) -> str:
    """The text of a JSON object, or nothing for none; raises NoCall for another."""
    try:
        msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise NoCall from None
    return text.strip() or "{}"


class CallReader(ABC):
    """Tells calls from text.

    A call begins once its name is known and is not taken back: what follows is its arguments, as
    written, up to the bracket that closes them. Everything else that is no call is text, as
    written, but for space: around calls it is text only if text follows. ``functions``: the tools;
    a call that no mark announces has to be of one of them. ``new_id`` makes ids of calls.
    """

    first: ClassVar[str]
    """Characters that a call may begin with."""

    def __init__(self, functions: Sequence[Function], new_id: Callable[[], str] = call_id) -> None:
        self._functions = {function["name"]: function for function in functions}
        self._new_id = new_id
        self._parts: list[Part] = []
        self._arguments: list[str] = []  # of the call that is being read, not yet a part
        self._space = ""  # text only if text follows
        self._held: list[str] = []  # characters read since the last part
        self._last = ""  # the character read last
        self._reading = False  # of what may be a call
        self._closing = False  # of a call that is complete
        self.num_calls = 0
        self._any_text = False
        self._after_call = False  # with nothing but space in between
        self._first = re.compile(f"[{re.escape(self.first)}]")
        self._run = self._read()
        next(self._run)

    @abstractmethod
    def _call(self, char: str) -> Chars[str]:
        """Read calls that begin with ``char``; returns the character after them."""

    def _opens(self, char: str) -> bool:
        """Whether a call may begin here."""
        return char != "" and char in self.first

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        at = 0
        while at < len(text):
            if not self._reading:
                found = self._first.search(text, at)
                end = found.start() if found else len(text)
                self._say(text[at:end])
                at = end
                if found is None:
                    break
            self._send(text[at])
            at += 1
        return self._taken()

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        if self._reading:
            self._send("")
        if self._space and not self._after_call:
            self._parts.append(Text(self._space))
        return self._taken()

    def _send(self, char: str) -> None:
        self._held.append(char)
        self._last = char
        self._run.send(char)

    def _read(self) -> Chars[None]:
        char = yield
        while True:
            if self._opens(char):
                self._reading = True
                try:
                    yield from self._call(char)
                except NoCall:
                    held = "".join(self._held[:-1])
                    # The text ended while a call was being closed: nothing is missing.
                    if self._last or not self._closing:
                        self._say(held)
                self._reading = self._closing = False
                char = self._last
                self._held = [char]
            else:
                self._say(char)
                self._held.clear()
                char = yield

    # What is found

    def _say(self, text: str) -> None:
        said = text.rstrip(_SPACE)
        if said:
            self._any_text, self._after_call = True, False
            self._parts.append(Text(self._space + said))
            self._space = ""
        self._space += text[len(said) :]

    def _start(self, name: str) -> None:
        self._space = ""
        self._held.clear()
        self._after_call = True
        self._parts.append(ToolCallStart(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def _argue(self, text: str) -> None:
        self._held.clear()
        self._arguments.append(text)

    def _end(self) -> None:
        self._flush_arguments()
        self._closing = True
        self._parts.append(ToolCallEnd(self.num_calls - 1))

    def _flush_arguments(self) -> None:
        if self._arguments:
            text = "".join(self._arguments)
            self._parts.append(ToolCallArguments(self.num_calls - 1, text))
            self._arguments = []

    def _taken(self) -> list[Part]:
        self._flush_arguments()
        parts, self._parts = self._parts, []
        return parts

    # What calls are made of; each is given the first character of what it reads

    def _known(self, name: str, *, marked: bool) -> str:
        """The name, if it may be one."""
        if not NAME.fullmatch(name) or not (marked or name in self._functions):
            raise NoCall
        return name

    def _spaces(self, char: str) -> Chars[str]:
        """Skip space; returns the character after it."""
        while char and char in _SPACE:
            char = yield
        return char

    def _mark(self, char: str, mark: str) -> Chars[str]:
        """Read ``mark``; returns the character after it."""
        for expected in mark:
            if char != expected:
                raise NoCall
            char = yield
        return char

    def _one_of(self, char: str, marks: Sequence[str]) -> Chars[tuple[str, str]]:
        """Read one of ``marks``, of which none begins another; returns it, and the character
        after it."""
        read = ""
        while read not in marks:
            read += char
            if not char or not any(mark.startswith(read) for mark in marks):
                raise NoCall
            char = yield
        return read, char

    def _json_list(self) -> Chars[str]:
        """Read the calls of a list whose bracket has been read; returns the character after it."""
        while True:
            char = yield from self._spaces((yield))
            char = yield from self._json_call(char, marked=True)
            char = yield from self._spaces(char)
            if char == "]":
                return (yield)
            if char != ",":
                raise NoCall

    def _json_call(self, char: str, *, marked: bool) -> Chars[str]:
        """Read an object with a name and arguments; returns the character after it.

        ``marked``: a mark says that it is a call, so that arguments may be missing. They may be
        the text of an object (Granite).
        """
        if char != "{":
            raise NoCall
        self._closing = False  # of the call before
        name: str | None = None
        early: list[str] = []  # arguments written before the name
        started = False
        char = yield from self._spaces((yield))
        while char != "}":
            key, char = yield from self._json_string(char)
            char = yield from self._spaces(char)
            if char != ":":
                raise NoCall
            char = yield from self._spaces((yield))
            if key == "name" and name is None:
                value, char = yield from self._json_string(char)
                name = self._known(value, marked=marked)
                if early:
                    self._whole(name, "".join(early))
                    started = True
            elif key in ARGUMENT_KEYS and char == "{" and not started and not early:
                if name is None:
                    yield from self._nested(char, early.append)
                else:
                    self._start(name)
                    started = True
                    yield from self._nested(char, self._argue)
                    self._end()
                char = yield
            elif key in ARGUMENT_KEYS and char == '"' and not started and not early:
                value, char = yield from self._json_string(char)
                early.append(object_text(value))
                if name is not None:
                    self._whole(name, early[0])
                    started = True
            else:
                char = yield from self._skip_json(char)
            char = yield from self._spaces(char)
            if char == ",":
                char = yield from self._spaces((yield))
            elif char != "}":
                raise NoCall
        if not started:
            if name is None or not marked:
                raise NoCall
            self._whole(name, "{}")
        self._held.clear()
        return (yield)

    def _whole(self, name: str, arguments: str) -> None:
        self._start(name)
        self._argue(arguments)
        self._end()

    def _json_string(self, char: str) -> Chars[tuple[str, str]]:
        """Read a JSON string; returns its value, and the character after it."""
        if char != '"':
            raise NoCall
        written, escaped = [char], False
        while True:
            char = yield
            if char < " ":  # the end, too
                raise NoCall
            written.append(char)
            if char == '"' and not escaped:
                break
            escaped = char == "\\" and not escaped
        try:
            value: str = json.loads("".join(written))
        except ValueError:
            raise NoCall from None
        return value, (yield)

    def _skip_json(self, char: str) -> Chars[str]:
        """Read a value that says nothing to us; returns the character after it."""
        if char == '"':
            _, char = yield from self._json_string(char)
            return char
        if char and char in "{[":
            yield from self._nested(char, lambda _: None)
            return (yield)
        if not (char.isalnum() or char == "-"):
            raise NoCall
        while char.isalnum() or (char and char in "+-."):
            char = yield
        return char

    def _nested(self, char: str, each: Callable[[str], None]) -> Chars[None]:
        """Read a JSON object or array up to the bracket that closes it, calling ``each`` with
        every character."""
        depth, in_string, escaped = 0, False, False
        while True:
            if not char:
                raise NoCall
            each(char)
            if in_string:
                in_string = escaped or char != '"'
                escaped = char == "\\" and not escaped
            elif char == '"':
                in_string = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
                if not depth:
                    return
            char = yield
