"""build_batch against one row at a time, and a batch's tiles against the batch."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.batch import Batch, SharedRange, build_batch
from headstart.engine.ranges.segments import CAUSAL, Segments
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

PARAMS = SamplingParams(max_tokens=1)
ADAPTERS: list[Any] = [None, None, "a", "b"]


@st.composite
def segments_of(draw: st.DrawFn, num_tokens: int) -> Segments:
    cuts = sorted(draw(st.sets(st.integers(0, num_tokens), max_size=6)))
    spans = [span for span in itertools.pairwise(cuts) if draw(st.booleans())]
    return Segments.of(spans, num_tokens)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[ScheduledSequence], int]:
    """Sequences with pages of their own, in any order, and a chunk of each, which ends in no
    segment."""
    page_size = draw(st.sampled_from([1, 2, 4, 32]))
    free = draw(st.permutations(range(64)))
    scheduled = []
    for index in range(draw(st.integers(1, 6))):
        longest = min(len(free), 8) * page_size
        if not longest:
            break
        num_tokens = draw(st.integers(1, longest))
        start = draw(st.integers(0, num_tokens - 1))
        segments = draw(st.one_of(st.just(CAUSAL), segments_of(num_tokens)))
        count = draw(st.one_of(st.just(1), st.integers(1, num_tokens - start)))
        count = segments.end_of(start + count) - start
        # Sometimes more pages than the chunk needs.
        held = draw(st.integers(-(-(start + count) // page_size), -(-longest // page_size)))
        pages, free = list(free[:held]), free[held:]
        tokens = array(
            "i", draw(st.lists(st.integers(0, 99), min_size=num_tokens, max_size=num_tokens))
        )
        seq = Sequence(index, tokens, num_tokens, PARAMS, pages=pages, segments=segments)
        seq.adapter = draw(st.sampled_from(ADAPTERS))
        scheduled.append(ScheduledSequence(seq, start, count, start + count == num_tokens))
    return scheduled, page_size


@given(batches())
def test_build_batch(drawn: tuple[list[ScheduledSequence], int]) -> None:
    scheduled, page_size = drawn
    batch = build_batch(scheduled, page_size)
    token_ids, positions, slots, visible, logit_rows = [], [], [], [], []
    changed: dict[Any, list[int]] = {}
    for seq, start, count, samples in scheduled:
        seen = seq.segments.mask(seq.num_tokens)
        for position in range(start, start + count):
            token_ids.append(seq.token_ids[position])
            positions.append(position)
            slots.append(seq.pages[position // page_size] * page_size + position % page_size)
            visible.append(int(seen[position].sum()))
            if seq.adapter is not None:
                changed.setdefault(seq.adapter, []).append(len(token_ids) - 1)
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
    assert {adapter: rows.tolist() for adapter, rows in batch.adapters} == changed

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
        # What a row writes, it sees: its own slot is among the keys of its range. All it sees is
        # there once the batch is written, in other rows or before.
        for row in range(ranges.row_start[i], ranges.row_start[i + 1]):
            key = positions[row]
            assert key < ranges.visible[row] <= start + count
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


# ------------------------------------------------------------------------------- tiles


@st.composite
def shared_batches(draw: st.DrawFn) -> Batch:
    """Sequences with a prefix in common, and some with more, read apart or once; adapters."""
    page_size, most = 4, 6
    pages = iter(draw(st.permutations(range(100))))
    trunk = [next(pages) for _ in range(draw(st.integers(1, 3)))]
    branch = [next(pages) for _ in range(draw(st.integers(1, 3)))]
    scheduled, depths = [], []
    for index in range(draw(st.integers(1, 7))):
        prefix = draw(st.sampled_from([[], trunk, trunk, trunk + branch, trunk + branch]))
        computed = len(prefix) * page_size + draw(st.integers(0, 3))
        num_tokens = computed + draw(st.integers(1, most * page_size - 3))
        own = -(-num_tokens // page_size) - len(prefix)
        segments = draw(st.one_of(st.just(CAUSAL), segments_of(num_tokens)))
        end = segments.end_of(draw(st.integers(computed + 1, num_tokens)))
        seq = Sequence(
            index,
            array("i", range(index, index + num_tokens)),
            num_tokens,
            PARAMS,
            segments=segments,
            adapter=draw(st.sampled_from(ADAPTERS)),
            pages=[*prefix, *(next(pages) for _ in range(own))] if own else list(prefix),
        )
        depths.append(len(prefix))
        scheduled.append(ScheduledSequence(seq, computed, end - computed, draw(st.booleans())))
    shared, first = [], 0
    for end in (len(trunk), len(trunk) + len(branch)):
        members = [i for i, depth in enumerate(depths) if depth >= end]
        if len(members) > 1 and draw(st.booleans()):
            # One below another begins where that ends.
            shared.append(SharedRange(first * page_size, end * page_size, members))
            first = end
    return build_batch(scheduled, page_size, shared)


def read_by(batch: Batch) -> list[list[tuple[int, list[int], int]]]:
    """For each row its ranges in order: first key, pages, and how many keys it sees."""
    ranges = batch.kv_ranges
    found: list[list[tuple[int, list[int], int]]] = [[] for _ in range(batch.num_rows)]
    for i in range(len(ranges)):
        pages = ranges.pages[ranges.page_start[i] : ranges.page_start[i + 1]].tolist()
        for at in range(ranges.row_start[i], ranges.row_start[i + 1]):
            found[ranges.rows[at]].append(
                (int(ranges.first_key[i]), pages, int(ranges.visible[at]))
            )
    return found


@given(shared_batches(), st.integers(1, 40))
def test_tiles_one_after_the_other_are_the_batch(batch: Batch, most: int) -> None:
    tiles = list(batch.tiles(most))
    starts = [rows.start for rows, _ in tiles]
    assert starts == [0, *(rows.stop for rows, _ in tiles[:-1])]
    assert tiles[-1][0].stop == batch.num_rows
    sizes = [tile.num_rows for _, tile in tiles]
    assert sizes == [rows.stop - rows.start for rows, _ in tiles]
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(tiles) == -(-batch.num_rows // most)
    for name in ("token_ids", "positions", "slots"):
        parts = [getattr(tile, name) for _, tile in tiles]
        assert torch.equal(torch.cat(parts), getattr(batch, name))
        assert {part.dtype for part in parts} == {torch.int32}
    wanted = [
        row + start
        for start, (_, tile) in zip(starts, tiles, strict=True)
        for row in (range(tile.num_rows) if tile.logit_rows is None else tile.logit_rows.tolist())
    ]
    every = list(range(batch.num_rows))
    assert wanted == (every if batch.logit_rows is None else batch.logit_rows.tolist())

    changed: dict[Any, list[int]] = {}
    for start, (_, tile) in zip(starts, tiles, strict=True):
        for adapter, rows in tile.adapters:
            assert rows.dtype == np.int32
            changed.setdefault(adapter, []).extend((rows + start).tolist())
    assert {a: rows for a, rows in changed.items() if rows} == {
        adapter: rows.tolist() for adapter, rows in batch.adapters
    }

    assert [row for _, tile in tiles for row in read_by(tile)] == read_by(batch)
    for _, tile in tiles:
        ranges = tile.kv_ranges
        assert (np.diff(ranges.row_start) > 0).all(), "a range that no row reads"
        assert ranges.page_start[-1] == len(ranges.pages)
        assert ranges.row_start[-1] == len(ranges.rows) == len(ranges.visible)
        for array_ in (getattr(ranges, name) for name in ranges.__slots__):
            assert array_.dtype == np.int32
            assert array_.flags.c_contiguous


@given(shared_batches(), st.data())
def test_an_adapters_rows_among_some_rows(batch: Batch, data: st.DataObject) -> None:
    some = data.draw(st.sets(st.integers(0, batch.num_rows - 1), min_size=1))
    rows = np.array(sorted(some))
    for entry in batch.adapters:
        narrowed = entry.narrowed(rows)
        assert narrowed.adapter is entry.adapter
        assert narrowed.rows.dtype == np.int32
        assert rows[narrowed.rows].tolist() == sorted(some & set(entry.rows.tolist()))


def test_a_batch_of_few_rows_is_its_only_tile() -> None:
    seq = Sequence(0, array("i", range(40)), 40, PARAMS, pages=[3, 1])
    batch = build_batch([ScheduledSequence(seq, 0, 40, True)], 32)
    [(rows, tile)] = batch.tiles(40)
    assert tile is batch
    assert rows == slice(0, 40)


def test_a_shared_range_is_cut_by_rows_and_left_out_where_nobody_reads_it() -> None:
    """Two long chunks beside each other, the second of them with a range before its own."""
    first = Sequence(0, array("i", range(8)), 8, PARAMS, pages=[0, 1])
    others = [
        Sequence(i, array("i", range(8)), 8, PARAMS, pages=[2, 2 + i], segments=Segments(((5, 8),)))
        for i in (1, 2)
    ]
    batch = build_batch(
        [ScheduledSequence(first, 0, 8, True), *(ScheduledSequence(o, 4, 4, True) for o in others)],
        4,
        [SharedRange(0, 4, [1, 2])],
    )
    (_, alone), (_, both) = batch.tiles(8)
    assert read_by(alone) == [[(0, [0, 1], i + 1)] for i in range(8)]
    assert len(alone.kv_ranges) == 1
    assert both.kv_ranges.pages.tolist() == [2, 3, 4]
    assert both.kv_ranges.visible.tolist() == [4] * 8 + [1, 4, 4, 4] * 2
    one, two, three, four = (tile for _, tile in batch.tiles(4))
    assert [len(tile.kv_ranges) for tile in (one, two, three, four)] == [1, 1, 2, 2]
    assert read_by(three) == read_by(both)[:4]
    assert read_by(four) == read_by(both)[4:]
