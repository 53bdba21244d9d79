"""Tools in requests: what they may be, which of them have to be called, and calls in messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from pydantic import WithJsonSchema

from headstart.server.generation.chat import ToolUse
from headstart.server.http.bounds import has_values
from headstart.server.http.errors import APIError, bad_request, invalid
from headstart.server.http.policy import Notes
from headstart.server.settings import ServerSettings
from headstart.server.text.answer_format import AnswerFormat
from headstart.server.text.templates import Tools
from headstart.server.text.tool_formats.schemas import Function

MAX_ARGUMENT_VALUES = 64 * 1024
"""In the arguments of one call of a message; an object counts as several."""

NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")

ToolsField = Annotated[
    Any,
    WithJsonSchema({"type": "array", "items": {"type": "object"}}, mode="validation"),
]
ToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["none", "auto", "required"]},
                *(
                    {
                        "type": "object",
                        "properties": {
                            "type": {"const": kind},
                            kind: {"type": "object", "properties": {"name": {"type": "string"}}},
                        },
                    }
                    for kind in ("function", "custom")
                ),
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "allowed_tools"},
                        "allowed_tools": {
                            "type": "object",
                            "properties": {
                                "mode": {"type": "string", "enum": ["auto", "required"]},
                                "tools": {"type": "array", "items": {"type": "object"}},
                            },
                        },
                    },
                },
            ]
        },
        mode="validation",
    ),
]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``mode``: "none", "auto" or "required". ``only``: the names of those that may be called; None
    for all. ``once``: there is one call at most."""

    mode: str = "auto"
    only: Sequence[str] | None = None
    once: bool = False


def check_number(tools: Sequence[Any], settings: ServerSettings) -> None:
    """Raise APIError for too many tools."""
    if len(tools) > settings.max_tools:
        raise bad_request(
            f"tools has {len(tools)} entries; at most {settings.max_tools} are allowed", "tools"
        )


def check_size(tool: Mapping[str, Any], path: str, settings: ServerSettings) -> None:
    """Raise APIError for a tool that is too large, as JSON."""
    if len(msgspec.json.encode(tool)) > settings.max_tool_bytes:
        raise bad_request(f"{path} is larger than {settings.max_tool_bytes} bytes", path)


def checked_tools(tools: Any, settings: ServerSettings) -> list[tuple[str, dict[str, Any]]]:
    """The tools of a request and their paths, within the limits; raises APIError."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise invalid("tools", "must be a list of tools")
    check_number(tools, settings)
    found: list[tuple[str, dict[str, Any]]] = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise invalid(path, "must be an object")
        check_size(tool, path, settings)
        found.append((path, tool))
    return found


def named_functions(given: Sequence[tuple[Any, str]]) -> list[Function]:
    """Functions, each beside its path, checked: no two have one name; raises APIError."""
    functions: list[Function] = []
    names: set[str] = set()
    for value, path in given:
        functions.append(_checked_function(value, path))
        name = functions[-1]["name"]
        if name in names:
            raise bad_request(f"{path}.name: {name!r} is given twice", f"{path}.name")
        names.add(name)
    return functions


def _checked_function(function: Any, path: str) -> Function:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(path, "must be an object with a name")
    if not NAME.fullmatch(function["name"]):
        raise invalid(f"{path}.name", "must have 1 to 128 characters of a-z, A-Z, 0-9, _ and -")
    given = {key: value for key, value in function.items() if value is not None}
    for key, kind, words in (
        ("description", str, "a string"),
        ("strict", bool, "true or false"),
        ("parameters", dict, "a JSON schema"),
    ):
        if key in given and not isinstance(given[key], kind):
            raise invalid(f"{path}.{key}", f"must be {words}")
    if (given.get("parameters", {}).get("type") or "object") != "object":
        raise invalid(f"{path}.parameters", 'must be a schema of type "object"')
    return given


def as_tools(functions: Sequence[Function]) -> Tools | None:
    """Functions as templates take them; what asks for a grammar is none of the model's business."""
    return [
        {
            "type": "function",
            "function": {key: value for key, value in function.items() if key != "strict"},
        }
        for function in functions
    ] or None


