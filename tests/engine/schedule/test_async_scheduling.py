"""Steps that overlap give what steps one after the other give, and do overlap.

test_scheduler.py has the scheduler's side, test_device_sampler.py the sampler's.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.engine.batch import Batch, InFlight, build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.process.messages import Output
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.device import DeviceSampler
from headstart.engine.sampling.grammar import Masks
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sampling.sampler import Sampled, Sampler, Sampling
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.devices import load_backend

PAGE_BYTES = 2 * 32 * 2 * 2 * 16 * 4
"""A page of the tiny model: layers, tokens, keys and values, heads, head size, float32."""

TinyModel = Callable[..., Path]


@dataclass(frozen=True)
class Request:
    """``step``: before which it is added; ``aborted_at``: before which it is aborted."""

    prompt: list[int]
    params: SamplingParams
    step: int = 0
    aborted_at: int | None = None
    spans: list[Span] = field(default_factory=list)
    adapter: str | None = None
    salt: bytes = b""


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 1, "kv_memory": 400 * PAGE_BYTES, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def run(engine: Engine, requests: list[Request]) -> list[list[Output]]:
    """What each request is told, in order; the books are proved after every step."""
    told: list[list[Output]] = [[] for _ in requests]
    step, last = 0, max(request.step for request in requests)
    while step <= last or engine.has_work:
        for i, request in enumerate(requests):
            if request.step == step:
                engine.add(
                    i,
                    array("i", request.prompt),
                    request.params,
                    segments=request.spans,
                    adapter=request.adapter,
                    salt=request.salt,
                )
            if request.aborted_at == step:
                engine.abort([i])
        for output in engine.step():
            told[output.id].append(output)
        engine.check()
        step += 1
    assert not engine.has_work
    return told


def tokens(told: list[Output]) -> list[int]:
    return [token for output in told for token in output.token_ids]


def check_equal(requests: list[Request], on: list[list[Output]], off: list[list[Output]]) -> None:
    """Equal tokens and ends; of a request that is aborted the one is the other's beginning."""
    for request, overlapping, plain in zip(requests, on, off, strict=True):
        found, expected = tokens(overlapping), tokens(plain)
        if request.aborted_at is None:
            assert found == expected
            reasons = [told[-1].finish_reason for told in (overlapping, plain)]
            assert reasons[0] == reasons[1] is not None
            assert all(output.finish_reason is None for output in overlapping[:-1])
        else:
            shorter = min(len(found), len(expected))
            assert found[:shorter] == expected[:shorter]
        for one, other in zip(overlapping, plain, strict=False):
            assert [(e.token_id, len(e.top)) for e in one.logprobs or ()] == [
                (e.token_id, len(e.top)) for e in other.logprobs or ()
            ]


