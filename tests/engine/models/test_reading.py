"""Prompts that are read, in random traffic: every result is transformers', told once, whatever is
preempted, aborted, cached, in segments or in flight."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.process.messages import Output
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import POOLINGS, PoolingParams, SamplingParams

REQUESTS = 40


class Asked(NamedTuple):
    prompt: list[int]
    params: SamplingParams | PoolingParams
    spans: list[Span]


def some_request(draw: random.Random, shared: list[int]) -> Asked:
    prompt = shared[: draw.randrange(60)]
    prompt = prompt + [draw.randrange(3, 320) for _ in range(draw.randrange(1, 40))]
    spans: list[Span] = []
    if len(prompt) > 10 and draw.random() < 0.3:
        first = draw.randrange(len(prompt) - 5)
        spans = [(first, draw.randrange(first + 2, len(prompt) + 1))]
    kind = draw.randrange(6)
    if kind < 3:
        return Asked(prompt, PoolingParams(POOLINGS[kind]), spans)
    params = SamplingParams(
        max_tokens=0 if kind == 3 else draw.randrange(60, 160),
        temperature=0.0,
        ignore_eos=True,
        prompt_logprobs=None if kind == 4 else draw.randrange(3),
    )
    return Asked(prompt, params, spans)


def judge(reference: Any, asked: Asked, outputs: list[Output]) -> None:
    prompt, params, spans = asked
    first = outputs[0]
    if isinstance(params, PoolingParams):
        states = reference.states(prompt, spans)
        wanted = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[params.pooling]
        found = torch.frombuffer(bytearray(first.pooled or b""), dtype=torch.float32)
        assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-3)
    elif params.prompt_logprobs is not None:
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        scores = first.prompt_logprobs or []
        assert [score.token_id for score in scores] == prompt[1:]
        rows = torch.log_softmax(reference.logits(prompt, spans)[:-1], dim=-1)
        own = rows.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        assert torch.allclose(torch.tensor([s.logprob for s in scores]), own, atol=5e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(tiny_model: Callable[..., Path], references: Any, seed: int) -> None:
    folder, draw = tiny_model("llama"), random.Random(seed)
    page = 32 * 2 * 2 * 16 * 2 * 4  # tokens, k and v, heads, head size, layers, bytes
    engine = Engine(
        EngineConfig(
            model_path=str(folder),
            weights="f32",
            threads=2,
            kv_memory=draw.choice([9, 12]) * page,
            max_model_len=256,
            max_batched_tokens=draw.choice([33, 64]),
            async_scheduling=("on", "off")[seed % 2],
        )
    )
    shared = [draw.randrange(3, 320) for _ in range(60)]
    asked: list[Asked] = []
    outputs: list[list[Output]] = []
    while len(asked) < REQUESTS or engine.has_work:
        if len(asked) < REQUESTS and draw.random() < 0.9:
            request = some_request(draw, shared)
            tokens = array("i", request.prompt)
            engine.add(len(asked), tokens, request.params, segments=request.spans)
            asked.append(request)
            outputs.append([])
        if asked and draw.random() < 0.03:
            engine.abort([draw.randrange(len(asked))])
        for output in engine.step():
            outputs[output.id].append(output)
        engine.check()
    assert engine.stats.preemptions > 0
    told = [(a, o) for a, o in zip(asked, outputs, strict=True) if o and o[-1].finish_reason]
    assert len(told) > REQUESTS / 2
    for each in told:
        judge(references(folder), *each)
