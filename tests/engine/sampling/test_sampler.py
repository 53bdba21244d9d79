"""Sampler against a full-sort reference, transformers' processors, and chance."""

import math
from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headstart.engine.errors import RequestError
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampler, uniform
from headstart.engine.sequence import Sequence
from headstart.kernels.reference import ReferenceBackend, threshold

VOCAB = 1000


def make_sequence(tokens: list[int] | None = None, num_prompt: int = 1, **params: Any) -> Sequence:
    tokens = tokens or [0]
    return Sequence(
        id=0,
        token_ids=array("i", tokens),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(max_tokens=9, **params),
    )


def draws(logits: torch.Tensor, n: int, **params: Any) -> Counter[int]:
    """Tokens of ``n`` sequences with seeds 0, 1, ... for the same row of logits."""
    sequences = [make_sequence(seed=seed, **params) for seed in range(n)]
    sampled = Sampler(len(logits)).sample(logits.expand(n, -1), sequences)
    return Counter(token.token_id for token in sampled if token.token_id is not None)


def reference_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities by sorting everything, in float64; ties at a cut are kept."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    if params.min_p is not None:
        p[p < params.min_p * p.max()] = 0
    if params.top_k is not None:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0
    if params.top_p is not None:
        order = np.sort(p)[::-1]
        before = np.cumsum(order) - order
        smallest = order[before < params.top_p * p.sum()].min()
        p[p < smallest] = 0
    return p / p.sum()


