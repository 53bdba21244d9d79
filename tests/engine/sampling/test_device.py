"""DeviceSampler chooses what Sampler chooses, on CPU tensors; and hands out nothing early."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.sampling.device import DeviceSampler
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampled, Sampler
from headstart.engine.sequence import ScheduledSequence, Sequence

EOS = (0,)


def make_entry(tokens: list[int], num_prompt: int, params: SamplingParams) -> ScheduledSequence:
    seq = Sequence(0, array("i", tokens), num_prompt, params)
    return ScheduledSequence(seq, len(tokens) - 1, 1, True)


def entry(**params: Any) -> ScheduledSequence:
    return make_entry([0], 1, SamplingParams(max_tokens=9, **params))


def agree(logits: torch.Tensor, entries: list[ScheduledSequence]) -> list[Sampled]:
    """What both samplers choose, which must be the same, and leave the logits as they are."""
    vocab = logits.shape[1]
    before = logits.clone()
    sampling = DeviceSampler(vocab, EOS).launch(logits, entries)
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    logits += 1  # the next step's: of no account any more
    found = sampling.result()
    expected = Sampler(vocab, eos_token_ids=EOS).sample(before, [each.seq for each in entries])
    assert [each.token_id for each in found] == [each.token_id for each in expected]
    assert sampling.token_ids.dtype == torch.int32
    for given_id, one, other in zip(sampling.token_ids.tolist(), found, expected, strict=True):
        assert 0 <= given_id < vocab
        assert one.token_id in (None, given_id)
        assert (one.logprobs is None) is (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.token_id == one.token_id
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
            assert one.logprobs.top == [
                (id_, pytest.approx(value, abs=1e-5)) for id_, value in other.logprobs.top
            ]
    return found


@st.composite
def sampling_params(draw: st.DrawFn, vocab: int) -> SamplingParams:
    maybe = st.none()
    ids = st.integers(0, vocab - 1)
    words = st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)
    allowed = draw(maybe | maybe | st.lists(ids, min_size=1, max_size=4).map(tuple))
    return SamplingParams(
        max_tokens=9,
        temperature=draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0])),
        top_k=draw(maybe | st.integers(1, vocab + 2)),
        top_p=draw(maybe | st.sampled_from([1e-6, 0.2, 0.77, 0.95, 0.9999, 1.0])),
        min_p=draw(maybe | st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.7, 1.4])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -1.5, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.25, 1.1])),
        logit_bias=draw(
            maybe | st.dictionaries(st.integers(0, vocab - 1), st.floats(-9, 9), max_size=3)
        ),
        stop_token_ids=draw(st.lists(ids, max_size=2).map(tuple)),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 2, 9])),
        bad_words=() if allowed else draw(words),
        allowed_token_ids=allowed,
        seed=draw(st.integers(0, 99)),
        logprobs=draw(maybe | st.integers(0, 5)),
    )


@given(data=st.data(), vocab=st.sampled_from([1, 7, 256, 600]), seed=st.integers(0, 10**6))
@settings(max_examples=3 * settings.default.max_examples // 2)
def test_both_samplers_choose_the_same(data: st.DataObject, vocab: int, seed: int) -> None:
    entries = []
    for _ in range(data.draw(st.integers(0, 6))):
        tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12))
        num_prompt = data.draw(st.integers(1, len(tokens)))
        entries.append(make_entry(tokens, num_prompt, data.draw(sampling_params(vocab))))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(entries), vocab, generator=generator)
    logits *= data.draw(st.sampled_from([0.1, 3.0, 20.0]))
    for row in range(len(entries)):
        bad = data.draw(st.sampled_from([None, None, None, math.nan, math.inf, -math.inf]))
        if bad is not None:
            logits[row, data.draw(st.integers(0, vocab - 1))] = bad
    agree(logits, entries)


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 1, "top_p": 0.01}])
def test_ties_at_the_cut_are_all_kept(filters: dict[str, Any]) -> None:
    logits = torch.tensor([1.0, 2, 2, 0, 2]).repeat(300, 1)
    found = agree(logits, [entry(seed=seed, **filters) for seed in range(300)])
    assert {each.token_id for each in found} == {1, 2, 4}


def test_one_hot_equal_and_hopeless_rows() -> None:
    one_hot = torch.full((9,), -math.inf)
    one_hot[4] = 0
    rows = [one_hot, torch.zeros(9), torch.full((9,), -math.inf), torch.full((9,), math.nan)]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 1}]
    for kind in kinds:
        logits = torch.stack(rows * 5)
        found = agree(logits, [entry(seed=i, **kind) for i in range(len(logits))])
        assert [each.token_id for each in found[::4]] == [4] * 5
        assert all(each.token_id is None for each in found[2::4] + found[3::4])


def test_a_huge_vocabulary() -> None:
    vocab = 128_256
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(1)) * 4
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 50, "top_p": 0.95},
        {"min_p": 0.02},
        {"top_p": 0.999, "repetition_penalty": 1.2},
        {"logprobs": 20},
        {"top_k": 1},
    ]
    agree(logits, [entry(seed=i, **kind) for i, kind in enumerate(kinds)])


def test_the_draw_is_numbered_by_what_the_step_computes() -> None:
    """Not by the tokens the host knows: one of them is still on its way."""
    params = SamplingParams(max_tokens=9, seed=3)
    logits = torch.zeros(1, 500)
    [known] = Sampler(500).sample(logits, [make_entry([0, 5, 6], 1, params).seq])
    behind = ScheduledSequence(make_entry([0, 5], 1, params).seq, 2, 1, True)
    assert DeviceSampler(500).launch(logits, [behind]).result() == [known]


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 100"):
        DeviceSampler(100).launch(torch.zeros(1, 99), [entry()])
