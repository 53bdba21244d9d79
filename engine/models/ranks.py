"""Ranks: the processes that compute a model together, as its decoder sees them.

Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): each rank has some of the attention
heads and some of the MLP's inner features, so what o_proj and down_proj give are terms of a sum.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """All ranks call the same verbs in the same order, with rows of the same shape."""

    @property
    def capturable(self) -> bool:
        """Whether what they do may be part of a CUDA graph."""
        ...

    def sum(self, rows: Tensor) -> Tensor:
        """The sum over all ranks of ``rows [rows, hidden]``, on each of them. ``rows`` may be
        overwritten. Raises RankError."""
        ...

    def gather(self, logits: Tensor) -> Tensor:
        """On rank 0 the logits ``[rows, vocab]`` of all parts of the vocabulary; elsewhere the
        rank's own. Raises RankError."""
        ...


class OneRank:
    """There is one process, and it has the whole model."""

    capturable = True

    def sum(self, rows: Tensor) -> Tensor:
        return rows

    def gather(self, logits: Tensor) -> Tensor:
        return logits
