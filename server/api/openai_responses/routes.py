"""/v1/responses, and the answers it has stored: another shape of a chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, WithJsonSchema

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.fields import (
    LogprobCount,
    fit_max_tokens,
)
from headstart.server.api.openai_responses.conversation import Conversation
from headstart.server.api.openai_responses.items import add_input
from headstart.server.api.openai_responses.store import ResponseStore, StoredResponse
from headstart.server.api.openai_responses.writer import ResponseFormat
from headstart.server.api.segment_mask import NOT_DECLARED
from headstart.server.api.tools import (
    ToolsField,
    ToolUse,
    checked_choice,
    checked_tools,
    named_functions,
    use_of,
)
from headstart.server.generation.chat import Chat, start_chat
from headstart.server.generation.defaults import GenerationDefaults
from headstart.server.generation.structure import ObjectField, Structure, json_structure
from headstart.server.http.auth import sent_key
from headstart.server.http.cache_scope import CacheBody
from headstart.server.http.errors import APIError, bad_request, refuse_extras
from headstart.server.http.keys import key_digest
from headstart.server.http.policy import Body
from headstart.server.http.reply import Reply
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.text.answer_blocks import Block
from headstart.server.text.assembler import TextOptions
from headstart.server.text.templates import ChatTemplate, Message

REFUSED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
REFUSED_IN_REASONING: dict[str, tuple[Any, ...]] = {
    "context": ("auto",),
    "generate_summary": (),
    "mode": (),
    "summary": (),
}
LOGPROBS = "message.output_text.logprobs"

InputField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        mode="validation",
    ),
]
ToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}, mode="validation"
    ),
]


def _few(value: Any) -> Any:
    # Before they are looked at: there would be an error for each of a million.
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError(f"there are {len(value)} entries; at most 16 are allowed")
    return value


Metadata = Annotated[
    dict[str, Annotated[str, Field(max_length=512)]], BeforeValidator(_few), Field(max_length=16)
]


class ReasoningBody(Body):
    effort: str | None = None


class ResponsesBody(CacheBody):
    """``reasoning.effort`` is the template's variable ``reasoning_effort``."""

    model: str
    input: InputField
    instructions: str | None = None
    tools: ToolsField = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    text: ObjectField = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: LogprobCount | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = None
    reasoning: ReasoningBody | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    stream: bool | None = None

    def check(self) -> None:
        """Raise APIError for fields that are unknown or not supported, or do not go together."""
        refuse_extras(self.model_extra, REFUSED_IN_RESPONSES)
        if self.reasoning is not None:
            refuse_extras(self.reasoning.model_extra, REFUSED_IN_REASONING, "reasoning.")
        for i, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                raise bad_request(
                    f"include[{i}]: {name[:80]!r} is not supported",
                    f"include[{i}]",
                    "unsupported_parameter",
                )
        if self.top_logprobs and not self.include:
            raise bad_request(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")

    @property
    def logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    def tool_use(self, runtime: Runtime) -> ToolUse:
        """What the answer may do with the tools; raises APIError."""
        functions: list[tuple[Any, str]] = []
        for path, tool in checked_tools(self.tools, runtime.settings):
            kind = tool.get("type")
            if kind != "function":
                raise bad_request(
                    f"{path}: tools of type {str(kind)[:40]!r} are not supported",
                    f"{path}.type",
                    "unsupported_parameter",
                )
            known = ("type", "name", "description", "parameters", "strict")
            refuse_extras(tool, {"defer_loading": (False,)}, f"{path}.", known=known)
            functions.append(({key: tool[key] for key in known[1:] if key in tool}, path))
        choice = checked_choice(self.tool_choice, nested=False)
        return use_of(named_functions(functions), choice, self.parallel_tool_calls, runtime.answers)

    def structure(self, settings: ServerSettings) -> Structure | None:
        """What the answer has to follow; raises APIError."""
        if self.text is None:
            return None
        if not isinstance(self.text, dict):
            raise bad_request("text must be an object", "text", "invalid_value")
        refuse_extras(self.text, {"verbosity": ("medium",)}, "text.", known=("format",))
        asked, path = self.text.get("format"), "text.format"
        if asked is None:
            return None
        kind = asked.get("type") if isinstance(asked, dict) else None
        known = {
            "text": ("type",),
            "json_object": ("type",),
            "json_schema": ("type", "name", "description", "schema", "strict"),
        }.get(str(kind))
        if known is None:
            raise bad_request(
                f"{path}.type must be text, json_object or json_schema",
                f"{path}.type",
                "invalid_value",
            )
        refuse_extras(asked, {}, f"{path}.", known=known)
        match kind:
            case "text":
                return None
            case "json_object":
                return json_structure({"type": "object"}, path, settings)
        if not isinstance(asked.get("name"), str) or not 1 <= len(asked["name"]) <= 64:
            raise bad_request(f"{path}.name must have 1 to 64 characters", f"{path}.name")
        if asked.get("strict") not in (None, True, False):
            raise bad_request(f"{path}.strict must be true or false", f"{path}.strict")
        return json_structure(asked.get("schema"), f"{path}.schema", settings)

    def variables(self, template: ChatTemplate) -> dict[str, Any]:
        """What the template gets beside messages and tools; raises APIError."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        if effort is None:
            return {}
        if "reasoning_effort" not in template.variables:
            raise bad_request(
                "the model's chat template does not read reasoning_effort",
                "reasoning.effort",
                "unsupported_parameter",
            )
        return {"reasoning_effort": effort}

    def chosen(self, defaults: GenerationDefaults) -> GenerationDefaults:
        """How tokens are chosen: as asked for, else by ``defaults``."""
        return defaults.over(temperature=self.temperature, top_p=self.top_p)

    def params(
        self, defaults: GenerationDefaults, model: ModelInfo, num_prompt: int, grammar: str | None
    ) -> SamplingParams:
        """The engine's view of the request; raises RequestError."""
        params = self.chosen(defaults).params(
            max_tokens=fit_max_tokens(
                num_prompt,
                self.max_output_tokens,
                model,
                param="max_output_tokens",
                prompt_param="input",
                default=defaults.max_tokens,
            ),
            logprobs=self.logprobs,
            grammar=grammar,
        )
        params.validate(model.vocab_size)
        return params

    def head(self, model: str, defaults: GenerationDefaults) -> dict[str, Any]:
        """The fields of the answer that are known before it, most of them the request's."""
        reasoning, chosen = self.reasoning, self.chosen(defaults)
        return {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "model": model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.store is not False,
            "temperature": chosen.temperature,
            "text": {"format": {"type": "text"}} | (self.text or {}),
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if chosen.top_p is None else chosen.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


class Stored:
    """The answers of one app, as its clients find them: each those of its own key."""

    def __init__(self, settings: ServerSettings) -> None:
        self._with_keys = bool(settings.keys.api)
        self._store = ResponseStore(settings.max_stored_responses, settings.max_stored_bytes)

    def find(self, request: Request, response_id: str, param: str | None = None) -> StoredResponse:
        """Raises a 404; for answers of another key it is the same one."""
        found = self._store.get(self._owner(request), response_id)
        if found is None:
            raise _not_stored(response_id, param)
        return found

    def delete(self, request: Request, response_id: str) -> None:
        """Raises a 404."""
        if not self._store.delete(self._owner(request), response_id):
            raise _not_stored(response_id, None)

    def keep(
        self,
        request: Request,
        response_id: str,
        conversation: Conversation,
        body: bytes,
        blocks: Sequence[Block],
    ) -> None:
        """Store an answer to a conversation, which it becomes a part of."""
        conversation.answer(blocks)
        stored = StoredResponse(body, msgspec.json.encode(conversation.messages))
        self._store.put(self._owner(request), response_id, stored)

    def _owner(self, request: Request) -> bytes:
        return key_digest(sent_key(request.scope)) if self._with_keys else b""


def _not_stored(response_id: str, param: str | None) -> APIError:
    return APIError(
        404,
        f"there is no response {response_id[:80]!r}: never stored, deleted, or gone for newer ones",
        param=param,
        code="response_not_found" if param is None else "previous_response_not_found",
    )


def _instructed(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """Templates know one system message at most: instructions stand in front of its text."""
    if instructions is None:
        return list(messages)
    if messages[0]["role"] == "system":
        instructions = f"{instructions}\n\n{messages[0]['content']}"
        messages = messages[1:]
    return [{"role": "system", "content": instructions}, *messages]


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["responses"])
    stored = Stored(runtime.settings)

    @router.post("/v1/responses", response_class=Response)
    async def create_response(request: Request) -> Reply:
        """Answer a conversation; streamed with ``stream: true``."""
        body = await runtime.parse(request, ResponsesBody)
        deadline = runtime.deadline(request, None)
        served = runtime.served(body.model)
        body.check()
        use = body.tool_use(runtime)
        conversation = Conversation()
        if (previous := body.previous_response_id) is not None:
            earlier = stored.find(request, previous, "previous_response_id").messages
            conversation = Conversation(msgspec.json.decode(earlier))
        await runtime.with_body(
            request, partial(add_input, conversation, body.input, runtime.settings)
        )
        model = runtime.require_text_model()
        chat = Chat(
            _instructed(body.instructions, conversation.messages),
            use,
            TextOptions(),
            served.chat_mask,
            asked=body.structure(runtime.settings),
            variables=body.variables(runtime.require_chat_template()),
        )
        if body.include and (use.names or runtime.answers.thoughts is not None):
            raise bad_request(
                "log-probabilities go neither with tools nor with a model that thinks", "include"
            )
        new_params = partial(body.params, runtime.defaults, model)
        choices = await start_chat(runtime, request, served, chat, new_params)
        head = body.head(served.name, runtime.defaults)
        format = ResponseFormat(
            head,
            runtime.tokenizer,
            logprobs=bool(body.include),
            keep=(
                partial(stored.keep, request, head["id"], conversation)
                if body.store is not False
                else None
            ),
        )
        warning = NOT_DECLARED if chat.mask == "turns" and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning, deadline=deadline)

    @router.get("/v1/responses/{response_id}", response_class=Response)
    async def get_response(request: Request, response_id: str) -> Response:
        """A stored answer."""
        return Response(stored.find(request, response_id).body, media_type="application/json")

    @router.delete("/v1/responses/{response_id}", response_class=Response)
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a stored answer; those that went on from it stay."""
        stored.delete(request, response_id)
        shown = {"id": response_id, "object": "response", "deleted": True}
        return Response(msgspec.json.encode(shown), media_type="application/json")

    return router
