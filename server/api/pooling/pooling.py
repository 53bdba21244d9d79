"""Vectors of prompts, for the endpoints that answer with them or compare them.

All prompts are checked before any is started. They are computed in groups, so that one request does
not fill the engine's queue. When the client hangs up, the engine's streams are aborted at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fastapi import Request

from headstart.engine.process.messages import ModelInfo
from headstart.engine.sampling.params import Pooling, PoolingParams
from headstart.server.api.fields import (
    Described,
    Ignored,
    Truncation,
    truncated,
)
from headstart.server.api.openai_completions.prompts import check_vocabulary
from headstart.server.generation.engine_client import Stream
from headstart.server.http.access_log import note_usage
from headstart.server.http.admission import Ticket
from headstart.server.http.cache_scope import CacheBody, owner_of, salt_of
from headstart.server.http.deadline import begun
from headstart.server.http.errors import APIError, ContextLengthError, bad_request, unavailable
from headstart.server.http.metrics import ChoiceTimer
from headstart.server.http.policy import Refused
from headstart.server.http.runtime import Runtime, Served
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]

GROUP = 64
"""Prompts of one request that the engine has at a time."""


class PooledBody(Described, CacheBody):
    """What requests for vectors have in common. ``null`` always means: the default."""

    model: str
    pooling: Pooling | None = None
    truncate_prompt_tokens: Truncation | None = None
    add_special_tokens: bool | None = None
    mm_processor_kwargs: Ignored = None
    priority: Ignored = None
    request_id: Ignored = None
    activation: Annotated[Any, Refused("scores are cosines")] = None
    softmax: Annotated[Any, Refused("scores are cosines")] = None
    use_activation: Annotated[Any, Refused("scores are cosines")] = None


class PooledText(NamedTuple):
    """A prompt, and where in the body it is. ``most``: only so many of its first tokens count."""

    path: str
    prompt: str | list[int]
    most: int | None = None


class Vectors(NamedTuple):
    """``rows``: ``[prompts, hidden]``, float32, all of them numbers."""

    rows: Floats
    num_tokens: int


class _Running(NamedTuple):
    path: str
    num_tokens: int
    stream: Stream
    timer: ChoiceTimer


def normalized(rows: Floats) -> Floats:
    """Each row divided by its length; one of zeros is left as it is."""
    lengths: Floats = np.sqrt(np.square(rows).sum(-1, keepdims=True))
    lengths[lengths == 0] = 1
    found: Floats = rows / lengths
    return found


def texts_of(value: Any, field: str, settings: ServerSettings) -> list[PooledText]:
    """The texts of ``field``, one or a list; raises APIError."""
    if isinstance(value, str):
        return [PooledText(field, value)]
    if not isinstance(value, list):
        raise bad_request(f"{field} must be a string or a list of strings", field, "invalid_value")
    check_count(value, field, settings)
    for i, text in enumerate(value):
        if not isinstance(text, str):
            path = f"{field}[{i}]"
            raise bad_request(f"{path} is not a text", path, "invalid_value")
    return [PooledText(f"{field}[{i}]", text) for i, text in enumerate(value)]


def check_count(values: list[Any], field: str, settings: ServerSettings) -> None:
    """Raise APIError for no texts, and for too many."""
    if not values:
        raise bad_request(f"{field} is an empty list", field)
    if len(values) > settings.max_texts:
        raise bad_request(
            f"{field} has {len(values)} entries; at most {settings.max_texts} are allowed", field
        )


async def vectors_of(
    runtime: Runtime,
    request: Request,
    body: PooledBody,
    served: Served,
    model: ModelInfo,
    texts: Sequence[PooledText],
) -> Vectors:
    """The vector of each text. Raises APIError, naming the one that is at fault."""
    pooling = body.pooling or runtime.settings.pooling or model.pooling or "last"
    work = partial(_checked_ids, runtime.tokenizer, body, model, texts)
    checked = await runtime.with_text(sum(len(text.prompt) for text in texts), work)
    num_tokens = sum(map(len, checked))
    most = runtime.settings.max_text_contexts * model.max_model_len
    if num_tokens > most:
        raise bad_request(
            f"the texts have {num_tokens} tokens; at most {most} are allowed in one request, "
            f"{runtime.settings.max_text_contexts} times the model's context",
            texts[-1].path.partition("[")[0],
        )
    note_usage(request.scope, num_tokens, 0)
    metrics = runtime.metrics.of(served.name)
    ticket = Ticket.of(request.scope)
    ticket.settle(request.scope, [len(token_ids) for token_ids in checked], min(len(texts), GROUP))

    def start(path: str, token_ids: Sequence[int]) -> _Running:
        stream = ticket.asked(
            runtime.engine.add(
                token_ids,
                PoolingParams(pooling),
                salt=salt_of(request.scope),
                owner=owner_of(request.scope),
                adapter=served.adapter,
            )
        )
        timer = ChoiceTimer(metrics, told=partial(ticket.first_token, len(token_ids)))
        timer.begin(begun(request.scope))
        return _Running(path, len(token_ids), stream, timer)

    prompts = [(text.path, token_ids) for text, token_ids in zip(texts, checked, strict=True)]
    return Vectors(np.stack(await _computed(prompts, start)), num_tokens)


async def _computed(
    prompts: Sequence[tuple[str, Sequence[int]]], start: Callable[[str, Sequence[int]], _Running]
) -> list[Floats]:
    """The vector of each prompt, a group after the other."""
    rows: list[Floats] = []
    for at in range(0, len(prompts), GROUP):
        running: list[_Running] = []
        try:
            for path, token_ids in prompts[at : at + GROUP]:
                running.append(start(path, token_ids))
            rows += await _collect(running)
        finally:
            for _, count, stream, timer in running:  # those that have not ended
                stream.abort()
                timer.finished("abort", count, 0)
    return rows


def _checked_ids(
    tokenizer: Tokenizer, body: PooledBody, model: ModelInfo, texts: Sequence[PooledText]
) -> list[Sequence[int]]:
    """The ids of each text; raises APIError."""
    found: list[Sequence[int]] = []
    room = model.max_model_len - 1
    for path, prompt, most in texts:
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            token_ids = tokenizer.encode(prompt, add_special_tokens=special)
        else:
            token_ids = prompt
            check_vocabulary(token_ids, path, model)
        token_ids = token_ids[:most]
        kept = truncated(token_ids, body.truncate_prompt_tokens, room)
        if not kept:
            raise bad_request(f"{path} is empty", path)
        if len(kept) > room:
            remedy = "; truncate_prompt_tokens: -1 cuts it"
            raise ContextLengthError(len(kept), model.max_model_len, path, remedy)
        found.append(kept)
    return found


async def _collect(running: list[_Running]) -> list[Floats]:
    """The vectors in order, each taken from ``running`` once it is there."""
    rows: list[Floats] = []
    while running:
        path, count, stream, timer = running[0]
        vector: bytes | None = None
        reason: str | None = None
        async for output in stream:
            timer.scheduled(output)
            vector, reason = output.pooled, output.finish_reason
        if reason == "abort":
            raise unavailable("the engine gave the request up")
        if vector is None:
            raise APIError(500, f"{path}: the model's hidden states are not numbers")
        del running[0]
        timer.finished("stop", count, 0)
        rows.append(np.frombuffer(vector, dtype="<f4"))
    return rows
