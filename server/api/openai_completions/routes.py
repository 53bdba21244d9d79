"""/v1/completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from headstart.engine.process.messages import ModelInfo, TokenLogprobs
from headstart.engine.sampling.params import SamplingParams
from headstart.server.api.choices.logprobs import (
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
    text_offsets,
)
from headstart.server.api.choices.shown import Shown
from headstart.server.api.choices.writer import ChoiceFormat
from headstart.server.api.fields import (
    GenerationBody,
    LogprobCount,
    fit_max_tokens,
)
from headstart.server.api.openai_completions.fill_in import filled_in, layout_of
from headstart.server.api.openai_completions.prompts import (
    PromptField,
    check_vocabulary,
    given_prompts,
    most_ids,
)
from headstart.server.api.segment_mask import (
    CompletionMaskField,
    Spans,
    completion_spans,
)
from headstart.server.generation.cache_explain import explainer
from headstart.server.generation.start import Prompt, answer
from headstart.server.http.errors import bad_request
from headstart.server.http.ledger import Ledger
from headstart.server.http.policy import Refused
from headstart.server.http.reply import NO_MORE, Choice, Echo, Reply, Usage
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings
from headstart.server.text.assembler import Delta
from headstart.server.text.tokenizer import Place, Tokenizer

encode = msgspec.json.encode

# OpenAI's default, and vLLM's. Chat completions have none.
DEFAULT_MAX_TOKENS = 16


class CompletionBody(GenerationBody):
    """``suffix``: the answer is what comes between the prompt and this."""

    prompt: PromptField
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: LogprobCount | None = None
    segment_mask: CompletionMaskField = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    prompt_embeds: Annotated[Any, Refused("give prompt")] = None
    suffix: str | None = None

    @property
    def num_choices(self) -> int:
        """Choices of each prompt, the ``n`` best of which are answered."""
        return self.best_of or self.n or 1

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def check_completion(self, settings: ServerSettings) -> None:
        """Raise APIError for what the types alone do not say."""
        self.check(settings)
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens must be at least 1 without echo: true", "max_tokens")
        for name in ("echo", "segment_mask", "truncate_prompt_tokens"):
            if self.suffix and getattr(self, name) not in (None, False):
                raise bad_request(f"suffix and {name} cannot be combined", "suffix")
        if self.best_of is not None:
            self._check_best_of(self.best_of, settings)
        if self.add_special_tokens is False and self.segment_mask is not None:
            raise bad_request(
                "add_special_tokens: false and segment_mask cannot be combined",
                "add_special_tokens",
            )

    @property
    def scored(self) -> int | None:
        counts = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in counts if count is not None), default=None)

    def _check_best_of(self, best_of: int, settings: ServerSettings) -> None:
        n = self.n or 1
        if best_of < n:
            raise bad_request(f"best_of is {best_of}, and n is {n}", "best_of")
        if best_of > settings.max_n:
            raise bad_request(f"best_of must be at most {settings.max_n}, got {best_of}", "best_of")
        if best_of > n and self.stream:
            raise bad_request("best_of above n cannot be streamed", "best_of")

    def check_choices(self, num_prompts: int, settings: ServerSettings) -> None:
        """Raise APIError for too many choices of so many prompts."""
        n, most = self.num_choices, settings.max_choices
        if num_prompts * n > most:
            raise bad_request(
                f"{num_prompts} prompts with n={n} are {num_prompts * n} choices; at most {most} "
                "are allowed",
                "prompt",
            )

    def params(
        self,
        num_prompt: int,
        model: ModelInfo,
        runtime: Runtime,
        grammar: str | None,
    ) -> SamplingParams:
        """The engine's view of the request, for a prompt of this length."""
        wanted = self.wanted_tokens
        max_tokens = fit_max_tokens(
            num_prompt, wanted or 1, model, param="max_tokens", prompt_param="prompt"
        )
        max_tokens = max_tokens if wanted else 0
        logprobs = self.logprobs
        if logprobs is None and self.num_choices > (self.n or 1):
            logprobs = 0  # the best are chosen by them
        return self.sampling_params(max_tokens, logprobs, model, runtime, grammar)


