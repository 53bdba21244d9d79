"""What a chat template writes around the text of a message, by role.

    <|im_start|>user\\n  TEXT  <|im_end|>\\n      <|im_start|>assistant\\n  TEXT  <|im_end|>\\n  ...
    prefix                    suffix            prefix                       suffix

No template says so itself. So small chats are rendered, once without their last message, and what
the shorter one ends with tells where a turn ends in the longer one. This is done for each request,
since templates write its tools, and the date, between the texts. A role may have several prefixes
and suffixes: with tools or without, first in the chat or later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tools = Sequence[dict[str, Any]]
Render = Callable[[Sequence[Message], Tools | None, bool], str | None]
"""Renders messages and tools, the answer opened or not; None when the template refuses them. The
token that begins a text is ``Signs.bos`` in it."""

KINDS = {"system": "S", "user": "U", "assistant": "A", "tool": "T"}
"""Chats are written as words of these: SUAU. There, C is an assistant that calls tools."""

_BLANK = "\u2003"
"""Stripped by templates that strip texts; no template writes it."""


@dataclass(frozen=True, slots=True)
class Signs:
    """Characters that neither the chat nor the template has.

    ``bos``, ``call_id`` and ``name`` stand for what they say, ``edges`` are put into texts.
    """

    bos: str
    call_id: str
    name: str
    edges: str

    @classmethod
    def of(cls, chars: Sequence[str]) -> Signs:
        return cls(chars[0], chars[1], chars[2], "".join(chars[3:NUM_SIGNS]))

    def fields(self) -> dict[str, str]:
        """The fields of a message that are written into its marks, and their signs."""
        return {"tool_call_id": self.call_id, "name": self.name}


NUM_SIGNS = 11


@dataclass(frozen=True, slots=True)
class Writing:
    """How a template writes a text: stripped at its left, at its right, as the inside of JSON."""

    lstrip: bool
    rstrip: bool
    as_json: bool

    def parts(self, left: str, right: str) -> tuple[str, str]:
        """The two parts of a text as they are written."""
        left = left.lstrip() if self.lstrip else left
        right = right.rstrip() if self.rstrip else right
        if self.as_json:
            left, right = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (left, right))
        return left, right


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of a message in a rendering: characters ``[start, end)``."""

    start: int
    end: int
    writing: Writing


class Lesson:
    """Small chats rendered with the same tools, each only once."""

    def __init__(
        self, render: Render, signs: Signs, shapes: Mapping[str, Message], tools: Tools | None
    ) -> None:
        self._render = render
        self._edges = signs.edges
        self._shapes = shapes
        self._tools = tools
        self._texts: dict[tuple[str, bool], str | None] = {}

    def text(self, word: str, *, answer: bool = False) -> str | None:
        """The chat rendered; None when the template refuses it."""
        key = (word, answer)
        if key not in self._texts:
            messages = [self._message(kind, i) for i, kind in enumerate(word)]
            self._texts[key] = self._render(messages, self._tools, answer)
        return self._texts[key]

    def pieces(self, word: str) -> tuple[str, list[Piece]] | None:
        """The chat and its texts; None unless each text is there once, in order, and readable."""
        text = self.text(word)
        if text is None:
            return None
        pieces: list[Piece] = []
        for i, kind in enumerate(word):
            piece = self._piece(text, kind, i)
            if piece is None or (pieces and piece.start < pieces[-1].end):
                return None
            pieces.append(piece)
        return text, pieces

    def has(self, word: str, i: int) -> bool:
        """Whether the text of message ``i`` is anywhere in the chat."""
        return self._edges[2 * i] in (self.text(word) or "")

    def _message(self, kind: str, i: int) -> Message:
        first, last = self._edges[2 * i], self._edges[2 * i + 1]
        shape = self._shapes[kind]
        if kind != "C":
            # The quote shows JSON, the blanks show stripping.
            return shape | {"content": f'{_BLANK}{first}"{last}{_BLANK}'}
        *calls, call = shape["tool_calls"]
        function = call["function"] | {"name": f"{call['function']['name']}{last}"}
        return shape | {"tool_calls": [*calls, call | {"function": function}]}

    def _piece(self, text: str, kind: str, i: int) -> Piece | None:
        first, last = self._edges[2 * i], self._edges[2 * i + 1]
        if text.count(last) != 1:
            return None
        end = text.index(last) + 1
        if kind == "C":
            return Piece(end, end, Writing(False, False, False))
        start = text.find(first)
        inside = text[start + 1 : end - 1]
        if text.count(first) != 1 or inside not in ('"', '\\"'):
            return None
        lstrip = text[start - 1 : start] != _BLANK
        rstrip = text[end : end + 1] != _BLANK
        writing = Writing(lstrip, rstrip, inside != '"')
        return Piece(start - (not lstrip), end + (not rstrip), writing)


def _by_kind() -> dict[str, set[Any]]:
    return {kind: set() for kind in "SUACT"}


