"""A checked chat on its way to the engine: what all endpoints that take chats have in common.

    Chat -> encode_chat (the template) -> _read_answer (parts, grammar) -> answer (start.py)

``answer_chat`` is all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import msgspec
from fastapi import Request

from headstart.engine.ranges.segments import Span, turn_spans
from headstart.engine.sampling.params import SamplingParams
from headstart.server.generation.cache_explain import explainer
from headstart.server.generation.start import Prompt, answer
from headstart.server.generation.structure import Structure
from headstart.server.http.errors import bad_request
from headstart.server.http.ledger import Ledger
from headstart.server.http.reply import Echo, Format, Reply
from headstart.server.http.runtime import Runtime, Served
from headstart.server.text.answer import AnswerParser
from headstart.server.text.assembler import TextOptions
from headstart.server.text.layout import Layout
from headstart.server.text.templates import Ending, Message, Tools
from headstart.server.text.tool_formats.schemas import Function

# The end of a prompt that may open the answer's thoughts.
CONTEXT_IDS = 16

MUCH = 4 << 20


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a chat may do with its tools.

    ``tools``: as the template gets them. ``functions``: those whose calls are read. ``forced``: one
    of them has to be called. ``followed``: calls are right, and of these, if there are any.
    ``parallel``: there may be several calls.
    """

    tools: Tools | None = None
    functions: Sequence[Function] = ()
    forced: bool = False
    followed: bool = False
    parallel: bool = True

    @property
    def names(self) -> list[str]:
        return [function["name"] for function in self.functions]


@dataclass(frozen=True, slots=True)
class Chat:
    """``mask``: "causal" or "turns". ``asked``: what the answer has to follow, calls apart.
    ``variables``: what the template gets beside messages and tools."""

    messages: Sequence[Message]
    use: ToolUse
    options: TextOptions
    mask: str
    asked: Structure | None = None
    ending: Ending = "opened"
    variables: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise APIError for what does not go together."""
        if self.use.forced and self.asked is not None:
            path = self.asked.path
            raise bad_request(f"tool_choice and {path} cannot be combined", "tool_choice")
        if self.mask == "turns" and self.ending != "opened":
            raise bad_request(
                "segment_mask turns needs the answer opened: it goes neither with "
                "continue_final_message nor with add_generation_prompt: false",
                "segment_mask",
            )

    def context(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The end of the prompt, if the answer's text continues it."""
        return token_ids[-8:] if self.ending == "continued" else ()


@dataclass(frozen=True, slots=True)
class AnswerReading:
    """How an answer is read. ``grammar``: what it has to follow, thoughts included, if anything.
    ``new_parser``: None if it is text and nothing else."""

    options: TextOptions
    grammar: str | None
    new_parser: Callable[[], AnswerParser] | None


async def encode_chat(
    runtime: Runtime, chat: Chat, ledger: Ledger
) -> tuple[Sequence[int], list[Span]]:
    """The ids of a chat, and its segments, if any; raises RequestError and APIError."""
    rendered = partial(ledger.mark, "template")
    template = runtime.require_chat_template()
    messages, tools, variables = chat.messages, chat.use.tools, chat.variables
    size = chat_size(messages, tools)
    if chat.mask == "turns":
        token_ids, turns = await runtime.with_chat(
            size,
            partial(
                template.encode_turns, messages, tools, variables=variables, on_rendered=rendered
            ),
        )
        ledger.mark("tokenise")
        return token_ids, turn_spans(turns)
    encode = partial(
        template.encode,
        messages,
        tools,
        ending=chat.ending,
        variables=variables,
        on_rendered=rendered,
    )
    token_ids = await runtime.with_chat(size, encode)
    ledger.mark("tokenise")
    return token_ids, []


async def _lay_out(runtime: Runtime, chat: Chat) -> Layout:
    """Where its messages are in the text of the prompt; raises RequestError and APIError."""
    template = runtime.require_chat_template()
    messages, tools, variables = chat.messages, chat.use.tools, chat.variables
    work = partial(template.layout, messages, tools, ending=chat.ending, variables=variables)
    return await runtime.with_chat(chat_size(messages, tools), work)