class CompletionFormat(ChoiceFormat):
    """``logprobs``: how many of the likeliest tokens are shown, if any. ``n``: of each prompt."""

    kind = "cmpl"
    event_object = "text_completion"
    field = b'"text":'

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        shown: Shown,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None,
        n: int,
    ) -> None:
        super().__init__(model, tokenizer, shown, prompt_logprobs=prompt_logprobs)
        self._logprobs = logprobs
        self._n = n

    def opening(self, choice: Choice) -> bytes:
        echo, shown = choice.echo, self._shown
        scored = echo if self._logprobs is not None else None
        if not (choice.echoed or scored or shown.token_ids):
            return b""
        logprobs = self._of_echo(choice, scored) if scored else None
        ids = b""
        if shown.token_ids:
            ids = b',"token_ids":[],"prompt_token_ids":' + encode(list(choice.prompt_token_ids))
        return b"".join(
            (
                self._start(choice),
                encode(choice.echoed),
                b',"logprobs":',
                encode(logprobs),
                b',"finish_reason":null',
                ids,
                shown.tail_of(choice),
            )
        )

    def event(self, choice: Choice, delta: Delta) -> bytes:
        text = self._start(choice) + encode(delta.text)
        if delta.finish_reason is None and self._logprobs is None and self._shown.plain:
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
                choice.end(delta.finish_reason),
                self._shown.ids_of(delta.token_ids),
                self._shown.tail_of(choice),
            )
        )

    def _of_answer(
        self, choice: Choice, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]
    ) -> dict[str, list[Any]]:
        before = len(choice.echoed)
        return completion_logprobs(self._names, tokens, [before + place for place in offsets])

    def _of_echo(self, choice: Choice, echo: Echo) -> dict[str, list[Any]]:
        return echoed_logprobs(self._names, echo, choice.scores, self._logprobs or 0)

    def _of_all(self, choice: Choice) -> dict[str, list[Any]] | None:
        """Those of the prompt, if it is in the text, and of the answer."""
        if self._logprobs is None:
            return None
        answer = self._of_answer(choice, choice.logprobs, choice.offsets)
        if choice.echo is None:
            return answer
        prompt = self._of_echo(choice, choice.echo)
        return {name: prompt[name] + values for name, values in answer.items()}

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        if self._prompt_logprobs is None:
            return {}
        scores = prompt_logprobs(self._tokenizer, choice.scores, self._prompt_logprobs)
        return {"prompt_logprobs": scores}

    def _ids_of(self, choice: Choice) -> dict[str, Any]:
        if not self._shown.token_ids:
            return {}
        return {
            "token_ids": choice.token_ids,
            "prompt_token_ids": list(choice.prompt_token_ids),
        }

    def body(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        answers = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": self._of_all(choice),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.assembler.stop_reason,
                **self._ids_of(choice),
            }
            | self._of_prompt(choice)
            for index, choice in enumerate(best_choices(choices, self._n))
        ]
        return encode({**self._head, "choices": answers, "usage": usage.json(), **more})


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
    runtime: Runtime,
    body: CompletionBody,
    model: ModelInfo,
    spans: Spans | None,
    ledger: Ledger,
) -> list[Prompt]:
    """Tokenise and check every prompt before any is started."""
    checked: list[Prompt] = []
    tokenizer = runtime.tokenizer
    settings = runtime.settings
    prompts = given_prompts(
        body.prompt, "prompt", settings.max_prompts, ids=most_ids(settings, model)
    )
    body.check_choices(len(prompts), settings)
    grammar = await runtime.checked(body.structure(runtime.settings))
    if grammar is not None:
        ledger.mark("grammar")
    if spans is not None:
        spans.check_prompts([prompt for _, prompt in prompts])
    layout = _layout(tokenizer, body.suffix)
    special = body.add_special_tokens is not False
    for path, prompt in prompts:
        token_ids: Sequence[int]
        places: Sequence[Place | None] = ()
        if not isinstance(prompt, str):
            token_ids = prompt
            check_vocabulary(token_ids, path, model)
        if layout is not None and body.suffix:
            size = len(prompt) + len(body.suffix)
            fill = partial(filled_in, tokenizer, layout, prompt, body.suffix)
            token_ids = await runtime.with_text(size, partial(fill, add_special_tokens=special))
        elif isinstance(prompt, str):
            token_ids, places = await runtime.with_text(
                len(prompt), partial(_encode, tokenizer, prompt, spans, special)
            )
        if not token_ids:
            raise bad_request(f"{path} is empty", path)
        kept = body.truncated(body.wanted_tokens, model, token_ids, spans is not None)
        whole, token_ids = len(kept) == len(token_ids), kept
        echo = None
        if body.echo:
            given = prompt if isinstance(prompt, str) and whole else None
            work = partial(_echo, tokenizer, token_ids, given, placed=body.logprobs is not None)
            echo = await runtime.with_text(4 * len(token_ids), work)
        params = body.params(len(token_ids), model, runtime, grammar)
        text = prompt if isinstance(prompt, str) else ""
        segments = spans.of_prompt(len(token_ids), text, places) if spans else ()
        context = () if layout else token_ids[-8:]
        checked.append(Prompt(token_ids, params, segments, context=context, echo=echo))
    ledger.mark("tokenise")
    return checked


