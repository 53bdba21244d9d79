"""The turns of a rendered chat, whatever the template: which characters are whose.

    <s> <|im_start|>user\\n  TEXT  <|im_end|>\\n <|im_start|>assistant\\n  TEXT  <|im_end|>\\n
        `------------ user turn -------------´ `---------- assistant turn -------------´

The chat is rendered once more with a sign amid every system, user and tool message and one at the
end of every assistant's. Without the signs the text must be what it was: so they show where each
message is. What a turn has around its messages, ``turn_marks`` knows. Nothing is guessed: a chat
that does not come apart in exactly one way is refused.

BOS and the header that opens the answer are in no turn. Messages that the template joins are one
turn (tool results in Qwen; a system message that Llama 2 writes into the user's turn: a user turn),
and so are assistant messages in a row.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headstart.engine.errors import RequestError
from headstart.server.text.turn_marks import KINDS, Message, Render, Signs, Tools, TurnMarks, learn

ROLES = {kind: role for role, kind in KINDS.items()}


class TextTurn(NamedTuple):
    """Characters ``[start, end)`` of a rendered chat."""

    role: str
    start: int
    end: int


def refusal(reason: str) -> RequestError:
    return RequestError(
        f"the turns of this chat cannot be told apart (a causal mask needs no turns): {reason}",
        "messages",
    )


def find_turns(
    render: Render,
    signs: Signs,
    chat: Sequence[Message],
    tools: Tools | None,
    rendered: str,
    special_tokens: Mapping[str, str],
) -> list[TextTurn]:
    """The turns of ``rendered``: the chat, its answer opened.

    Raises RequestError, saying why, where the template does not let them be told apart.
    """
    for i, message in enumerate(chat):
        if message.get("role") not in KINDS:
            raise refusal(f"messages[{i}] has none of the roles {', '.join(KINDS)}")
        if message["role"] != "assistant" and not isinstance(message.get("content"), str):
            raise refusal(f"messages[{i}] has no text")
    marks = learn(render, signs, chat, tools, special_tokens)
    cutter = _Cutter(_locate(render, marks, chat, tools, rendered), marks)
    long = len(marks.bos) - 1
    signs_at = [match.start() for match in re.finditer(signs.bos, cutter.text)]

    def in_rendered(at: int) -> int:
        return at + long * bisect_left(signs_at, at)

    return [
        TextTurn(turn.role, in_rendered(turn.start), in_rendered(turn.end))
        for turn in cutter.turns()
    ]


@dataclass(frozen=True, slots=True)
class Item:
    """A system, user or tool message and its text in the rendering, ``[start, end)``."""

    kind: str
    message: Message
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Assistant messages between two items: how many, and where the last one's text ends, if that
    is known: one that calls tools may have none."""

    num_messages: int
    end: int | None


@dataclass(frozen=True, slots=True)
class Located:
    """``text``: the rendering, with the sign of BOS. ``slots[i]`` is before ``items[i]``."""

    text: str
    items: list[Item]
    slots: list[Slot]


def _locate(
    render: Render, marks: TurnMarks, chat: Sequence[Message], tools: Tools | None, rendered: str
) -> Located:
    """Where the messages' texts are; raises RequestError."""
    signs = dict(zip("SUTA", marks.signs.edges, strict=False))
    # A template may look at the end of an assistant's text; one may leave out a system message
    # without any (Phi-3.5).
    not_empty = [m for m in chat if m["role"] != "system" or m["content"].strip()]
    for messages, marked in ((chat, "SUTA"), (chat, "SUT"), (not_empty, "SUTA")):
        signed = render(
            [
                _signed(m, signs[kind]) if (kind := KINDS[m["role"]]) in marked else m
                for m in messages
            ],
            tools,
            True,
        )
        if signed is None:
            continue
        pieces = re.split(f"([{''.join(signs.values())}])", signed)
        text = "".join(pieces[::2])
        if text.replace(marks.signs.bos, marks.bos) == rendered:
            break
    else:
        raise refusal("the chat template does not write every message as it is")
    kinds = {sign: kind for kind, sign in signs.items()}
    found: list[tuple[str, int]] = []
    at = 0
    for before, sign in zip(pieces[:-1:2], pieces[1::2], strict=True):
        at += len(before)
        found.append((kinds[sign], at))
    return _assign(text, messages, found, marks)


def _cut_at(message: Message, kind: str) -> int:
    """Where in a message's text its sign goes. The ends stay as they are: templates strip them,
    and look at them."""
    text = message["content"]
    end = len(text.rstrip())
    return end if kind == "A" else (len(text) - len(text.lstrip()) + end) // 2


