"""The input of /v1/responses, a string or items, as messages for the template."""

from __future__ import annotations

from typing import Any

from headstart.server.api.openai_responses.conversation import Conversation
from headstart.server.api.tools import parsed_arguments
from headstart.server.http.errors import bad_request, invalid, refuse_extras, string_at
from headstart.server.settings import ServerSettings

ROLES = ("system", "developer", "user", "assistant")

# Type of item -> its fields, and what others may be beside null: what answers are given back with.
_FIELDS: dict[str, tuple[str, ...]] = {
    "message": ("type", "role", "content", "id", "status"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status"),
    "function_call_output": ("type", "call_id", "output", "id", "status"),
    "reasoning": ("type", "content", "summary", "id", "status"),
}
_REFUSED: dict[str, tuple[Any, ...]] = {
    "caller": (),
    "encrypted_content": (),
    "namespace": (),
    "phase": ("commentary", "final_answer"),
}


def add_input(conversation: Conversation, value: Any, settings: ServerSettings) -> None:
    """Put the field ``input`` into a conversation; raises APIError."""
    if isinstance(value, str):
        conversation.say("user", value)
        return
    if not isinstance(value, list) or not value:
        raise bad_request("input must be a string or a list of items", "input", "invalid_value")
    if len(value) > settings.max_messages:
        raise bad_request(
            f"input has {len(value)} entries; at most {settings.max_messages} are allowed", "input"
        )
    for i, item in enumerate(value):
        _add_item(conversation, item, f"input[{i}]")
    if not conversation.messages:
        raise bad_request("input has no message", "input")


def _add_item(conversation: Conversation, item: Any, path: str) -> None:
    if not isinstance(item, dict):
        raise invalid(path, "must be an object")
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise bad_request(
            f"{path}: items of type {str(kind)[:40]!r} are not supported",
            f"{path}.type",
            "unsupported_parameter",
        )
    refuse_extras(item, _REFUSED, f"{path}.", known=_FIELDS[kind])
    match kind:
        case "message":
            role = item.get("role")
            if role not in ROLES:
                raise invalid(f"{path}.role", f"must be one of {', '.join(ROLES)}")
            text = texts(item.get("content"), f"{path}.content")
            conversation.say("system" if role == "developer" else str(role), text)
        case "function_call":
            call_id, name, arguments = (
                string_at(item, key, path) for key in ("call_id", "name", "arguments")
            )
            parsed = parsed_arguments(arguments, f"{path}.arguments")
            conversation.call(call_id, name, parsed)
        case "function_call_output":
            call_id = string_at(item, "call_id", path)
            conversation.result(
                call_id, texts(item.get("output"), f"{path}.output"), f"{path}.call_id"
            )
        case "reasoning":
            thought = [
                texts(item[key], f"{path}.{key}") for key in ("content", "summary") if item.get(key)
            ]
            if thought:
                conversation.think(thought[0])


def texts(content: Any, path: str) -> str:
    """A string, or the texts of a list of parts, joined by newlines; raises APIError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(path, "must be a string or a list of parts")
    found: list[str] = []
    for i, part in enumerate(content):
        where = f"{path}[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise invalid(where, "must be an object with a type")
        if part["type"] not in (
            "input_text",
            "output_text",
            "text",
            "reasoning_text",
            "summary_text",
        ):
            raise bad_request(
                f"{where}: parts of type {part['type'][:40]!r} are not supported",
                where,
                "unsupported_parameter",
            )
        known = ("type", "text", "logprobs")  # parts of answers have these
        refuse_extras(part, {"annotations": ([],)}, f"{where}.", known=known)
        found.append(string_at(part, "text", where))
    return "\n".join(found)
