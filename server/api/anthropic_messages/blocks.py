"""Messages of /v1/messages, which consist of blocks, as messages for the template."""

from __future__ import annotations

from typing import Any

from headstart.server.api.openai_responses.conversation import Conversation
from headstart.server.http.errors import bad_request, invalid, refuse_extras, string_at

# Type of block -> its fields.
_FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("type", "text", "cache_control"),
    "thinking": ("type", "thinking", "signature"),
    "tool_use": ("type", "id", "name", "input", "cache_control"),
    "tool_result": ("type", "tool_use_id", "content", "is_error", "cache_control"),
}
_REFUSED: dict[str, tuple[Any, ...]] = {
    "caller": ({"type": "direct"},),
    "citations": ([],),
    "toolset_name": (),
}
_ROLES = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


def add_message(conversation: Conversation, role: str, content: Any, path: str) -> None:
    """Put the content of a message, a string or blocks, into a conversation; raises APIError.

    Texts side by side are one, joined by newlines. Each result of a tool is a message of its own.
    """
    if isinstance(content, str):
        conversation.say(role, content)
        return
    if not isinstance(content, list) or not content:
        raise invalid(path, "must be a string or a list of blocks")
    said: list[str] = []

    def flush() -> None:
        if said:
            conversation.say(role, "\n".join(said))
            said.clear()

    for i, value in enumerate(content):
        where = f"{path}[{i}]"
        block = _checked(value, _ROLES[role], where)
        if block["type"] == "text":
            said.append(string_at(block, "text", where))
            continue
        flush()
        _add_block(conversation, block, where)
    flush()


def _add_block(conversation: Conversation, block: dict[str, Any], path: str) -> None:
    match block["type"]:
        case "thinking":
            conversation.think(string_at(block, "thinking", path))
        case "tool_use":
            given = block.get("input")
            if not isinstance(given, dict):
                raise invalid(f"{path}.input", "must be an object")
            conversation.call(string_at(block, "id", path), string_at(block, "name", path), given)
        case "tool_result":
            text = text_of(block.get("content", ""), f"{path}.content")
            if block.get("is_error") not in (None, True, False):
                raise invalid(f"{path}.is_error", "must be true or false")
            if block.get("is_error"):  # templates know no field for it
                text = f"Error: {text}"
            call_id = string_at(block, "tool_use_id", path)
            conversation.result(call_id, text, f"{path}.tool_use_id")


def text_of(content: Any, path: str) -> str:
    """A string, or text blocks, joined by newlines; raises APIError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(path, "must be a string or a list of text blocks")
    return "\n".join(
        string_at(_checked(block, ("text",), f"{path}[{i}]"), "text", f"{path}[{i}]")
        for i, block in enumerate(content)
    )


def _checked(block: Any, kinds: tuple[str, ...], path: str) -> dict[str, Any]:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(kind, str):
        raise invalid(path, "must be an object with a type")
    if kind not in _FIELDS:
        raise bad_request(
            f"{path}: blocks of type {kind[:40]!r} are not supported: this model reads text only",
            path,
        )
    if kind not in kinds:
        raise bad_request(f"{path}: a block of type {kind!r} does not belong here", path)
    refuse_extras(block, _REFUSED, f"{path}.", known=_FIELDS[kind])
    return block
