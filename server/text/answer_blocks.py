"""The parts of an answer in a row of blocks: each is thoughts, text or one call, from its beginning
to its end, as the APIs have it that number what an answer consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from headstart.server.text.answer import (
    Part,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

Step = tuple[Literal["opened", "grown", "closed"], "Block", str]
"""What has become of a block, and the text that is new."""


@dataclass(slots=True)
class Block:
    """``texts``, joined: what is said, thought, or the JSON of a call's arguments. ``whole``: it
    was not cut short."""

    kind: Literal["text", "thought", "call"]
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Blocks:
    """The blocks of one answer so far; the last one may be open."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def push(self, part: Part) -> Iterator[Step]:
        """What a part changes."""
        match part:
            case Text(text):
                yield from self._grow("text", text)
            case Reasoning(text):
                yield from self._grow("thought", text)
            case ToolCallStart(_, call_id, name):
                yield from self.close()
                yield self._new("call", call_id, name)
            case ToolCallArguments(_, text) if self._open is not None:
                self._open.texts.append(text)
                yield "grown", self._open, text
            case ToolCallEnd():
                yield from self.close()

    def close(self, *, cut: bool = False) -> Iterator[Step]:
        """Close what is open; ``cut``: short."""
        if self._open is not None:
            block, self._open = self._open, None
            block.whole = not cut
            yield "closed", block, ""

    def _grow(self, kind: Literal["text", "thought"], text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self.close()
            yield self._new(kind)
        assert self._open is not None
        self._open.texts.append(text)
        yield "grown", self._open, text

    def _new(
        self, kind: Literal["text", "thought", "call"], call_id: str = "", name: str = ""
    ) -> Step:
        self._open = Block(kind, len(self.all), call_id, name)
        self.all.append(self._open)
        return "opened", self._open, ""
