"""/tokenize and /detokenize as vLLM has them, /apply-template as llama.cpp's server has it.

They show what a request would cost before it is sent: the ids of a prompt or a chat are those that
the engine would get for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field

from headstart.engine.process.messages import ModelInfo
from headstart.server.api.fields import Ignored, TokenIdsField
from headstart.server.api.openai_chat.messages import ChatMessage, MessageList, plain_messages
from headstart.server.api.openai_chat.rendering import ChatRendering
from headstart.server.api.openai_chat.tools import Tool, ToolList, functions_of
from headstart.server.api.openai_completions.prompts import check_token_ids, check_vocabulary
from headstart.server.api.tools import as_tools
from headstart.server.generation.chat import chat_size
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Body, Refused
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import ChatTemplate, Ending, Message, Tools
from headstart.server.text.tokenizer import Tokenizer

encode = msgspec.json.encode

ChatTemplateField = Annotated[Any, Refused("see --chat-template")]


class TokenizeBody(ChatRendering):
    """``prompt``, maybe with ``add_special_tokens``, or ``messages``, maybe with ``tools`` and what
    says how they are rendered."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[ChatMessage] | None, FailFast(), Field(min_length=1)] = None
    tools: ToolList = None
    return_token_strs: bool | None = None
    chat_template: ChatTemplateField = None
    mm_processor_kwargs: Ignored = None

    def check(self) -> None:
        """Raise APIError for fields that do not go together."""
        if self.prompt is not None and self.messages is not None:
            raise bad_request("prompt and messages exclude each other", "messages")
        if self.prompt is None and self.messages is None:
            raise bad_request(
                "prompt, or messages, is required", "prompt", "missing_required_parameter"
            )
        if self.prompt is None and self.add_special_tokens:
            raise bad_request(
                "add_special_tokens goes with prompt; a chat's special tokens are its template's",
                "add_special_tokens",
            )
        if self.messages is None:
            for name in (*ChatRendering.model_fields, "tools"):
                if getattr(self, name) is not None:
                    raise bad_request(f"{name} goes with messages, not with prompt", name)


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIdsField

    def token_ids(self, model: ModelInfo, settings: ServerSettings) -> list[int]:
        """The ids, all of them in the vocabulary; raises APIError naming the first that is not."""
        ids = self.tokens
        if not isinstance(ids, list):
            raise bad_request("tokens must be a list of token ids", "tokens", "invalid_value")
        limit = settings.max_contexts * model.max_model_len
        if len(ids) > limit:
            raise bad_request(
                f"tokens has {len(ids)} entries; at most {limit} are allowed, "
                f"{settings.max_contexts} times the model's context",
                "tokens",
            )
        check_token_ids(ids, "tokens")
        check_vocabulary(ids, "tokens", model)
        return ids


class ApplyTemplateBody(ChatRendering):
    model: str | None = None
    messages: MessageList
    tools: ToolList = None
    chat_template: ChatTemplateField = None
    mm_processor_kwargs: Ignored = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A checked chat and its template; ``variables``: what else the template gets."""

    template: ChatTemplate
    messages: list[Message]
    tools: Tools | None
    ending: Ending
    variables: dict[str, Any]

    @property
    def size(self) -> int:
        """About how many characters there are to work on."""
        return chat_size(self.messages, self.tools)

    def text(self) -> str:
        return self.template.render(
            self.messages, self.tools, ending=self.ending, variables=self.variables
        )

    def token_ids(self) -> list[int]:
        return self.template.encode(
            self.messages, self.tools, ending=self.ending, variables=self.variables
        )


def _checked_chat(
    runtime: Runtime,
    messages: list[ChatMessage],
    tools: list[Tool] | None,
    rendering: ChatRendering,
) -> Chat:
    """Raises APIError for what a chat completion would refuse in its messages, and for tools that
    are none."""
    plain = plain_messages(messages, runtime.settings)
    checked = as_tools(functions_of(tools, runtime.settings))
    template = runtime.require_chat_template()
    variables = rendering.variables(template, runtime.settings)
    rendering.notes.check()
    return Chat(template, plain, checked, rendering.ending(plain), variables)


def _tokenized(
    tokenizer: Tokenizer, model: ModelInfo, token_ids: Callable[[], list[int]], strings: bool
) -> bytes:
    ids = token_ids()
    return encode(
        {
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "tokens": ids,
            "token_strs": tokenizer.entries(ids) if strings else None,
        }
    )


def _prompt(text: Callable[[], str]) -> bytes:
    return encode({"prompt": text()})


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["tokens"])
    tokenizer = runtime.tokenizer

    def require_model(name: str | None) -> ModelInfo:
        if name is not None:
            runtime.served(name)
        return runtime.require_model()

    @router.post("/tokenize", response_class=Response)
    async def tokenize(request: Request) -> Response:
        """Ids of a prompt, or of a chat; ``token_strs`` are their entries in the vocabulary."""
        body = await runtime.parse(request, TokenizeBody)
        model = require_model(body.model)
        body.check()
        strings = bool(body.return_token_strs)
        if body.messages is not None:
            chat = await runtime.with_body(
                request, partial(_checked_chat, runtime, body.messages, body.tools, body)
            )
            work = partial(_tokenized, tokenizer, model, chat.token_ids, strings)
            return _json(await runtime.with_chat(chat.size, work))
        text = body.prompt or ""
        special = True if body.add_special_tokens is None else body.add_special_tokens
        token_ids = partial(tokenizer.encode, text, add_special_tokens=special)
        work = partial(_tokenized, tokenizer, model, token_ids, strings)
        return _json(await runtime.with_text(len(text), work))

    @router.post("/detokenize", response_class=Response)
    async def detokenize(request: Request) -> Response:
        """Text of ids, special tokens included."""
        body = await runtime.parse(request, DetokenizeBody)
        model = require_model(body.model)
        ids = body.token_ids(model, runtime.settings)
        work = partial(_prompt, partial(tokenizer.decode_all, ids))
        return _json(await runtime.with_text(len(ids), work))

    @router.post("/apply-template", response_class=Response)
    async def apply_template(request: Request) -> Response:
        """The text that the model's chat template makes of messages."""
        body = await runtime.parse(request, ApplyTemplateBody)
        require_model(body.model)
        chat = await runtime.with_body(
            request, partial(_checked_chat, runtime, body.messages, body.tools, body)
        )
        return _json(await runtime.with_chat(chat.size, partial(_prompt, chat.text)))

    return router
