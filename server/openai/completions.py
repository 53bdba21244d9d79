"""/v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from headstart.engine.messages import ModelInfo, TokenLogprobs
from headstart.engine.sampling_params import SamplingParams
from headstart.server.errors import bad_request
from headstart.server.openai.fields import (
    REFUSED_IN_COMPLETIONS,
    GenerationBody,
    LogprobCount,
    fit_max_tokens,
)
from headstart.server.openai.logprobs import (
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
    text_offsets,
)
from headstart.server.openai.prompts import PromptField, check_vocabulary, given_prompts
from headstart.server.openai.reply import Choice, Echo, Format, Reply, Usage
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


class CompletionBody(GenerationBody):
    prompt: PromptField
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool | None = None
    logprobs: LogprobCount | None = None
    segment_mask: CompletionMaskField = None

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def check_completion(self, settings: ServerSettings) -> None:
        """Raise APIError for what the types alone do not say."""
        self.check(REFUSED_IN_COMPLETIONS, settings)
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens must be at least 1 without echo: true", "max_tokens")
        if self.add_special_tokens is False and self.segment_mask is not None:
            raise bad_request(
                "add_special_tokens: false and segment_mask cannot be combined",
                "add_special_tokens",
            )

    @property
    def scored(self) -> int | None:
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in counts if count is not None), default=None)

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


class CompletionFormat(Format):
    """Bytes around text: everything but the text is encoded once per request."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None,
        include_usage: bool,
    ) -> None:
        """``logprobs``, ``prompt_logprobs``: how many of the likeliest tokens are shown, if any."""
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = b"data: " + encode(self._head)[:-1]
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
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
        echo = choice.echo
        if echo is None or (not echo.text and self._logprobs is None):
            return b""
        start = self._start(choice) + encode(echo.text)
        if self._logprobs is None:
            return start + self._plain_tail
        logprobs = echoed_logprobs(self._tokenizer, echo, choice.scores, self._logprobs)
        return start + b',"logprobs":' + encode(logprobs) + b',"finish_reason":null' + self._tail

    def event(self, choice: Choice, delta: Delta) -> bytes:
        text = self._start(choice) + encode(delta.text)
        if delta.finish_reason is None and self._logprobs is None:
            return text + self._plain_tail
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._of_answer(choice, delta.logprobs or (), delta.offsets or ())
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

    def _of_answer(
        self, choice: Choice, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> dict[str, list[Any]]:
        before = len(choice.echo.text) if choice.echo else 0
        return completion_logprobs(self._tokenizer, tokens, [before + place for place in offsets])

    def _of_all(self, choice: Choice) -> dict[str, list[Any]] | None:
        """Those of the prompt, if it is in the text, and of the answer."""
        if self._logprobs is None:
            return None
        answer = self._of_answer(choice, choice.logprobs, choice.offsets)
        if choice.echo is None:
            return answer
        prompt = echoed_logprobs(self._tokenizer, choice.echo, choice.scores, self._logprobs)
        return {name: prompt[name] + values for name, values in answer.items()}

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        if self._prompt_logprobs is None:
            return {}
        scores = prompt_logprobs(self._tokenizer, choice.scores, self._prompt_logprobs)
        return {"prompt_logprobs": scores}

    def usage_event(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return b""
        return self._prefix + b',"choices":[],"usage":' + encode(usage.json()) + b"}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": self._of_all(choice),
                "finish_reason": choice.finish_reason,
            }
            | self._of_prompt(choice)
            for choice in choices
        ]
        return encode(self._head | {"choices": answers, "usage": usage.json()})


async def _checked_prompts(
    runtime: Runtime, body: CompletionBody, model: ModelInfo, spans: Spans | None
) -> list[Prompt]:
    """Tokenise and check every prompt before any is started."""
    checked: list[Prompt] = []
    tokenizer = runtime.tokenizer
    prompts = given_prompts(body.prompt, "prompt", runtime.settings, n=body.n or 1)
    grammar = await runtime.checked(body.structure(runtime.settings))
    if spans is not None:
        spans.check_prompts([prompt for _, prompt in prompts])
    for path, prompt in prompts:
        token_ids: Sequence[int]
        places: Sequence[Place | None] = ()
        if isinstance(prompt, str):
            token_ids, places = await runtime.with_text(
                len(prompt), partial(_encode, tokenizer, prompt, spans, body.add_special_tokens)
            )
        else:
            token_ids = prompt
            check_vocabulary(token_ids, path, model)
        if not token_ids:
            raise bad_request(f"{path} is empty", path)
        kept = body.truncated(token_ids, body.wanted_tokens, model, spans=spans is not None)
        whole, token_ids = len(kept) == len(token_ids), kept
        echo = None
        if body.echo:
            given = prompt if isinstance(prompt, str) and whole else None
            work = partial(_echo, tokenizer, token_ids, given, placed=body.logprobs is not None)
            echo = await runtime.with_text(4 * len(token_ids), work)
        params = body.params(len(token_ids), model, runtime.settings, tokenizer, grammar)
        text = prompt if isinstance(prompt, str) else ""
        segments = spans.of_prompt(len(token_ids), text, places) if spans else ()
        checked.append(Prompt(token_ids, params, segments, context=token_ids[-8:], echo=echo))
    return checked


def _echo(
    tokenizer: Tokenizer, token_ids: Sequence[int], given: str | None, *, placed: bool
) -> Echo:
    """The prompt as it was ``given``, or the text of its ids; ``placed``: with offsets."""
    text = tokenizer.decode(token_ids) if given is None else given
    return Echo(text, token_ids, text_offsets(tokenizer, token_ids, text) if placed else ())


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
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            include_usage=body.include_usage,
        )
        choices = start_choices(
            runtime, served, prompts, n=body.n or 1, options=options, salt=body.salt
        )
        warning = NOT_DECLARED if spans and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning)

    return router
