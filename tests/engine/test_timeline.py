"""What the engine says of a request's time: moments that follow each other, chunks counted."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.process.messages import Output, QueueAhead, Times
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.engine.timeline import MOST_CHUNKS, Timeline

PROMPT = [3 + i % 300 for i in range(150)]
PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
GRAMMAR = SamplingParams(max_tokens=2, temperature=0.0, grammar='start: "a"* "b"')


def make_engine(folder: Path, **settings: object) -> Engine:
    return Engine(
        EngineConfig(
            model_path=str(folder),
            weights="f32",
            threads=1,
            kv_memory=4 << 20,
            max_batched_tokens=32,
            **settings,
        )
    )


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=4)


def times_of(engine: Engine) -> dict[int, Times]:
    """Of all that run; fails where there are two of one request."""
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    told = [(output.id, output.times) for output in outputs if output.times is not None]
    assert len(dict(told)) == len(told)
    return dict(told)


def prove(times: Times) -> None:
    """Nothing overlaps, and the sums are those of the chunks."""
    moments = [times.arrived, times.ready, times.scheduled, times.computed, times.made]
    assert moments == sorted(moments)
    edges = [times.scheduled, *(edge for chunk in times.chunks for edge in chunk), times.computed]
    assert edges == sorted(edges)
    if len(times.chunks) < MOST_CHUNKS:
        assert times.chunks[-1][1] == times.computed
        assert times.seconds == pytest.approx(sum(end - begin for begin, end in times.chunks))
    assert 0 < times.seconds <= times.computed - times.scheduled + 1e-9


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": "on"}, {"step_time": 0.0}])
@pytest.mark.parametrize("params", [PARAMS, GRAMMAR, PoolingParams("mean")])
def test_moments_follow_each_other(folder, settings, params) -> None:
    engine = make_engine(folder, **settings)
    for request_id in range(3):
        engine.add(request_id, array("i", [request_id + 5, *PROMPT]), params)
    found = times_of(engine)
    assert found.keys() == {0, 1, 2}
    for times in found.values():
        prove(times)
        assert times.num_tokens == len(PROMPT) + 1
        assert times.num_chunks >= 1


def test_only_what_is_computed_counts(folder) -> None:
    engine = make_engine(folder)
    engine.add(0, array("i", PROMPT), PARAMS)
    times_of(engine)
    engine.add(1, array("i", PROMPT), PARAMS)
    times = times_of(engine)[1]
    prove(times)
    assert 0 < times.num_tokens <= 64


def test_a_long_segment_is_one_chunk(folder) -> None:
    engine = make_engine(folder)
    engine.add(0, array("i", PROMPT), PARAMS, segments=[(0, 150)])
    engine.add(1, array("i", [9, 9, 9]), PARAMS)
    times = times_of(engine)[0]
    prove(times)
    assert (times.num_chunks, times.num_tokens) == (1, 150)


def test_what_was_there_before(folder) -> None:
    engine = make_engine(folder)
    engine.add(0, array("i", PROMPT), PARAMS)
    engine.step()
    engine.add(1, array("i", [5, *PROMPT]), PARAMS)
    engine.add(2, array("i", [6, *PROMPT]), PARAMS)
    found = times_of(engine)
    assert found[0].ahead == QueueAhead(0, 0, 0)
    assert (found[1].ahead.running, found[1].ahead.waiting) == (1, 0)
    assert 0 < found[1].ahead.tokens < 150
    assert found[2].ahead.waiting == 1
    assert found[2].ahead.tokens == found[1].ahead.tokens + 151


def test_one_that_lost_its_pages_goes_on_with_its_times(folder) -> None:
    engine = make_engine(folder)
    for request_id in range(8):
        long = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        engine.add(request_id, array("i", [request_id + 5, *PROMPT]), long)
    for times in times_of(engine).values():
        prove(times)


def test_steps_that_overlap_are_not_counted_twice() -> None:
    moments = iter((1.0, 2.0, 20.0))
    timeline = Timeline(QueueAhead(), lambda: next(moments))
    timeline.compiled()
    timeline.chunk(2.5, 5.0, 32, scheduled=3.0)  # its step had begun before
    timeline.chunk(4.0, 7.0, 32, scheduled=3.0)
    timeline.chunk(10.0, 12.0, 0, scheduled=3.0)
    timeline.chunk(13.0, 15.0, 8, scheduled=3.0)
    times = timeline.times(3.0)
    prove(times)
    assert times.chunks == [(3.0, 5.0), (5.0, 7.0), (10.0, 12.0), (13.0, 15.0)]
    assert (times.arrived, times.ready, times.computed, times.made) == (1.0, 2.0, 15.0, 20.0)
    assert (times.seconds, times.num_chunks, times.num_tokens) == (8.0, 3, 72)
    assert (times.queue, times.prefill) == (1.0, 17.0)


def test_of_many_chunks_the_sums_are_kept() -> None:
    moments = iter((0.0, 1000.0))
    timeline = Timeline(QueueAhead(), lambda: next(moments))
    for i in range(200):
        timeline.chunk(2.0 * i, 2.0 * i + 1, 1, scheduled=0.0)
    times = timeline.times(0.0)
    prove(times)
    assert (len(times.chunks), times.num_chunks, times.seconds) == (MOST_CHUNKS, 200, 200.0)
