"""The messages of a chat: their types, and what templates get of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, WithJsonSchema

from headstart.server.api.fields import Ignored
from headstart.server.api.openai_chat.tools import ToolCallList
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Advisory, Body, Notes, Refused, body_at
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import Message

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _part_schema(kind: str) -> dict[str, Any]:
    properties = {"type": {"const": kind}, kind: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": list(properties)}


ChatContentField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"anyOf": [_part_schema("text"), _part_schema("refusal")]},
                },
                {"type": "null"},
            ]
        },
        mode="validation",
    ),
]


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class ChatMessage(Body):
    """``content``: a string, or a list of parts whose texts are joined by newlines; null only where
    the assistant's message has something else. ``developer`` is what OpenAI calls ``system`` since
    2024. ``reasoning``: vLLM's name for ``reasoning_content``."""

    role: Role
    content: ChatContentField = None
    name: str | None = None
    tool_calls: ToolCallList = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Annotated[Any, Advisory(harmless=([],))] = None
    cache_control: Ignored = None
    audio: Annotated[Any, Refused("this model reads text")] = None
    function_call: Annotated[Any, Refused("use tool_calls")] = None
    __slots__ = ("_said",)  # as Body's

    def settle(self, notes: Notes, prefix: str = "") -> None:
        super().settle(notes, prefix)
        texts = list(_texts(self.content, f"{prefix}content", notes))
        object.__setattr__(self, "_said", texts)

    def plain(self, path: str) -> Message:
        """The message as templates take it; raises APIError."""
        calls = [
            call.plain(f"{path}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls or ())
        ]
        reasoning = self.reasoning_content or self.reasoning
        if self.content is None and not (calls or reasoning or self.refusal):
            raise bad_request(
                f"{path}.content is required", f"{path}.content", "missing_required_parameter"
            )
        refusal = [self.refusal] if self.refusal else []
        message: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join([*object.__getattribute__(self, "_said"), *refusal]),
        }
        if self.name is not None:
            message["name"] = self.name
        for role, field, value in (
            ("assistant", "tool_calls", calls),
            ("assistant", "reasoning_content", reasoning),
            ("assistant", "refusal", self.refusal),
            ("tool", "tool_call_id", self.tool_call_id),
        ):
            if value and self.role != role:
                raise bad_request(f"{path}.{field} goes with the role {role!r}", f"{path}.{field}")
            if value and field != "refusal":
                message[field] = value
        if reasoning:
            message["reasoning"] = reasoning  # templates know one name or the other
        return message


MessageList = Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]


def _texts(content: Any, path: str, notes: Notes) -> Iterator[str]:
    """The texts of a message's content; raises APIError."""
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise bad_request(f"{path} must be a string or a list of parts", path)
    for i, part in enumerate(content):
        where = f"{path}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise bad_request(f"{where} must be an object with a type", where, "invalid_value")
        if kind == "text":
            yield body_at(TextPart, part, where, notes).text
        elif kind == "refusal":
            yield body_at(RefusalPart, part, where, notes).refusal
        else:
            notes.refuse(where, f"its type is {kind[:40]!r}, and this model reads text only")


def plain_messages(messages: Sequence[ChatMessage], settings: ServerSettings) -> list[Message]:
    """The messages as templates take them; raises APIError, for too many of them, too."""
    if len(messages) > settings.max_messages:
        raise bad_request(
            f"messages has {len(messages)} entries; at most {settings.max_messages} are allowed",
            "messages",
        )
    plain = [message.plain(f"messages[{i}]") for i, message in enumerate(messages)]
    _check_results(plain)
    return plain


def _check_results(messages: Sequence[Message]) -> None:
    """Raise APIError for a tool's result that belongs to no call before it."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        called.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] != "tool":
            continue
        path = f"messages[{i}].tool_call_id"
        if "tool_call_id" not in message:
            raise bad_request(f"{path} is required", path, "missing_required_parameter")
        if message["tool_call_id"] not in called:
            raise bad_request(f"{path} is the id of no call before it", path)