async def _read_answer(
    runtime: Runtime, chat: Chat, token_ids: Sequence[int], ledger: Ledger
) -> AnswerReading:
    """How the answer to a prompt is read; raises APIError for what cannot be followed."""
    answers, use = runtime.answers, chat.use
    inside = answers.inside(runtime.tokenizer.decode_all(token_ids[-CONTEXT_IDS:]))
    reading = answers.reading(use.functions, inside=inside, only_first=not use.parallel)
    structure = await _structure(runtime, chat)
    if structure is not None:
        structure = structure.replaced(answers.after_thoughts(structure.grammar, inside=inside))
    grammar = await runtime.checked(structure)
    if grammar is not None:
        ledger.mark("grammar")
    if reading is None:
        return AnswerReading(chat.options, grammar, None)
    return AnswerReading(replace(chat.options, shown=reading.shown), grammar, reading.new_parser)


async def _structure(runtime: Runtime, chat: Chat) -> Structure | None:
    """What the answer has to follow, thoughts apart: the calls that it has to make or may make, or
    what is asked."""
    use, asked, answers = chat.use, chat.asked, runtime.answers
    if use.forced:
        grammar = answers.calls_grammar(use.functions, parallel=use.parallel)
    elif use.functions and asked is not None and answers.calls_stand_out:
        await runtime.checked(asked)  # alone, so that what is wrong with it is said of it
        grammar = answers.calls_or_grammar(use.functions, asked.grammar, parallel=use.parallel)
    elif use.followed and asked is None:
        grammar = answers.calls_or_text_grammar(use.functions, parallel=use.parallel)
    else:
        return asked
    schemas = {function["name"]: function.get("parameters") for function in use.functions}
    return Structure(grammar, "tools", schemas)


async def answer_chat(
    runtime: Runtime,
    request: Request,
    served: Served,
    chat: Chat,
    format: Format,
    new_params: Callable[[int, str | None], SamplingParams],
    *,
    stream: bool,
    truncate: Callable[[Sequence[int], bool], Sequence[int]] | None = None,
    echo: bool = False,
    n: int = 1,
    priority: int = 0,
    explain: bool = False,
) -> Reply:
    """The answer to a chat, in the API's ``format``; raises APIError and RequestError.

    new_params  of the prompt's length and the grammar
    truncate    the prompt's ids; it also gets whether there are segments
    echo        the text that the answer continues comes before it
    explain     it says why the cache did not have more of the prompt
    """
    chat.check()
    ledger = Ledger.of(request.scope)
    token_ids, segments = await encode_chat(runtime, chat, ledger)
    if truncate is not None:
        token_ids = truncate(token_ids, bool(segments))
    reading = await _read_answer(runtime, chat, token_ids, ledger)
    prompt = Prompt(
        token_ids,
        new_params(len(token_ids), reading.grammar),
        segments,
        context=chat.context(token_ids),
        echo=Echo(chat.messages[-1]["content"], token_ids) if echo else None,
        new_parser=reading.new_parser,
    )
    if explain:
        lay_out = partial(_lay_out, runtime, chat)
        asked = explainer(runtime, request, token_ids, chat.messages, lay_out)
        prompt = replace(prompt, explain=asked)
    return answer(
        runtime,
        request,
        served,
        [prompt],
        format,
        options=reading.options,
        stream=stream,
        n=n,
        priority=priority,
    )


def chat_size(messages: Sequence[Message], tools: Tools | None) -> int:
    """About how many characters there are to work on; not much more than MUCH are counted of calls
    and tools, which have to be written for that."""
    size = sum(len(message["content"]) for message in messages)
    size += sum(len(message.get("reasoning", "")) for message in messages)
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    for value in chain(calls, tools or ()):
        if size > MUCH:
            break
        size += len(msgspec.json.encode(value))
    return size
