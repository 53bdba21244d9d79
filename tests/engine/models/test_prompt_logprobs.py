"""Log-probabilities of prompts are those of transformers' own model, however they are computed."""

from __future__ import annotations

import types
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import RequestError
from headstart.engine.models.decoder import Decoder
from headstart.engine.process.messages import Output, ScoredToken
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.engine.sequence import Status

NEW = 6
LIKELIEST = 3


def make_engine(folder: Path, **settings: Any) -> Engine:
    fields = {"weights": "f32", "threads": 2, "kv_memory": 64 << 20, "max_model_len": 512}
    return Engine(EngineConfig(model_path=str(folder), **{**fields, **settings}))


def some_tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, 320, (n,), generator=generator).tolist()
    return ids


def scoring(count: int = LIKELIEST, new: int = NEW, **fields: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=new, temperature=0.0, ignore_eos=True, prompt_logprobs=count, **fields
    )


def run(engine: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    return outputs


def scores(outputs: list[Output]) -> list[ScoredToken]:
    """Those of one request: with its first output, and never again."""
    assert outputs[0].prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    return outputs[0].prompt_logprobs


def judge(
    reference: Any,
    prompt: list[int],
    found: list[ScoredToken],
    spans: list[Span] | None = None,
    count: int = LIKELIEST,
) -> None:
    assert [score.token_id for score in found] == prompt[1:]
    expected = torch.log_softmax(reference.logits(prompt, spans or ())[:-1].double(), dim=-1)
    for row, score in zip(expected, found, strict=True):
        own = float(row[score.token_id])
        assert score.logprob == pytest.approx(own, abs=2e-4)
        near = 1 + int((row > own + 1e-3).sum()), 1 + int((row > own - 1e-3).sum())
        assert near[0] <= score.rank <= near[1]
        best = row.topk(count).values.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(best, abs=2e-4)
        for token_id, logprob in score.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=2e-4)


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of 33": {"max_batched_tokens": 33},
    "uncached": {"prefix_caching": False},
    "overlapping": {"async_scheduling": "on", "max_batched_tokens": 48},
    "reference": {"backend": "reference", "max_batched_tokens": 100},
}


@pytest.mark.parametrize("mode", MODES)
def test_as_transformers_has_them(llama: Path, references: Any, mode: str) -> None:
    """Beside others that decode and share the prompt's beginning."""
    engine = make_engine(llama, **MODES[mode])
    prompts = [some_tokens(n) for n in (1, 2, 70, 150, 150)]
    plain = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(i, array("i", prompt), scoring())
        engine.add(10 + i, array("i", prompt), plain)
    outputs = run(engine)
    reference = references(llama)
    for i, prompt in enumerate(prompts):
        judge(reference, prompt, scores(outputs[i]))
        assert all(output.prompt_logprobs is None for output in outputs[10 + i])
    answers = [[t for o in outputs[i] for t in o.token_ids] for i in range(5)]
    reference.check(prompts, answers, NEW)


def test_the_cache_is_not_read_but_filled(llama: Path, references: Any) -> None:
    engine, prompt = make_engine(llama), some_tokens(100)
    for i in range(2):
        engine.add(i, array("i", prompt), scoring())
        [first, *_] = run(engine)[i]
        assert first.cached_tokens == 0
        judge(references(llama), prompt, scores([first]))
    engine.add(2, array("i", prompt), SamplingParams(max_tokens=1))
    assert run(engine)[2][0].cached_tokens == 96


def test_equal_prompts_do_not_wait_for_each_other(llama: Path) -> None:
    """They could take nothing from the cache."""
    engine, prompt = make_engine(llama), some_tokens(100)
    for i in range(2):
        engine.add(i, array("i", prompt), scoring())
    assert [output.id for output in engine.step()] == [0, 1]


