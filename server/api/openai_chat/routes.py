"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field, WithJsonSchema

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.fields import (
    GenerationBody,
    Ignored,
    LogprobCount,
    Role,
    fit_max_tokens,
)
from headstart.server.api.openai_chat.rendering import ChatRendering
from headstart.server.api.openai_chat.writer import ChatFormat
from headstart.server.api.segment_mask import (
    NOT_DECLARED,
    ChatMaskField,
    chat_mask,
)
from headstart.server.api.tools import (
    ToolCallsField,
    ToolChoiceField,
    ToolsField,
    ToolUse,
    checked_calls,
    tool_use,
)
from headstart.server.generation.chat import Chat, encode_chat, read_answer
from headstart.server.generation.start import Prompt, start_choices
from headstart.server.http.access_log import name_request
from headstart.server.http.errors import bad_request, refuse_extras
from headstart.server.http.policy import Body, Refused
from headstart.server.http.reply import Echo, Reply
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import Message

ContentField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        mode="validation",
    ),
]


class ChatMessage(Body):
    """``content``: a string, or a list of ``{"type": "text", "text": ...}`` parts, joined by
    newlines; null only beside ``tool_calls``. ``developer`` is what OpenAI calls ``system`` since
    2024. ``reasoning``: vLLM's name for ``reasoning_content``."""

    role: Role
    content: ContentField = None
    name: str | None = None
    tool_calls: ToolCallsField = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: Ignored = None
    cache_control: Ignored = None
    audio: Annotated[Any, Refused("this model reads text")] = None
    function_call: Annotated[Any, Refused("use tool_calls")] = None

    def plain(self, path: str) -> Message:
        """The message as templates take it; raises APIError."""
        calls = checked_calls(self.tool_calls, f"{path}.tool_calls")
        content = self.content
        if content is None:
            if not calls:
                raise bad_request(
                    f"{path}.content is required", f"{path}.content", "missing_required_parameter"
                )
            content = ""
        message: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": _content_text(content, f"{path}.content"),
        }
        if self.name is not None:
            message["name"] = self.name
        reasoning = self.reasoning_content or self.reasoning
        for role, field, value in (
            ("assistant", "tool_calls", calls),
            ("assistant", "reasoning_content", reasoning),
            ("tool", "tool_call_id", self.tool_call_id),
        ):
            if value and self.role != role:
                raise bad_request(f"{path}.{field} goes with the role {role!r}", f"{path}.{field}")
            if value:
                message[field] = value
        if reasoning:
            message["reasoning"] = reasoning  # templates know one name or the other
        return message


class ChatBody(ChatRendering, GenerationBody):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: ToolsField = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    segment_mask: ChatMaskField = None
    echo: bool | None = None
    media_io_kwargs: Ignored = None
    mm_processor_kwargs: Ignored = None
    prediction: Ignored = None
    thinking_token_budget: Ignored = None
    verbosity: Ignored = None
    web_search_options: Ignored = None
    add_special_tokens: Annotated[
        Any, Refused("a chat's special tokens are its template's", harmless=(False,))
    ] = None
    audio: Annotated[Any, Refused("this model writes text")] = None
    best_of: Annotated[Any, Refused("see n", harmless=(1,))] = None
    chat_template: Annotated[Any, Refused("see --chat-template")] = None
    function_call: Annotated[Any, Refused("use tool_choice", harmless=("none", "auto"))] = None
    functions: Annotated[Any, Refused("use tools", harmless=([],))] = None
    modalities: Annotated[Any, Refused("this model writes text", harmless=(["text"],))] = None

    def check_chat(self, settings: ServerSettings) -> None:
        """Raise APIError for what the types alone do not say."""
        self.check(settings)
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.echo and not self.continue_final_message:
            raise bad_request("echo needs continue_final_message: true", "echo")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise bad_request(
                f"max_completion_tokens is {both[1]} and max_tokens, its old name, {both[0]}",
                "max_completion_tokens",
            )

    def tool_use(self, runtime: Runtime) -> ToolUse:
        """What the answer may do with the tools; raises APIError."""
        answers, settings = runtime.answers, runtime.settings
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, answers, settings)

    def params(
        self,
        num_prompt: int,
        model: ModelInfo,
        runtime: Runtime,
        grammar: str | None,
    ) -> SamplingParams:
        """The engine's view of the request."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = fit_max_tokens(
            num_prompt,
            getattr(self, name),
            model,
            param=name,
            prompt_param="messages",
            default=runtime.defaults.max_tokens,
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens, logprobs, model, runtime, grammar)


def plain_messages(messages: Sequence[ChatMessage], settings: ServerSettings) -> list[Message]:
    """The messages as templates take them; raises APIError, for too many of them, too."""
    if len(messages) > settings.max_messages:
        raise bad_request(
            f"messages has {len(messages)} entries; at most {settings.max_messages} are allowed",
            "messages",
        )
    plain = [message.plain(f"messages[{i}]") for i, message in enumerate(messages)]
    _check_results(plain)
    return plain


def _check_results(messages: Sequence[Message]) -> None:
    """Raise APIError for a tool's result that belongs to no call before it."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        called.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] != "tool":
            continue
        path = f"messages[{i}].tool_call_id"
        if "tool_call_id" not in message:
            raise bad_request(f"{path} is required", path, "missing_required_parameter")
        if message["tool_call_id"] not in called:
            raise bad_request(f"{path} is the id of no call before it", path)


