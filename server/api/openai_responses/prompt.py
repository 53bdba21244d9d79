"""What a body asks for as a chat: its items behind those that are stored, and its tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from starlette.requests import Request

from headstart.server.api.conversation import Conversation
from headstart.server.api.openai_responses.body import PromptBody
from headstart.server.api.openai_responses.items import (
    add_items,
    item_list,
    references,
    resolved,
)
from headstart.server.api.openai_responses.store import Item, Stored
from headstart.server.api.openai_responses.tools import OfferedTools, offered_tools
from headstart.server.api.tools import use_of
from headstart.server.generation.chat import Chat, encode_chat
from headstart.server.http.errors import bad_request
from headstart.server.http.ledger import Ledger
from headstart.server.http.runtime import Runtime, Served
from headstart.server.text.assembler import TextOptions
from headstart.server.text.templates import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """``earlier``: the items that were stored before; ``new``: the request's own."""

    chat: Chat
    tools: OfferedTools
    earlier: Sequence[Item]
    new: Sequence[Item]


def read_prompt(
    runtime: Runtime, served: Served, stored: Stored, request: Request, body: PromptBody
) -> Asked:
    """The chat of a body; raises APIError."""
    settings, notes = runtime.settings, body.notes
    tools = offered_tools(body.tools, settings, notes)
    choice = tools.choice(body.tool_choice, settings, notes)
    use = use_of(tools.functions, choice, body.parallel_tool_calls, runtime.answers)
    earlier = _earlier(stored, request, body)
    if body.input is None and not earlier:
        raise bad_request("input is required", "input", "missing_required_parameter")
    new = [] if body.input is None else item_list(body.input, "input", settings)
    new = resolved(new, stored.items(request, references(new, "input")), "input")
    conversation = Conversation()
    add_items(conversation, [*earlier, *new], "input", notes)
    if not conversation.messages:
        raise bad_request("input has no message", "input")
    structure = body.structure(settings)
    variables = body.variables(runtime.require_chat_template())
    notes.check()
    chat = Chat(
        _instructed(body.instructions, conversation.messages),
        use,
        TextOptions(),
        served.chat_mask,
        asked=None if use.forced else structure,
        variables=variables,
    )
    return Asked(chat, tools, earlier, new)


def _earlier(stored: Stored, request: Request, body: PromptBody) -> list[Item]:
    conversation = body.conversation_id()
    if body.previous_response_id is None:
        if conversation is None:
            return []
        return stored.find(request, conversation, "conversation", "conversation").item_list()
    if conversation is not None:
        raise bad_request(
            "previous_response_id and conversation cannot be combined", "previous_response_id"
        )
    found = stored.find(request, body.previous_response_id, param="previous_response_id")
    return found.item_list()


def _instructed(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """Templates know one system message at most: instructions stand in front of its text."""
    if instructions is None:
        return list(messages)
    if messages[0]["role"] == "system":
        instructions = f"{instructions}\n\n{messages[0]['content']}"
        messages = messages[1:]
    return [{"role": "system", "content": instructions}, *messages]


async def fitted(runtime: Runtime, chat: Chat, room: int, ledger: Ledger) -> Chat:
    """The chat without its oldest turns, as few of them as leave ``room`` tokens or less. The
    system message and the last turn stay; a turn begins with what the user says."""
    messages = chat.messages
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"][1:]

    def later(start: int) -> Chat:
        return replace(chat, messages=[*system, *messages[start:]])

    async def fits(chat: Chat) -> bool:
        token_ids, _ = await encode_chat(runtime, chat, ledger)
        return len(token_ids) <= room

    if not starts or await fits(chat):
        return chat
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(later(starts[middle])):
            high = middle
        else:
            low = middle + 1
    return later(starts[low])
