"""Collective: Ranks over torch.distributed. Gloo for tensors in memory, NCCL for those on GPUs.

A sum of more than two ranks is taken in an order that depends on the place in the buffer, so that
a row's last bits depend on its place in the batch. All ranks get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from headstart.engine.errors import RankError
from headstart.engine.models.share import Share
from headstart.engine.process.groups import check_gpus, dist, first_line, gloo_group, nccl_group

HOST = "127.0.0.1"
"""Ranks are processes of one machine."""
HANG_SECONDS = 60.0
"""How long a rank may keep the others waiting before it counts as lost."""


def open_group(store: Any, share: Share, device: torch.device) -> Any:
    """The process group for tensors on ``device``; its ranks meet in ``store``.

    Raises ConfigError where there are too few GPUs, RuntimeError where ranks do not come.
    """
    timeout = timedelta(seconds=HANG_SECONDS)
    if device.type != "cuda":
        return gloo_group(store, share.rank, share.ranks, HOST, timeout)
    check_gpus(f"--tensor-parallel {share.ranks}", share.ranks)
    return nccl_group(store, share.rank, share.ranks, timeout)


class Collective:
    """See Ranks. ``connect`` comes before the first verb. ``explain``: makes of what went wrong
    the line that RankError says."""

    def __init__(self, share: Share, vocab_size: int, explain: Callable[[str], str]) -> None:
        self._share = share
        self._explain = explain
        spans = [Share(rank, share.ranks).span(vocab_size) for rank in range(share.ranks)]
        self._sizes = [end - first for first, end in spans]
        self._group: Any = None

    @property
    def capturable(self) -> bool:
        """NCCL allows it, Gloo does not; neither was tried on a card."""
        return False

    def connect(self, store: Any, device: torch.device) -> str:
        """Meet the other ranks; returns what carries the numbers. Raises HeadstartError."""
        try:
            self._group = open_group(store, self._share, device)
        except RuntimeError as error:
            raise self._lost(error) from error
        return "nccl" if device.type == "cuda" else "gloo"

    def sum(self, rows: Tensor) -> Tensor:
        try:
            self._group.allreduce([rows]).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return rows

    def gather(self, logits: Tensor) -> Tensor:
        # All parts have to be of one size.
        own = torch.nn.functional.pad(logits, (0, max(self._sizes) - logits.shape[1]))
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(own) for _ in self._sizes] if self._share.rank == 0 else []
        try:
            self._group.gather([parts] if parts else [], [own], options).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        if not parts:
            return logits
        pairs = zip(parts, self._sizes, strict=True)
        return torch.cat([part[:, :size] for part, size in pairs], dim=1)

    def _lost(self, error: RuntimeError) -> RankError:
        return RankError(self._explain(first_line(error)[:200]))