def use_of(
    functions: list[Function], choice: ToolChoice, parallel: bool | None, answers: AnswerFormat
) -> ToolUse:
    """What may be done with checked functions; raises APIError.

    The template shows all of them, whatever may be called: prompts that differ in that alone share
    their KV.
    """
    if not functions:
        if choice.mode == "required" or choice.only is not None:
            raise bad_request("tool_choice needs tools", "tool_choice")
        return ToolUse()
    shown = as_tools(functions)
    if choice.mode == "none":
        return ToolUse(shown)
    if answers.calls is None:
        raise bad_request(
            "this server does not read tool calls, or does not know how this model writes them: "
            "see --tool-call-parser",
            "tools",
            "unsupported_parameter",
        )
    if choice.only is not None:
        by_name = {function["name"]: function for function in functions}
        for name in choice.only:
            if name not in by_name:
                raise bad_request(f"tool_choice: there is no tool {name[:80]!r}", "tool_choice")
        functions = [by_name[name] for name in dict.fromkeys(choice.only)]
    strict = any(function.get("strict") for function in functions)
    return ToolUse(
        tools=shown,
        functions=functions,
        forced=choice.mode == "required",
        followed=strict or choice.only is not None or answers.told_by_us,
        parallel=parallel is not False and not choice.once,
    )


def checked_choice(choice: Any, *, nested: bool, notes: Notes | None = None) -> ToolChoice:
    """What ``tool_choice`` says; raises APIError. ``nested``: names stand in ``function`` or
    ``custom``, and what is allowed in ``allowed_tools``, as in chats. ``notes`` are told of fields
    that are not known."""
    notes = notes or Notes()
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise invalid("tool_choice", 'must be "none", "auto", "required" or name a function')
        return ToolChoice(choice)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind in ("function", "custom"):
        return ToolChoice("required", [_chosen(choice, "tool_choice", nested, notes)], once=True)
    if kind != "allowed_tools":
        raise invalid(
            "tool_choice",
            'must be a string or an object of type "function", "custom" or "allowed_tools"',
        )
    path, allowed = "tool_choice", choice
    if nested:
        _note_others(choice, ("type", "allowed_tools"), path, notes)
        path, allowed = f"{path}.allowed_tools", choice.get("allowed_tools")
        if not isinstance(allowed, dict):
            raise invalid(path, "must be an object")
    known = ("mode", "tools") if nested else ("type", "mode", "tools")
    _note_others(allowed, known, path, notes)
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise invalid(f"{path}.mode", 'must be "auto" or "required"')
    if not isinstance(tools, list) or not tools:
        raise invalid(f"{path}.tools", "must be a list of tools")
    names = [_chosen(tool, f"{path}.tools[{i}]", nested, notes) for i, tool in enumerate(tools)]
    return ToolChoice(mode, names)


def _chosen(tool: Any, path: str, nested: bool, notes: Notes) -> str:
    """The name of a tool in a choice."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    named, key = tool, "name"
    if nested and kind in ("function", "custom"):
        named, key = tool.get(kind), kind
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or kind not in ("function", "custom"):
        shown = '"function": {"name": ...}' if nested else '"name": ...'
        raise invalid(path, f'must be {{"type": "function", {shown}}}')
    _note_others(tool, ("type", key), path, notes)
    return name


def _note_others(given: dict[str, Any], known: Collection[str], path: str, notes: Notes) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            notes.unknown(f"{path}.{name[:80]}")


def written_arguments(text: str) -> dict[str, Any] | str:
    """Arguments as templates take them: an object, or what a model wrote that is none."""
    try:
        return parsed_arguments(text, "")
    except APIError:
        return text


def arguments_object(text: str) -> dict[str, Any]:
    """Arguments that a model wrote; what is no object is kept as text, as Anthropic's documentation
    of streamed arguments has it: ``{"INVALID_JSON": text}``."""
    try:
        return parsed_arguments(text, "")
    except APIError:
        return {"INVALID_JSON": text}


def parsed_arguments(arguments: str, path: str) -> dict[str, Any]:
    """The JSON text of an object, or nothing for none; raises APIError."""
    if not arguments.strip():
        return {}
    if has_values(arguments.encode(), MAX_ARGUMENT_VALUES):
        raise invalid(
            path, f"must be the JSON text of an object of at most {MAX_ARGUMENT_VALUES} values"
        )
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        reason = str(error).split(" - ")[0]
        raise invalid(path, f"must be the JSON text of an object: {reason}") from error
