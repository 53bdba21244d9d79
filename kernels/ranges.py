"""KVRanges: what attention reads, as data.

Attention is a list of **KV ranges**: a run of pages, the rows that read it, and per row how many of
its keys that row sees. Each range yields ``(out, lse)`` per row; partial results of one row are
merged (reference.py has the algebra).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class KVRanges:
    """The KV ranges of one batch, as flat arrays (int32).

        page_start  [ 0       3    4 ]        range i reads pages[page_start[i] : page_start[i+1]]
        pages       [ 7  3  9 | 4 ]
        first_key   [ 0        | 96 ]         and its first key is key first_key[i] of a sequence
        row_start   [ 0   2          5 ]      and is read by rows[row_start[i] : row_start[i+1]]
        rows        [ 0   1 | 2   3   4 ]
        visible     [ 64 65 | 8   9  10 ]     row sees keys [0, visible) of its range

    Key k of a range lies in page k // page_size of its run, at offset k % page_size. A range
    begins with a page, and the ranges of one row come in the order of their keys.
    """

    page_start: IntArray
    pages: IntArray
    first_key: IntArray
    row_start: IntArray
    rows: IntArray
    visible: IntArray

    def __len__(self) -> int:
        return len(self.page_start) - 1

    def __getitem__(self, i: int) -> Range:
        pages = slice(self.page_start[i], self.page_start[i + 1])
        entries = slice(self.row_start[i], self.row_start[i + 1])
        return Range(
            self.pages[pages], self.rows[entries], self.visible[entries], int(self.first_key[i])
        )

    @classmethod
    def of(cls, ranges: Sequence[Range]) -> KVRanges:
        """The ranges of a list, in its order."""

        def joined(parts: Iterable[Sequence[int] | IntArray]) -> IntArray:
            return np.concatenate([np.zeros(0), *parts]).astype(np.int32)

        return cls(
            page_start=starts([len(each.pages) for each in ranges]),
            pages=joined(each.pages for each in ranges),
            first_key=np.array([each.first_key for each in ranges], dtype=np.int32),
            row_start=starts([len(each.rows) for each in ranges]),
            rows=joined(each.rows for each in ranges),
            visible=joined(each.visible for each in ranges),
        )

    @classmethod
    def of_sequences(cls, count: int, keys: int, rows: int, page_size: int) -> KVRanges:
        """``count`` sequences of ``keys`` keys in pages of their own: of each the last ``rows``
        rows, which are a staircase."""
        pages = -(-keys // page_size)
        visible = np.arange(keys - rows + 1, keys + 1, dtype=np.int32)
        return cls.of(
            [
                Range(
                    np.arange(i * pages, (i + 1) * pages, dtype=np.int32),
                    np.arange(i * rows, (i + 1) * rows, dtype=np.int32),
                    visible,
                )
                for i in range(count)
            ]
        )

    def chosen(self, which: Iterable[int]) -> KVRanges:
        """These ranges alone."""
        return KVRanges.of([self[i] for i in which])

    def of_rows(self, first: int, last: int) -> KVRanges:
        """What they are to rows ``[first, last)`` alone, which become rows 0, 1, ..."""
        here = (self.rows >= first) & (self.rows < last)
        counts = np.diff(starts(here)[self.row_start])
        narrowed = replace(
            self,
            row_start=starts(counts),
            rows=self.rows[here] - np.int32(first),
            visible=self.visible[here],
        )
        return narrowed.chosen(np.flatnonzero(counts).tolist())


class Range(NamedTuple):
    """One of KVRanges: the pages, who reads them, how far, and the key they begin with."""

    pages: Sequence[int] | IntArray
    rows: Sequence[int] | IntArray
    visible: Sequence[int] | IntArray
    first_key: int = 0


def starts(counts: npt.ArrayLike) -> IntArray:
    """Where runs of these lengths begin, one after the other, and where the last one ends."""
    return np.cumsum(np.append(np.zeros(1, np.int32), counts), dtype=np.int32)


def in_pieces(
    num_rows: int,
    step: int,
    plan: Callable[[int, int], Plan],
    fits: Callable[[Plan], bool],
) -> list[tuple[int, Plan]]:
    """Runs of rows, the first of each and ``plan(first, last)``: halved at multiples of ``step``
    until their plans fit, or they have no more rows than that."""
    pieces, waiting = [], [(0, num_rows)]
    while waiting:
        first, last = waiting.pop()
        made = plan(first, last)
        middle = first + -(-(last - first) // (2 * step)) * step
        if middle >= last or fits(made):
            pieces.append((first, made))
        else:
            waiting += [(middle, last), (first, middle)]
    return pieces
