"""/v1/messages and /v1/messages/count_tokens: Anthropic's shape of a chat."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.anthropic_messages.blocks import add_message, text_of
from headstart.server.api.anthropic_messages.writer import MessageFormat
from headstart.server.api.fields import (
    INT32_MAX,
    StringsField,
    checked_stops,
    fit_max_tokens,
)
from headstart.server.api.openai_chat.routes import ContentField
from headstart.server.api.openai_responses.conversation import Conversation
from headstart.server.api.segment_mask import NOT_DECLARED
from headstart.server.api.tools import (
    ToolChoice,
    ToolsField,
    ToolUse,
    checked_tools,
    named_functions,
    use_of,
)
from headstart.server.generation.chat import Chat, encode_chat, start_chat
from headstart.server.generation.defaults import GenerationDefaults
from headstart.server.generation.structure import ObjectField, Structure, json_structure
from headstart.server.http.cache_scope import CacheBody
from headstart.server.http.errors import bad_request, refuse_extras
from headstart.server.http.policy import Body
from headstart.server.http.reply import Reply
from headstart.server.http.runtime import Runtime, Served
from headstart.server.settings import ServerSettings
from headstart.server.text.assembler import TextOptions
from headstart.server.text.templates import ChatTemplate, Ending

DESCRIPTIVE_IN_MESSAGES = ("cache_control", "metadata")
REFUSED_IN_COUNT: dict[str, tuple[Any, ...]] = {
    "context_management": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
REFUSED_IN_MESSAGES: dict[str, tuple[Any, ...]] = REFUSED_IN_COUNT | {
    "container": (),
    "inference_geo": (),
    "service_tier": ("auto", "standard_only"),
}
_CHOICES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


class MessageBody(Body):
    role: Literal["user", "assistant"]
    content: ContentField


class CountTokensBody(Body):
    """What makes the prompt. ``thinking``: the template's variable ``enable_thinking``."""

    model: str
    messages: Annotated[list[MessageBody], FailFast(), Field(min_length=1)]
    system: ContentField = None
    tools: ToolsField = None
    tool_choice: ObjectField = None
    thinking: ObjectField = None
    output_config: ObjectField = None

    def check(self, refused: dict[str, tuple[Any, ...]]) -> None:
        """Raise APIError for fields that are unknown or not supported."""
        refuse_extras(self.model_extra, refused, known=DESCRIPTIVE_IN_MESSAGES)
        for i, message in enumerate(self.messages):
            refuse_extras(message.model_extra, {}, f"messages[{i}].")

    def chat(self, runtime: Runtime, served: Served, options: TextOptions) -> Chat:
        """The chat; raises APIError."""
        settings = runtime.settings
        if len(self.messages) > settings.max_messages:
            raise bad_request(
                f"messages has {len(self.messages)} entries; at most {settings.max_messages} are "
                "allowed",
                "messages",
            )
        conversation = Conversation()
        if self.system is not None and (system := text_of(self.system, "system")):
            conversation.say("system", system)
        for i, message in enumerate(self.messages):
            add_message(conversation, message.role, message.content, f"messages[{i}].content")
        ending: Ending = "opened"
        last = conversation.messages[-1]
        if last["role"] == "assistant":  # the answer goes on from there
            if "tool_calls" in last or not last["content"]:
                raise bad_request(
                    "the last message must be a user's, or an assistant's text to go on from",
                    "messages",
                )
            ending = "continued"
        return Chat(
            conversation.messages,
            self._tool_use(runtime),
            options,
            served.chat_mask,
            asked=self._structure(settings),
            ending=ending,
            variables=self._variables(runtime.require_chat_template()),
        )

    def _tool_use(self, runtime: Runtime) -> ToolUse:
        functions: list[tuple[Any, str]] = []
        for path, tool in checked_tools(self.tools, runtime.settings):
            if tool.get("type") not in (None, "custom"):
                raise bad_request(
                    f"{path}: tools of type {str(tool['type'])[:40]!r} are not supported",
                    f"{path}.type",
                )
            names = {"name": "name", "description": "description", "input_schema": "parameters"}
            names |= {"strict": "strict"}
            free = ("type", "cache_control", "eager_input_streaming")
            refuse_extras(tool, {"defer_loading": (False,)}, f"{path}.", known=(*names, *free))
            if not isinstance(tool.get("input_schema"), dict):
                raise bad_request(
                    f"{path}.input_schema must be a JSON schema", f"{path}.input_schema"
                )
            functions.append(({to: tool[key] for key, to in names.items() if key in tool}, path))
        choice = {"type": "auto"} if self.tool_choice is None else self.tool_choice
        kind = choice.get("type") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(kind, str) or kind not in _CHOICES:
            raise bad_request("tool_choice.type must be auto, any, tool or none", "tool_choice")
        known = ("type", "disable_parallel_tool_use", *(("name",) if kind == "tool" else ()))
        refuse_extras(choice, {}, "tool_choice.", known=known)
        only, alone = choice.get("name"), choice.get("disable_parallel_tool_use")
        if kind == "tool" and not isinstance(only, str):
            raise bad_request("tool_choice.name must be a string", "tool_choice.name")
        if alone not in (None, True, False):
            raise bad_request("disable_parallel_tool_use must be true or false", "tool_choice")
        chosen = ToolChoice(_CHOICES[kind], None if only is None else [only], only is not None)
        return use_of(named_functions(functions), chosen, not alone, runtime.answers)

    def _structure(self, settings: ServerSettings) -> Structure | None:
        config, path = self.output_config, "output_config.format"
        asked = config.get("format") if isinstance(config, dict) else None
        if asked is None:
            return None
        if not isinstance(asked, dict) or asked.get("type") != "json_schema":
            raise bad_request(f"{path}.type must be json_schema", f"{path}.type")
        refuse_extras(asked, {}, f"{path}.", known=("type", "schema"))
        return json_structure(asked.get("schema"), f"{path}.schema", settings)

    def _variables(self, template: ChatTemplate) -> dict[str, Any]:
        """What the template gets beside messages and tools."""
        found: dict[str, Any] = {}
        config = {} if self.output_config is None else self.output_config
        if not isinstance(config, dict):
            raise bad_request("output_config must be an object", "output_config")
        refuse_extras(config, {}, "output_config.", known=("effort", "format"))
        if (effort := config.get("effort")) is not None:
            if "reasoning_effort" not in template.variables or not isinstance(effort, str):
                raise bad_request(
                    "the model's chat template does not read reasoning_effort",
                    "output_config.effort",
                )
            found["reasoning_effort"] = effort
        if self.thinking is None:
            return found
        thinking = self.thinking
        kind = thinking.get("type") if isinstance(thinking, dict) else None
        if not isinstance(thinking, dict) or kind not in ("enabled", "disabled", "adaptive"):
            raise bad_request("thinking.type must be enabled, disabled or adaptive", "thinking")
        known = ("type", *(("budget_tokens",) if kind == "enabled" else ()))
        refuse_extras(thinking, {}, "thinking.", known=known)
        if kind == "enabled" and type(thinking.get("budget_tokens")) is not int:
            raise bad_request(
                "thinking.budget_tokens must be a whole number", "thinking.budget_tokens"
            )
        if "enable_thinking" in template.variables:
            if kind != "adaptive":
                found["enable_thinking"] = kind == "enabled"
        elif kind == "enabled":
            raise bad_request(
                "the model's chat template does not let thinking be enabled", "thinking.type"
            )
        return found