def support(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    top_p = 1.0 if params.top_p is None else params.top_p
    least = threshold(weights, params.min_p or 0.0, params.top_k or len(weights), top_p)
    return weights >= np.float32(least)


FILTERS = [
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01},
]


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters_keep_what_a_full_sort_keeps(filters: dict[str, Any], scale: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits = (rng.standard_normal(VOCAB) * scale).astype(np.float32)
        params = SamplingParams(max_tokens=1, temperature=0.8, **filters)
        expected = reference_distribution(logits, params)
        assert (support(logits, params) == (expected > 0)).all()


@pytest.mark.parametrize(
    ("filters", "processor"),
    [
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.3}, TopPLogitsWarper(0.3)),
        ({"top_k": 50}, TopKLogitsWarper(50)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_filters_agree_with_transformers(filters: dict[str, Any], processor: Any) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    kept = processor(torch.zeros(1, 1, dtype=torch.long), logits)[0].isfinite().numpy()
    params = SamplingParams(max_tokens=1, **filters)
    assert (support(logits[0].numpy(), params) == kept).all()


def test_ties_at_the_cut_are_all_kept() -> None:
    logits = np.array([1, 2, 2, 0, 2], dtype=np.float32)
    for filters in ({"top_k": 2}, {"top_p": 0.3}, {"top_k": 1, "top_p": 0.01}):
        kept = support(logits, SamplingParams(max_tokens=1, **filters))
        assert kept.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_p": 0.7},
        {"top_k": 7},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 20,000 seeds; the limit is 5 standard deviations of the statistic."""
    n = 20_000
    logits = torch.randn(600, generator=torch.Generator().manual_seed(2)) * 2
    counts = draws(logits, n, **params)
    expected = reference_distribution(logits.numpy(), SamplingParams(max_tokens=1, **params)) * n
    assert all(expected[token] > 0 for token in counts)
    # Tokens with few expected draws are counted together.
    common = expected >= 5
    observed = np.array([counts[token] for token in range(len(expected))])
    bins = [*zip(observed[common], expected[common], strict=True)]
    if expected[~common].sum() >= 5:
        bins.append((observed[~common].sum(), expected[~common].sum()))
    chi_square = sum((o - e) ** 2 / e for o, e in bins)
    freedom = len(bins) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_draw_depends_on_seed_index_and_logits_alone() -> None:
    sampler = Sampler(VOCAB)
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(3))
    filters: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 9}, {"temperature": 0.0}]
    sequences = [
        make_sequence([1] * (2 + i % 5), seed=i, **filters[i % len(filters)]) for i in range(40)
    ]
    together = sampler.sample(logits, sequences)
    alone = [sampler.sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(sequences)]
    assert together == alone
    later = make_sequence([1] * 9, seed=1, top_p=0.9)
    indices = {sampler.sample(logits[:1], [later])[0].token_id for _ in range(3)}
    assert len(indices) == 1


def test_sequences_without_a_seed_differ_and_keep_theirs() -> None:
    one, other = make_sequence(), make_sequence()
    assert one.seed != other.seed
    assert make_sequence(seed=5).seed == 5


def test_uniform_is_uniform_for_neighbouring_seeds_and_indices() -> None:
    values = [uniform(seed, index) for seed in range(-50, 50) for index in range(100)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 99 + 5 * math.sqrt(198)
    along = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(along) < 0.05


@given(
    tokens=st.lists(st.integers(0, 19), min_size=2, max_size=12),
    num_prompt=st.integers(1, 12),
    repetition=st.floats(0.5, 2),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 19), st.floats(-5, 5), max_size=3),
)
@settings(deadline=None, max_examples=3 * settings.default.max_examples // 5)
def test_penalties_against_the_definition(
    tokens: list[int],
    num_prompt: int,
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
) -> None:
    logits = torch.linspace(-3, 3, 20)
    num_prompt = min(num_prompt, len(tokens))
    seq = make_sequence(
        tokens,
        num_prompt,
        temperature=0.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    expected = logits.clone().double()
    for token, value in bias.items():
        expected[token] += value
    processor = RepetitionPenaltyLogitsProcessor(repetition)
    expected = processor(torch.tensor([tokens]), expected.unsqueeze(0))[0]
    for token, count in Counter(tokens[num_prompt:]).items():
        expected[token] -= frequency * count + presence
    changed = Sampler(20)._changed(logits.unsqueeze(0), [0], [seq], {})[0]
    torch.testing.assert_close(changed.double(), expected, rtol=1e-5, atol=1e-5)
    seq.token_ids.append(1)  # fails if a view of the tokens is kept


def test_greedy_takes_the_best_and_uses_the_given_argmax() -> None:
    logits = torch.randn(3, VOCAB)
    best = logits.argmax(-1).tolist()
    calls = []

    class Noted(ReferenceBackend):
        def argmax(self, logits: torch.Tensor) -> list[int]:
            calls.append(logits.shape)
            return super().argmax(logits)

    backend = Noted(page_size=1)
    before = logits.clone()
    sequences = [make_sequence(temperature=0.0) for _ in range(3)]
    sampled = Sampler(VOCAB, backend=backend).sample(logits, sequences)
    assert [token.token_id for token in sampled] == best
    assert calls == [(3, VOCAB)]
    mixed = [
        make_sequence(temperature=0.0),
        make_sequence(temperature=1e-6),
        make_sequence(temperature=0.0, logit_bias={7: 100.0}, repetition_penalty=1.1),
    ]
    sampled = Sampler(VOCAB, backend=backend).sample(logits, mixed)
    assert [token.token_id for token in sampled] == [*best[:2], 7]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_logits_stay_as_they_are(temperature: float) -> None:
    """Whatever is changed for one token is there for its log-probabilities and the next reader."""
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4))
    logits[4, 3] = math.nan
    before = logits.clone()
    settings: list[dict[str, Any]] = [
        {"logit_bias": {5: 3.0, 6: -100.0}, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.7, "min_tokens": 5, "stop_token_ids": (4, 5)},
        {"bad_words": ((5,), (7, 8)), "logit_bias": {5: 9.0}},
        {"allowed_token_ids": (3, 4), "presence_penalty": 2.0},
        {"logit_bias": {3: 1.0, 9: 2.0}, "repetition_penalty": 0.5},
    ]
    sequences = [
        make_sequence([5, 6, 5, 7, 5], temperature=temperature, logprobs=2, **each)
        for each in settings
    ]
    copies = Sampler(VOCAB).sample(logits.t().contiguous().t(), sequences)  # not contiguous
    assert Sampler(VOCAB).sample(logits, sequences) == copies
    assert torch.equal(logits.nan_to_num(7.5), before.nan_to_num(7.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_does_not_harm_the_others(bad: float, temperature: float) -> None:
    logits = torch.randn(4, VOCAB)
    logits[1, 17] = bad
    logits[2] = -math.inf
    params: list[dict[str, Any]] = [{}, {"logprobs": 3, "top_p": 0.9}, {"top_k": 3}, {}]
    sequences = [make_sequence(temperature=temperature, seed=1, **extra) for extra in params]
    sampled = Sampler(VOCAB).sample(logits, sequences)
    assert [token.token_id is None for token in sampled] == [False, True, True, False]
    assert sampled[1].logprobs is None


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((300,), -math.inf)
    logits[[5, 299]] = torch.tensor([0.0, 1.0])
    assert set(draws(logits, 200)) == {5, 299}
    assert set(draws(logits, 200, top_p=0.99, top_k=100)) == {5, 299}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    expected = logits.log_softmax(-1)
    sequences = [
        make_sequence(seed=1, logprobs=5, temperature=0.3, logit_bias={3: 50.0}),
        make_sequence(temperature=0.0, logprobs=0),
        make_sequence(seed=1),
    ]
    first, second, third = Sampler(VOCAB).sample(logits, sequences)
    assert first.token_id == 3
    assert first.logprobs is not None
    assert first.logprobs.token_id == 3
    assert first.logprobs.logprob == pytest.approx(expected[0, 3].item(), abs=1e-5)
    values, ids = expected[0].topk(5)
    assert [id_ for id_, _ in first.logprobs.top] == ids.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert second.logprobs is not None
    assert second.logprobs.top == []
    assert second.logprobs.logprob == pytest.approx(expected[1].max().item(), abs=1e-5)
    assert third.logprobs is None


def test_more_rows_than_fit_a_tile() -> None:
    vocab = 300_000
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(5))
    best = logits.argmax(-1).tolist()
    sequences = [
        make_sequence(**params)
        for params in [{"top_k": 1, "logprobs": 1}, {"temperature": 0.0, "presence_penalty": 0.1}]
        for _ in range(4)
    ] + [make_sequence(temperature=0.0, logprobs=2)]
    sampled = Sampler(vocab).sample(logits, sequences)
    assert [token.token_id for token in sampled] == best
    wanted = [token.logprobs.top[0][0] for token in sampled if token.logprobs is not None]
    assert wanted == [*best[:4], best[8]]


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 1000"):
        Sampler(VOCAB).sample(torch.zeros(1, 999), [make_sequence()])


# --------------------------------------------------------------------- tokens that may not come


def chosen(logits: list[float], tokens: list[int], num_prompt: int, **params: Any) -> int | None:
    """The greedy token after ``tokens``; 9 ends a sequence."""
    seq = make_sequence(tokens, num_prompt, temperature=0.0, **params)
    (sampled,) = Sampler(len(logits), eos_token_ids=[9]).sample(torch.tensor([logits]), [seq])
    return sampled.token_id


RISING = [float(i) for i in range(10)]
"""Token 9 is the likeliest, then 8, ..."""


def test_min_tokens_keeps_what_ends_it_away() -> None:
    assert chosen(RISING, [1, 2, 3], 2) == 9
    for num_output, expected in ((0, 8), (1, 8), (2, 9), (3, 9)):
        tokens = [1, 2, *[5] * num_output]
        assert chosen(RISING, tokens, 2, min_tokens=2) == expected
    assert chosen(RISING, [1], 1, min_tokens=1, stop_token_ids=(8, 6)) == 7
    # What does not end it may come.
    assert chosen(RISING, [1], 1, min_tokens=1, ignore_eos=True, stop_token_ids=(8,)) == 9


def test_bad_words_end_nowhere() -> None:
    assert chosen(RISING, [1], 1, bad_words=((9,), (8,))) == 7
    word = (5, 6, 9)
    assert chosen(RISING, [1, 5, 6], 1, bad_words=(word,)) == 8
    for tokens, num_prompt in (
        ([1, 6, 5], 1),
        ([1, 5, 6, 2], 1),
        ([5, 6], 2),  # the prompt is not the answer
        ([1, 5, 6], 2),  # nor a part of it
        ([6], 1),
    ):
        assert chosen(RISING, tokens, num_prompt, bad_words=(word,)) == 9
    assert chosen(RISING, [1, 9, 9], 1, bad_words=((9, 9, 9),)) == 8


def test_only_allowed_tokens_come() -> None:
    assert chosen(RISING, [1], 1, allowed_token_ids=(2, 5, 3)) == 5
    assert chosen(RISING, [1], 1, allowed_token_ids=(2, 9), min_tokens=3) == 2
    # A bias or a penalty moves a token among the others, not past a ban.
    assert chosen(RISING, [1], 1, allowed_token_ids=(2, 3), logit_bias={2: 5.0, 7: 100.0}) == 2
    logits = torch.tensor(RISING)
    assert set(draws(logits, 200, allowed_token_ids=(1, 2, 3))) == {1, 2, 3}
    assert set(draws(logits, 200, temperature=2.0, bad_words=((9,), (8,)))) <= set(range(8))


def test_logprobs_are_of_the_model_not_of_what_was_allowed() -> None:
    seq = make_sequence([1], temperature=0.0, allowed_token_ids=(2,), logprobs=1)
    (sampled,) = Sampler(10).sample(torch.tensor([RISING]), [seq])
    assert sampled.logprobs is not None
    assert (sampled.logprobs.token_id, sampled.logprobs.top[0][0]) == (2, 9)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_tokens": 10}, "min_tokens must be at most 9, got 10"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": (7,)}, "allowed_token_ids names token 7; the vocabulary has 7"),
        ({"bad_words": ((1,), (2, -1))}, "bad_words names token -1"),
        ({"bad_words": ((1,),), "allowed_token_ids": (1,)}, "cannot be combined"),
    ],
)
def test_params_that_make_no_sense(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(max_tokens=9, **params).validate(7)
