"""DeviceSampler: what sampler.py defines, computed where the logits are.

``launch`` only queues work: nothing in it waits for the device, so the host goes on to the next
step, which takes its tokens from ``Sampling.token_ids`` without having seen them.

    host      params, uniforms, token counts ──┐                      result(): waits for the event
    device    logits ──────────────────────────┴─> token_ids ─> copy to pinned memory ─> event
                                                       └─> rows of the next step

The operations and their order are those of sampler.py. Where it selects and sorts only what it
must, here every row with a top_k or top_p is sorted whole: one call, whatever the rows ask for.
Sums are of float64 in another order, so a token whose weight lies within rounding of a top_p cut,
or a uniform within rounding of a token's end, may fall on the other side.

All steps are launched on one stream, in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.engine.copies import copy_to_host, upload
from headstart.engine.process.messages import TokenLogprobs
from headstart.engine.sampling.grammar import Masks
from headstart.engine.sampling.sampler import (
    GREEDY_BELOW,
    Sampled,
    Sampling,
    checked_shape,
    forbidden,
    is_restricted,
    uniform,
)
from headstart.engine.sequence import ScheduledSequence, Sequence

_BLOCK = 256  # weights summed at a time when drawing


class _Logprobs(NamedTuple):
    """Of the entries ``rows``, on the device: ``own [n]``, the most likely ``values, ids [n, k]``;
    the first ``counts[i]`` are wanted."""

    rows: list[int]
    counts: list[int]
    own: Tensor
    values: Tensor
    ids: Tensor


class DeviceSampler:
    """Samples on the logits' own device, which may be the CPU."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def launch(
        self, logits: Tensor, entries: list[ScheduledSequence], masks: Masks | None = None
    ) -> Sampling:
        """Queue the choice of the next token of each entry.

        logits: [n, vocab] float32; left as they are, and not needed any more when this returns,
        but for work that is queued. Row i is entry i's. ``masks``: of what grammars allow. Raises
        ValueError for another shape.
        """
        sequences = [entry.seq for entry in entries]
        checked_shape(logits, len(sequences), self._vocab_size)
        # The number of output tokens before this one, which the host may not know all yet.
        indices = [e.start + e.num_tokens - e.seq.num_prompt_tokens for e in entries]
        changed = self._changed(logits, sequences, indices)
        if masks is not None and masks.rows:
            changed = _masked(changed, masks)
        token_ids = changed.argmax(-1)
        valid = changed.gather(1, token_ids.unsqueeze(1)).squeeze(1).isfinite()
        drawn = [i for i, seq in enumerate(sequences) if seq.params.temperature >= GREEDY_BELOW]
        if drawn:
            rows = upload(drawn, torch.int64, logits)
            uniforms = [uniform(sequences[i].seed, indices[i]) for i in drawn]
            some = changed if len(drawn) == len(sequences) else changed.index_select(0, rows)
            ids = _draw(some, [sequences[i] for i in drawn], uniforms)
            token_ids = token_ids.index_copy(0, rows, ids)
        logprobs = _logprobs(logits, sequences, token_ids)
        ids32 = token_ids.to(torch.int32)
        arrive = copy_to_host([ids32, valid, *(logprobs[2:] if logprobs else ())])
        return Sampling(ids32, lambda: _sampled(arrive(), logprobs))

    def _changed(self, logits: Tensor, sequences: list[Sequence], indices: list[int]) -> Tensor:
        """The logits with biases, penalties and bans applied; themselves where there are none."""
        biased = [i for i, seq in enumerate(sequences) if seq.params.logit_bias]
        penalised = [i for i, seq in enumerate(sequences) if seq.params.penalised]
        restricted = [i for i, seq in enumerate(sequences) if is_restricted(seq.params, indices[i])]
        if not biased and not penalised and not restricted:
            return logits
        logits = logits.clone()
        if biased:
            biases = [sequences[i].params.logit_bias or {} for i in biased]
            at = _places(biased, biases, logits)
            values = upload([v for each in biases for v in each.values()], torch.float32, logits)
            logits.index_put_(at, logits[at] + values)
        if penalised:
            _penalise(logits, penalised, [sequences[i] for i in penalised])
        if restricted:
            self._restrict(logits, restricted, sequences, indices)
        return logits

    def _restrict(
        self, logits: Tensor, rows: list[int], sequences: list[Sequence], indices: list[int]
    ) -> None:
        """Lower what may not come to -inf, in place. Added, not set: a NaN stays one."""
        some = [i for i in rows if sequences[i].params.allowed_token_ids is not None]
        if some:
            allowed = [sequences[i].params.allowed_token_ids or () for i in some]
            bans = logits.new_full((len(some), logits.shape[1]), float("-inf"))
            bans.index_put_(_places(list(range(len(some))), allowed, logits), bans.new_zeros(()))
            logits.index_add_(0, upload(some, torch.int64, logits), bans)
        ids = [forbidden(sequences[i], indices[i], self._eos_token_ids) for i in rows]
        at = _places(rows, ids, logits)
        logits.index_put_(at, logits[at] - float("inf"))


