"""/v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import WithJsonSchema

from headstart.engine.messages import ModelInfo
from headstart.engine.sampling_params import SamplingParams
from headstart.server.errors import bad_request
from headstart.server.openai.fields import (
    REFUSED_IN_COMPLETIONS,
    GenerationBody,
    LogprobCount,
    fit_max_tokens,
    is_token_id,
)
from headstart.server.openai.logprobs import completion_logprobs
from headstart.server.openai.reply import Choice, Format, Reply, Usage
from headstart.server.openai.segment_mask import (
    NOT_DECLARED,
    CompletionMaskField,
    Spans,
    completion_spans,
)
from headstart.server.openai.start import Prompt, start_choices
from headstart.server.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.stream import Delta
from headstart.server.tokenizer import Place, Tokenizer

encode = msgspec.json.encode

# OpenAI's default, and vLLM's. Chat completions have none.
DEFAULT_MAX_TOKENS = 16

_IDS = {"type": "array", "items": {"type": "integer"}}
PromptField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        },
        mode="validation",
    ),
]


class CompletionBody(GenerationBody):
    prompt: PromptField
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: LogprobCount | None = None
    segment_mask: CompletionMaskField = None

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def check_completion(self, settings: ServerSettings) -> None:
        """Raise APIError for what the types alone do not say."""
        self.check(REFUSED_IN_COMPLETIONS, settings)
        if self.echo and self.logprobs is not None:
            raise bad_request(
                "echo together with logprobs is not supported", "echo", "unsupported_parameter"
            )
        if self.add_special_tokens is False and self.segment_mask is not None:
            raise bad_request(
                "add_special_tokens: false and segment_mask cannot be combined",
                "add_special_tokens",
            )

    def prompts(self, settings: ServerSettings) -> Sequence[str | list[int]]:
        """The prompts, whatever form they came in; ids are not checked against the vocabulary."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list):
            raise _bad_prompt("prompt")
        if not prompt:
            raise bad_request("prompt is an empty list", "prompt")
        if is_token_id(prompt[0]):
            return [_checked_ids(prompt, "prompt")]
        count = len(prompt) * (self.n or 1)
        if len(prompt) > settings.max_prompts or count > settings.max_choices:
            raise bad_request(
                f"{len(prompt)} prompts with n={self.n or 1} are {count} choices; at most "
                f"{settings.max_prompts} prompts and {settings.max_choices} choices are allowed",
                "prompt",
            )
        if isinstance(prompt[0], str):
            for i, text in enumerate(prompt):
                if not isinstance(text, str):
                    raise _bad_prompt(f"prompt[{i}]")
            return prompt
        return [_checked_ids(ids, f"prompt[{i}]") for i, ids in enumerate(prompt)]

    def params(
        self,
        num_prompt: int,
        model: ModelInfo,
        settings: ServerSettings,
        tokenizer: Tokenizer,
        grammar: str | None = None,
    ) -> SamplingParams:
        """The engine's view of the request, for a prompt of this length."""
        max_tokens = self.wanted_tokens
        if self.max_tokens is None and num_prompt < model.max_model_len:
            max_tokens = min(max_tokens, model.max_model_len - num_prompt)
        max_tokens = fit_max_tokens(
            num_prompt, max_tokens, model, param="max_tokens", prompt_param="prompt"
        )
        return self.sampling_params(max_tokens, self.logprobs, model, settings, tokenizer, grammar)


def _bad_prompt(path: str) -> Exception:
    return bad_request(
        f"{path}: a prompt is a string, a list of strings, a list of token ids, or a list of those",
        path,
        "invalid_value",
    )


def _checked_ids(ids: Any, path: str) -> list[int]:
    if not isinstance(ids, list):
        raise _bad_prompt(path)
    for i, token_id in enumerate(ids):
        if not is_token_id(token_id):
            raise bad_request(f"{path}[{i}] is not a token id", f"{path}[{i}]", "invalid_value")
    return ids


