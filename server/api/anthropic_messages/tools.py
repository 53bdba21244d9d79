"""The fields ``tools`` and ``tool_choice`` of /v1/messages."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from headstart.server.api.fields import Ignored
from headstart.server.api.tools import (
    ToolChoice,
    checked_tools,
    named_functions,
    use_of,
)
from headstart.server.generation.chat import ToolUse
from headstart.server.http.errors import APIError, bad_request
from headstart.server.http.policy import Advisory, Body, Notes, body_at
from headstart.server.http.runtime import Runtime

_MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
_HOSTED = re.compile(
    "(advisor|bash|browser_toolset|code_execution|computer|computer_toolset|memory|text_editor|"
    r"tool_search_tool_bm25|tool_search_tool_regex|web_fetch|web_search)_\d{8}|(mcp_toolset)"
)
"""Types of tools that Anthropic's servers run, or whose schemas its models have learnt."""


class Tool(Body):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Ignored = None
    defer_loading: Annotated[Any, Advisory(harmless=(False,))] = None
    eager_input_streaming: Annotated[Any, Advisory(harmless=(False,))] = None
    input_examples: Annotated[Any, Advisory(harmless=([],))] = None
    allowed_callers: Annotated[Any, Advisory(harmless=([], ["direct"]))] = None


class ToolChoiceBody(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


def tool_use(tools: Any, choice: ToolChoiceBody | None, runtime: Runtime, notes: Notes) -> ToolUse:
    """What the answer may do with the tools; raises APIError.

    Hosted tools are left out, with a note, unless one of them has to be called.
    """
    functions: list[tuple[Any, str]] = []
    hosted: dict[str, str] = {}
    for path, value in checked_tools(tools, runtime.settings):
        kind = value.get("type")
        if isinstance(kind, str) and (match := _HOSTED.fullmatch(kind)):
            notes.ignore(f"tools[type={match[1] or match[2]}]")
            hosted[str(value.get("name", kind))] = kind
            continue
        if kind not in (None, "custom"):
            raise bad_request(
                f"{path}: tools of type {str(kind)[:40]!r} are not supported", f"{path}.type"
            )
        tool = body_at(Tool, value, path, notes)
        function = {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
        functions.append((function, path))
    choice = choice or ToolChoiceBody(type="auto")
    only = choice.name if choice.type == "tool" else None
    if choice.type == "tool" and only is None:
        raise bad_request("tool_choice.name must be a string", "tool_choice.name")
    if only in hosted:
        raise _hosted(hosted[only])
    if choice.type == "any" and hosted and not functions:
        raise _hosted(next(iter(hosted.values())))
    chosen = ToolChoice(_MODES[choice.type], None if only is None else [only], only is not None)
    alone = choice.disable_parallel_tool_use
    return use_of(named_functions(functions), chosen, not alone, runtime.answers)


def _hosted(kind: str) -> APIError:
    return bad_request(
        f"tool_choice asks for a tool of type {kind!r}: headstart runs no tools, and only those "
        "with an input_schema can be shown to the model",
        "tool_choice",
        "unsupported_parameter",
    )
