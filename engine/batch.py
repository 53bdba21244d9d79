"""Batch and build_batch: the only place where lists become tensors.

    scheduled    A: positions 64..66 (a chunk)      B: position 40 (decoding)
    rows           0    1    2                        3
    token_ids    [ t64  t65  t66                      t40 ]
    positions    [ 64   65   66                       40  ]
    slots        [ where each row's key and value go: page * page_size + offset ]
    kv_ranges      pages of A, visible 65 66 67       pages of B, visible 41
    logit_rows   [           2                        3   ]

Which ranges are emitted is all that distinguishes one attention method from another. If A and B
have their first 32 keys in common, a SharedRange of them makes three ranges of these two:

    kv_ranges      page 0 of both: rows 0 1 2 3, visible 32 32 32 32
                   the other pages of A, visible 33 34 35      the other page of B, visible 9

If the step before is in flight, and samples B's token 40, the host does not know that token:

    token_ids    [ t64  t65  t66                      0   ]
    pending        row 3 takes the token of the place B has among those that step samples
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.engine.sequence import Adapter, Reader, ScheduledSequence, Sequence
from headstart.kernels.backend import Backend
from headstart.kernels.ranges import IntArray, KVRanges


class AdapterRows(NamedTuple):
    """The rows of a batch that one adapter changes, int32 in ascending order."""

    adapter: Adapter
    rows: IntArray

    def narrowed(self, rows: npt.NDArray[np.int64]) -> AdapterRows:
        """Those that are among ``rows``, ascending, by their place there."""
        places = np.searchsorted(rows, self.rows)
        kept = rows[np.minimum(places, len(rows) - 1)] == self.rows
        return AdapterRows(self.adapter, places[kept].astype(np.int32))


class InFlight(NamedTuple):
    """The tokens of a step that is in flight: ``token_ids[i]``, int32, where its logits are, is
    the next one of ``sequences[i]``."""

    sequences: list[Sequence]
    token_ids: Tensor


class Pending(NamedTuple):
    """Row ``rows[i]`` of a batch has the token ``token_ids[sources[i]]``.

    rows, sources: int64. token_ids: int32, on the device that computed them.
    """

    rows: Tensor
    sources: Tensor
    token_ids: Tensor

    def tokens(self, ops: Backend) -> tuple[Tensor, Tensor]:
        """The rows and the token of each, where ``ops`` reads them: the host does not see them."""
        return ops.upload(self.rows), self.token_ids.index_select(0, ops.upload(self.sources))


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model computes in one step; one row per token.

    token_ids, positions, slots: int32 ``[rows]``. logit_rows: int64, the rows whose logits are
    wanted, or None where that is every row. pending: of the rows whose token the host does not
    know, 0 in token_ids; None: it knows all of them. reads: rows of prompts that somebody reads.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    kv_ranges: KVRanges
    logit_rows: Tensor | None
    adapters: list[AdapterRows]
    pending: Pending | None = None
    reads: Items[Read] = ()

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def tiles(self, most: int) -> Iterator[tuple[slice, Batch]]:
        """The batch in runs of at most ``most`` rows, of about equal length.

        A run by itself is no batch one could compute: its rows may see keys of later rows, and
        which tokens are pending is left out.
        """
        rows = self.num_rows
        if rows <= most:
            yield slice(0, rows), self
            return
        count = -(-rows // most)
        for i in range(count):
            first, last = i * rows // count, (i + 1) * rows // count
            yield slice(first, last), self._between(first, last)

    def _between(self, first: int, last: int) -> Batch:
        logit_rows = self.logit_rows
        if logit_rows is not None:
            logit_rows = logit_rows[(logit_rows >= first) & (logit_rows < last)] - first
        return Batch(
            token_ids=self.token_ids[first:last],
            positions=self.positions[first:last],
            slots=self.slots[first:last],
            kv_ranges=self.kv_ranges.of_rows(first, last),
            logit_rows=logit_rows,
            adapters=[entry.narrowed(np.arange(first, last)) for entry in self.adapters],
            reads=[read.within(first, last) for read in self.reads if read.meets(first, last)],
        )

    def with_all_logits(self) -> Batch:
        """The same batch, with the logits of every row wanted."""
        return replace(self, logit_rows=None)


class Read(NamedTuple):
    """Rows ``[first, end)`` of a batch, and who reads them."""

    first: int
    end: int
    reader: Reader

    def meets(self, first: int, end: int) -> bool:
        """Whether some are among rows ``[first, end)``."""
        return self.first < end and first < self.end

    def within(self, first: int, end: int) -> Read:
        """Those that are, by their place there."""
        return Read(max(self.first, first) - first, min(self.end, end) - first, self.reader)


class SharedRange(NamedTuple):
    """Keys ``[first_key, end_key)`` that sequences have in common, to be read once for all.

    Both are multiples of the page size. ``members``: which entries of ``scheduled``; they hold
    the same pages there, and compute nothing before ``end_key``.
    """

    first_key: int
    end_key: int
    members: list[int]


def build_batch(
    scheduled: list[ScheduledSequence],
    page_size: int,
    shared: Items[SharedRange] = (),
    in_flight: InFlight | None = None,
) -> Batch:
    """The rows of ``scheduled``, in order.

    Each sequence reads the shared ranges it is a member of, which are given in key order, and one
    range with the rest of its pages. ``in_flight``: where to find the tokens behind the known ones.
    """
    token_ids, positions, slots = array("i"), array("i"), array("i")
    page_start, pages, first_key = array("i", [0]), array("i"), array("i")
    row_start, rows, visible = array("i", [0]), array("i"), array("i")
    logit_rows: list[int] = []
    pending: dict[Sequence, int] = {}  # which row has the token that is in flight
    adapters: dict[Adapter, array[int]] = {}
    reads: list[Read] = []
    own_keys = [0] * len(scheduled)  # where each one's own range begins
    if shared:
        first_row = array("i", [0])
        for entry in scheduled:
            first_row.append(first_row[-1] + entry.num_tokens)
        for first, end, members in shared:
            pages.extend(scheduled[members[0]].seq.pages[first // page_size : end // page_size])
            for i in members:
                rows.extend(range(first_row[i], first_row[i + 1]))
                own_keys[i] = end
            page_start.append(len(pages))
            first_key.append(first)
            visible.extend([end - first] * (len(rows) - row_start[-1]))
            row_start.append(len(rows))
    shared_rows = len(rows)
    for (seq, start, num_tokens, samples), own in zip(scheduled, own_keys, strict=True):
        end = start + num_tokens
        used = seq.pages[: -(-end // page_size)]
        pages.extend(used[own // page_size :] if own else used)
        page_start.append(len(pages))
        first_key.append(own)
        if num_tokens == 1:
            if start == len(seq.token_ids):
                pending[seq] = len(token_ids)
                token_ids.append(0)
            else:
                token_ids.append(seq.token_ids[start])
            positions.append(start)
            slots.append(used[-1] * page_size + start % page_size)
            visible.append(end - own)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
            if seq.segments:
                visible.extend(limit - own for limit in seq.segments.visible(start, end))
            else:
                visible.extend(range(start + 1 - own, end + 1 - own))
            for position in range(start - start % page_size, end, page_size):
                first = used[position // page_size] * page_size
                slots.extend(
                    range(first + max(start - position, 0), first + min(end - position, page_size))
                )
        row_start.append(shared_rows + len(token_ids))
        if seq.adapter is not None:
            changed = adapters.setdefault(seq.adapter, array("i"))
            changed.extend(range(len(token_ids) - num_tokens, len(token_ids)))
        if seq.reading is not None:
            # What is in flight ends where this begins, so it is not read twice.
            unread, last = max(start, seq.reading.next), min(end, seq.reading.end)
            if unread < last:
                place = len(token_ids) - end
                reader = seq.reading.reader(unread, last)
                reads.append(Read(place + unread, place + last, reader))
        if samples:
            logit_rows.append(len(token_ids) - 1)
    num_rows = len(token_ids)
    rows.extend(range(num_rows))
    return Batch(
        token_ids=torch.frombuffer(token_ids, dtype=torch.int32),
        positions=torch.frombuffer(positions, dtype=torch.int32),
        slots=torch.frombuffer(slots, dtype=torch.int32),
        kv_ranges=KVRanges(
            page_start=np.frombuffer(page_start, dtype=np.int32),
            pages=np.frombuffer(pages, dtype=np.int32),
            first_key=np.frombuffer(first_key, dtype=np.int32),
            row_start=np.frombuffer(row_start, dtype=np.int32),
            rows=np.frombuffer(rows, dtype=np.int32),
            visible=np.frombuffer(visible, dtype=np.int32),
        ),
        logit_rows=(
            None if len(logit_rows) == num_rows else torch.tensor(logit_rows, dtype=torch.int64)
        ),
        adapters=[
            AdapterRows(adapter, np.frombuffer(changed, dtype=np.int32))
            for adapter, changed in adapters.items()
        ],
        pending=_pending(pending, in_flight) if pending else None,
        reads=reads,
    )


def _pending(rows: dict[Sequence, int], in_flight: InFlight | None) -> Pending:
    if in_flight is None:
        raise ValueError("tokens are scheduled that nobody computes")
    places = {seq: i for i, seq in enumerate(in_flight.sequences)}
    return Pending(
        torch.tensor(list(rows.values()), dtype=torch.int64),
        torch.tensor([places[seq] for seq in rows], dtype=torch.int64),
        in_flight.token_ids,
    )
