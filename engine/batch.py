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
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart.engine.scheduler import ScheduledSequence
from headstart.kernels.backend import KVRanges


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model computes in one step; one row per token.

    token_ids, positions, slots: int32 ``[rows]``. logit_rows: int64, the rows whose logits are
    wanted, or None where that is every row.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    kv_ranges: KVRanges
    logit_rows: Tensor | None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def with_all_logits(self) -> Batch:
        """The same batch, with the logits of every row wanted."""
        return replace(self, logit_rows=None)


class SharedRange(NamedTuple):
    """Keys ``[first_key, end_key)`` that sequences have in common, to be read once for all.

    Both are multiples of the page size. ``members``: which entries of ``scheduled``; they hold
    the same pages there, and compute nothing before ``end_key``.
    """

    first_key: int
    end_key: int
    members: list[int]


def build_batch(
    scheduled: list[ScheduledSequence], page_size: int, shared: Items[SharedRange] = ()
) -> Batch:
    """The rows of ``scheduled``, in order.

    Each sequence reads the shared ranges it is a member of, which are given in key order, and one
    range with the rest of its pages.
    """
    token_ids, positions, slots = array("i"), array("i"), array("i")
    page_start, pages, first_key = array("i", [0]), array("i"), array("i")
    row_start, rows, visible = array("i", [0]), array("i"), array("i")
    logit_rows: list[int] = []
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
            token_ids.append(seq.token_ids[start])
            positions.append(start)
            slots.append(used[-1] * page_size + start % page_size)
            visible.append(end - own)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
            visible.extend(range(start + 1 - own, end + 1 - own))
            for position in range(start - start % page_size, end, page_size):
                first = used[position // page_size] * page_size
                slots.extend(
                    range(first + max(start - position, 0), first + min(end - position, page_size))
                )
        row_start.append(shared_rows + len(token_ids))
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
    )
