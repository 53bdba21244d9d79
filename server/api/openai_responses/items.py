"""Items, what conversations of /v1/responses consist of, as messages for the template.

Items of hosted tools and of types that nobody knows say nothing to the model: they are left out,
and named as ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from headstart.server.api.conversation import Conversation
from headstart.server.api.fields import Ignored
from headstart.server.api.openai_responses.store import Item
from headstart.server.api.openai_responses.tools import qualified
from headstart.server.api.tools import written_arguments
from headstart.server.http.errors import bad_request, invalid, string_at
from headstart.server.http.policy import Advisory, Body, Notes, body_at
from headstart.server.settings import ServerSettings

TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")

# Type of item -> what ids of this server begin with.
_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


class ItemBody(Body):
    """What items have in common; ``id`` and ``status`` are what answers are given back with."""

    type: str | None = None
    id: Any = None
    status: Any = None


class MessageBody(ItemBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    phase: Ignored = None


class CallBody(ItemBody):
    call_id: str
    name: str
    namespace: str | None = None
    caller: Annotated[Any, Advisory(harmless=({"type": "direct"},))] = None


class FunctionCallBody(CallBody):
    arguments: str


class CustomCallBody(CallBody):
    input: str


class OutputBody(ItemBody):
    call_id: str
    output: Any = None
    caller: Annotated[Any, Advisory(harmless=({"type": "direct"},))] = None


class ReasoningItemBody(ItemBody):
    content: Any = None
    summary: Any = None
    encrypted_content: Ignored = None


class PartBody(Body):
    """A text among the parts of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    logprobs: Any = None
    annotations: Annotated[Any, Advisory(harmless=([],))] = None
    cache_control: Ignored = None


def item_list(value: Any, path: str, settings: ServerSettings) -> list[Item]:
    """The field ``input``, or another list of items, each an object; raises APIError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string or a list of items", path, "invalid_value")
    if len(value) > settings.max_messages:
        raise bad_request(
            f"{path} has {len(value)} entries; at most {settings.max_messages} are allowed", path
        )
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise invalid(f"{path}[{i}]", "must be an object")
    return value


def item_type(item: Item) -> Any:
    """Messages and references may leave it out."""
    default = "item_reference" if "id" in item and "role" not in item else "message"
    return default if item.get("type") is None else item["type"]


def references(items: Sequence[Item], path: str) -> list[str]:
    """The ids that items refer to; raises APIError."""
    return [
        string_at(item, "id", f"{path}[{i}]")
        for i, item in enumerate(items)
        if item_type(item) == "item_reference"
    ]


def resolved(items: Sequence[Item], stored: Mapping[str, Item], path: str) -> list[Item]:
    """The items, with those that are referred to in their places; raises APIError."""
    found: list[Item] = []
    for i, item in enumerate(items):
        if item_type(item) == "item_reference":
            if item["id"] not in stored:
                raise bad_request(
                    f"{path}[{i}].id: there is no item {item['id'][:80]!r} stored",
                    f"{path}[{i}].id",
                    "item_not_found",
                )
            item = stored[item["id"]]
        found.append(item)
    return found


def add_items(conversation: Conversation, items: Sequence[Item], path: str, notes: Notes) -> None:
    """Put items, references apart, into a conversation; raises APIError."""
    for i, item in enumerate(items):
        _add_item(conversation, item, f"{path}[{i}]", notes)


def _add_item(conversation: Conversation, item: Item, path: str, notes: Notes) -> None:
    match item_type(item):
        case "message":
            message = body_at(MessageBody, item, path, notes)
            text = texts(message.content, f"{path}.content", notes)
            conversation.say("system" if message.role == "developer" else message.role, text)
        case "function_call":
            call = body_at(FunctionCallBody, item, path, notes)
            given = written_arguments(call.arguments)
            conversation.call(call.call_id, qualified(call.namespace, call.name), given)
        case "custom_tool_call":
            custom = body_at(CustomCallBody, item, path, notes)
            name = qualified(custom.namespace, custom.name)
            conversation.call(custom.call_id, name, {"input": custom.input})
        case "function_call_output" | "custom_tool_call_output":
            output = body_at(OutputBody, item, path, notes)
            text = texts(output.output, f"{path}.output", notes)
            conversation.result(output.call_id, text, f"{path}.call_id")
        case "reasoning":
            thought = body_at(ReasoningItemBody, item, path, notes)
            for key in ("content", "summary"):
                given = getattr(thought, key)
                if given and (text := texts(given, f"{path}.{key}", notes)):
                    conversation.think(text)
                    break
        case str(kind):
            notes.ignore(f"{path}.type={kind[:40]}")
        case _:
            raise invalid(f"{path}.type", "must be a string")


def texts(content: Any, path: str, notes: Notes) -> str:
    """A string, or the texts of a list of parts, joined by newlines; raises APIError.

    What is no text is refused, or beside a text leaves its kind in its place: ``[image]``.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(path, "must be a string or a list of parts")
    found: list[str] = []
    others: list[str] = []
    for i, part in enumerate(content):
        where = f"{path}[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise invalid(where, "must be an object with a type")
        if kind in TEXTS and len(part) == 2 and isinstance(part.get("text"), str):
            found.append(part["text"])  # there may be many
        elif kind in TEXTS or kind == "refusal":
            body = body_at(PartBody, part, where, notes)
            key = "refusal" if kind == "refusal" else "text"
            if (text := getattr(body, key)) is None:
                raise invalid(f"{where}.{key}", "must be a string")
            found.append(text)
        else:
            notes.ignore(f"{where}.type={kind[:40]}")
            found.append(f"[{kind.removeprefix('input_')[:40]}]")
            others.append(where)
    if others and len(others) == len(found):
        raise bad_request(
            f"{others[0]}: this model reads text only", others[0], "unsupported_parameter"
        )
    return "\n".join(found)


def stored_items(items: Sequence[Item]) -> list[Item]:
    """Items that have been checked, as they are listed: with ids, and content in parts."""
    return [_stored(item) for item in items]


def _stored(item: Item) -> Item:
    kind = item_type(item)
    stored = {key: value for key, value in item.items() if value is not None} | {"type": kind}
    if not isinstance(stored.get("id"), str):
        stored["id"] = new_id(_ID_PREFIXES.get(kind, "item"))
    if kind == "message":
        stored.setdefault("status", "completed")
        if isinstance(item["content"], str):
            part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
            if item["role"] == "assistant":
                part |= {"type": "output_text", "annotations": []}
            stored["content"] = [part]
    elif kind == "reasoning":
        stored.setdefault("summary", [])
    return stored


def new_id(prefix: str) -> str:
    """An id for an item."""
    return f"{prefix}_{secrets.token_hex(16)}"
