"""Prompts as completions and embeddings take them: a text, ids, or a list of either."""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import WithJsonSchema

from headstart.engine.process.messages import ModelInfo
from headstart.server.api.fields import is_token_id
from headstart.server.http.errors import APIError, bad_request
from headstart.server.settings import MANY_TOKENS, ServerSettings

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


class GivenPrompt(NamedTuple):
    """One prompt as it came, and where in the body: ``prompt[3]``."""

    path: str
    prompt: str | list[int]


def most_ids(settings: ServerSettings, model: ModelInfo) -> int:
    """Ids of a prompt that are looked at; longer ones are refused by their number alone."""
    return max(settings.max_contexts * model.max_model_len, MANY_TOKENS)


def given_prompts(
    value: Any, field: str, most: int, *, ids: int | None = None
) -> list[GivenPrompt]:
    """The prompts of ``field``, whatever form they came in; raises APIError, for more than ``most``
    of them, too. Ids are not checked against the vocabulary; there are at most ``ids``."""
    if isinstance(value, str):
        return [GivenPrompt(field, value)]
    if not isinstance(value, list):
        raise _bad_prompt(field)
    if not value:
        raise bad_request(f"{field} is an empty list", field)
    if is_token_id(value[0]):
        return [GivenPrompt(field, _checked_ids(value, field, ids))]
    if len(value) > most:
        raise bad_request(f"{field} has {len(value)} entries; at most {most} are allowed", field)
    texts = isinstance(value[0], str)
    prompts = []
    for i, prompt in enumerate(value):
        path = f"{field}[{i}]"
        if texts and not isinstance(prompt, str):
            raise _bad_prompt(path)
        prompts.append(GivenPrompt(path, prompt if texts else _checked_ids(prompt, path, ids)))
    return prompts


def check_token_ids(values: list[Any], path: str) -> None:
    """Raise APIError for the first of ``values`` that is no token id.

    In a few passes, and none of them a loop of Python's: there may be as many as several contexts
    hold, and the event loop has others to serve.
    """
    whole = list(map(operator.is_, map(type, values), itertools.repeat(int)))
    most = len(values) if all(whole) else whole.index(False)
    try:
        negative = np.flatnonzero(np.array(array("i", values[:most])) < 0)
        wrong = int(negative[0]) if len(negative) else most
    except OverflowError:
        wrong = next(i for i, value in enumerate(values) if not is_token_id(value))
    if wrong < len(values):
        where = f"{path}[{wrong}]"
        raise bad_request(f"{where} is not a token id", where, "invalid_value")


def check_vocabulary(token_ids: Sequence[int], path: str, model: ModelInfo) -> None:
    """Raise APIError for the first id that the model does not know; all are token ids."""
    wrong = np.flatnonzero(np.array(token_ids, dtype=np.int32) >= model.vocab_size)
    if len(wrong):
        i = int(wrong[0])
        raise bad_request(
            f"{path}[{i}] is token {token_ids[i]}; the vocabulary has {model.vocab_size}",
            f"{path}[{i}]",
        )


def _bad_prompt(path: str) -> APIError:
    return bad_request(
        f"{path}: a prompt is a string, a list of strings, a list of token ids, or a list of those",
        path,
        "invalid_value",
    )


def _checked_ids(ids: Any, path: str, most: int | None) -> list[int]:
    if not isinstance(ids, list):
        raise _bad_prompt(path)
    if most is not None and len(ids) > most:
        raise bad_request(
            f"{path} has {len(ids)} tokens; at most {most} are looked at, which is more than the "
            "model's maximum context length",
            path,
            "context_length_exceeded",
        )
    check_token_ids(ids, path)
    return ids