def _content_text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{path} must be a string or a list of parts", path)
    texts: list[str] = []
    for i, part in enumerate(content):
        part_path = f"{path}[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_request(f"{part_path} must be an object with a type", part_path)
        if part["type"] != "text":
            raise bad_request(
                f"{part_path}: parts of type {part['type'][:40]!r} are not supported",
                part_path,
                "unsupported_parameter",
            )
        refuse_extras(part, {}, f"{part_path}.", known=("type", "text"))
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{part_path}.text must be a string", f"{part_path}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["chat"])

    @router.post("/v1/chat/completions", response_class=Response)
    async def create_chat_completion(request: Request) -> Reply:
        """Answer a chat; streamed with ``stream: true``."""
        body = await runtime.parse(request, ChatBody)
        deadline = runtime.deadline(request, body.timeout)
        if body.request_id is not None:
            name_request(request.scope, body.request_id)
        served = runtime.served(body.model)
        body.check_chat(runtime.settings)
        mask = chat_mask(body.segment_mask) or served.chat_mask
        messages = await runtime.with_body(
            request, partial(plain_messages, body.messages, runtime.settings)
        )
        use = body.tool_use(runtime)
        model = runtime.require_text_model()
        template = runtime.require_chat_template()
        options = body.text_options(runtime.settings)
        ending, variables = body.ending(messages), body.variables(template, runtime.settings)
        chat = Chat(
            messages,
            use,
            options,
            mask,
            asked=body.structure(runtime.settings),
            ending=ending,
            variables=variables,
        )
        chat.check()
        token_ids, segments = await encode_chat(runtime, chat)
        wanted = body.max_completion_tokens or body.max_tokens or runtime.defaults.max_tokens
        token_ids = body.truncated(token_ids, wanted, model, spans=bool(segments))
        reading = await read_answer(runtime, chat, token_ids)
        params = body.params(len(token_ids), model, runtime, reading.grammar)
        format = ChatFormat(
            served.name,
            runtime.tokenizer,
            body.shown,
            logprobs=params.logprobs is not None,
            prompt_logprobs=body.prompt_logprobs,
            reasoning=body.include_reasoning is not False,
        )
        choices = start_choices(
            runtime,
            request,
            served,
            [
                Prompt(
                    token_ids,
                    params,
                    segments,
                    context=chat.context(token_ids),
                    echo=Echo(messages[-1]["content"], token_ids) if body.echo else None,
                    new_parser=reading.new_parser,
                )
            ],
            n=body.n or 1,
            options=reading.options,
            priority=body.priority or 0,
        )
        warning = NOT_DECLARED if mask == "turns" and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning, deadline=deadline)

    return router
