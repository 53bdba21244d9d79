"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import FailFast, Field, WithJsonSchema

from headstart.engine.messages import ModelInfo
from headstart.engine.sampling_params import SamplingParams
from headstart.engine.segments import Span, turn_spans
from headstart.server.access_log import name_request
from headstart.server.errors import bad_request
from headstart.server.openai.chat_fields import ChatRendering
from headstart.server.openai.fields import (
    REFUSED_IN_CHAT,
    REFUSED_IN_MESSAGE,
    Body,
    GenerationBody,
    LogprobCount,
    Role,
    fit_max_tokens,
    refuse_extras,
)
from headstart.server.openai.logprobs import chat_logprobs
from headstart.server.openai.reply import Choice, Format, Reply, Usage
from headstart.server.openai.segment_mask import (
    NOT_DECLARED,
    ChatMaskField,
    chat_mask,
)
from headstart.server.openai.shown import Shown, TokenIdNames, TokenNames
from headstart.server.openai.start import Prompt, start_choices
from headstart.server.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.stream import Delta
from headstart.server.templates import Message
from headstart.server.tokenizer import Tokenizer

encode = msgspec.json.encode

ContentField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        mode="validation",
    ),
]


class ChatMessage(Body):
    """``content``: a string, or a list of ``{"type": "text", "text": ...}`` parts, joined by
    newlines. ``developer`` is what OpenAI calls ``system`` since 2024."""

    role: Role
    content: ContentField
    name: str | None = None

    def plain(self, path: str) -> Message:
        """The message as templates take it; raises APIError."""
        refuse_extras(self.model_extra, REFUSED_IN_MESSAGE, f"{path}.")
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": _content_text(self.content, f"{path}.content"),
        }
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatBody(ChatRendering, GenerationBody):
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    segment_mask: ChatMaskField = None
    echo: bool | None = None

    def check_chat(self, settings: ServerSettings) -> None:
        """Raise APIError for what the types alone do not say."""
        self.check(REFUSED_IN_CHAT, settings)
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

    def params(
        self, num_prompt: int, model: ModelInfo, settings: ServerSettings, tokenizer: Tokenizer
    ) -> SamplingParams:
        """The engine's view of the request."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = fit_max_tokens(
            num_prompt, getattr(self, name), model, param=name, prompt_param="messages"
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens, logprobs, model, settings, tokenizer)


def plain_messages(messages: Sequence[ChatMessage], settings: ServerSettings) -> list[Message]:
    """The messages as templates take them; raises APIError, for too many of them, too."""
    if len(messages) > settings.max_messages:
        raise bad_request(
            f"messages has {len(messages)} entries; at most {settings.max_messages} are allowed",
            "messages",
        )
    return [message.plain(f"messages[{i}]") for i, message in enumerate(messages)]


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
        refuse_extras(
            {key: value for key, value in part.items() if key not in ("type", "text")},
            {},
            f"{part_path}.",
        )
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{part_path}.text must be a string", f"{part_path}.text")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatFormat(Format):
    """Bytes around text: everything but the text is encoded once per request."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, shown: Shown) -> None:
        self._head = {
            "id": shown.answer_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = b"data: " + encode(self._head)[:-1]
        self._names: TokenNames = TokenIdNames() if shown.tokens_as_ids else tokenizer
        self._logprobs = logprobs
        self._shown = shown
        self.every_token = shown.token_ids
        self._tail = (b'}],"usage":null}' if shown.usage else b"}]}") + b"\n\n"
        self._plain_tail = b'},"logprobs":null,"finish_reason":null' + self._tail
        self._choice_prefix: dict[int, bytes] = {}

    def _start(self, choice: Choice) -> bytes:
        prefix = self._choice_prefix.get(choice.index)
        if prefix is None:
            prefix = self._prefix + b',"choices":[{"index":%d,"delta":' % choice.index
            self._choice_prefix[choice.index] = prefix
        return prefix

    def opening(self, choice: Choice) -> bytes:
        start = self._start(choice) + b'{"role":"assistant","content":' + encode(choice.echo)
        if self._shown.plain:
            return start + self._plain_tail
        ids = b""
        if self._shown.token_ids:
            ids = b',"prompt_token_ids":' + encode(list(choice.prompt_token_ids))
        none = b'},"logprobs":null,"finish_reason":null'
        return start + none + self._shown.tail_of(choice, ids)

    def event(self, choice: Choice, delta: Delta) -> bytes:
        start = self._start(choice)
        if delta.finish_reason is None and not self._logprobs and self._shown.plain:
            return start + b'{"content":' + encode(delta.text) + self._plain_tail
        logprobs = chat_logprobs(self._names, delta.logprobs or ()) if self._logprobs else None
        return b"".join(
            (
                start,
                encode({"content": delta.text} if delta.text else {}),
                b',"logprobs":',
                encode(logprobs),
                b',"finish_reason":',
                encode(delta.finish_reason),
                self._shown.ids_of(delta),
                self._shown.tail_of(choice),
            )
        )

    def usage_event(self, usage: Usage) -> bytes:
        if not self._shown.usage:
            return b""
        return self._prefix + b',"choices":[],"usage":' + encode(usage.json()) + b"}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": (
                    chat_logprobs(self._names, choice.logprobs) if self._logprobs else None
                ),
                "finish_reason": choice.finish_reason,
                **({"token_ids": choice.token_ids} if self._shown.token_ids else {}),
            }
            for choice in choices
        ]
        head = self._head | {"object": "chat.completion"}
        if self._shown.token_ids:
            head["prompt_token_ids"] = list(choices[0].prompt_token_ids)
        return encode(head | {"choices": answers, "usage": usage.json()})


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
        messages = plain_messages(body.messages, runtime.settings)
        model = runtime.require_model()
        template = runtime.require_chat_template()
        options = body.text_options(runtime.settings)
        ending, variables = body.ending(messages), body.variables(template, runtime.settings)
        size = sum(len(message["content"]) for message in messages)
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
                size, partial(template.encode_turns, messages, variables=variables)
            )
            segments = turn_spans(turns)
        else:
            encode_chat = partial(template.encode, messages, ending=ending, variables=variables)
            token_ids = await runtime.with_chat(size, encode_chat)
        wanted = body.max_completion_tokens or body.max_tokens
        token_ids = body.truncated(token_ids, wanted, model, spans=bool(segments))
        params = body.params(len(token_ids), model, runtime.settings, runtime.tokenizer)
        format = ChatFormat(
            served.name,
            runtime.tokenizer,
            logprobs=params.logprobs is not None,
            shown=body.shown,
        )
        choices = start_choices(
            runtime,
            served,
            [
                Prompt(
                    token_ids,
                    params,
                    segments,
                    context=token_ids[-8:] if ending == "continued" else (),
                    echo=messages[-1]["content"] if body.echo else "",
                )
            ],
            n=body.n or 1,
            options=options,
            salt=body.salt,
            priority=body.priority or 0,
        )
        warning = NOT_DECLARED if mask == "turns" and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning, deadline=deadline)

    return router