def workload(seed: int, *, segments: bool = False, adapters: bool = False) -> list[Request]:
    """Prompts with shared prefixes, arrivals, aborts, and every way of choosing tokens."""
    draw = random.Random(seed)

    def some(n: int) -> list[int]:
        return [draw.randrange(3, 320) for _ in range(n)]

    prefixes = [some(70), some(130), []]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "ignore_eos": True, "logprobs": 3},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "seed": 1, "logprobs": 0},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}},
        {
            "temperature": 0.9,
            "bad_words": tuple((i, j) for i in range(20) for j in range(0, 320, 9)),
        },
        {"temperature": 0.9, "min_tokens": 5, "stop_token_ids": tuple(range(150))},
        {"temperature": 0.0, "stop_token_ids": tuple(range(3, 300, 9))},
    ]
    requests = []
    step = 0
    for i in range(16):
        step += draw.choice((0, 0, 1, 4))
        prompt = draw.choice(prefixes) + some(draw.choice((1, 5, 31, 40)))
        most, way = draw.choice((1, 2, 9, 40)), draw.choice(ways)
        most = max(most, way.get("min_tokens", 0))
        params = SamplingParams(max_tokens=most, **{"seed": i, **way})
        spans: list[Span] = []
        if segments and draw.random() < 0.7:
            spans = [(1, 1 + (len(prompt) - 1) // 2), (1 + (len(prompt) - 1) // 2, len(prompt))]
            spans = [(start, end) for start, end in spans if end > start]
        requests.append(
            Request(
                prompt,
                params,
                step,
                step + draw.randrange(1, 9) if draw.random() < 0.25 else None,
                spans,
                draw.choice((None, "a", "b")) if adapters else None,
                draw.choice((b"", b"", b"salt")),
            )
        )
    return requests


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small chunks": {"max_batched_tokens": 24},
    "tiny pool": {"kv_memory": 9 * PAGE_BYTES, "max_model_len": 256},
    "uncached": {"prefix_caching": False},
    "relay": {"relay": "on", "relay_check": 3},
    "few at a time": {"max_running": 2},
    "reference": {"backend": "reference"},
    "short": {"max_model_len": 172},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_answers_on_and_off(tiny_model: TinyModel, name: str) -> None:
    folder = tiny_model("llama")
    shared = 0
    for seed in range(3):
        requests = workload(seed)
        engine = make_engine(folder, async_scheduling="on", **SETTINGS[name])
        plain = make_engine(folder, async_scheduling="off", **SETTINGS[name])
        check_equal(requests, run(engine, requests), run(plain, requests))
        shared += engine.stats.relay.ranges
        assert not engine.stats.relay.refused
        if name not in ("tiny pool", "uncached"):
            assert engine.stats.cached_tokens > 0
    assert shared > 0 or name != "relay"  # some of these workloads share a prefix at a time


@pytest.mark.parametrize("choice", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}], ids=str)
def test_preemption_while_a_step_is_in_flight(tiny_model: TinyModel, choice: Any) -> None:
    """Sequences that grow out of a small pool together: some give way and are computed again."""
    folder = tiny_model("llama")
    params = SamplingParams(max_tokens=60, ignore_eos=True, **choice)
    requests = [Request([i + 3] * 40, params) for i in range(5)]
    small = {"kv_memory": 9 * PAGE_BYTES, "max_model_len": 256}
    engine = make_engine(folder, async_scheduling="on", **small)
    plain = make_engine(folder, async_scheduling="off")
    check_equal(requests, run(engine, requests), run(plain, requests))
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("budget", [512, 40])
def test_the_same_answers_with_segments(tiny_model: TinyModel, budget: int) -> None:
    """Under the smaller budget some of them are long chunks, beside the steps of others."""
    folder = tiny_model("llama")
    settings = {"max_batched_tokens": budget}
    requests = workload(7, segments=True)
    on = run(make_engine(folder, async_scheduling="on", **settings), requests)
    check_equal(requests, on, run(make_engine(folder, **settings), requests))


def test_the_same_answers_with_adapters(tiny_model: TinyModel, lora: Any) -> None:
    folder = tiny_model("llama")
    adapters = {name: str(lora.write(folder, seed=i)) for i, name in enumerate("ab")}
    requests = workload(11, adapters=True)
    on = run(make_engine(folder, async_scheduling="on", adapters=adapters), requests)
    check_equal(requests, on, run(make_engine(folder, adapters=adapters), requests))


def test_auto_is_off_where_the_host_computes(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.add(0, array("i", [5, 6]), SamplingParams(max_tokens=1))
    assert len(engine.step()) == 1
    assert not engine.has_work


def test_another_word_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="--async-scheduling must be auto, on, off"):
        make_engine(tiny_model("llama"), async_scheduling="yes")


