"""Where the messages and the tools of a chat are in its rendering, whatever the template.

    <|im_start|>system  YOU ARE ...  # TOOLS ...  <|im_end|> <|im_start|>user  HELLO  <|im_end|>
                       `messages[0]´ `- tools --´                             `[1]-´

The chat is rendered once more with a sign amid every message's text, and once more with other
tools. Nothing is refused: what a template does not write as it is has no place here. For segments,
which have to be exact, there is turns.py.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headstart.server.text.turn_marks import KINDS, Message, Tools, Writing

Render = Callable[[Sequence[Message], Tools | None], str | None]
"""The text of a chat; None when the template refuses it."""

NUM_SIGNS = len(KINDS)

_PROBE: Tools = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "probe",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
COMPARED = 8
"""Characters by which it is told whether tools begin somewhere: all of them begin alike."""


class MessagePlace(NamedTuple):
    """The text of a message, by its number: characters ``[start, end)``."""

    message: int
    start: int
    end: int


class Mark(NamedTuple):
    """What another list of tools would write at character ``at``, if only its beginning."""

    at: int
    text: str

    def meets(self, at: int, earlier: str) -> bool:
        """Whether it is what ``earlier`` has at ``at``."""
        text = self.text[: len(earlier)]
        return at == self.at and bool(text) and earlier.startswith(text)


@dataclass(frozen=True, slots=True)
class ToolsPlace:
    """Where the tools are, characters ``[start, end)``; or would be, if the chat has none. A
    template may write them around messages.

    ``marks``: what the chat would have there with no tools, with some, with one more.
    """

    start: int
    end: int
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Layout:
    """``text``: the rendering. ``messages``: in the order in which they are in it."""

    text: str
    messages: Sequence[MessagePlace]
    tools: ToolsPlace | None

    def message_at(self, at: int) -> int | None:
        """The message that character ``at`` belongs to: of what is between two texts the header of
        the later one, and a text's end is its own. None before the first and behind the last."""
        i = bisect_right([place.start for place in self.messages], at) - 1
        if i >= 0 and at <= self.messages[i].end:
            return self.messages[i].message
        if i < 0 or i + 1 == len(self.messages):
            return None
        return min(self.messages[i].message + 1, self.messages[i + 1].message)

    def tools_changed_at(self, at: int, earlier: str) -> bool:
        """Whether a chat that reads ``earlier`` from character ``at`` on has other tools."""
        tools = self.tools
        if tools is None:
            return False
        if any(mark.meets(at, earlier) for mark in tools.marks):
            return True
        in_text = any(place.start <= at <= place.end for place in self.messages)
        return tools.start < at <= tools.end and not in_text


def lay_out(
    render: Render, signs: str, messages: Sequence[Message], tools: Tools | None, text: str
) -> Layout:
    """The layout of ``text``, the chat as it is rendered. ``signs``: NUM_SIGNS characters that are
    neither in the chat nor in what the template writes."""
    return Layout(
        text, _messages(render, signs, messages, tools, text), _tools(render, messages, tools, text)
    )


def _messages(
    render: Render, signs: str, messages: Sequence[Message], tools: Tools | None, text: str
) -> list[MessagePlace]:
    sign_of = dict(zip(KINDS, signs, strict=True))
    role_of = {sign: role for role, sign in sign_of.items()}
    for left_out in ((), ("assistant",)):  # a template may look at the end of an assistant's text
        signed = [
            message | {"content": _with_sign(message["content"], sign_of[message["role"]])}
            if message["role"] in sign_of and message["role"] not in left_out and _has_text(message)
            else message
            for message in messages
        ]
        rendered = render(signed, tools)
        pieces = re.split(f"([{re.escape(signs)}])", rendered or "")
        if rendered is not None and "".join(pieces[::2]) == text:
            break
    else:
        return []
    waiting = {
        role: deque(
            i
            for i, message in enumerate(messages)
            if message["role"] == role and role not in left_out and _has_text(message)
        )
        for role in sign_of
    }
    found: list[MessagePlace] = []
    at = 0
    for before, sign in zip(pieces[:-1:2], pieces[1::2], strict=True):
        at += len(before)
        if not waiting[role_of[sign]]:
            return []  # one is written twice
        index = waiting[role_of[sign]].popleft()
        found.append(_place(text, messages[index]["content"], index, at))
    return found


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip()) and not message.get("tool_calls")


def _middle(content: str) -> int:
    """Between its ends, which templates strip and look at."""
    return (len(content) - len(content.lstrip()) + len(content.rstrip())) // 2


def _with_sign(content: str, sign: str) -> str:
    at = _middle(content)
    return f"{content[:at]}{sign}{content[at:]}"


def _place(text: str, content: str, index: int, at: int) -> MessagePlace:
    """Of a message whose middle is at character ``at``."""
    cut = _middle(content)
    for lstrip, rstrip, as_json in itertools.product((False, True), repeat=3):
        left, right = Writing(lstrip, rstrip, as_json).parts(content[:cut], content[cut:])
        start = at - len(left)
        if start >= 0 and text.startswith(left, start) and text.startswith(right, at):
            return MessagePlace(index, start, at + len(right))
    return MessagePlace(index, at, at)


def _tools(
    render: Render, messages: Sequence[Message], tools: Tools | None, text: str
) -> ToolsPlace | None:
    other = render(messages, None if tools else _PROBE)
    if other is None or other == text:
        return None
    start = common_prefix(text, other)
    marks = [Mark(start, other[start : start + COMPARED])]
    if not tools:
        return ToolsPlace(start, start, marks)
    if (more := render(messages, [*tools, *_PROBE])) is not None:
        at = common_prefix(text, more)
        marks.append(Mark(at, more[at : at + COMPARED]))
    end = len(text) - common_prefix(text[start:][::-1], other[start:][::-1])
    return ToolsPlace(start, end, marks)


def common_prefix(a: str, b: str) -> int:
    """How many first characters are equal."""
    low, high = 0, min(len(a), len(b))  # low are
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
