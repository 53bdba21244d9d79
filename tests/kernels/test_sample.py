"""Drawing tokens: every instruction set draws what the reference draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from headstart.kernels.backend import Draws
from headstart.kernels.devices import load_backend
from headstart.kernels.reference import sample, top

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.01},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.02, "top_p": 0.9},
    {"temperature": 50.0},
]


def draws(rows: list[int], vocab: int, uniform: Any, **filters: Any) -> Draws:
    def full(name: str, default: float) -> np.ndarray[Any, Any]:
        return np.full(len(rows), filters.get(name, default))

    return Draws(
        np.array(rows),
        full("temperature", 1.0),
        full("min_p", 0.0),
        full("top_k", vocab),
        full("top_p", 1.0),
        np.array(uniform),
    )


def random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))


@pytest.fixture(params=[1, 2])
def backend(request: pytest.FixtureRequest, isa: str) -> Any:
    return load_backend("cpu", isa=isa, weights="f32", threads=request.param)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_tokens_are_those_of_the_reference(backend: Any, filters: Any) -> None:
    numbers = np.random.default_rng(3)
    for vocab in (1, 2, 255, 256, 257, 1000, 20_011):
        logits = random(12, vocab) * 3
        uniform = numbers.random(24)
        wanted = draws([*range(12), *range(11, -1, -1)], vocab, uniform, **filters)
        assert backend.sample(logits, wanted) == sample(logits, wanted), vocab


def test_what_was_drawn_before_changes_nothing(backend: Any) -> None:
    """Threads keep their scratch, of whatever size the last row needed."""
    numbers = np.random.default_rng(5)
    for vocab in (300, 20_011, 700, 5000, 1, 20_011):
        logits = random(3, vocab) * 3
        for filters in numbers.permutation(np.array(FILTERS, dtype=object)):
            wanted = draws([0, 1, 2], vocab, numbers.random(3), **filters)
            assert backend.sample(logits, wanted) == sample(logits, wanted), (vocab, filters)
            backend.top(logits, [1], min(vocab, 3))


def test_parameters_belong_to_their_rows(backend: Any) -> None:
    logits = random(4, 1000) * 3
    whole = [draws([2], 1000, [0.7], **filters) for filters in FILTERS]
    together = Draws(*(np.concatenate(parts) for parts in zip(*whole, strict=True)))
    assert backend.sample(logits, together) == [backend.sample(logits, one)[0] for one in whole]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_ends_of_the_range_draw_tokens_that_have_a_weight(backend: Any, filters: Any) -> None:
    """Rounding may put the target at the very end of the sum, or past it."""
    logits = torch.full((1, 700), -math.inf)
    logits[0, 3], logits[0, 300], logits[0, 301] = 0.0, 2.0, -69.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        [token] = backend.sample(logits, draws([0], 700, [uniform], **filters))
        assert token in (3, 300, 301)


def test_equally_likely_tokens_at_the_cut_are_all_kept(backend: Any) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).repeat(1, 60)
    best = {i for i in range(300) if logits[0, i] == 2.0}
    uniform = np.linspace(0, 1, 2000, endpoint=False)
    for filters in ({"top_k": 2}, {"top_p": 0.3}, {"top_k": 1, "top_p": 0.01}, {"min_p": 1.0}):
        found = set(backend.sample(logits, draws([0] * 2000, 300, uniform, **filters)))
        assert found == best, filters


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab", [5, 600])
def test_logits_that_are_no_distribution(
    backend: Any, filters: Any, bad: float, vocab: int
) -> None:
    logits = random(3, vocab)
    logits[1] = bad
    last = random(1, vocab)
    last[0, vocab - 1] = math.nan
    wanted = draws([0, 1, 2, 3], vocab, [0.3] * 4, **filters)
    found = backend.sample(torch.cat([logits, last]), wanted)
    assert [token < 0 for token in found] == [False, True, False, True]


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 20_011])
def test_the_largest_are_those_of_the_reference(backend: Any, vocab: int) -> None:
    logits = random(6, vocab) * 4
    logits[1] = logits[1].round()  # ties
    logits[2, 1:] = -math.inf
    for count in (0, 1, 5, min(vocab, 300)):
        if count > vocab:
            continue
        found = backend.top(logits, [5, 1, 2, 0], count)
        wanted = top(logits, [5, 1, 2, 0], count)
        assert np.array_equal(found.values, wanted.values)
        assert np.array_equal(found.ids, wanted.ids)
        np.testing.assert_allclose(found.total, wanted.total, rtol=2e-6, atol=2e-6)


def test_no_rows(backend: Any) -> None:
    assert backend.top(torch.zeros(0, 50), [], 5).ids.shape == (0, 5)
    assert backend.sample(torch.zeros(0, 50), draws([], 50, [])) == []
