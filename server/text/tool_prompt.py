"""Tools in chats whose template knows none: written by us, into the turns that it knows.

    system      the functions, how to call them, and then the system message
    assistant   its text, and its calls as the format has them
    user        <tool_response>\\nresults\\n</tool_response>, those in a row in one turn

What stands before the chat's own texts depends on the tools alone, so that chats with the same
tools share their KV.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.server.text.tool_formats.format import ToolFormat
from headstart.server.text.turn_marks import Message, Tools

EXAMPLE = ("function_name", '{"parameter_name": "value"}')


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a chat template can do; what it cannot is done for it.

    tools: it writes them.
    tools_of_system: it writes those that the system message has, as text (Phi-4-mini).
    calls: it writes calls, and with them the results.
    calls_without_text: it writes calls only where the message's content is None (DeepSeek R1).
    arguments_as_text: it wants the arguments of calls as JSON text.
    system: it writes a system message, and before everything else.
    users_in_a_row: it takes them.
    """

    tools: bool = True
    tools_of_system: bool = False
    calls: bool = True
    calls_without_text: bool = False
    arguments_as_text: bool = False
    system: bool = True
    users_in_a_row: bool = True


def written_by_us(
    messages: Sequence[Message], tools: Tools | None, able: Abilities, format: ToolFormat
) -> tuple[Sequence[Message], Tools | None]:
    """The chat as the template can write it."""
    if able.tools:
        return messages, tools
    if not able.calls and any(_is_of_tools(message) for message in messages):
        messages = _plain_turns(messages, format)
    elif not tools:
        return messages, tools
    if tools and able.tools_of_system:
        messages = _with_tools(messages, tools)
    elif tools:
        messages = _opened(messages, tool_text(tools, format), able)
    return (messages if able.users_in_a_row else _joined(messages)), None


def tool_text(tools: Tools, format: ToolFormat) -> str:
    """What the model is told of its tools."""
    lines = (json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return "\n".join(
        (
            "You can call functions. Each line describes one, its parameters as a JSON schema:",
            *lines,
            "To call a function, write its name and its arguments exactly like this:",
            format.written([EXAMPLE]),
            "Its result is then given to you. Call a function only where it helps; otherwise "
            "answer in plain text.",
        )
    )


def for_calls(messages: Sequence[Message], able: Abilities) -> Sequence[Message]:
    """The messages with calls in the form that the template reads."""
    if not (able.arguments_as_text or able.calls_without_text):
        return messages
    turns: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls and able.arguments_as_text:
            calls = [
                call | {"function": function | {"arguments": arguments_text(function["arguments"])}}
                for call in calls
                for function in (call["function"],)
            ]
            message = message | {"tool_calls": calls}
        if calls and able.calls_without_text:
            if message.get("content"):
                turns.append({key: value for key, value in message.items() if key != "tool_calls"})
            message = message | {"content": None}
        turns.append(message)
    return turns


def _is_of_tools(message: Message) -> bool:
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _plain_turns(messages: Sequence[Message], format: ToolFormat) -> list[Message]:
    """The messages with calls and results as texts of the assistant and the user."""
    turns: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if after_result:
                turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}\n{text}"}
            else:
                turns.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            turns.append(_calling(message, format))
        else:
            turns.append(message)
        after_result = is_result
    return turns


def _calling(message: Message, format: ToolFormat) -> Message:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [(function["name"], arguments_text(function["arguments"])) for function in functions]
    said = [text] if (text := message.get("content")) else []
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return others | {"content": "\n".join((*said, format.written(calls)))}


def arguments_text(arguments: object) -> str:
    """The JSON text of a call's arguments, which may be that already."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


def _opened(messages: Sequence[Message], text: str, able: Abilities) -> list[Message]:
    """The messages with a text before everything else."""
    said = [text]
    rest = list(messages)
    if rest and rest[0].get("role") == "system":
        said.append(rest.pop(0)["content"])
    if able.system:
        return [{"role": "system", "content": "\n\n".join(said)}, *rest]
    if rest and rest[0].get("role") == "user":
        said.append(rest.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(said)}, *rest]


def _with_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The messages with the tools as a field of the system message."""
    rest = list(messages)
    first = rest and rest[0].get("role") == "system"
    system = rest.pop(0) if first else {"role": "system", "content": ""}
    functions = [tool.get("function", tool) for tool in tools]
    return [system | {"tools": json.dumps(functions, ensure_ascii=False)}, *rest]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """The messages, those of the user in a row as one."""
    turns: list[Message] = []
    for message in messages:
        if turns and message.get("role") == turns[-1].get("role") == "user":
            text = f"{turns[-1]['content']}\n\n{message['content']}"
            turns[-1] = turns[-1] | {"content": text}
        else:
            turns.append(message)
    return turns
