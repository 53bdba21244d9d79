"""/v1/completions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from headstart.engine.messages import ModelInfo
from headstart.engine.sampling_params import SamplingParams
from headstart.server.access_log import name_request
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
from headstart.server.openai.shown import Shown, TokenIdNames, TokenNames
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
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def num_choices(self) -> int:
        """Choices of each prompt, the ``n`` best of which are answered."""
        return self.best_of or self.n or 1

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
        if self.best_of is not None:
            self._check_best_of(self.best_of, settings)
        if self.add_special_tokens is False and self.segment_mask is not None:
            raise bad_request(
                "add_special_tokens: false and segment_mask cannot be combined",
                "add_special_tokens",
            )

    def _check_best_of(self, best_of: int, settings: ServerSettings) -> None:
        n = self.n or 1
        if best_of < n:
            raise bad_request(f"best_of is {best_of}, and n is {n}", "best_of")
        if best_of > settings.max_n:
            raise bad_request(f"best_of must be at most {settings.max_n}, got {best_of}", "best_of")
        if best_of > n and self.stream:
            raise bad_request("best_of above n cannot be streamed", "best_of")

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
        count = len(prompt) * self.num_choices
        if len(prompt) > settings.max_prompts or count > settings.max_choices:
            raise bad_request(
                f"{len(prompt)} prompts with n={self.num_choices} are {count} choices; at most "
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
        logprobs = self.logprobs
        if logprobs is None and self.num_choices > (self.n or 1):
            logprobs = 0  # the best are chosen by them
        return self.sampling_params(max_tokens, logprobs, model, settings, tokenizer, grammar)


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
        self, model: str, tokenizer: Tokenizer, *, logprobs: bool, shown: Shown, n: int
    ) -> None:
        self._head = {
            "id": shown.answer_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = b"data: " + encode(self._head)[:-1]
        self._names: TokenNames = TokenIdNames() if shown.tokens_as_ids else tokenizer
        self._logprobs = logprobs
        self._shown = shown
        self._n = n
        self.every_token = shown.token_ids
        self._tail = (b'}],"usage":null}' if shown.usage else b"}]}") + b"\n\n"
        self._plain_tail = b',"logprobs":null,"finish_reason":null' + self._tail
        self._choice_prefix: dict[int, bytes] = {}

    def _start(self, choice: Choice) -> bytes:
        prefix = self._choice_prefix.get(choice.index)
        if prefix is None:
            prefix = self._prefix + b',"choices":[{"index":%d,"text":' % choice.index
            self._choice_prefix[choice.index] = prefix
        return prefix

    def opening(self, choice: Choice) -> bytes:
        start = self._start(choice) + encode(choice.echo)
        if self._shown.plain:
            return start + self._plain_tail if choice.echo else b""
        if not (choice.echo or self._shown.token_ids):
            return b""
        ids = b""
        if self._shown.token_ids:
            ids = b',"token_ids":[],"prompt_token_ids":' + encode(list(choice.prompt_token_ids))
        none = b',"logprobs":null,"finish_reason":null'
        return start + none + ids + self._shown.tail_of(choice)

    def event(self, choice: Choice, delta: Delta) -> bytes:
        text = self._start(choice) + encode(delta.text)
        if delta.finish_reason is None and not self._logprobs and self._shown.plain:
            return text + self._plain_tail
        logprobs = self._logprobs_of(delta.logprobs or (), delta.offsets or ())
        return b"".join(
            (
                text,
                b',"logprobs":',
                encode(logprobs),
                b',"finish_reason":',
                encode(delta.finish_reason),
                self._shown.ids_of(delta.token_ids),
                self._shown.tail_of(choice),
            )
        )

    def _logprobs_of(self, tokens: Sequence[Any], offsets: Sequence[int]) -> dict[str, Any] | None:
        return completion_logprobs(self._names, tokens, offsets) if self._logprobs else None

    def _ids_of(self, choice: Choice) -> dict[str, Any]:
        if not self._shown.token_ids:
            return {}
        return {
            "token_ids": choice.token_ids,
            "prompt_token_ids": list(choice.prompt_token_ids),
        }

    def usage_event(self, usage: Usage) -> bytes:
        if not self._shown.usage:
            return b""
        return self._prefix + b',"choices":[],"usage":' + encode(usage.json()) + b"}\n\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": self._logprobs_of(choice.logprobs, choice.offsets),
                "finish_reason": choice.finish_reason,
                **self._ids_of(choice),
            }
            for index, choice in enumerate(best_choices(choices, self._n))
        ]
        return encode(self._head | {"choices": answers, "usage": usage.json()})


def best_choices(choices: Sequence[Choice], n: int) -> list[Choice]:
    """The ``n`` choices of each prompt whose tokens are the most likely on average, best first; as
    they are when there are no more."""
    by_prompt: dict[int, list[Choice]] = {}
    for choice in choices:
        by_prompt.setdefault(choice.prompt, []).append(choice)
    best: list[Choice] = []
    for found in by_prompt.values():
        best += sorted(found, key=_likelihood, reverse=True)[:n] if len(found) > n else found
    return best


def _likelihood(choice: Choice) -> float:
    """Mean log-probability of the tokens of the text; an empty one is the least likely."""
    tokens = choice.logprobs
    return sum(token.logprob for token in tokens) / len(tokens) if tokens else -math.inf


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
        deadline = runtime.deadline(request, body.timeout)
        if body.request_id is not None:
            name_request(request.scope, body.request_id)
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
            shown=body.shown,
            n=body.n or 1,
        )
        choices = start_choices(
            runtime,
            served,
            prompts,
            n=body.num_choices,
            options=options,
            salt=body.salt,
            priority=body.priority or 0,
        )
        warning = NOT_DECLARED if spans and not served.for_segments else None
        return Reply(choices, format, stream=bool(body.stream), warning=warning, deadline=deadline)

    return router