def _explained(runtime: Runtime, request: Request, prompts: Sequence[Prompt]) -> Prompt:
    """The one prompt, whose answer says why the cache did not have more of it; APIError if there
    are several."""
    if len(prompts) > 1:
        raise bad_request(
            f"cache_explain takes one prompt, and there are {len(prompts)}", "cache_explain"
        )
    [prompt] = prompts
    return replace(prompt, explain=explainer(runtime, request, prompt.token_ids))


def _layout(tokenizer: Tokenizer, suffix: str | None) -> Sequence[str] | None:
    """How the prompts and the suffix are laid out; None where there is none. Raises APIError."""
    layout = layout_of(tokenizer) if suffix else None
    if suffix and layout is None:
        raise bad_request(
            "suffix is not supported: this model has no tokens to fill in text between two others",
            "suffix",
            "unsupported_parameter",
        )
    return layout


def _echo(
    tokenizer: Tokenizer, token_ids: Sequence[int], given: str | None, *, placed: bool
) -> Echo:
    """The prompt as it was ``given``, or the text of its ids; ``placed``: with offsets."""
    text = tokenizer.decode(token_ids) if given is None else given
    return Echo(text, token_ids, text_offsets(tokenizer, token_ids, text) if placed else ())


def _encode(
    tokenizer: Tokenizer, prompt: str, spans: Spans | None, add_special_tokens: bool
) -> tuple[list[int], Sequence[Place | None]]:
    """Ids, and where each comes from if ``spans`` ask for that, which takes longer."""
    if spans is not None and spans.unit == "characters":
        return tokenizer.encode_placed(prompt)
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens), ()


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
        model = runtime.require_text_model()
        ledger = Ledger.of(request.scope)
        prompts = await _checked_prompts(runtime, body, model, spans, ledger)
        if body.cache_explain:
            prompts = [_explained(runtime, request, prompts)]
        format = CompletionFormat(
            served.name,
            runtime.tokenizer,
            body.shown,
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            n=body.n or 1,
        )
        return answer(
            runtime,
            request,
            served,
            prompts,
            format,
            options=options,
            stream=bool(body.stream),
            n=body.num_choices,
            priority=body.priority or 0,
        )

    return router