class MessagesBody(CountTokensBody, CacheBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: StringsField = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    stream: bool | None = None

    def options(self, settings: ServerSettings) -> TextOptions:
        """How tokens become the answer's text; raises APIError."""
        stops = self.stop_sequences
        if isinstance(stops, str):
            raise bad_request("stop_sequences must be a list of strings", "stop_sequences")
        return TextOptions(stops=checked_stops(stops, "stop_sequences", settings))

    def params(
        self, defaults: GenerationDefaults, model: ModelInfo, num_prompt: int, grammar: str | None
    ) -> SamplingParams:
        """The engine's view of the request; raises RequestError."""
        chosen = defaults.over(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        params = chosen.params(
            max_tokens=fit_max_tokens(
                num_prompt, self.max_tokens, model, param="max_tokens", prompt_param="messages"
            ),
            grammar=grammar,
        )
        params.validate(model.vocab_size)
        return params


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["messages"])

    @router.post("/v1/messages", response_class=Response)
    async def create_message(request: Request) -> Reply:
        """Answer a chat; streamed with ``stream: true``."""
        body = await runtime.parse(request, MessagesBody)
        deadline = runtime.deadline(request, None)
        served = runtime.served(body.model)
        body.check(REFUSED_IN_MESSAGES)
        model = runtime.require_text_model()
        options = body.options(runtime.settings)
        chat = await runtime.with_body(request, partial(body.chat, runtime, served, options))
        new_params = partial(body.params, runtime.defaults, model)
        choices = await start_chat(runtime, request, served, chat, new_params)
        warning = NOT_DECLARED if chat.mask == "turns" and not served.for_segments else None
        format = MessageFormat(served.name)
        return Reply(choices, format, stream=bool(body.stream), warning=warning, deadline=deadline)

    @router.post("/v1/messages/count_tokens", response_class=Response)
    async def count_tokens(request: Request) -> Response:
        """The tokens of the prompt that /v1/messages would have."""
        body = await runtime.parse(request, CountTokensBody)
        served = runtime.served(body.model)
        body.check(REFUSED_IN_COUNT)
        runtime.require_model()
        chat = await runtime.with_body(request, partial(body.chat, runtime, served, TextOptions()))
        chat.check()
        token_ids, _ = await encode_chat(runtime, chat)
        counted = msgspec.json.encode({"input_tokens": len(token_ids)})
        return Response(counted, media_type="application/json")

    return router
