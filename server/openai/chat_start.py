"""prepare_chat: from the body of a chat to what the engine is asked, whatever the endpoint.

body -> messages, tools -> template -> token ids -> what the answer has to follow -> PreparedChat
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from headstart.engine.sampling_params import SamplingParams
from headstart.engine.segments import Span, turn_spans
from headstart.server.answer_format import Reading
from headstart.server.errors import bad_request
from headstart.server.openai.chat_body import ChatBody, chat_size, plain_messages
from headstart.server.openai.reply import Choice, Echo
from headstart.server.openai.segment_mask import NOT_DECLARED, chat_mask
from headstart.server.openai.start import Prompt, start_choices
from headstart.server.openai.tools import ToolUse
from headstart.server.runtime import Runtime, Served
from headstart.server.stream import TextOptions
from headstart.server.structure import Structure

# The end of a prompt that may open the answer's thoughts.
CONTEXT_IDS = 16


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A checked chat. ``warning``: for a header of its answer."""

    body: ChatBody
    served: Served
    prompt: Prompt
    options: TextOptions
    warning: str | None

    @property
    def params(self) -> SamplingParams:
        return self.prompt.params

    def start(self, runtime: Runtime) -> list[Choice]:
        """Ask the engine for the answers. Raises EngineDeadError; nothing is left running then."""
        return start_choices(
            runtime,
            self.served,
            [self.prompt],
            n=self.body.n or 1,
            options=self.options,
            salt=self.body.salt,
            priority=self.body.priority or 0,
        )


async def prepare_chat(runtime: Runtime, body: ChatBody) -> PreparedChat:
    """Check all of a chat, and render it; raises APIError and RequestError."""
    served = runtime.served(body.model)
    body.check_chat(runtime.settings)
    mask = chat_mask(body.segment_mask) or served.chat_mask
    messages = plain_messages(body.messages, runtime.settings)
    use = body.tool_use(runtime)
    model = runtime.require_model()
    template = runtime.require_chat_template()
    options = body.text_options(runtime.settings)
    ending, variables = body.ending(messages), body.variables(template, runtime.settings)
    size = chat_size(messages, use.tools)
    structure = _structure(runtime, use, body.structure(runtime.settings))
    token_ids: Sequence[int]
    segments: list[Span] = []
    if mask == "turns":
        if ending != "opened":
            raise bad_request(
                "segment_mask turns needs the answer opened: it goes neither with "
                "continue_final_message nor with add_generation_prompt: false",
                "segment_mask",
            )
        token_ids, turns = await runtime.with_chat(
            size, partial(template.encode_turns, messages, use.tools, variables=variables)
        )
        segments = turn_spans(turns)
    else:
        encode_chat = partial(
            template.encode, messages, use.tools, ending=ending, variables=variables
        )
        token_ids = await runtime.with_chat(size, encode_chat)
    wanted = body.max_completion_tokens or body.max_tokens
    token_ids = body.truncated(token_ids, wanted, model, spans=bool(segments))
    reading, structure = _read_as(runtime, use, structure, token_ids)
    if reading is not None:
        options = replace(options, shown=reading.shown)
    grammar = await runtime.checked(structure)
    prompt = Prompt(
        token_ids,
        body.params(len(token_ids), model, runtime.settings, runtime.tokenizer, grammar),
        segments,
        context=token_ids[-8:] if ending == "continued" else (),
        echo=Echo(messages[-1]["content"], token_ids) if body.echo else None,
        new_parser=reading.new_parser if reading is not None else None,
    )
    warning = NOT_DECLARED if mask == "turns" and not served.for_segments else None
    return PreparedChat(body, served, prompt, options, warning)


def _structure(runtime: Runtime, use: ToolUse, asked: Structure | None) -> Structure | None:
    """What the answer has to follow, thoughts apart: the calls it has to make, or what is asked."""
    if not use.forced:
        return asked
    if asked is not None:
        raise bad_request(f"tool_choice and {asked.path} cannot be combined", "tool_choice")
    grammar = runtime.answers.calls_grammar(use.forced, parallel=use.parallel)
    schemas = {function["name"]: function.get("parameters") for function in use.forced}
    return Structure(grammar, "tools", schemas)


def _read_as(
    runtime: Runtime, use: ToolUse, structure: Structure | None, token_ids: Sequence[int]
) -> tuple[Reading | None, Structure | None]:
    """How the answer to a prompt is read, and what it has to follow, thoughts included."""
    answers = runtime.answers
    inside = answers.inside(runtime.tokenizer.decode_all(token_ids[-CONTEXT_IDS:]))
    reading = answers.reading(use.names, inside=inside, only_first=not use.parallel)
    if structure is None:
        return reading, None
    return reading, structure.replaced(answers.after_thoughts(structure.grammar, inside=inside))