def _signed(message: Message, sign: str) -> Message:
    if not _has_sign(message):
        return message
    text, at = message["content"], _cut_at(message, KINDS[message["role"]])
    return message | {"content": f"{text[:at]}{sign}{text[at:]}"}


def _has_sign(message: Message) -> bool:
    # Tool calls are written behind what an assistant says, or instead.
    return isinstance(message.get("content"), str) and not message.get("tool_calls")


def _assign(
    text: str, chat: Sequence[Message], found: Iterable[tuple[str, int]], marks: TurnMarks
) -> Located:
    """Give the signs found in the text, kinds and places, to the messages; raises RequestError."""
    waiting = {kind: deque[int]() for kind in "SUT"}
    for i, message in enumerate(chat):
        if message["role"] != "assistant":
            waiting[KINDS[message["role"]]].append(i)
    order: list[int] = []
    items: list[Item] = []
    answers: list[list[int]] = [[]]
    for kind, at in found:
        if kind == "A":
            answers[-1].append(at)
            continue
        if not waiting[kind]:
            raise refusal("the chat template repeats a message")
        i = waiting[kind].popleft()
        order.append(i)
        start, end = _extent(text, chat, i, at, marks)
        if items and start < items[-1].end:
            raise refusal("the chat template writes one message into another")
        kind = "U" if kind == "S" and marks.joins_system else kind
        items.append(Item(kind, chat[i], start, end))
        answers.append([])
    if any(waiting.values()):
        raise refusal("the chat template leaves out a message")
    # A system message that joins a user turn goes to where that is: in Mistral, to the last one.
    moves = {i for i in order if chat[i]["role"] == "system" and marks.joins_system}
    rest = [i for i in order if i not in moves]
    if rest != sorted(rest):
        raise refusal("the chat template puts the messages in another order")

    # An assistant message is behind the one it answers.
    speakers: list[list[int]] = [[] for _ in answers]
    place = {i: n for n, i in enumerate(order)}
    n = 0
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            speakers[n].append(i)
        elif i not in moves:
            n = place[i] + 1
    slots = [_slot(text, chat, *pair, marks) for pair in zip(speakers, answers, strict=True)]
    return Located(text, items, slots)


def _slot(
    text: str, chat: Sequence[Message], speakers: list[int], answers: list[int], marks: TurnMarks
) -> Slot:
    if len(answers) > len(speakers):
        raise refusal("the chat template repeats a message or puts it in another place")
    end = None
    if speakers and len(answers) == len(speakers):
        _, end = _extent(text, chat, speakers[-1], answers[-1], marks)
    return Slot(len(speakers), end)


def _extent(
    text: str, chat: Sequence[Message], i: int, at: int, marks: TurnMarks
) -> tuple[int, int]:
    """Where message ``i`` is, whose sign is at ``at``; of an assistant's only what is after it."""
    kind = KINDS[chat[i]["role"]]
    before = KINDS[chat[i - 1]["role"]] if i else "^"
    content, cut = chat[i]["content"], _cut_at(chat[i], kind)
    extents: set[tuple[int, int]] = set()
    for writing in marks.writings_of(before, kind):
        left, right = writing.parts(content[:cut], content[cut:])
        start = at - len(left) if kind != "A" else at
        if (
            start >= 0
            and text.startswith(right, at)
            and (kind == "A" or text.startswith(left, start))
        ):
            extents.add((start, at + len(right)))
    if len(extents) != 1:
        raise refusal(
            f"the chat template changes, drops or repeats the text of a {chat[i]['role']} message"
        )
    return extents.pop()


