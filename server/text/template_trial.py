"""What a chat template can do with tools, found out once by rendering small chats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from headstart.server.text.tool_prompt import Abilities
from headstart.server.text.turn_marks import Message, Tools

Render = Callable[[Sequence[Message], Tools | None], str | None]
"""Renders messages and tools; None when the template refuses them."""

TOOL, CALLED, RESULT = "headstart_probe", "headstart_call", "headstart_result"
ARGUMENTS = {"headstart_key": "headstart_value"}
_AS_JSON = re.compile(r'"headstart_key": ?"headstart_value"')
_CALL_ID = "headstart"  # nine letters, as Mistral's templates want them


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}


USER = _says("user", "x")


def find_abilities(render: Render) -> Abilities:
    """What the template can do. One that refuses to say has tools."""
    schema = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}}
    function = {"name": TOOL, "description": TOOL, "parameters": schema}
    tools: Tools | None = [{"type": "function", "function": function}]
    rendered = (render(chat, tools) for chat in ([USER], [_says("system", "x"), USER]))
    writes_tools = TOOL in next((text for text in rendered if text is not None), TOOL)
    calls, without_text, as_text = _calls(render, tools if writes_tools else None)
    if writes_tools:
        return Abilities(calls_without_text=without_text, arguments_as_text=as_text)
    with_tools = _says("system", "x") | {"tools": TOOL}
    return Abilities(
        tools=False,
        tools_of_system=TOOL in (render([with_tools, USER], None) or ""),
        calls=calls,
        calls_without_text=without_text,
        arguments_as_text=as_text,
        system=_has_system_turn(render),
        users_in_a_row=_in_order(render, ["user", "assistant", "user", "user"]),
    )


def _calls(render: Render, tools: Tools | None) -> tuple[bool, bool, bool]:
    """Whether it writes calls, only where there is no text, with arguments as JSON text."""
    written: list[tuple[bool, bool, bool]] = []
    for content in ("", None):
        for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
            text = render(_calling_chat(content, arguments), tools) or ""
            if CALLED in text:
                found = (True, content is None, isinstance(arguments, str))
                if _AS_JSON.search(text):
                    return found
                written.append(found)
    return written[0] if written else (False, False, False)


def _calling_chat(content: str | None, arguments: Any) -> list[Message]:
    function = {"name": CALLED, "arguments": arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return [
        USER,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": _CALL_ID, "content": RESULT},
    ]


def _has_system_turn(render: Render) -> bool:
    return _in_order(render, ["system", "user", "assistant", "user"])


def _in_order(render: Render, roles: Sequence[str]) -> bool:
    """Whether a chat of these roles is written whole and in order."""
    texts = [f"headstart{i}" for i in range(len(roles))]
    rendered = render(list(map(_says, roles, texts)), None) or ""
    places = [rendered.find(text) for text in texts]
    return places[0] >= 0 and places == sorted(places)