@dataclass
class TurnMarks:
    """What was learned, by kind of message.

    ``writings``: by the kind of the message before, too.
    ``heads``: what may stand before the first text, after BOS and ``opening``.
    ``headers``: what may open the answer.
    ``joins_system``: system messages are written into the user turn that follows.
    ``opening``: the system turn that the template adds where the chat has none, "" where it does
    not; None when what stands there is no turn known.
    """

    signs: Signs
    bos: str
    eos: str
    prefixes: dict[str, set[str]] = field(default_factory=_by_kind)
    suffixes: dict[str, set[str]] = field(default_factory=_by_kind)
    writings: dict[tuple[str, str], set[Writing]] = field(default_factory=dict)
    heads: dict[str, set[str]] = field(default_factory=_by_kind)
    headers: set[str] = field(default_factory=set)
    joins_system: bool = False
    opening: str | None = None

    def after_bos(self, text: str) -> int:
        """Where the turns of a rendered chat begin."""
        start = len(text) - len(text.lstrip(self.signs.bos))
        spelt_out = self.bos and text.startswith(self.bos)
        # Where it opens later turns too it is part of them: ChatML's <|im_start|> may be BOS.
        if spelt_out and not any(prefix.startswith(self.bos) for prefix in self.prefixes["U"]):
            return len(self.bos)
        return start

    def note_writings(self, word: str, pieces: Sequence[Piece]) -> None:
        """Keep how the texts of a chat are written: it may depend on the message before (Llama 2
        strips the two together that it joins)."""
        befores = "^" + word.replace("C", "A")
        for before, kind, piece in zip(befores, word, pieces, strict=False):
            self.writings.setdefault((before, kind), set()).add(piece.writing)

    def writings_of(self, before: str, kind: str) -> set[Writing]:
        """How a message is written after one of kind ``before``; "^" before the first."""
        anywhere = [found for (_, other), found in self.writings.items() if other == kind]
        return self.writings.get((before, kind)) or set().union(*anywhere)

    def starts(self, kind: str, message: Message) -> set[str]:
        """What may stand between the turn before and this message's text."""
        return self._filled(self.prefixes[kind], message)

    def first_starts(self, kind: str, message: Message) -> set[str]:
        """The same for the chat's first turn."""
        later = {start.lstrip(self.signs.bos) for start in self.prefixes[kind]}
        # What parts a turn from the one before may be missing here.
        return self._filled(self.heads[kind] | later | {s.lstrip() for s in later}, message)

    def starts_other(self, text: str) -> bool:
        """Whether a user's or assistant's turn begins in what should be of a system turn."""
        starts = {start.strip() for kind in "UA" for start in self.prefixes[kind]}
        # A system turn may begin as others do.
        return any(start in text for start in starts - {"", text.strip()})

    def ends(self, kind: str, message: Message) -> set[str]:
        """What may stand between this message's text and the end of its turn."""
        return self._filled(self.suffixes[kind], message)

    def _filled(self, patterns: set[str], message: Message) -> set[str]:
        """The patterns with the message's own values in place of their signs."""
        for key, sign in self.signs.fields().items():
            if isinstance(value := message.get(key), str):
                patterns = {_replace_run(pattern, sign, value) for pattern in patterns}
        return patterns


def _replace_run(text: str, sign: str, value: str) -> str:
    return re.sub(f"{sign}+", lambda _: value, text) if sign in text else text


def learn(
    render: Render,
    signs: Signs,
    chat: Sequence[Message],
    tools: Tools | None,
    special_tokens: Mapping[str, str],
) -> TurnMarks:
    """What the template writes around the texts of such a chat with these tools."""
    marks = TurnMarks(
        signs, special_tokens.get("bos_token", ""), special_tokens.get("eos_token", "")
    )
    shapes = _shapes(chat, signs)
    words = ["UA", "UAU", "UU"]
    if any(message["role"] == "system" for message in chat[1:]):
        words += ["US", "SS", "UAS"]
    if "T" in shapes:
        # A template may not write calls, but results.
        words += ["UCT", "UCTA"] if "C" in shapes else []
        words += ["UAT", "UATA"]
    # First without tools: with them a template may refuse a system message alone (Llama 3.1).
    offers = [None, tools] if tools else [None]
    lessons = [Lesson(render, signs, shapes, offer) for offer in offers]
    for lesson in lessons:
        for word in words:
            _compare(marks, lesson, word)
    marks.joins_system = _joins_system(marks, lessons)
    for lesson in lessons:
        if not marks.joins_system:
            _compare(marks, lesson, "SU")
        _meet_system(marks, lesson)
    _meet_user(marks, lessons[-1])
    return marks


