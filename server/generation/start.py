"""Prompts to running choices: the one place where the API asks the engine for tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from fastapi import Request

from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import SamplingParams
from headstart.server.http.admission import Ticket
from headstart.server.http.cache_scope import owner_of, salt_of
from headstart.server.http.ledger import Asked, Ledger
from headstart.server.http.metrics import ChoiceTimer
from headstart.server.http.reply import Choice, Echo, Explain, Format, Reply
from headstart.server.http.runtime import Runtime, Served
from headstart.server.text.answer import AnswerParser
from headstart.server.text.assembler import TextAssembler, TextOptions

NOT_DECLARED = (
    "segment_mask: neither a config nor --segment-mask declares segments for this model; "
    "one that was not tuned for them answers worse with them"
)
SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked prompt. ``context``: its last ids, for text that continues it. ``new_parser`` makes
    what tells the parts of an answer; None: it is text and nothing else. ``explain``: where the
    answer is to say why the cache did not have more of the prompt."""

    token_ids: Sequence[int]
    params: SamplingParams
    segments: Sequence[Span] = ()
    context: Sequence[int] = ()
    echo: Echo | None = None
    new_parser: Callable[[], AnswerParser] | None = None
    explain: Explain | None = None


def answer(
    runtime: Runtime,
    request: Request,
    served: Served,
    prompts: Sequence[Prompt],
    format: Format,
    *,
    options: TextOptions,
    stream: bool,
    n: int = 1,
    priority: int = 0,
) -> Reply:
    """The answer to a request: ``n`` choices of each prompt, in the API's ``format``.

    Raises EngineDeadError, and APIError where it is more than the server lets in; nothing is left
    running then.
    """
    first = prompts[0].params
    Ledger.of(request.scope).asked = Asked(
        model=served.name,
        answer_id=format.answer_id,
        choices=n * len(prompts),
        max_tokens=first.max_tokens,
        temperature=first.temperature,
        top_p=first.top_p,
    )
    choices = _start_choices(runtime, request, served, prompts, n, options, priority)
    declared = served.for_segments or not any(prompt.segments for prompt in prompts)
    return Reply(choices, format, stream=stream, warning=None if declared else NOT_DECLARED)


def _start_choices(
    runtime: Runtime,
    request: Request,
    served: Served,
    prompts: Sequence[Prompt],
    n: int,
    options: TextOptions,
    priority: int,
) -> list[Choice]:
    """Seeds count up from the request's."""
    choices: list[Choice] = []
    metrics = runtime.metrics.of(served.name)
    salt, owner = salt_of(request.scope), owner_of(request.scope)
    ticket = Ticket.of(request.scope)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    ticket.settle(request.scope, lengths, n * len(prompts))
    try:
        for i, prompt in enumerate(prompts):
            for j in range(n):
                params, explain = prompt.params, prompt.explain
                if j:  # the first one tells of the prompt
                    seed = None if params.seed is None else choice_seed(params.seed, j)
                    params = msgspec.structs.replace(params, seed=seed, prompt_progress=False)
                    explain = None
                elif explain is not None:
                    params = msgspec.structs.replace(params, cache_explain=True)
                assembler = TextAssembler(
                    runtime.tokenizer,
                    options,
                    context=prompt.context,
                    logprobs=params.logprobs is not None,
                )
                choices.append(
                    Choice(
                        index=i * n + j,
                        prompt=i,
                        prompt_token_ids=prompt.token_ids,
                        stream=ticket.asked(
                            runtime.engine.add(
                                prompt.token_ids,
                                params,
                                salt=salt,
                                segments=prompt.segments,
                                adapter=served.adapter,
                                priority=priority,
                                owner=owner,
                            )
                        ),
                        assembler=assembler,
                        timer=ChoiceTimer(
                            metrics, told=partial(ticket.first_token, 0 if j else lengths[i])
                        ),
                        echo=prompt.echo,
                        parser=prompt.new_parser() if prompt.new_parser else None,
                        explain=explain,
                    )
                )
    except BaseException:
        for choice in choices:
            choice.stream.abort()
        raise
    return choices


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice ``index`` of a request: never negative, never beyond 63 bits."""
    return (seed + index) % SEED_RANGE
