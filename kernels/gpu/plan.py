"""AttentionPlan: a batch's KV ranges as items for the kernels, in one buffer.

Ranges are cut twice. Rows: as many as fit a tile (``block_m`` vectors). Keys: into splits, so that
there is work for all processors even where few rows read many keys:

    range        rows 0..4, group 3, 700 keys          15 vectors
    row tiles    block_m 16: [0 1 2 3 4]
    splits       256 keys:   [0, 256)  [256, 512)  [512, 700)       three items

A row that has only one item is written by it; the parts of the others get a slot each and are
merged. Ranges of so few vectors that they fit the small tile ("row" kernel) go there, the rest to
the large one ("tile" kernel).

Everything is int32 in one host buffer, which takes one copy to the device:

    [ row items | tile items | rows | visible | merge rows | starts | slots | pages ]

Sections of a captured graph have fixed places and lengths (``Capacity``); what a batch leaves over
is filled with items of no entries and merge rows of -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.kernels.gpu.attention import ITEM_FIELDS
from headstart.kernels.ranges import IntArray, KVRanges

Int64s = npt.NDArray[np.int64]

MIN_SPLIT = 256
"""Keys of the shortest split: below it the merge costs more than the waiting processors."""

ITEMS_PER_PROCESSOR = 2


class Capacity(NamedTuple):
    """Lengths of the sections of a plan."""

    row_items: int
    tile_items: int
    pages: int
    entries: int
    merge_rows: int
    slots: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """int32 of each section, in order."""
        return (
            self.row_items * ITEM_FIELDS,
            self.tile_items * ITEM_FIELDS,
            self.entries,
            self.entries,
            self.merge_rows,
            self.merge_rows + 1,
            self.slots,
            self.pages,
        )

    @property
    def total(self) -> int:
        return sum(_aligned(size) for size in self.sizes[:-1]) + self.pages

    def holds(self, other: Capacity) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def sections(self, buffer: Tensor) -> list[Tensor]:
        """The sections of ``buffer [total]``."""
        found, begin = [], 0
        for size in self.sizes:
            found.append(buffer[begin : begin + size])
            begin += _aligned(size)
        return found


def _aligned(size: int) -> int:
    """Sections begin at 16 bytes, so that loads from them can be wide."""
    return -(-size // 4) * 4


@dataclass(frozen=True, slots=True)
class Cut:
    """A batch's items and what merges them, on the host."""

    row_items: IntArray
    tile_items: IntArray
    pages: IntArray
    rows: IntArray
    visible: IntArray
    merge_rows: IntArray
    starts: IntArray
    slots: IntArray

    @property
    def capacity(self) -> Capacity:
        return Capacity(
            len(self.row_items),
            len(self.tile_items),
            len(self.pages),
            len(self.rows),
            len(self.merge_rows),
            len(self.slots),
        )

    def write(self, capacity: Capacity) -> Tensor:
        """All of it as the beginning of a buffer ``[capacity.total]``; what it does not fill says:
        nothing to do. Pages come last: those it does not have are left out."""
        capacity = capacity._replace(pages=len(self.pages))
        buffer = torch.zeros(capacity.total, dtype=torch.int32)
        sections = [section.numpy() for section in capacity.sections(buffer)]
        parts = (
            self.row_items.ravel(),
            self.tile_items.ravel(),
            self.rows,
            self.visible,
            self.merge_rows,
            self.starts,
            self.slots,
            self.pages,
        )
        for section, part in zip(sections, parts, strict=True):
            section[: len(part)] = part
        sections[4][len(self.merge_rows) :] = -1
        return buffer


def cut(
    num_rows: int,
    ranges: KVRanges,
    *,
    group: int,
    kv_heads: int,
    page_size: int,
    row_block: int,
    tile_block: int,
    processors: int,
    most_items: int | None = None,
) -> Cut:
    """Cut ``ranges`` into items. ``row_block``, ``tile_block``: vectors of the two tiles.

    ``most_items``: of either kind, at most, if there are fewer row tiles than that.
    Raises ValueError for ranges that contradict themselves.
    """
    _check(num_rows, ranges, page_size)
    tiles = _row_tiles(ranges, group, row_block, tile_block)
    target = most_splits(processors, kv_heads)
    row_items, tile_items = (
        _split(tiles[tiles[:, _SMALL] == small], target, most_items, page_size) for small in (1, 0)
    )
    merge_rows, starts, slots = _join(num_rows, ranges.rows, [row_items, tile_items])
    return Cut(
        row_items.astype(np.int32),
        tile_items.astype(np.int32),
        ranges.pages,
        ranges.rows,
        ranges.visible,
        merge_rows.astype(np.int32),
        starts.astype(np.int32),
        slots.astype(np.int32),
    )