class _Cutter:
    """Puts the ends of turns between the located texts."""

    def __init__(self, located: Located, marks: TurnMarks) -> None:
        self.text, self._items, self._slots = located.text, located.items, located.slots
        self._marks = marks
        self._turns: list[TextTurn] = []

    def turns(self) -> list[TextTurn]:
        """The turns in order; raises RequestError."""
        if not self._items:
            raise refusal("there is no system, user or tool message")
        at = self._answers(0, self._opening())
        first = 0
        for i in range(len(self._items)):
            end = self._end(i)
            if end is None:
                continue
            self._add(at, end, self._items[first : i + 1])
            first = i + 1
            at = self._answers(first, end)
        return self._turns

    def _opening(self) -> int:
        """Where the first turn of the chat's own begins; adds the system turn that the template
        puts before it."""
        at, opening = self._marks.after_bos(self.text), self._marks.opening
        first = self._items[0]
        head = self.text[at : first.start]
        if first.kind != "S" or (opening and head.startswith(opening)):
            if opening is None or not head.startswith(opening):
                raise refusal("the chat template begins with what is no turn it is known to write")
            if opening:
                self._turns.append(TextTurn("system", at, at + len(opening)))
            at, head = at + len(opening), head.removeprefix(opening)
        if self._slots[0].num_messages:
            return at
        known = head in self._marks.first_starts(first.kind, first.message)
        if not known or (first.kind == "S" and self._marks.starts_other(head)):
            raise refusal("the chat template begins this chat in a way of its own")
        return at

    def _end(self, i: int) -> int | None:
        """Where the turn of item ``i`` ends; None if the next item is in the same turn."""
        item = self._items[i]
        ends = self._marks.ends(item.kind, item.message)
        if self._slots[i + 1].num_messages:
            return self._after(item.kind, item.end, ends, self._is_answer)
        if i + 1 == len(self._items):
            return self._after(item.kind, item.end, ends, self._opens_answer)
        then = self._items[i + 1]
        gap = self.text[item.end : then.start]
        end = _parting(gap, ends, self._marks.starts(then.kind, then.message))
        if end is not None:
            return item.end + end
        # One turn, if what ends such turns is known and comes later.
        ends = {end for end in ends if end.strip()}
        if item.kind != then.kind or not ends or any(end in gap for end in ends):
            raise self._unknown(item.kind)
        return None

    def _answers(self, n: int, at: int) -> int:
        """Where the turn of item ``n`` begins, the one before having ended at ``at``; adds the
        turn of assistant messages between."""
        slot = self._slots[n]
        if not slot.num_messages:
            return at
        end: int | None
        if n == len(self._items):
            end = self._last_answer_end(slot)
        else:
            item = self._items[n]
            starts = self._marks.starts(item.kind, item.message)
            # Without an end of the answer's text only what starts the next turn tells.
            ends = self._marks.suffixes["A"] if slot.end is not None else set[str]()
            lo = at if slot.end is None else slot.end
            end = _parting(self.text[lo : item.start], ends, starts)
            end = None if end is None else lo + end
        if end is None or end < at:
            raise self._unknown("A")
        if end > at:
            self._turns.append(TextTurn("assistant", at, end))
        return end

    def _last_answer_end(self, slot: Slot) -> int:
        """Where the last turn ends, the assistant's."""
        if slot.end is not None:
            return self._after("A", slot.end, self._marks.suffixes["A"], self._opens_answer)
        headers = {header for header in self._marks.headers if self.text.endswith(header)}
        if len(headers) != 1:
            raise self._unknown("A")
        return len(self.text) - len(headers.pop())

    def _after(self, kind: str, at: int, ends: set[str], confirms: Callable[[int], bool]) -> int:
        """Where a turn ends whose last text ends at ``at``; what follows may confirm it."""
        found = {at + len(end): bool(end.strip()) for end in ends if self.text.startswith(end, at)}
        confirmed = [end for end in found if confirms(end)]
        if len(found) > 1 or not all(found.values()):
            found = dict.fromkeys(confirmed, True)
        if len(found) != 1:
            raise self._unknown(kind)
        return found.popitem()[0]

    def _is_answer(self, at: int) -> bool:
        starts = self._marks.prefixes["A"]
        return any(start.strip() and self.text.startswith(start, at) for start in starts)

    def _opens_answer(self, at: int) -> bool:
        return self.text[at:] in self._marks.headers

    def _add(self, start: int, end: int, items: Sequence[Item]) -> None:
        while self.text.startswith(self._marks.signs.bos, start):
            start += 1
        if start == end:  # a system message that says nothing, with nothing around it
            return
        edges = [start, *(edge for item in items for edge in (item.start, item.end)), end]
        own = "".join(self.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        role = ROLES[items[-1].kind]
        if role != "system" and not own.strip():
            raise refusal(f"the chat template writes nothing around a {role} message")
        self._turns.append(TextTurn(role, start, end))

    def _unknown(self, kind: str) -> RequestError:
        return refusal(f"nothing that ends a turn is known to follow this {ROLES[kind]} message")


def _parting(gap: str, ends: set[str], starts: set[str]) -> int | None:
    """Where in ``gap`` a turn ends and the next begins; None when nothing known is there.

    An end and a start that meet are proof; else one of them will do, if it is not blank and no
    other disagrees.
    """
    by_end = {len(end): bool(end.strip()) for end in ends if gap.startswith(end)}
    by_start = {len(gap) - len(s): bool(s.strip()) for s in starts if gap.endswith(s)}
    places = by_end.keys() & by_start.keys() or by_end.keys() | by_start.keys()
    places = {at for at in places if by_end.get(at) or by_start.get(at)}
    if len(places) > 1:
        raise refusal("what stands between two messages can be read in two ways")
    return places.pop() if places else None
