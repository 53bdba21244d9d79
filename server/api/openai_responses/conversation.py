"""Conversation: messages as templates take them, put together from the items of other APIs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from headstart.server.api.tools import arguments_object
from headstart.server.http.errors import bad_request
from headstart.server.text.answer_blocks import Block
from headstart.server.text.templates import Message


class Conversation:
    """Thoughts, text and calls of the assistant, in this order, are one message.

    ``earlier``: messages that come first.
    """

    def __init__(self, earlier: Iterable[Message] = ()) -> None:
        self.messages: list[Message] = list(earlier)
        self._called = {
            call["id"] for message in self.messages for call in message.get("tool_calls", ())
        }

    def say(self, role: str, text: str) -> None:
        """A text; the assistant's goes with thoughts before it."""
        last = self._assistants()
        if role != "assistant" or last is None or last["content"] or "tool_calls" in last:
            self.messages.append({"role": role, "content": text})
        else:
            last["content"] = text

    def think(self, text: str) -> None:
        """Thoughts of the assistant, under both names that templates know."""
        thought = {"reasoning_content": text, "reasoning": text}
        self.messages.append({"role": "assistant", "content": ""} | thought)

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """A call; it goes with what the assistant said last."""
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

    def answer(self, blocks: Sequence[Block]) -> None:
        """An answer of this server."""
        for block in blocks:
            match block.kind:
                case "text":
                    self.say("assistant", block.text)
                case "thought":
                    self.think(block.text)
                case "call":
                    self.call(block.call_id, block.name, arguments_object(block.text))

    def _assistants(self) -> Message | None:
        """The last message, if it is the assistant's."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return None
