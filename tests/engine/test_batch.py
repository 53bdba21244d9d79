"""build_batch against one row at a time."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.batch import build_batch
from headstart.engine.sampling_params import SamplingParams
from headstart.engine.scheduler import ScheduledSequence
from headstart.engine.sequence import Sequence

PARAMS = SamplingParams(max_tokens=1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[ScheduledSequence], int]:
    """Sequences with pages of their own, in any order, and a chunk of each."""
    page_size = draw(st.sampled_from([1, 2, 4, 32]))
    free = draw(st.permutations(range(64)))
    scheduled = []
    for index in range(draw(st.integers(1, 6))):
        longest = min(len(free), 8) * page_size
        if not longest:
            break
        num_tokens = draw(st.integers(1, longest))
        start = draw(st.integers(0, num_tokens - 1))
        count = draw(st.one_of(st.just(1), st.integers(1, num_tokens - start)))
        # Sometimes more pages than the chunk needs.
        held = draw(st.integers(-(-(start + count) // page_size), -(-longest // page_size)))
        pages, free = list(free[:held]), free[held:]
        tokens = array(
            "i", draw(st.lists(st.integers(0, 99), min_size=num_tokens, max_size=num_tokens))
        )
        seq = Sequence(index, tokens, num_tokens, PARAMS, pages=pages)
        scheduled.append(ScheduledSequence(seq, start, count, start + count == num_tokens))
    return scheduled, page_size


@given(batches())
def test_build_batch(drawn: tuple[list[ScheduledSequence], int]) -> None:
    scheduled, page_size = drawn
    batch = build_batch(scheduled, page_size)
    token_ids, positions, slots, visible, logit_rows = [], [], [], [], []
    for seq, start, count, samples in scheduled:
        for position in range(start, start + count):
            token_ids.append(seq.token_ids[position])
            positions.append(position)
            slots.append(seq.pages[position // page_size] * page_size + position % page_size)
            visible.append(position + 1)
        if samples:
            logit_rows.append(len(token_ids) - 1)
    assert batch.num_rows == len(token_ids)
    for tensor, expected in (
        (batch.token_ids, token_ids), (batch.positions, positions), (batch.slots, slots)
    ):  # fmt: skip
        assert tensor.dtype is torch.int32
        assert tensor.tolist() == expected
    if len(logit_rows) == len(token_ids):
        assert batch.logit_rows is None
    else:
        assert batch.logit_rows is not None
        assert batch.logit_rows.dtype is torch.int64
        assert batch.logit_rows.tolist() == logit_rows
    assert batch.with_all_logits().logit_rows is None

    ranges = batch.kv_ranges
    assert len(ranges) == len(scheduled)
    assert ranges.visible.tolist() == visible
    assert ranges.rows.tolist() == list(range(len(token_ids)))
    for i, (seq, start, count, _) in enumerate(scheduled):
        pages = ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]].tolist()
        assert pages == seq.pages[: len(pages)]
        # Just the pages that hold what the last row sees.
        assert (len(pages) - 1) * page_size < start + count <= len(pages) * page_size
        assert ranges.row_start[i + 1] - ranges.row_start[i] == count
        # What a row writes, it sees: its own slot is key visible - 1 of its range.
        for row in range(ranges.row_start[i], ranges.row_start[i + 1]):
            key = ranges.visible[row] - 1
            assert pages[key // page_size] * page_size + key % page_size == slots[row]


def test_the_batch_keeps_its_memory() -> None:
    """Tensors are views of arrays that build_batch made: they must outlive it."""
    seq = Sequence(0, array("i", range(40)), 40, PARAMS, pages=[3, 1])
    batch = build_batch([ScheduledSequence(seq, 0, 40, True)], 32)
    others = [array("i", [-1] * 40) for _ in range(200)]
    assert batch.token_ids.tolist() == list(range(40))
    assert batch.kv_ranges.visible.tolist() == list(range(1, 41))
    seq.token_ids.append(5)  # the sequence may grow while a batch of it is held
    assert len(others) == 200
