"""The tools of /v1/responses: functions for the model, and back to what the client calls them.

function        as it is
custom          a function with one argument, ``input``
namespace       its tools, named ``NAMESPACE__NAME``
anything else   runs on OpenAI's servers, or nowhere: left out, and named as ignored
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import WithJsonSchema

from headstart.server.api.fields import Ignored
from headstart.server.api.tools import NAME, ToolChoice, check_size, checked_choice, named_functions
from headstart.server.http.errors import APIError, bad_request, invalid
from headstart.server.http.policy import Advisory, Body, Notes, body_at
from headstart.server.settings import ServerSettings
from headstart.server.text.tool_formats.schemas import Function

DEFAULT_NAMESPACE = "functions"
"""What Codex takes calls of no namespace to be in."""

ToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}, mode="validation"
    ),
]


class ToolBody(Body):
    """What tools that the model may call have in common."""

    type: str
    name: str
    description: str | None = None
    allowed_callers: Annotated[Any, Advisory(harmless=([], ["direct"]))] = None
    defer_loading: Annotated[Any, Advisory(harmless=(False,))] = None


class FunctionBody(ToolBody):
    parameters: Any = None
    strict: Any = None
    output_schema: Ignored = None


class TextFormatBody(Body):
    type: Literal["text"]


class GrammarBody(Body):
    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


class CustomBody(ToolBody):
    """``format``: of the input."""

    format: Any = None


class NamespaceBody(Body):
    type: str
    name: str
    description: str | None = None
    tools: Any = None


class ChosenBody(Body):
    """A tool in ``tool_choice``; ``tools``: what may be called, by ``mode``."""

    type: str
    name: str | None = None
    namespace: str | None = None
    server_label: Ignored = None
    mode: Literal["auto", "required"] | None = None
    tools: Any = None


@dataclass(frozen=True, slots=True)
class Offered:
    """A tool as its client calls it. ``shown``: what the model does."""

    shown: str
    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """``functions``: as the model gets them. ``by_name``: by the model's name, and by the client's
    where that is one tool's. ``left_out``: types of the others."""

    functions: list[Function] = field(default_factory=list)
    by_name: Mapping[str, Offered] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def tool(self, shown: str) -> Offered:
        """The tool that a model calls so."""
        return self.by_name.get(shown, Offered(shown, shown))

    def choice(self, value: Any, settings: ServerSettings, notes: Notes) -> ToolChoice:
        """What ``tool_choice`` says; raises APIError."""
        path = "tool_choice"
        if value is None or isinstance(value, str):
            choice = checked_choice(value, nested=False)
            if choice.mode == "required" and self.left_out and not self.functions:
                raise _not_run(path, min(self.left_out))
            return choice
        chosen = body_at(ChosenBody, value, path, notes)
        if chosen.type == "allowed_tools":
            return self._allowed(chosen, settings, notes)
        return ToolChoice("required", [self._named(chosen, path)], once=True)

    def _allowed(self, chosen: ChosenBody, settings: ServerSettings, notes: Notes) -> ToolChoice:
        path, tools = "tool_choice.tools", chosen.tools
        if chosen.mode is None:
            raise invalid("tool_choice.mode", 'must be "auto" or "required"')
        if not isinstance(tools, list) or not 1 <= len(tools) <= settings.max_tools:
            raise invalid(path, f"must be a list of 1 to {settings.max_tools} tools")
        names: list[str] = []
        for i, tool in enumerate(tools):
            allowed = body_at(ChosenBody, tool, f"{path}[{i}]", notes)
            if allowed.type in ("function", "custom"):
                names.append(self._named(allowed, f"{path}[{i}]"))
            else:
                notes.ignore(f"{path}[{i}].type={allowed.type[:40]}")
        if names:
            return ToolChoice(chosen.mode, names)
        if chosen.mode == "required":
            raise _not_run("tool_choice", tools[0]["type"])
        return ToolChoice("none")

    def _named(self, chosen: ChosenBody, path: str) -> str:
        """The model's name of a tool that is chosen."""
        if chosen.type not in ("function", "custom"):
            raise _not_run("tool_choice", chosen.type)
        if chosen.name is None:
            raise invalid(path, f'must be {{"type": "{chosen.type}", "name": ...}}')
        name = qualified(chosen.namespace, chosen.name)
        return self.by_name[name].shown if name in self.by_name else name