class CompletionFormat(Format):
    """Bytes around text: everything but the text is encoded once per request."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool
    ) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = b"data: " + encode(self._head)[:-1]
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._tail = (b'}],"usage":null}' if include_usage else b"}]}") + b"\n\n"
        self._plain_tail = b',"logprobs":null,"finish_reason":null' + self._tail
        self._choice_prefix: dict[int, bytes] = {}

    def _start(self, choice: Choice) -> bytes:
        prefix = self._choice_prefix.get(choice.index)
        if prefix is None:
            prefix = self._prefix + b',"choices":[{"index":%d,"text":' % choice.index
            self._choice_prefix[choice.index] = prefix
        return prefix

    def opening(self, choice: Choice) -> bytes:
        return self._start(choice) + encode(choice.echo) + self._plain_tail if choice.echo else b""

    def event(self, choice: Choice, delta: Delta) -> bytes:
        text = self._start(choice) + encode(delta.text)
        if delta.finish_reason is None and not self._logprobs:
            return text + self._plain_tail
        logprobs = self._logprobs_of(delta.logprobs or (), delta.offsets or ())
        return b"".join(
            (
                text,
                b',"logprobs":',
                encode(logprobs),
                b',"finish_reason":',
                encode(delta.finish_reason),
                self._tail,
            )
        )

    def _logprobs_of(self, tokens: Sequence[Any], offsets: Sequence[int]) -> dict[str, Any] | None:
        return completion_logprobs(self._tokenizer, tokens, offsets) if self._logprobs else None

    def usage_event(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return b""
        return self._prefix + b',"choices":[],"usage":' + encode(usage.json()) + b"}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": self._logprobs_of(choice.logprobs, choice.offsets),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return encode(self._head | {"choices": answers, "usage": usage.json()})


async def _checked_prompts(
    runtime: Runtime, body: CompletionBody, model: ModelInfo, spans: Spans | None
) -> list[Prompt]:
    """Tokenise and check every prompt before any is started."""
    checked: list[Prompt] = []
    tokenizer = runtime.tokenizer
    prompts = body.prompts(runtime.settings)
    grammar = await runtime.checked(body.structure(runtime.settings))
    if spans is not None:
        spans.check_prompts(prompts)
    many = isinstance(body.prompt, list) and not is_token_id(body.prompt[0])
    for i, prompt in enumerate(prompts):
        path = f"prompt[{i}]" if many else "prompt"
        token_ids: Sequence[int]
        places: Sequence[Place | None] = ()
        if isinstance(prompt, str):
            token_ids, places = await runtime.with_text(
                len(prompt), partial(_encode, tokenizer, prompt, spans, body.add_special_tokens)
            )
        else:
            token_ids = prompt
            for j, token_id in enumerate(token_ids):
                if token_id >= model.vocab_size:
                    raise bad_request(
                        f"{path}[{j}] is token {token_id}; the vocabulary has {model.vocab_size}",
                        f"{path}[{j}]",
                    )
        if not token_ids:
            raise bad_request(f"{path} is empty", path)
        kept = body.truncated(token_ids, body.wanted_tokens, model, spans=spans is not None)
        whole, token_ids = len(kept) == len(token_ids), kept
        echo = ""
        if body.echo:
            given = isinstance(prompt, str) and whole
            echo = str(prompt) if given else tokenizer.decode(token_ids)
        params = body.params(len(token_ids), model, runtime.settings, tokenizer, grammar)
        text = prompt if isinstance(prompt, str) else ""
        segments = spans.of_prompt(len(token_ids), text, places) if spans else ()
        checked.append(Prompt(token_ids, params, segments, context=token_ids[-8:], echo=echo))
    return checked


def _encode(
    tokenizer: Tokenizer, prompt: str, spans: Spans | None, add_special_tokens: bool | None
) -> tuple[list[int], Sequence[Place | None]]:
    """Ids, and where each comes from if ``spans`` ask for that, which takes longer."""
    if spans is not None and spans.unit == "characters":
        return tokenizer.encode_placed(prompt)
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens is not False), ()


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["completions"])

    @router.post("/v1/completions", response_class=Response)
    async def create_completion(request: Request) -> Reply:
        """Continue one or more prompts; streamed with ``stream: true``."""
        body = await runtime.parse(request, CompletionBody)
        served = runtime.served(body.model)
        body.check_completion(runtime.settings)
        spans = completion_spans(body.segment_mask, runtime.settings)
        options = body.text_options(runtime.settings)
        model = runtime.require_model()
        prompts = await _checked_prompts(runtime, body, model, spans)
        format = CompletionFormat(
            served.name,
            runtime.tokenizer,
            logprobs=body.logprobs is not None,
            include_usage=body.include_usage,
        )
        choices = start_choices(
            runtime, served, prompts, n=body.n or 1, options=options, salt=body.salt
        )
        warning = NOT_DECLARED if spans and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning)

    return router
