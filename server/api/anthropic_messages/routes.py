"""/v1/messages and /v1/messages/count_tokens: Anthropic's shape of a chat."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.anthropic_messages.conversation import MessageBody, Reader
from headstart.server.api.anthropic_messages.tools import ToolChoiceBody, tool_use
from headstart.server.api.anthropic_messages.writer import MessageFormat
from headstart.server.api.fields import (
    INT32_MAX,
    ContentField,
    Ignored,
    StringsField,
    checked_stops,
)
from headstart.server.api.tools import ToolsField
from headstart.server.generation.chat import Chat, answer_chat, encode_chat
from headstart.server.generation.defaults import GenerationDefaults
from headstart.server.generation.structure import ObjectField, Structure, json_structure
from headstart.server.http.cache_scope import ExplainedBody
from headstart.server.http.errors import ContextLengthError, bad_request
from headstart.server.http.ledger import Ledger, TimedBody
from headstart.server.http.policy import Advisory, Body, Refused
from headstart.server.http.reply import Reply
from headstart.server.http.runtime import Runtime, Served
from headstart.server.settings import ServerSettings
from headstart.server.text.assembler import TextOptions
from headstart.server.text.templates import ChatTemplate

BLOCKS_PER_MESSAGE = 4
"""On average, of as many messages as are allowed."""


class ThinkingBody(Body):
    """The template's variable ``enable_thinking``; ``adaptive`` leaves it to the template."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Ignored = None
    display: Ignored = None
    block_binding: Ignored = None


class JSONFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[ObjectField, Field(alias="schema")]


class OutputConfig(Body):
    """``effort``: the template's variable ``reasoning_effort``."""

    effort: str | None = None
    format: JSONFormat | None = None
    task_budget: Ignored = None


class CountTokensBody(Body):
    """``output_format``: an older name of ``output_config.format``. What does not make the prompt
    is not looked at."""

    model: str
    messages: Annotated[list[MessageBody], FailFast(), Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    system: ContentField = None
    tools: ToolsField = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    output_format: JSONFormat | None = None
    stop_sequences: StringsField = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    stream: bool | None = None
    betas: Ignored = None
    billing_policy: Ignored = None
    cache_control: Ignored = None
    container: Ignored = None
    context_management: Ignored = None
    diagnostics: Ignored = None
    fallback_credit_token: Ignored = None
    fallbacks: Ignored = None
    inference_geo: Ignored = None
    metadata: Ignored = None
    service_tier: Annotated[Any, Advisory(harmless=("auto", "standard_only"))] = None
    speed: Annotated[Any, Advisory(harmless=("standard",))] = None
    user_profile_id: Ignored = None
    compaction: Annotated[Any, Refused("ask for a summary in a message")] = None
    mcp_servers: Annotated[Any, Refused("headstart calls no servers", harmless=([],))] = None
    thread: Annotated[
        Any, Refused("send the whole conversation", harmless=({"type": "create"},))
    ] = None

    def chat(self, runtime: Runtime, served: Served, options: TextOptions) -> Chat:
        """The chat; raises APIError."""
        settings, notes, template = runtime.settings, self.notes, runtime.require_chat_template()
        if len(self.messages) > settings.max_messages:
            raise bad_request(
                f"messages has {len(self.messages)} entries; at most {settings.max_messages} are "
                "allowed",
                "messages",
            )
        use = tool_use(self.tools, self.tool_choice, runtime, notes)
        asked = any(message.role == "system" for message in self.messages)
        reader = Reader(
            notes,
            most_blocks=BLOCKS_PER_MESSAGE * settings.max_messages,
            later_system=asked and template.takes_later_system(use.tools),
        )
        reader.system(self.system, "system")
        for i, message in enumerate(self.messages):
            reader.add(message, f"messages[{i}].content")
        ending = reader.end()
        variables = self._variables(template)
        notes.check()
        return Chat(
            reader.messages,
            use,
            options,
            served.chat_mask,
            asked=self._structure(settings),
            ending=ending,
            variables=variables,
        )

    def _structure(self, settings: ServerSettings) -> Structure | None:
        if self.output_config is not None and self.output_config.format is not None:
            schema = self.output_config.format.schema_
            return json_structure(schema, "output_config.format.schema", settings)
        if self.output_format is not None:
            return json_structure(self.output_format.schema_, "output_format.schema", settings)
        return None

    def _variables(self, template: ChatTemplate) -> dict[str, Any]:
        """What the template gets beside messages and tools; what it does not read is ignored."""
        variables: dict[str, Any] = {}
        if self.output_config is not None and self.output_config.effort is not None:
            if "reasoning_effort" in template.variables:
                variables["reasoning_effort"] = self.output_config.effort
            else:
                self.notes.ignore("output_config.effort")
        if self.thinking is None:
            return variables
        if "enable_thinking" not in template.variables:
            self.notes.ignore("thinking")
        elif self.thinking.type != "adaptive":
            variables["enable_thinking"] = self.thinking.type == "enabled"
        return variables


class MessagesBody(CountTokensBody, TimedBody, ExplainedBody):
    """``max_tokens``: 0 computes the prompt, for the cache, and nothing else."""

    max_tokens: Annotated[int, Field(ge=0)]

    def options(self, settings: ServerSettings) -> TextOptions:
        """How tokens become the answer's text; raises APIError."""
        stops = self.stop_sequences
        if isinstance(stops, str):
            raise bad_request("stop_sequences must be a list of strings", "stop_sequences")
        return TextOptions(stops=checked_stops(stops, "stop_sequences", settings))

    def params(
        self, defaults: GenerationDefaults, model: ModelInfo, num_prompt: int, grammar: str | None
    ) -> SamplingParams:
        """The engine's view of the request; raises APIError and RequestError."""
        room = model.max_model_len - num_prompt
        if room < 1:
            raise ContextLengthError(num_prompt, model.max_model_len, "messages")
        chosen = defaults.over(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        params = chosen.params(max_tokens=min(self.max_tokens, room), grammar=grammar)
        params.validate(model.vocab_size)
        return params


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["messages"])

    @router.post("/v1/messages", response_class=Response)
    async def create_message(request: Request) -> Reply:
        """Answer a chat; streamed with ``stream: true``."""
        body = await runtime.parse(request, MessagesBody)
        served = runtime.served(body.model)
        model = runtime.require_text_model()
        options = body.options(runtime.settings)
        chat = await runtime.with_body(request, partial(body.chat, runtime, served, options))
        new_params = partial(body.params, runtime.defaults, model)
        return await answer_chat(
            runtime,
            request,
            served,
            chat,
            MessageFormat(served.name),
            new_params,
            stream=bool(body.stream),
            explain=bool(body.cache_explain),
        )

    @router.post("/v1/messages/count_tokens", response_class=Response)
    async def count_tokens(request: Request) -> Response:
        """The tokens of the prompt that /v1/messages would have."""
        body = await runtime.parse(request, CountTokensBody)
        served = runtime.served(body.model)
        runtime.require_model()
        chat = await runtime.with_body(request, partial(body.chat, runtime, served, TextOptions()))
        chat.check()
        token_ids, _ = await encode_chat(runtime, chat, Ledger.of(request.scope))
        counted = msgspec.json.encode({"input_tokens": len(token_ids)})
        return Response(counted, media_type="application/json")

    return router
