"""What attention allocates stays within what the memory plan counts for it, whatever the batch."""

from __future__ import annotations

import logging
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headstart.engine.batch import Batch, SharedRange, build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.ranges.segments import CAUSAL, Segments
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.backend import AttentionShape, Backend, RopeTable
from headstart.kernels.devices import load_backend

SHAPE = AttentionShape(heads=6, kv_heads=2, head_dim=16)
PAGE, PAGES = 32, 64
STEP = 4 * PAGE
PARAMS = SamplingParams(max_tokens=1)


class Allocated(TorchDispatchMode):
    """``most``: bytes of new tensors that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self._add(result.nbytes)
            weakref.finalize(result, self._add, -result.nbytes)
        return result

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)


@st.composite
def batches(draw: st.DrawFn, longest: int) -> tuple[Batch, int]:
    """Chunks, decoding rows and segments of sequences behind a prefix, read once for all of them in
    up to two ranges, or not; and the most keys that a row sees."""
    prefix = draw(st.integers(0, longest // STEP)) * STEP
    count = draw(st.integers(1, 5))
    scheduled = []
    for index in range(count):
        length = prefix + draw(st.integers(1, longest))
        start = draw(st.integers(prefix, length - 1))
        rows = draw(st.one_of(st.just(1), st.integers(1, min(length - start, 90))))
        segments = CAUSAL
        if draw(st.booleans()):
            segments = Segments.of([(start, start + rows)], length)
        pages = draw(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=9))
        pages = (pages * -(-length // PAGE))[: -(-length // PAGE)]
        tokens = array("i", [0] * length)
        seq = Sequence(index, tokens, length, PARAMS, pages=pages, segments=segments)
        scheduled.append(ScheduledSequence(seq, start, rows, False))
    shared = []
    if prefix and draw(st.booleans()):
        cut = draw(st.integers(0, prefix // STEP)) * STEP
        some = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
        shared = [SharedRange(0, cut, list(range(count))), SharedRange(cut, prefix, some)]
    shared = [each for each in shared if each.first_key < each.end_key]
    return build_batch(scheduled, PAGE, shared), max(len(e.seq.token_ids) for e in scheduled)


def queries(backend: Backend, rows: int, kv: Any) -> Any:
    """Random ones, kept where the backend keeps them; layer 0 is written, layer 1 is read."""
    width = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim
    ones, zeros = torch.ones(1, SHAPE.head_dim // 2), torch.zeros(1, SHAPE.head_dim // 2)
    nowhere = torch.arange(rows, dtype=torch.int32) % (PAGES * PAGE)
    qkv = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    at = torch.zeros(rows, dtype=torch.int32)
    rope = RopeTable(ones, zeros)
    return backend.rope_and_store(qkv, None, None, 1e-5, rope, at, nowhere, SHAPE, kv, 0)


def pool(backend: Backend) -> Any:
    kv = backend.allocate_kv(SHAPE, 2, PAGES)
    pages = backend.kv_pages(kv)
    values = torch.randn(pages.numel() // 4, generator=torch.Generator().manual_seed(0))
    pages.copy_(values.view(torch.uint8).view(pages.shape))
    return kv


def assert_within(backend: Backend, batch: Batch, keys: int) -> torch.Tensor:
    """The result; what it took beside it was planned for."""
    kv = pool(backend)
    query = queries(backend, batch.num_rows, kv)
    plan = backend.plan_attention(batch.num_rows, batch.kv_ranges, SHAPE)
    with Allocated() as allocated:
        out = backend.attend(query, kv, 1, plan)
    result: torch.Tensor = out if isinstance(out, torch.Tensor) else out.data
    own = batch.num_rows * (SHAPE.heads * (SHAPE.head_dim + 1) + 1) * 4  # with lse, or a scale
    bound = backend.attention_scratch(batch.num_rows, keys, SHAPE)
    assert 0 < allocated.most <= own + bound
    return result


@settings(max_examples=60)
@given(batches(4000))
def test_on_a_cpu(drawn: tuple[Batch, int]) -> None:
    backend = load_backend("cpu", isa="auto", weights="f32", threads=2, page_size=PAGE)
    assert_within(backend, *drawn)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=batches(4000), limit=st.integers(1, 200))
def test_long_batches_are_cut_and_no_bit_changes(
    monkeypatch: pytest.MonkeyPatch, drawn: tuple[Batch, int], limit: int
) -> None:
    with monkeypatch.context() as patch:
        backend = load_backend("cpu", isa="auto", weights="f32", threads=2, page_size=PAGE)
        whole = assert_within(backend, *drawn)
        patch.setattr("headstart.kernels.cpu.backend.SCRATCH_BYTES", limit << 10)
        backend = load_backend("cpu", isa="auto", weights="f32", threads=2, page_size=PAGE)
        assert torch.equal(assert_within(backend, *drawn), whole)


@pytest.fixture
def gpu() -> Backend:
    return load_backend("gpu", isa="auto", weights="f32", threads=2, page_size=PAGE)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=batches(4000), ranges=st.sampled_from([0, 1, 2]))
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, drawn: tuple[Batch, int], ranges: int
) -> None:
    """Of every launch only the memory: nothing is computed."""
    with monkeypatch.context() as patch:
        patch.setattr(gpu.on, "launch", lambda *args, **constants: None)
        patch.setattr("headstart.kernels.gpu.backend.SCRATCH_RANGES", ranges)
        assert_within(gpu, *drawn)


def test_a_gpu_s_long_batch_in_pieces(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    seq = Sequence(0, array("i", [0] * 2000), 2000, PARAMS, pages=[i % PAGES for i in range(63)])
    batch = build_batch([ScheduledSequence(seq, 1960, 40, False)], PAGE)
    whole = assert_within(gpu, batch, 2000)
    monkeypatch.setattr(gpu, "_few_slots", lambda rows, shape: 20 * rows)
    monkeypatch.setattr(gpu, "_has_few_slots", lambda plan: plan.num_rows <= 10)
    plan = gpu.plan_attention(batch.num_rows, batch.kv_ranges, SHAPE)
    assert [first for first, _ in plan.pieces] == [0, 10, 20, 30]
    torch.testing.assert_close(assert_within(gpu, batch, 2000), whole)


def test_it_is_planned_and_printed(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Of an 8B model at 128k tokens, 128 partial results of each of 512 rows would be 1.2 GB."""
    backend = load_backend("cpu", isa="auto", weights="f32", threads=2)
    shape = AttentionShape(heads=32, kv_heads=8, head_dim=128)
    assert 57 << 20 < backend.attention_scratch(512, 128 << 10, shape) < 65 << 20
    with caplog.at_level(logging.INFO):
        Engine(
            EngineConfig(
                model_path=str(tiny_model("llama")), weights="f32", threads=2, kv_memory=8 << 20
            )
        )
    [line] = [m for m in caplog.messages if m.startswith("memory: ")]
    # One split of 1,024 keys, 512 rows, 4 heads of 16 + 1 + 16 floats.
    assert "attention's partial results 0." in line
