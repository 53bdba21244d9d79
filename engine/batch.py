"""Batch and build_batch: the only place where lists become tensors.

    scheduled    A: positions 64..66 (a chunk)      B: position 40 (decoding)
    rows           0    1    2                        3
    token_ids    [ t64  t65  t66                      t40 ]
    positions    [ 64   65   66                       40  ]
    slots        [ where each row's key and value go: page * page_size + offset ]
    kv_ranges      pages of A, visible 65 66 67       pages of B, visible 41
    logit_rows   [           2                        3   ]

Which ranges are emitted is all that distinguishes one attention method from another.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

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


def build_batch(scheduled: list[ScheduledSequence], page_size: int) -> Batch:
    """The rows of ``scheduled``, in order, each sequence reading one range: all its pages."""
    token_ids, positions, slots = array("i"), array("i"), array("i")
    page_start, pages = array("i", [0]), array("i")
    row_start, visible = array("i", [0]), array("i")
    logit_rows: list[int] = []
    for seq, start, num_tokens, samples in scheduled:
        end = start + num_tokens
        used = seq.pages[: -(-end // page_size)]
        pages.extend(used)
        page_start.append(len(pages))
        if num_tokens == 1:
            token_ids.append(seq.token_ids[start])
            positions.append(start)
            slots.append(used[-1] * page_size + start % page_size)
            visible.append(end)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
            visible.extend(range(start + 1, end + 1))
            for position in range(start - start % page_size, end, page_size):
                first = used[position // page_size] * page_size
                slots.extend(
                    range(first + max(start - position, 0), first + min(end - position, page_size))
                )
        row_start.append(len(token_ids))
        if samples:
            logit_rows.append(len(token_ids) - 1)
    num_rows = len(token_ids)
    return Batch(
        token_ids=torch.frombuffer(token_ids, dtype=torch.int32),
        positions=torch.frombuffer(positions, dtype=torch.int32),
        slots=torch.frombuffer(slots, dtype=torch.int32),
        kv_ranges=KVRanges(
            page_start=np.frombuffer(page_start, dtype=np.int32),
            pages=np.frombuffer(pages, dtype=np.int32),
            row_start=np.frombuffer(row_start, dtype=np.int32),
            rows=np.arange(num_rows, dtype=np.int32),
            visible=np.frombuffer(visible, dtype=np.int32),
        ),
        logit_rows=(
            None if len(logit_rows) == num_rows else torch.tensor(logit_rows, dtype=torch.int64)
        ),
    )
