"""The parts of an answer as chat completions write them: deltas of a stream, or one message.

Thoughts have two names: ``reasoning_content``, which most clients read, and vLLM's ``reasoning``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headstart.server.text.answer import (
    Part,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


def shown_delta(part: Part) -> dict[str, Any] | None:
    """A part as clients read it; None when there is nothing to tell."""
    match part:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text, "reasoning": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case ToolCallEnd():
            return None


def message_of(parts: Sequence[Part]) -> dict[str, Any]:
    """A whole message of these parts."""
    text, reasoning = (
        "".join(part.text for part in parts if isinstance(part, kind)) for kind in (Text, Reasoning)
    )
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, ToolCallStart):
            function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
        elif isinstance(part, ToolCallArguments):
            calls[part.index]["function"]["arguments"] += part.text
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    if reasoning:
        message |= {"content": text or None, "reasoning_content": reasoning, "reasoning": reasoning}
    return message
