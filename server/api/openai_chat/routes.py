"""/v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.fields import (
    GenerationBody,
    Ignored,
    LogprobCount,
    MaxTokens,
    fit_max_tokens,
)
from headstart.server.api.openai_chat.messages import MessageList, plain_messages
from headstart.server.api.openai_chat.rendering import ChatRendering
from headstart.server.api.openai_chat.tools import ToolList, custom_names, functions_of
from headstart.server.api.openai_chat.writer import ChatFormat
from headstart.server.api.segment_mask import ChatMaskField, chat_mask
from headstart.server.api.tools import ToolChoiceField, checked_choice, use_of
from headstart.server.generation.chat import Chat, ToolUse, answer_chat
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Refused
from headstart.server.http.reply import Reply
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings


class ChatBody(ChatRendering, GenerationBody):
    messages: MessageList
    max_completion_tokens: MaxTokens | None = None
    tools: ToolList = None
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
        if self.top_logprobs and not self.logprobs:
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
        choice = checked_choice(self.tool_choice, nested=True, notes=self.notes)
        functions = functions_of(self.tools, runtime.settings)
        return use_of(functions, choice, self.parallel_tool_calls, runtime.answers)

    @property
    def shows_reasoning(self) -> bool:
        return self.include_reasoning is not False and not (
            self.reasoning and self.reasoning.exclude
        )

    def params(
        self, model: ModelInfo, runtime: Runtime, num_prompt: int, grammar: str | None
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


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["chat"])

    @router.post("/v1/chat/completions", response_class=Response)
    async def create_chat_completion(request: Request) -> Reply:
        """Answer a chat; streamed with ``stream: true``."""
        body = await runtime.parse(request, ChatBody)
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
        body.notes.check()
        format = ChatFormat(
            served.name,
            runtime.tokenizer,
            body.shown,
            logprobs=bool(body.logprobs),
            prompt_logprobs=body.prompt_logprobs,
            reasoning=body.shows_reasoning,
            custom=custom_names(body.tools),
        )
        wanted = body.max_completion_tokens or body.max_tokens or runtime.defaults.max_tokens
        return await answer_chat(
            runtime,
            request,
            served,
            chat,
            format,
            partial(body.params, model, runtime),
            stream=bool(body.stream),
            truncate=partial(body.truncated, wanted, model),
            echo=bool(body.echo),
            n=body.n or 1,
            priority=body.priority or 0,
            explain=bool(body.cache_explain),
        )

    return router
