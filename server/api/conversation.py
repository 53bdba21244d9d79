"""Conversation: messages as templates take them, put together from the items of other APIs."""

from __future__ import annotations

from typing import Any

from headstart.server.http.errors import bad_request
from headstart.server.text.templates import Message


class Conversation:
    """Thoughts, text and calls of the assistant, in this order, are one message; so are system
    messages side by side, since templates know one in front of the others."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._called: set[str] = set()

    def say(self, role: str, text: str) -> None:
        """A text; the assistant's goes with thoughts before it, and with calls that wait for their
        results, which have to come next."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == role:
            if role == "system":
                last["content"] += f"\n\n{text}"
                return
            if role == "assistant" and (not last["content"] or "tool_calls" in last):
                last["content"] = "\n".join(filter(None, (last["content"], text)))
                return
        self.messages.append({"role": role, "content": text})

    def think(self, text: str) -> None:
        """Thoughts of the assistant, under both names that templates know."""
        last = self._assistants()
        if last is None or last["content"] or "tool_calls" in last:
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        elif "reasoning" in last:
            text = f"{last['reasoning']}\n{text}"
        last |= {"reasoning_content": text, "reasoning": text}

    def call(self, call_id: str, name: str, arguments: dict[str, Any] | str) -> None:
        """A call; it goes with what the assistant said last. ``arguments``: a text where they are
        no object."""
        last = self._assistants()
        if last is None:
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        function = {"name": name, "arguments": arguments}
        calls = last.setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})
        self._called.add(call_id)

    def result(self, call_id: str, text: str, path: str) -> None:
        """What a call gave; raises APIError, with ``path``, for the id of no call before it."""
        if call_id not in self._called:
            raise bad_request(f"{path} is the id of no call before it", path)
        self.messages.append({"role": "tool", "content": text, "tool_call_id": call_id})

    def _assistants(self) -> Message | None:
        """The last message, if it is the assistant's."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return None
