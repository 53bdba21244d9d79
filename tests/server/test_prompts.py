"""Token ids of prompts: what is none is named, and the event loop is not held up by many."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from headstart.server.api.openai_completions.prompts import check_vocabulary, given_prompts

URL = "/v1/completions"
FIRST = 100
"""The place of what is wrong, of 200 ids; something else is wrong behind it."""


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of Python ``work`` runs."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_many_ids_are_checked_in_as_many_lines_as_few(engine):
    def check(count: int) -> None:
        [(path, ids)] = given_prompts([7] * count, "prompt", 64)
        check_vocabulary(ids, path, engine.model)

    check(10)  # what is done once
    assert lines_run(lambda: check(100_000)) == lines_run(lambda: check(10))


@pytest.mark.parametrize(
    "wrong", ["7", 7.0, True, None, [7], {}, -1, -(2**31) - 1, 2**31, 2**32 + 7, 2**70, -(2**70)]
)
@pytest.mark.parametrize("behind", ["x", -5, 2**40])
async def test_what_is_no_id_is_named(client, engine, wrong, behind):
    ids = [7] * 200
    ids[FIRST], ids[FIRST + 50] = wrong, behind
    for url, field in ((URL, "prompt"), ("/v1/embeddings", "input"), ("/detokenize", "tokens")):
        response = await client.post(url, json={"model": "tiny", field: ids})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["message"] == f"{field}[{FIRST}] is not a token id"
        assert (error["param"], error["code"]) == (f"{field}[{FIRST}]", "invalid_value")
    assert engine.added == []


async def test_what_the_model_does_not_know_is_named(client, engine):
    ids = [7] * 200
    ids[FIRST], ids[FIRST + 50] = 400, 401
    for url, field in ((URL, "prompt"), ("/v1/embeddings", "input"), ("/detokenize", "tokens")):
        response = await client.post(url, json={"model": "tiny", field: ids})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["message"] == f"{field}[{FIRST}] is token 400; the vocabulary has 400"
        assert error["param"] == f"{field}[{FIRST}]"
    assert engine.added == []


async def test_too_many_ids_of_a_field_are_counted_before_they_are_looked_at(client):
    body = {"model": "tiny", "prompt": "x", "stop_token_ids": ["x"] * 10_000}
    error = (await client.post(URL, json=body)).json()["error"]
    assert "stop_token_ids has 10000 entries; at most" in error["message"]