def _masked(logits: Tensor, masks: Masks) -> Tensor:
    """A copy with what grammars do not allow lowered to -inf. Added, not set: a NaN stays one."""
    words = upload(masks.bits, torch.int32, logits)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    banned = bits.view(len(masks.rows), -1)[:, : logits.shape[1]] == 0
    bans = logits.new_zeros(banned.shape).masked_fill_(banned, float("-inf"))
    return logits.index_add(0, upload(masks.rows, torch.int64, logits), bans)


def _places(
    rows: list[int], tokens: Iterable[Iterable[int]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """An index, two int64 tensors, of each of some different tokens in each of ``rows``."""
    at = [(row, token) for row, some in zip(rows, tokens, strict=True) for token in some]
    row, token = upload(at, torch.int64, like).view(-1, 2).unbind(1)
    return row, token


def _penalise(logits: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    """Apply the penalties of ``sequences`` to their rows, in place."""
    params = [seq.params for seq in sequences]
    # Copies: a view would keep the sequences from growing.
    seen = [np.unique(np.array(seq.token_ids)) for seq in sequences]
    at, lengths = _each(rows, seen, logits), [len(ids) for ids in seen]
    penalty = upload(
        np.repeat([p.repetition_penalty for p in params], lengths), torch.float32, logits
    )
    values = logits[at]
    logits.index_put_(at, torch.where(values > 0, values / penalty, values * penalty))
    output = [
        np.unique(np.array(seq.token_ids[seq.num_prompt_tokens :]), return_counts=True)
        for seq in sequences
    ]
    at, lengths = _each(rows, [ids for ids, _ in output], logits), [len(ids) for ids, _ in output]
    terms = np.repeat([(p.frequency_penalty, p.presence_penalty) for p in params], lengths, axis=0)
    frequency, presence = upload(terms, torch.float32, logits).unbind(1)
    count = upload(np.concatenate([n for _, n in output]), torch.float32, logits)
    logits.index_put_(at, logits[at] - frequency * count - presence)


def _each(rows: list[int], tokens: list[npt.NDArray[Any]], like: Tensor) -> tuple[Tensor, Tensor]:
    """The same of arrays, which may be long: those of whole prompts."""
    row = np.repeat(rows, [len(ids) for ids in tokens])
    at = np.stack([row, np.concatenate(tokens)])
    rows_at, tokens_at = upload(at, torch.int64, like).unbind(0)
    return rows_at, tokens_at


def _draw(logits: Tensor, sequences: list[Sequence], uniforms: list[float]) -> Tensor:
    """One token of each row, int64: the inverse of the cumulative weights at its uniform."""
    temperatures = [seq.params.temperature for seq in sequences]
    best = logits.amax(-1, keepdim=True)
    weights = (logits - best).div_(upload(temperatures, torch.float32, logits).unsqueeze(1)).exp_()
    filtered = [
        i
        for i, seq in enumerate(sequences)
        if seq.params.min_p or seq.params.top_k is not None or seq.params.top_p is not None
    ]
    if filtered:
        rows = upload(filtered, torch.int64, logits)
        some = weights.index_select(0, rows)
        least = _thresholds(some, [sequences[i] for i in filtered])
        weights.index_copy_(0, rows, some.masked_fill_(some < least, 0.0))
    return _inverse_cdf(weights, upload(uniforms, torch.float64, logits))


def _thresholds(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """The smallest weight of each row that min_p, top_k and top_p keep, ``[n, 1]``.

    weights: [n, vocab], the largest of a row 1.
    """
    vocab = weights.shape[1]
    params = [seq.params for seq in sequences]
    least = upload([p.min_p or 0.0 for p in params], torch.float32, weights).unsqueeze(1)
    if all(p.top_k is None and p.top_p is None for p in params):
        return least
    descending = weights.sort(-1, descending=True).values
    # All of them reach the last one.
    last = [min(vocab if p.top_k is None else p.top_k, vocab) - 1 for p in params]
    kth = descending.gather(1, upload(last, torch.int64, weights).unsqueeze(1))
    least = torch.maximum(least, kth)
    limits = [1.0 if p.top_p is None else p.top_p for p in params]
    if min(limits) >= 1.0:
        return least
    sums = descending.masked_fill(descending < least, 0.0).cumsum(-1, dtype=torch.float64)
    top_p = upload(limits, torch.float64, weights).unsqueeze(1)
    cut = (sums < top_p * sums[:, -1:]).sum(-1, keepdim=True).clamp_(max=vocab - 1)
    return torch.where(top_p < 1.0, torch.maximum(least, descending.gather(1, cut)), least)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """For each row the first token at which the running sum exceeds uniform * sum, int64.

    weights: [n, vocab] float32; uniforms: [n] float64. Sums of blocks, then inside the block that
    holds the token, as in sampler.py.
    """
    n, vocab = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocab % _BLOCK))
    blocks = padded.view(n, -1, _BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms.unsqueeze(1) * sums[:, -1:]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    chosen = blocks.gather(1, block.unsqueeze(2).expand(n, 1, _BLOCK)).squeeze(1)
    inside = _first_above(chosen.cumsum(-1, dtype=torch.float64), target - before)
    # Weights that are not numbers compare as they like.
    return (block * _BLOCK + inside).squeeze(1).clamp_(max=vocab - 1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Per row the first position with a sum above the target, at most the last term that is not
    0; int64 ``[n, 1]``. sums: [n, m], rising; target: [n, 1]."""
    above = (sums <= target).sum(-1, keepdim=True)
    return torch.minimum(above, (sums < sums[:, -1:]).sum(-1, keepdim=True))


def _logprobs(logits: Tensor, sequences: list[Sequence], token_ids: Tensor) -> _Logprobs | None:
    rows = [i for i, seq in enumerate(sequences) if seq.params.logprobs is not None]
    if not rows:
        return None
    vocab = logits.shape[1]
    counts = [min(sequences[i].params.logprobs or 0, vocab) for i in rows]
    index = upload(rows, torch.int64, logits)
    some = logits.index_select(0, index)
    total = some.logsumexp(-1, keepdim=True)
    own = some.gather(1, token_ids.index_select(0, index).unsqueeze(1)) - total
    top = some.topk(max(counts), -1)
    return _Logprobs(rows, counts, own.squeeze(1), top.values - total, top.indices)


def _sampled(arrived: list[Tensor], logprobs: _Logprobs | None) -> list[Sampled]:
    """What ``launch`` has copied to the host, as lists."""
    token_ids, valid = arrived[0].tolist(), arrived[1].tolist()
    found: dict[int, TokenLogprobs] = {}
    if logprobs is not None:
        own, values, ids = (tensor.tolist() for tensor in arrived[2:])
        for i, (row, count) in enumerate(zip(logprobs.rows, logprobs.counts, strict=True)):
            best = list(zip(ids[i][:count], values[i][:count], strict=True))
            found[row] = TokenLogprobs(token_ids[row], own[i], best)
    return [
        Sampled(token_id, found.get(row)) if ok else Sampled(None)
        for row, (token_id, ok) in enumerate(zip(token_ids, valid, strict=True))
    ]