def test_preempted_prompts_are_told_once(llama: Path, references: Any) -> None:
    page = 32 * 2 * 2 * 16 * 2 * 4
    engine = make_engine(llama, kv_memory=6 * page, max_model_len=192, max_batched_tokens=40)
    assert engine.model.num_pages == 6
    prompts = [some_tokens(60, seed) for seed in range(4)]
    for i, prompt in enumerate(prompts):
        engine.add(i, array("i", prompt), scoring(new=60))
    outputs = run(engine)
    assert engine.stats.preemptions > 0
    for i, prompt in enumerate(prompts):
        judge(references(llama), prompt, scores(outputs[i]))


def test_preempted_amid_the_prompt(llama: Path, references: Any) -> None:
    """What was booked is not read again: the rest is read after a part from the cache."""
    engine = make_engine(llama, max_batched_tokens=32)
    prompt = some_tokens(150)
    engine.add(0, array("i", prompt), scoring())
    for _ in range(2):
        assert engine.step() == []
    scheduler = engine._scheduler
    [seq] = scheduler._running
    scheduler._leave(seq)
    seq.num_computed_tokens, seq.num_preemptions, seq.status = 0, 1, Status.WAITING
    scheduler._waiting.append(seq)
    assert engine.step() == []
    assert seq.num_computed_tokens == 96  # 64 were booked, and are in the cache
    judge(references(llama), prompt, scores(run(engine)[0]))


def test_long_segments(llama: Path, references: Any) -> None:
    """Computed beside the steps of others; rows see their whole segment."""
    engine = make_engine(llama, max_batched_tokens=40)
    prompt, spans = some_tokens(200), [(10, 120), (120, 190)]
    engine.add(1, array("i", some_tokens(5, 1)), SamplingParams(max_tokens=30))
    engine.step()
    engine.add(0, array("i", prompt), scoring(), segments=spans)
    judge(references(llama), prompt, scores(run(engine)[0]), spans)


def test_logits_of_a_prompt_are_never_all_there(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, rows = Decoder._head, []

    def head(self: Decoder, residual: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(residual))
        return decoder(self, residual, delta)

    monkeypatch.setattr(Decoder, "_head", head)
    engine = make_engine(llama)
    engine.add(0, array("i", some_tokens(400)), scoring(new=1))
    run(engine)
    assert max(rows) <= 64
    assert sum(rows) == 400


def test_what_is_read_does_not_run_ahead(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama)
    chain = types.SimpleNamespace(wants=lambda *_: True)
    monkeypatch.setattr(engine, "runahead", chain)
    for i, params in enumerate((scoring(), PoolingParams("last"), SamplingParams(max_tokens=0))):
        engine.add(i, array("i", [5] * 100), params)
    engine.add(3, array("i", [5] * 100), SamplingParams(max_tokens=1))
    wanted = [engine._runs_ahead(seq, 0, 0) for seq in engine._scheduler._waiting]
    assert wanted == [False, False, False, True]


def test_nothing_but_the_prompt(llama: Path, references: Any) -> None:
    """max_tokens 0: with scores, and without, where it fills the cache."""
    engine, prompt = make_engine(llama, async_scheduling="on"), some_tokens(70)
    engine.add(0, array("i", prompt), scoring(new=0))
    engine.add(1, array("i", prompt), SamplingParams(max_tokens=0))
    outputs = run(engine)
    for i in range(2):
        [output] = outputs[i]
        assert (output.token_ids, output.finish_reason) == ([], "length")
    judge(references(llama), prompt, scores(outputs[0]))
    assert outputs[1][0].prompt_logprobs is None
    assert engine.stats.generation_tokens == 0


@pytest.mark.slow
def test_int8_is_near(smollm2: Path) -> None:
    """The head's inputs are smoothed and rounded there."""
    engines = [make_engine(smollm2, weights=weights) for weights in ("f32", "int8")]
    found = []
    for engine in engines:
        engine.add(0, array("i", range(100, 180)), scoring(0, new=1))
        found.append([score.logprob for score in scores(run(engine)[0])])
    assert found[0] != found[1]
    mean = [sum(values) / len(values) for values in found]
    assert mean[1] == pytest.approx(mean[0], rel=0.05)


@pytest.mark.parametrize("count", [-1, 21])
def test_out_of_range(llama: Path, count: int) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs must be at"):
        make_engine(llama).add(0, array("i", [1]), scoring(count))
