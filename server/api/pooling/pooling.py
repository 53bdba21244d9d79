"""Vectors of prompts, for the endpoints that answer with them or compare them.

All prompts are checked before any is started, and computed together. When the client hangs up, the
engine's streams are aborted at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from headstart.server.api.openai_completions.prompts import GivenPrompt, check_vocabulary
from headstart.server.generation.engine_client import Stream
from headstart.server.http.access_log import note_usage
from headstart.server.http.cache_scope import CacheBody, salt_of
from headstart.server.http.errors import APIError, bad_request, unavailable
from headstart.server.http.metrics import ChoiceTimer
from headstart.server.http.policy import Refused
from headstart.server.http.reply import hang_up
from headstart.server.http.runtime import Runtime, Served

Floats = npt.NDArray[np.float32]


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


async def vectors_of(
    runtime: Runtime,
    request: Request,
    body: PooledBody,
    served: Served,
    model: ModelInfo,
    prompts: Sequence[GivenPrompt],
) -> Vectors:
    """The vector of each prompt. Raises APIError, naming the prompt that is at fault."""
    pooling = body.pooling or runtime.settings.pooling or model.pooling or "last"
    checked = [await _token_ids(runtime, body, model, given) for given in prompts]
    num_tokens = sum(map(len, checked))
    note_usage(request.scope, num_tokens, 0)
    metrics = runtime.metrics.of(served.name)
    running: list[_Running] = []
    try:
        for (path, _), token_ids in zip(prompts, checked, strict=True):
            stream = runtime.engine.add(
                token_ids,
                PoolingParams(pooling),
                salt=salt_of(request.scope),
                adapter=served.adapter,
            )
            running.append(_Running(path, len(token_ids), stream, ChoiceTimer(metrics)))
        rows = await _unless_gone(_collect(running), request)
    finally:
        for _, count, stream, timer in running:  # those that have not ended
            stream.abort()
            timer.finished("abort", count, 0)
    return Vectors(np.stack(rows), num_tokens)


async def _token_ids(
    runtime: Runtime, body: PooledBody, model: ModelInfo, given: GivenPrompt
) -> Sequence[int]:
    path, prompt = given
    token_ids: Sequence[int]
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        work = partial(runtime.tokenizer.encode, prompt, add_special_tokens=special)
        token_ids = await runtime.with_text(len(prompt), work)
    else:
        token_ids = prompt
        check_vocabulary(token_ids, path, model)
    most = model.max_model_len - 1
    token_ids = truncated(token_ids, body.truncate_prompt_tokens, most)
    if not token_ids:
        raise bad_request(f"{path} is empty", path)
    if len(token_ids) > most:
        raise bad_request(
            f"{path} has {len(token_ids)} tokens; at most {most} are allowed, unless "
            "truncate_prompt_tokens is -1",
            path,
        )
    return token_ids


async def _collect(running: list[_Running]) -> list[Floats]:
    """The vectors in order, each taken from ``running`` once it is there."""
    rows: list[Floats] = []
    while running:
        path, count, stream, timer = running[0]
        vector: bytes | None = None
        reason: str | None = None
        async for output in stream:
            vector, reason = output.pooled, output.finish_reason
        if reason == "abort":
            raise unavailable("the engine gave the request up")
        if vector is None:
            raise APIError(500, f"{path}: the model's hidden states are not numbers")
        del running[0]
        timer.finished("stop", count, 0)
        rows.append(np.frombuffer(vector, dtype="<f4"))
    return rows


async def _unless_gone(collect: Any, request: Request) -> list[Floats]:
    """What ``collect`` returns; an APIError, for nobody, when the client hangs up before."""
    work = asyncio.create_task(collect)
    gone = asyncio.create_task(hang_up(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise APIError(400, "the client hung up before the answer was complete")
        found: list[Floats] = work.result()
        return found
    except asyncio.CancelledError:  # the time to drain is over
        raise unavailable("the server is shutting down") from None
    finally:
        work.cancel()
        gone.cancel()
