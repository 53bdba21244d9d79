"""Tools of a chat, and the calls that its messages hold.

A custom tool takes a text instead of an object. The model sees a function with the one parameter
``input``; clients see its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import FailFast

from headstart.server.api.tools import check_number, check_size, named_functions, written_arguments
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Advisory, Body
from headstart.server.settings import ServerSettings
from headstart.server.text.tool_formats.schemas import Function

INPUT = "input"


class FunctionBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def function(self) -> Function:
        given = {name: getattr(self, name) for name in FunctionBody.model_fields}
        return {name: value for name, value in given.items() if value is not None}


class CustomGrammar(Body):
    syntax: Literal["lark", "regex"]
    definition: str


class CustomFormat(Body):
    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None

    def pattern(self, path: str) -> str | None:
        """The regex that an input has to match, if any; raises APIError."""
        if self.type == "text":
            return None
        path = f"{path}.grammar"
        if self.grammar is None:
            raise bad_request(f"{path} is required", path, "missing_required_parameter")
        if self.grammar.syntax != "regex":
            path = f"{path}.syntax"
            raise bad_request(
                f"{path} 'lark' is not supported: use 'regex'", path, "unsupported_parameter"
            )
        return self.grammar.definition


class CustomTool(Body):
    name: str
    description: str | None = None
    format: CustomFormat | None = None

    def function(self, path: str) -> Function:
        """What the model gets to see; raises APIError."""
        text: dict[str, Any] = {"type": "string"}
        pattern = self.format.pattern(f"{path}.format") if self.format else None
        if pattern is not None:
            text["pattern"] = f"^(?:{pattern})$"
        function: Function = {
            "name": self.name,
            "parameters": {"type": "object", "properties": {INPUT: text}, "required": [INPUT]},
        }
        if self.description is not None:
            function["description"] = self.description
        return function if pattern is None else function | {"strict": True}


class Tool(Body):
    type: Literal["function", "custom"]
    function: FunctionBody | None = None
    custom: CustomTool | None = None
    cache_control: Annotated[Any, Advisory()] = None


ToolList = Annotated[list[Tool] | None, FailFast()]


def functions_of(tools: Sequence[Tool] | None, settings: ServerSettings) -> list[Function]:
    """Tools as functions, checked; raises APIError."""
    tools = tools or ()
    check_number(tools, settings)
    found: list[tuple[Function, str]] = []
    for i, tool in enumerate(tools):
        path = f"tools[{i}].{tool.type}"
        given = tool.function if tool.type == "function" else tool.custom
        if given is None:
            raise bad_request(f"{path} is required", path, "missing_required_parameter")
        function = given.function(path) if isinstance(given, CustomTool) else given.function()
        check_size(function, f"tools[{i}]", settings)
        found.append((function, path))
    return named_functions(found)


def custom_names(tools: Sequence[Tool] | None) -> frozenset[str]:
    """The names of the tools that take a text."""
    return frozenset(
        tool.custom.name for tool in tools or () if tool.type == "custom" and tool.custom
    )


def custom_input(arguments: str) -> str:
    """The text that a call of a custom tool has; arguments that are something else, as one that
    was cut, as they were written."""
    written = written_arguments(arguments)
    text = written.get(INPUT) if isinstance(written, dict) else None
    return text if isinstance(text, str) else arguments


class CalledFunction(Body):
    name: str
    arguments: str | None = None


class CalledCustom(Body):
    name: str
    input: str


class ToolCall(Body):
    """``index``: those who put streamed calls together keep it."""

    id: str
    type: Literal["function", "custom"] | None = None
    function: CalledFunction | None = None
    custom: CalledCustom | None = None
    index: int | None = None

    def plain(self, path: str) -> dict[str, Any]:
        """The call as templates take it; raises APIError. Arguments that are no object are the text
        that the model wrote: a chat with such a call goes on."""
        arguments: dict[str, Any] | str
        if self.type == "custom" and self.custom is not None:
            name, arguments = self.custom.name, {INPUT: self.custom.input}
        elif self.type != "custom" and self.function is not None:
            name, arguments = self.function.name, written_arguments(self.function.arguments or "")
        else:
            path = f"{path}.{self.type or 'function'}"
            raise bad_request(f"{path} is required", path, "missing_required_parameter")
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


ToolCallList = Annotated[list[ToolCall] | None, FailFast()]