def test_a_step_is_launched_before_the_one_before_is_waited_for(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama"), async_scheduling="on")
    events: list[str] = []
    compute, launch = engine._runner.run, engine._sampler.launch

    def recorded(batch: Batch) -> Tensor:
        events.append(f"run {len(events)}")
        return compute(batch)

    def slow(logits: Tensor, entries: list[ScheduledSequence], masks: Masks | None) -> Sampling:
        sampling, name = launch(logits, entries, masks), events[-1].replace("run", "result")

        def finish() -> list[Sampled]:
            events.append(name)
            return sampling.result()

        return Sampling(sampling.token_ids, finish)

    monkeypatch.setattr(engine._runner, "run", recorded)
    monkeypatch.setattr(engine._sampler, "launch", slow)
    engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert events == [
        *("run 0", "run 1", "result 0", "run 3", "result 1", "run 5", "result 3", "result 5"),
    ]


def test_logits_that_are_no_numbers_end_only_their_request(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the next row of that request is in flight."""
    folder = tiny_model("llama")
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    requests = [Request([i + 3] * 40, params) for i in range(3)]
    expected = [tokens(told) for told in run(make_engine(folder), requests)]
    engine = make_engine(folder, async_scheduling="on")
    launch = engine._sampler.launch

    def broken(logits: Tensor, entries: list[ScheduledSequence], masks: Masks | None) -> Sampling:
        logits = logits.clone()
        for row, entry in enumerate(entries):
            if entry.seq.id == 1 and entry.end == 43:  # its fourth token
                logits[row] = torch.nan
        return launch(logits, entries, masks)

    monkeypatch.setattr(engine._sampler, "launch", broken)
    told = run(engine, requests)
    assert [tokens(each) for each in told] == [expected[0], expected[1][:3], expected[2]]
    assert [each[-1].finish_reason for each in told] == ["length", "error", "length"]
    monkeypatch.setattr(engine._sampler, "launch", launch)
    again = run(engine, [requests[0], requests[2]])
    assert [tokens(each) for each in again] == [expected[0], expected[2]]


def test_a_step_in_flight_is_work_though_nobody_wants_it(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"), async_scheduling="on")
    engine.add(0, array("i", [5] * 9), SamplingParams(max_tokens=9, temperature=0.0))
    engine.step()
    engine.abort([0])
    assert engine.has_work
    assert engine.step() == []
    assert not engine.has_work
    engine.check()


def test_the_id_of_an_aborted_request_may_come_again_at_once(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    [expected] = make_engine(folder).generate([[9] * 40], params)
    engine = make_engine(folder, async_scheduling="on")
    engine.add(0, array("i", [5] * 40), params)
    for _ in range(3):
        engine.step()
    engine.abort([0])
    assert engine.generate([[9] * 40], params) == [expected]
    engine.check()


def test_what_an_end_of_sequence_leaves_in_the_cache_is_right(tiny_model: TinyModel) -> None:
    """The row behind it wrote to the page after what is cached, or to none."""
    folder = tiny_model("llama")
    greedy = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True)
    prompt = list(range(3, 36))
    [answer] = make_engine(folder).generate([prompt], greedy)
    for length in (30, 31, 32, 33):
        end = answer[length - 1]
        stop = SamplingParams(max_tokens=70, temperature=0.0, stop_token_ids=(end,))
        engine = make_engine(folder, async_scheduling="on")
        [found] = engine.generate([prompt], stop)
        assert found == answer[: answer.index(end) + 1]
        engine.check()
        turn = [*prompt, *found, 9, 9]
        assert engine.generate([turn], greedy) == make_engine(folder).generate([turn], greedy)


def test_pending_tokens_come_from_their_places() -> None:
    params = SamplingParams(max_tokens=9)
    one, other, third = (
        Sequence(i, array("i", [50 + i] * 3), 3, params, pages=[i]) for i in range(3)
    )
    entries = [
        ScheduledSequence(third, 3, 1, True),
        ScheduledSequence(one, 2, 1, True),
        ScheduledSequence(other, 3, 1, True),
    ]
    in_flight = InFlight([other, third], torch.tensor([7, 8], dtype=torch.int32))
    pending = build_batch(entries, 32, (), in_flight).pending
    assert pending is not None
    assert pending.rows.tolist() == [0, 2]
    assert pending.token_ids[pending.sources].tolist() == [8, 7]
    assert build_batch(entries[1:2], 32, (), in_flight).pending is None
    with pytest.raises(ValueError, match="nobody computes"):
        build_batch(entries, 32)


def test_which_sampler(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    assert isinstance(make_engine(folder)._sampler, Sampler)
    assert isinstance(make_engine(folder, async_scheduling="on")._sampler, DeviceSampler)
    assert not load_backend("reference", isa="auto", weights="f32", threads=1).asynchronous