def _shapes(chat: Sequence[Message], signs: Signs) -> dict[str, Message]:
    """A message of each kind, like the chat's own but for the text."""
    shapes: dict[str, Message] = {kind: {"role": role} for role, kind in KINDS.items()}
    firsts = {KINDS[message["role"]]: message for message in reversed(chat)}
    tool = firsts.get("T")
    if tool is None:
        del shapes["T"]
    else:
        shapes["T"] = dict(tool)
        callers = [message for message in chat[: chat.index(tool)] if _calls_tools(message)]
        if callers:
            shapes["C"] = dict(callers[-1])
    for key, sign in signs.fields().items():
        for kind, message in firsts.items():
            if isinstance(value := message.get(key), str):
                # As long as the real one: a template may insist on that (Mistral).
                shapes[kind][key] = sign * len(value)
    if "C" in shapes and tool is not None:
        shapes["C"]["tool_calls"] = [
            call | {"id": shapes["T"]["tool_call_id"]}
            if "id" in call and call["id"] == tool.get("tool_call_id")
            else call
            for call in shapes["C"]["tool_calls"]
        ]
    return shapes


def _calls_tools(message: Message) -> bool:
    """Whether the message has tool calls, of the form that the API has."""
    calls = message.get("tool_calls")
    return (
        isinstance(calls, list)
        and bool(calls)
        and all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls)
        and "name" in calls[-1]["function"]
    )


def _compare(marks: TurnMarks, lesson: Lesson, word: str) -> None:
    """Learn how the last two messages of a chat are parted."""
    longer, shorter = lesson.pieces(word), lesson.pieces(word[:-1])
    if longer is None:
        return
    text, pieces = longer
    marks.note_writings(word, pieces)
    before, after = word[-2], word[-1]
    gap = text[pieces[-2].end : pieces[-1].start]
    if shorter is None:
        ends = marks.suffixes[before]
    else:
        end = shorter[0][shorter[1][-1].end :]
        # Phi-3 closes a text, but no turn, with EOS.
        ends = {end if gap.startswith(end) else end.removesuffix(marks.eos)}
    ends = {end for end in ends if gap.startswith(end)}
    if not ends:
        # What ends the shorter chat does not end the turn: an answer opened unasked, EOS spelt
        # out. What starts the next turn may be known.
        starts = {start for start in marks.prefixes[after] if start.strip()}
        ends = {gap.removesuffix(start) for start in starts if gap.endswith(start)}
    for end in ends:
        marks.suffixes[before].add(end)
        marks.prefixes[after].add(gap.removeprefix(end))


def _joins_system(marks: TurnMarks, lessons: Sequence[Lesson]) -> bool:
    for lesson in lessons:
        if lesson.text("S") is not None:
            # With no user message to go into, it is left out.
            return not lesson.has("S", 0)
    starts = {start.lstrip(marks.signs.bos) for start in marks.prefixes["U"] if start.strip()}
    heads = [_head(marks, found) for lesson in lessons if (found := lesson.pieces("SU"))]
    return any(head.startswith(start) for head in heads for start in starts)


def _head(marks: TurnMarks, found: tuple[str, list[Piece]]) -> str:
    text, pieces = found
    return text[marks.after_bos(text) : pieces[0].start]


def _meet_system(marks: TurnMarks, lesson: Lesson) -> None:
    """Learn what stands before a system message that comes first."""
    if found := lesson.pieces("SU"):
        marks.note_writings("SU", found[1])
        marks.heads["U" if marks.joins_system else "S"].add(_head(marks, found))


def _meet_user(marks: TurnMarks, lesson: Lesson) -> None:
    """Learn what stands before a user message that comes first, and what opens an answer."""
    found = lesson.pieces("U")
    if found is None:
        return
    head = _head(marks, found)
    marks.opening = _opening(marks, head)
    if marks.opening is not None:
        marks.heads["U"].add(head.removeprefix(marks.opening))
        # It may stay where the chat has a system message, another turn then (gpt-oss).
        marks.heads["S"] |= {other.removeprefix(marks.opening) for other in marks.heads["S"]}
    opened = lesson.text("U", answer=True)
    if opened is not None:
        end = opened[found[1][0].end :]
        marks.headers = {end.removeprefix(s) for s in marks.suffixes["U"] if end.startswith(s)}


def _opening(marks: TurnMarks, head: str) -> str | None:
    """The part of ``head``, what stands before a user message, that is a system turn."""
    if head in marks.first_starts("U", {}):
        return ""
    starts = {start for start in marks.first_starts("U", {}) if start.strip()}
    ends = {end for kind in "SU" for end in marks.suffixes[kind]}
    if any(head.startswith(start) for start in starts):
        # More of the same turn: a prompt of the template's own (Llama 2), or tools.
        return None if any(end.strip() and end.strip() in head for end in ends) else ""
    found = {head.removesuffix(start) for start in starts if head.endswith(start)}
    found = {opening for opening in found if _is_system_turn(opening, marks, ends)}
    return found.pop() if len(found) == 1 else None


def _is_system_turn(opening: str, marks: TurnMarks, ends: set[str]) -> bool:
    """Whether ``opening`` is what stands around a system message, with other text in its place
    (Qwen2.5) or without any (Llama 3.1); and no user or assistant turn."""
    return not marks.starts_other(opening) and any(
        body.startswith(head.rstrip()) or (end.strip() and body and head.startswith(body))
        for end in ends
        if opening.endswith(end)
        for body in [opening.removesuffix(end).rstrip()]
        for head in marks.heads["S"]
    )
