"""Reading: what a request wants of its prompt beside KV and an answer.

    PromptScores   how likely each token of the prompt is behind those before it
    Pooled         one vector: a hidden state behind the final norm, or the mean of all

Both are made of the last layer's rows, chunk by chunk as the prompt is computed:

    chunk      p p p p p p p p | p p p p p p ...
    readers    r r r r r r r r   r r r r            rows in tiles, on the device
                              ╰─ fetch ─> host ─> booked when the step is committed

What has been booked is not read again after a preemption. KV of rows that are still to be read is
not taken from the cache: it would save the very rows that are wanted. Prompts that are read do not
run ahead on other processes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.engine.copies import copy_to_host, upload
from headstart.engine.process.messages import ScoredToken
from headstart.engine.sampling.params import Pooling
from headstart.engine.sequence import FinishReason, Reader


class Unread(NamedTuple):
    """The reader of a process that computes the rows for another one to read."""

    needs_logits: bool

    def take(self, rows: Tensor) -> None: ...

    def fetch(self) -> Callable[[], None]:
        return lambda: None


class PromptScores:
    """Log-probabilities of all tokens of a prompt but the first, with the ``count`` likeliest.

    ``next``: the first position whose row is still to be read; ``end``: the last one's plus 1.
    """

    finish_reason = FinishReason.LENGTH
    """Of a sequence that ends with its prompt."""

    def __init__(self, prompt: array[int], count: int) -> None:
        self.next, self.end = 0, max(len(prompt) - 1, 0)
        self._tokens: list[ScoredToken] = []
        self._given = False
        self._prompt = prompt[:]
        self._count = count

    def reader(self, first: int, end: int) -> Reader:
        """For the rows of positions ``[first, end)``, which follow those booked or in flight."""
        return _ScoreReader(self, self._prompt[first + 1 : end + 1], self._count)

    def book(self, tokens: list[ScoredToken]) -> None:
        self._tokens += tokens
        self.next += len(tokens)

    def scores(self) -> list[ScoredToken] | None:
        """All of them, once: when the whole prompt was computed for the first time."""
        if self.next < self.end or self._given:
            return None
        self._given, tokens, self._tokens = True, self._tokens, []
        return tokens


class _ScoreReader:
    needs_logits = True

    def __init__(self, scores: PromptScores, tokens: array[int], count: int) -> None:
        self._scores = scores
        self._tokens = tokens  # behind each of the rows
        self._count = count
        self._taken = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def take(self, rows: Tensor) -> None:
        tokens = self._tokens[self._taken : self._taken + len(rows)]
        self._taken += len(rows)
        chosen = rows.gather(1, upload(tokens, torch.int64, rows).unsqueeze(1))
        total = rows.logsumexp(-1, keepdim=True)
        own = (chosen - total).squeeze(1)
        top = rows.topk(min(self._count, rows.shape[1]), -1)
        rank = (rows > chosen).sum(-1) + 1
        self._parts.append((own, rank, top.values - total, top.indices))

    def fetch(self) -> Callable[[], None]:
        if not self._parts:
            return lambda: None
        arrive = copy_to_host([torch.cat(parts) for parts in zip(*self._parts, strict=True)])

        def book() -> None:
            own, ranks, values, ids = (tensor.tolist() for tensor in arrive())
            self._scores.book(
                [
                    ScoredToken(token, own[i], list(zip(ids[i], values[i], strict=True)), ranks[i])
                    for i, token in enumerate(self._tokens)
                ]
            )

        return book


class Pooled:
    """One vector of a prompt of ``num_tokens`` tokens; see Pooling. ``next``, ``end``: as above."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self.next = num_tokens - 1 if pooling == "last" else 0
        self.end = 1 if pooling == "cls" else num_tokens
        self._divisor = self.end - self.next
        self._sum: Tensor | None = None

    @property
    def finish_reason(self) -> FinishReason:
        finite = self._sum is not None and bool(self._sum.isfinite().all())
        return FinishReason.STOP if finite else FinishReason.ERROR

    @property
    def vector(self) -> bytes:
        """``[hidden]``, float32; once all is read."""
        assert self._sum is not None
        return (self._sum / self._divisor).numpy().tobytes()

    def reader(self, first: int, end: int) -> Reader:
        return _SumReader(self)

    def book(self, rows: int, total: Tensor) -> None:
        self._sum = total if self._sum is None else self._sum + total
        self.next += rows


class _SumReader:
    needs_logits = False

    def __init__(self, pooled: Pooled) -> None:
        self._pooled = pooled
        self._rows = 0
        self._sum: Tensor | None = None

    def take(self, rows: Tensor) -> None:
        total = rows.sum(0)
        self._rows += len(rows)
        self._sum = total if self._sum is None else self._sum + total

    def fetch(self) -> Callable[[], None]:
        if self._sum is None:
            return lambda: None
        arrive = copy_to_host([self._sum])
        return lambda: self._pooled.book(self._rows, arrive()[0])


Reading = PromptScores | Pooled