def most_splits(processors: int, kv_heads: int) -> int:
    """How often the keys of all row tiles of a kind are split, taken together, at most."""
    return max(ITEMS_PER_PROCESSOR * processors // kv_heads, 1)


_PAGE, _KEYS, _ENTRY, _ENTRIES, _SMALL = range(5)  # columns of row tiles; the first four also of
_OFFSET, _SLOT = 4, 5  # items


def _row_tiles(ranges: KVRanges, group: int, row_block: int, tile_block: int) -> Int64s:
    """Entries that go through the keys together: page, keys, entry, entries, small ``[tiles, 5]``.

    keys: the most that one of the rows sees; tiles whose rows see none are left out.
    """
    counts = np.diff(ranges.row_start).astype(np.int64)
    small = counts * group <= row_block
    step = np.where(small, row_block // group, tile_block // group)
    number = -(-counts // step)
    of = np.repeat(np.arange(len(ranges)), number)
    entry = ranges.row_start[:-1][of] + _within(number) * step[of]
    entries = np.minimum(step[of], ranges.row_start[1:][of] - entry)
    keys = np.maximum.reduceat(ranges.visible, entry) if len(entry) else entry
    tiles = np.stack([ranges.page_start[of], keys, entry, entries, small[of]], axis=1)
    return tiles[tiles[:, _KEYS] > 0].astype(np.int64)


def _split(tiles: Int64s, target: int, most_items: int | None, page_size: int) -> Int64s:
    """Items ``[items, ITEM_FIELDS]`` of row tiles, slots yet unknown: about ``target`` of them, or
    one each."""
    if most_items is not None:
        target = max(min(target, most_items - len(tiles)), 1)
    keys = tiles[:, _KEYS]
    length = max(MIN_SPLIT, -(-int(keys.sum()) // target))
    length = -(-length // page_size) * page_size
    number = -(-keys // length)
    items = np.repeat(tiles, number, axis=0)
    offset = _within(number) * length
    items[:, _PAGE] += offset // page_size
    items[:, _KEYS] = np.minimum(items[:, _KEYS] - offset, length)
    items[:, _OFFSET] = offset
    return np.concatenate([items, np.full((len(items), 1), -1)], axis=1)


def _join(num_rows: int, rows: IntArray, kinds: list[Int64s]) -> tuple[Int64s, Int64s, Int64s]:
    """Give slots to items whose rows have others; the rows to merge, and their slots."""
    row_of = [rows[_expand(items)] for items in kinds]
    times = np.bincount(np.concatenate(row_of), minlength=num_rows)
    done = np.zeros(num_rows, bool)
    pairs, first = [], 0
    for items, found in zip(kinds, row_of, strict=True):
        if not len(items):
            continue
        begins = np.cumsum(items[:, _ENTRIES]) - items[:, _ENTRIES]
        shared = np.maximum.reduceat(times[found], begins) > 1
        sizes = np.where(shared, items[:, _ENTRIES], 0)
        ends = np.cumsum(sizes)
        items[shared, _SLOT] = (first + ends - sizes)[shared]
        in_slots = np.repeat(shared, items[:, _ENTRIES])
        done[found[~in_slots]] = True
        pairs.append(found[in_slots])
        first += int(ends[-1])
    in_order = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
    merged = np.flatnonzero(~done)
    counts = np.bincount(in_order, minlength=num_rows)[merged]
    starts = np.concatenate([[0], np.cumsum(counts)])
    return merged, starts, np.argsort(in_order, kind="stable")


def _expand(items: Int64s) -> Int64s:
    """The entries of items, one item after the other."""
    return np.repeat(items[:, _ENTRY], items[:, _ENTRIES]) + _within(items[:, _ENTRIES])


def _within(counts: Int64s) -> Int64s:
    """0, 1, ... count - 1 for each count: [3, 2] -> [0, 1, 2, 0, 1]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _check(num_rows: int, ranges: KVRanges, page_size: int) -> None:
    """Raise ValueError where following the ranges would read or write elsewhere."""
    room = np.repeat(np.diff(ranges.page_start) * page_size, np.diff(ranges.row_start))
    for row in ranges.rows[(ranges.rows < 0) | (ranges.rows >= num_rows)]:
        raise ValueError(f"a KV range names row {row} of {num_rows}")
    for at in np.flatnonzero((ranges.visible < 0) | (ranges.visible > room)):
        raise ValueError(f"a row sees {ranges.visible[at]} keys of a range of {room[at]}")
    for key in ranges.first_key[ranges.first_key % page_size != 0]:
        raise ValueError(f"a range begins at key {key}, which is not the start of a page")
    of = np.repeat(np.arange(len(ranges)), np.diff(ranges.row_start))
    pairs = np.sort(of * num_rows + ranges.rows)
    for pair in pairs[1:][pairs[1:] == pairs[:-1]]:
        raise ValueError(f"a range names row {pair % num_rows} twice")
