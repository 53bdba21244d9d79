"""The parts of an answer as chat completions write them: deltas of a stream, or one message.

Thoughts have two names: ``reasoning_content``, which most clients read, and vLLM's ``reasoning``.
``custom``: the names of the tools that take a text. What a model writes for it is JSON, so in a
stream it comes at once, when it is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from headstart.server.api.openai_chat.tools import custom_input
from headstart.server.text.answer import (
    Part,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


class Deltas:
    """The parts of one choice of a stream as clients read them."""

    def __init__(self, custom: Collection[str]) -> None:
        self._custom = custom
        self._inputs: dict[int, str] = {}  # JSON texts so far, by the index of their calls

    def of(self, part: Part) -> dict[str, Any] | None:
        """None when there is nothing to tell yet."""
        match part:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text, "reasoning": text}
            case ToolCallStart(index):
                if part.name in self._custom:
                    self._inputs[index] = ""
                return {"tool_calls": [{"index": index, **_begun(part, self._custom)}]}
            case ToolCallArguments(index, text):
                if index not in self._inputs:
                    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
                self._inputs[index] += text
                return None
            case ToolCallEnd(index):
                return self._input(index) if index in self._inputs else None

    def cut(self) -> Iterator[dict[str, Any]]:
        """What is left to tell at the end of the answer."""
        for index in list(self._inputs):
            yield self._input(index)

    def _input(self, index: int) -> dict[str, Any]:
        given = {"input": custom_input(self._inputs.pop(index))}
        return {"tool_calls": [{"index": index, "custom": given}]}


def _begun(part: ToolCallStart, custom: Collection[str]) -> dict[str, Any]:
    """A call without its arguments."""
    if part.name in custom:
        return {"id": part.id, "type": "custom", "custom": {"name": part.name, "input": ""}}
    function = {"name": part.name, "arguments": ""}
    return {"id": part.id, "type": "function", "function": function}


def message_of(parts: Sequence[Part], custom: Collection[str]) -> dict[str, Any]:
    """A whole message of these parts."""
    text, reasoning = (
        "".join(part.text for part in parts if isinstance(part, kind)) for kind in (Text, Reasoning)
    )
    calls: list[dict[str, Any]] = []
    arguments: list[str] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            calls.append(_begun(part, custom))
            arguments.append("")
        elif isinstance(part, ToolCallArguments):
            arguments[part.index] += part.text
    for call, given in zip(calls, arguments, strict=True):
        if call["type"] == "custom":
            call["custom"]["input"] = custom_input(given)
        else:
            call["function"]["arguments"] = given
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    if reasoning:
        message |= {"content": text or None, "reasoning_content": reasoning, "reasoning": reasoning}
    return message
