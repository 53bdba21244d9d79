"""The messages of /v1/messages as messages for the template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from headstart.server.api.anthropic_messages.blocks import (
    Block,
    BlockReader,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from headstart.server.api.conversation import Conversation
from headstart.server.api.fields import ContentField, Ignored
from headstart.server.api.tools import arguments_object
from headstart.server.http.errors import bad_request, invalid
from headstart.server.http.policy import Advisory, Body, Notes
from headstart.server.text.templates import Ending, Message


class MessageBody(Body):
    """``clear_at``, ``output_config``: of system messages."""

    role: Literal["user", "assistant", "system"]
    content: ContentField = None
    clear_at: Annotated[Any, Advisory(harmless=("never",))] = None
    output_config: Annotated[Any, Advisory(harmless=({},))] = None
    cache_control: Ignored = None


class Reader:
    """Puts messages into a conversation; its methods raise APIError.

    A system message among the others stays one where the template writes it in its place
    (``later_system``). Elsewhere it becomes text between ``<system-reminder>`` and
    ``</system-reminder>`` at the end of the user or tool message before it; behind an assistant's
    it begins the next user message. Either way what stands before it in the prompt is what it was
    without it, so its KV is used again, and users and assistants still alternate. System messages
    at the beginning, or side by side, are one.
    """

    def __init__(self, notes: Notes, *, most_blocks: int, later_system: bool) -> None:
        self._notes = notes
        self._blocks = BlockReader(notes, most_blocks)
        self._later_system = later_system
        self._conversation = Conversation()
        self._called: set[str] = set()
        self._reminders: list[str] = []
        self._unreadable: Block | None = None

    @property
    def messages(self) -> list[Message]:
        return self._conversation.messages

    def system(self, content: Any, path: str) -> None:
        """A system message; null is none."""
        text = "" if content is None else self._blocks.text(content, path)
        if not text:
            return
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "system":
            last["content"] += f"\n{text}"
        elif last is None or self._later_system:
            self._conversation.say("system", text)
        elif last["role"] == "assistant":
            self._reminders.append(_reminder(text))
        else:
            last["content"] += f"\n\n{_reminder(text)}"

    def add(self, message: MessageBody, path: str) -> None:
        """A message; ``path`` is that of its content."""
        content = message.content
        match message.role:
            case "system":
                self.system(content, path)
            case "user":
                self._user(content, path)
            case "assistant":
                self._say_reminders()
                self._assistant(content, path)

    def end(self) -> Ending:
        """How the chat ends: an assistant's text is gone on from."""
        self._say_reminders()
        if self._unreadable is not None:
            raise bad_request(
                f"the last user message has nothing but blocks like {self._unreadable.type!r}: "
                "this model reads text only",
                "messages",
            )
        if self.messages and self.messages[-1] == {"role": "assistant", "content": ""}:
            self.messages.pop()
        if not self.messages:
            raise bad_request("messages must have one with content", "messages")
        last = self.messages[-1]
        if last["role"] != "assistant":
            return "opened"
        if "tool_calls" in last or not last["content"]:
            raise bad_request(
                "the last message must be a user's, or an assistant's text to go on from",
                "messages",
            )
        if last["content"] != last["content"].rstrip():  # tokens begin with spaces
            raise bad_request(
                "messages: final assistant content cannot end with trailing whitespace", "messages"
            )
        return "continued"

    def _user(self, content: Any, path: str) -> None:
        if content == []:
            raise invalid(path, "must not be empty")
        self._unreadable = None
        texts: list[str] = []
        readable = False
        unread: Block | None = None
        before = len(self.messages)
        for block, where in self._blocks.blocks(content, "user", path):
            if isinstance(block, ToolResultBlock):
                readable = True
                self._result(block, where, texts)
                continue
            words = self._blocks.words(block, where)
            if words is None:
                unread = block
            readable = readable or bool(words)
            texts.append(f"[{block.type}]" if words is None else words)
        self._say(texts)
        if len(self.messages) == before:
            self._user_turn("")
        if not readable:
            self._unreadable = unread

    def _say(self, texts: list[str]) -> None:
        """What the user has said since the last result, if anything."""
        if text := "\n".join(filter(None, texts)):
            self._user_turn(text)
        texts.clear()

    def _say_reminders(self) -> None:
        if self._reminders:
            self._user_turn("")

    def _user_turn(self, text: str) -> None:
        self._conversation.say("user", "\n\n".join(filter(None, (*self._reminders, text))))
        self._reminders = []

    def _result(self, block: ToolResultBlock, path: str, texts: list[str]) -> None:
        text = ""
        if block.content is not None:
            text = self._blocks.text(block.content, f"{path}.content")
        if block.is_error:  # templates know no field for it
            text = f"Error: {text}"
        where = f"{path}.tool_use_id"
        if block.tool_use_id not in self._called:  # clients drop old messages
            self._notes.ignore(where)
            texts.append(text)
            return
        self._say(texts)
        self._conversation.result(block.tool_use_id, text, where)
        if self._reminders:
            self.messages[-1]["content"] += "\n\n" + "\n\n".join(self._reminders)
            self._reminders = []

    def _assistant(self, content: Any, path: str) -> None:
        texts: list[str] = []
        empty = True

        def flush() -> None:
            nonlocal empty
            if text := "\n".join(filter(None, texts)):
                self._conversation.say("assistant", text)
                empty = False
            texts.clear()

        for block, where in self._blocks.blocks(content, "assistant", path):
            match block:
                case ThinkingBlock():
                    flush()
                    self._conversation.think(block.thinking)
                    empty = False
                case ToolUseBlock():
                    flush()
                    self._conversation.call(block.id, block.name, _input(block.input))
                    self._called.add(block.id)
                    empty = False
                case _:
                    # It is not to write such as "[image]" itself.
                    texts.append(self._blocks.words(block, where) or "")
        flush()
        if empty:
            self._conversation.say("assistant", "")


def _reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def _input(value: Any) -> dict[str, Any]:
    """The arguments of a call; what is no object is kept as ``arguments_object`` keeps it."""
    if isinstance(value, dict):
        return value
    if value is None:
        return {}
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return arguments_object(text)