def qualified(namespace: str | None, name: str) -> str:
    """What the model calls a tool of a namespace: as long as a name may be that long, both."""
    if namespace in (None, "", DEFAULT_NAMESPACE):
        return name
    both = f"{namespace}__{name}"
    return both if NAME.fullmatch(both) else name


def offered_tools(tools: Any, settings: ServerSettings, notes: Notes) -> OfferedTools:
    """The tools of a request; raises APIError."""
    functions: list[tuple[Function, str]] = []
    offered: list[Offered] = []
    left_out: set[str] = set()
    for path, namespace, tool in _each(tools, settings, notes):
        kind = tool.get("type")
        if not isinstance(kind, str):
            raise invalid(f"{path}.type", "must be a string")
        if kind not in ("function", "custom"):
            notes.ignore(f"{path}.type={kind[:40]}")
            left_out.add(kind[:40])
            continue
        if len(functions) == settings.max_tools:
            raise bad_request(f"tools: at most {settings.max_tools} are allowed", "tools")
        check_size(tool, path, settings)
        if kind == "function":
            function = _function(body_at(FunctionBody, tool, path, notes))
        else:
            function = _custom(body_at(CustomBody, tool, path, notes), path, notes)
        name = function["name"]
        function["name"] = qualified(namespace, name)
        functions.append((function, path))
        offered.append(Offered(function["name"], name, namespace, kind == "custom"))
    names = [tool.name for tool in offered]
    by_name = {tool.name: tool for tool in offered if names.count(tool.name) == 1}
    by_name |= {tool.shown: tool for tool in offered}
    return OfferedTools(named_functions(functions), by_name, frozenset(left_out))


def _each(
    tools: Any, settings: ServerSettings, notes: Notes, path: str = "tools"
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Each tool: its path, its namespace, and what it is."""
    if tools is None:
        return
    if not isinstance(tools, list):
        raise invalid(path, "must be a list of tools")
    if len(tools) > settings.max_tools:
        raise bad_request(
            f"{path} has {len(tools)} entries; at most {settings.max_tools} are allowed", path
        )
    for i, tool in enumerate(tools):
        where = f"{path}[{i}]"
        if not isinstance(tool, dict):
            raise invalid(where, "must be an object")
        if tool.get("type") != "namespace" or path != "tools":
            yield where, None, tool
            continue
        namespace = body_at(NamespaceBody, tool, where, notes)
        for inner, _, member in _each(namespace.tools, settings, notes, f"{where}.tools"):
            yield inner, namespace.name, member


def _function(tool: FunctionBody) -> Function:
    given = {
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"name": tool.name} | {key: value for key, value in given.items() if value is not None}


def _custom(tool: CustomBody, path: str, notes: Notes) -> Function:
    """A function that takes the input as its argument. A regex is followed; other grammars are told
    to the model."""
    told, given, strict = tool.description or "", {"type": "string"}, False
    format, path = tool.format, f"{path}.format"
    if isinstance(format, dict) and format.get("type") == "grammar":
        grammar = body_at(GrammarBody, format, path, notes)
        told += f"\n\nThe input follows this {grammar.syntax} grammar:\n{grammar.definition}"
        if grammar.syntax == "regex":
            given["pattern"], strict = f"^(?:{grammar.definition})$", True
        else:
            notes.ignore(f"{path}.syntax={grammar.syntax}")
    elif format is not None:
        body_at(TextFormatBody, format, path, notes)
    return {
        "name": tool.name,
        "description": told.strip(),
        "parameters": {
            "type": "object",
            "properties": {"input": given},
            "required": ["input"],
            "additionalProperties": False,
        },
        "strict": strict,
    }


def _not_run(path: str, kind: str) -> APIError:
    return bad_request(
        f"{path} asks for {kind[:40]!r}, which this server does not run; it has calls of functions "
        "and of custom tools",
        path,
        "unsupported_parameter",
    )
