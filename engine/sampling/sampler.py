"""Sampler: logits of the batch's sampling rows to one token id each.

The order of operations, as in vLLM:

    logits ─> logit_bias ─> repetition, frequency, presence penalty ─> tokens that may not come
           ─> / temperature ─> min_p ─> top_k ─> top_p ─> draw

    repetition penalty            prompt and output tokens (CTRL, arXiv 1909.05858)
    frequency, presence penalty   output tokens only
    tokens that may not come      those of min_tokens, bad_words, not of allowed_token_ids, and
                                  not in the mask of the sequence's grammar
    logprobs                      log softmax of the raw logits, before everything above

Each filter keeps the tokens whose weight ``exp((logit - max) / temperature)`` reaches a threshold,
so equally likely tokens at the cut are all kept, whatever their order. The thresholds are exact:

    min_p   min_p itself: the best token has weight 1
    top_k   the k-th largest weight, by selection
    top_p   the weight at which the sum from the largest down reaches top_p of the whole. Only
            weights above (1 - top_p) * whole / count are sorted: those below add up to less than
            1 - top_p, so the cut cannot be among them

Draw i of a sequence is ``uniform(seed, i)`` through the inverse of the cumulative weights in order
of token id. It depends on seed, i and the sequence's logits alone, so neither preemption nor the
rest of the batch changes it.

Where the host does not wait for the device, device.py does the same on the device.

A row with a NaN, or whose largest logit is infinite, has no distribution: its token id is None,
and the other rows are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.engine.process.messages import TokenLogprobs
from headstart.engine.sampling.grammar import Mask, Masks
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

GREEDY_BELOW = 1e-5  # temperatures under it are greedy: float32 could not tell the difference
_BLOCK = 256  # weights summed at a time when drawing
_TILE = 1 << 20  # logits worked on at a time, 4 MB
_MASK = (1 << 64) - 1

Row = npt.NDArray[np.float32]

# What a byte of a mask says of its 8 tokens: [256, 8].
_OCTET_BANS = torch.where(
    (torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1, 0.0, float("-inf")
)


class Sampled(NamedTuple):
    """``token_id`` is None if the row's logits were not numbers."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class Sampling:
    """The tokens of one step, which may still be on their way.

    ``token_ids``: int32 ``[n]`` where the logits were, each in the vocabulary even where the
    logits were not numbers: what the next step takes its tokens from.
    """

    def __init__(self, token_ids: Tensor, finish: Callable[[], list[Sampled]]) -> None:
        self.token_ids = token_ids
        self._finish = finish

    def result(self) -> list[Sampled]:
        """Wait until they are known to the host. To be called once."""
        return self._finish()


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone (SplitMix64)."""
    return (_mix(_mix(seed) + (index + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def torch_argmax(logits: Tensor) -> list[int]:
    """Position of the largest value of each row, or of a NaN if there is one."""
    ids: list[int] = logits.argmax(-1).tolist()
    return ids


class Sampler:
    """``argmax``: a faster ``torch_argmax``; it must return the position of a NaN, too.
    ``eos_token_ids``: what ends a sequence that does not ignore them."""

    def __init__(
        self,
        vocab_size: int,
        argmax: Callable[[Tensor], list[int]] = torch_argmax,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._vocab_size = vocab_size
        self._argmax = argmax
        self._eos_token_ids = tuple(eos_token_ids)

    def launch(
        self, logits: Tensor, entries: list[ScheduledSequence], masks: Masks | None = None
    ) -> Sampling:
        """What ``DeviceSampler.launch`` is, but done when it returns; only for steps that are
        scheduled when all tokens so far are known."""
        sampled = self.sample(logits, [entry.seq for entry in entries], masks)
        token_ids = torch.tensor([each.token_id or 0 for each in sampled], dtype=torch.int32)
        return Sampling(token_ids, lambda: sampled)

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: list[Sequence], masks: Masks | None = None
    ) -> list[Sampled]:
        """The next token of each sequence.

        logits: [n, vocab] float32, on any device; left as they are. Row i is sequence i's.
        ``masks``: of what grammars allow.
        """
        checked_shape(logits, len(sequences), self._vocab_size)
        greedy, changed, drawn = [], [], []  # greedy, greedy after changes to the logits, random
        masked = dict(zip(masks.rows, masks.bits, strict=True)) if masks else {}
        for row, seq in enumerate(sequences):
            params = seq.params
            if params.temperature >= GREEDY_BELOW:
                drawn.append(row)
            elif (
                params.logit_bias
                or params.penalised
                or row in masked
                or is_restricted(params, seq.num_output_tokens)
            ):
                changed.append(row)
            else:
                greedy.append(row)
        tokens: list[int | None] = [None] * len(sequences)
        if greedy:
            rows = logits if len(greedy) == len(sequences) else logits[greedy]
            _scatter(tokens, greedy, self._greedy(rows))
        for part in self._tiles(changed):
            _scatter(tokens, part, self._greedy(self._changed(logits, part, sequences, masked)))
        for part in self._tiles(drawn):
            copy = self._changed(logits, part, sequences, masked)
            _scatter(tokens, part, self._draw(copy, [sequences[row] for row in part]))
        logprobs = self._logprobs(logits, sequences, tokens)
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def _tiles(self, rows: list[int]) -> Iterator[list[int]]:
        """The rows in runs that stay in a CPU's cache while several passes go over them."""
        n = max(1, _TILE // self._vocab_size)
        for start in range(0, len(rows), n):
            yield rows[start : start + n]

    def _greedy(self, rows: Tensor) -> list[int | None]:
        ids = self._argmax(rows)
        best = rows.gather(1, torch.tensor(ids, device=rows.device).unsqueeze(1)).squeeze(1)
        return [
            id_ if finite else None
            for id_, finite in zip(ids, best.isfinite().tolist(), strict=True)
        ]

    def _changed(
        self,
        logits: Tensor,
        rows: list[int],
        sequences: list[Sequence],
        masked: Mapping[int, Mask],
    ) -> Tensor:
        """A copy of these rows on the CPU with biases, penalties and bans applied.

        ``masked``: the masks of grammars, by row.
        """
        chosen = torch.tensor(rows, device=logits.device)
        copy = logits.index_select(0, chosen).cpu()
        for values, row in zip(copy.numpy(), rows, strict=True):
            seq = sequences[row]
            if seq.params.logit_bias:
                for token_id, bias in seq.params.logit_bias.items():
                    values[token_id] += bias
            if seq.params.penalised:
                _penalise(values, seq)
            if is_restricted(seq.params, seq.num_output_tokens):
                _restrict(values, seq, self._eos_token_ids)
        places = [i for i, row in enumerate(rows) if row in masked]
        if places:
            bits = np.stack([masked[rows[i]] for i in places])
            each = bans(bits, self._vocab_size)
            # Added, not set: a NaN stays one.
            if len(places) == len(rows):
                copy += each
            else:
                copy.index_add_(0, torch.tensor(places), each)
        return copy

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> list[int | None]:
        n, vocab = logits.shape
        best = logits.amax(-1, keepdim=True)
        # Padded to whole blocks with tokens of weight 0.
        weights = logits.new_full((n, -(-vocab // _BLOCK) * _BLOCK), float("-inf"))
        torch.sub(logits, best, out=weights[:, :vocab])
        weights.div_(torch.tensor([[seq.params.temperature] for seq in sequences])).exp_()
        finite = best.squeeze(1).isfinite().tolist()
        for row, seq, valid in zip(weights, sequences, finite, strict=True):
            threshold = _threshold(row[:vocab].numpy(), seq.params) if valid else 0.0
            if threshold > 0.0:
                # threshold keeps what is above its limit.
                below = float(np.nextafter(np.float32(threshold), np.float32(-1)))
                torch.nn.functional.threshold(row, below, 0.0, inplace=True)
        uniforms = np.array([uniform(seq.seed, seq.num_output_tokens) for seq in sequences])
        return [
            id_ if valid else None
            for id_, valid in zip(_inverse_cdf(weights, uniforms), finite, strict=True)
        ]

    def _logprobs(
        self, logits: Tensor, sequences: list[Sequence], tokens: list[int | None]
    ) -> dict[int, TokenLogprobs]:
        """By row, for the rows that want them and have a token."""
        wanted = [
            row
            for row, seq in enumerate(sequences)
            if seq.params.logprobs is not None and tokens[row] is not None
        ]
        result = {}
        for part in self._tiles(wanted):
            counts = [min(sequences[row].params.logprobs or 0, self._vocab_size) for row in part]
            rows = logits[part]
            total = rows.logsumexp(-1, keepdim=True)
            top = rows.topk(max(counts), -1)
            values, ids = (top.values - total).tolist(), top.indices.tolist()
            chosen = torch.tensor([[tokens[row]] for row in part], device=rows.device)
            own = (rows.gather(1, chosen) - total).squeeze(1).tolist()
            for i, (row, count) in enumerate(zip(part, counts, strict=True)):
                best = list(zip(ids[i][:count], values[i][:count], strict=True))
                result[row] = TokenLogprobs(int(chosen[i]), own[i], best)
        return result


def is_restricted(params: SamplingParams, num_output: int) -> bool:
    """Whether there are tokens that may not come after ``num_output`` ones."""
    return (
        num_output < params.min_tokens
        or bool(params.bad_words)
        or params.allowed_token_ids is not None
    )


def forbidden(seq: Sequence, num_output: int, eos_token_ids: tuple[int, ...]) -> list[int]:
    """Tokens that may not come after ``num_output`` ones, beside those that are not allowed at all.

    Only for sequences whose tokens are known, if ``params.needs_tokens``.
    """
    params = seq.params
    ids: list[int] = []
    if num_output < params.min_tokens:
        candidates = (*params.stop_token_ids, *eos_token_ids)
        ids += [token_id for token_id in candidates if params.is_end(token_id, eos_token_ids)]
    for word in params.bad_words:
        before = len(word) - 1
        if before <= num_output and tuple(seq.token_ids[seq.num_tokens - before :]) == word[:-1]:
            ids.append(word[-1])
    return list(dict.fromkeys(ids))


def bans(bits: Mask, vocab_size: int) -> Tensor:
    """0 for tokens that may come, -inf for others: float32 ``[rows, vocab]``, to add to logits.

    bits: int32 ``[rows, ceil(vocab / 32)]``, as in ``Masks``.
    """
    octets = torch.from_numpy(bits.view(np.uint8)).int()
    lowered = torch.nn.functional.embedding(octets, _OCTET_BANS)  # unlike numpy's take, threaded
    return lowered.view(len(bits), -1)[:, :vocab_size]


def checked_shape(logits: Tensor, n: int, vocab: int) -> None:
    """Raise ValueError unless ``logits`` is ``[n, vocab]``."""
    if logits.shape != (n, vocab):
        raise ValueError(
            f"logits {tuple(logits.shape)} for {n} sequences and a vocabulary of {vocab}"
        )


def _scatter(tokens: list[int | None], rows: list[int], ids: list[int | None]) -> None:
    for row, id_ in zip(rows, ids, strict=True):
        tokens[row] = id_


def _penalise(values: Row, seq: Sequence) -> None:
    """Apply the penalties of ``seq`` to its logits, in place."""
    params = seq.params
    # A copy: a view would keep the sequence from growing.
    tokens = np.array(seq.token_ids, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = values[tokens]
        penalty = np.float32(params.repetition_penalty)
        values[tokens] = np.where(seen > 0, seen / penalty, seen * penalty)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = np.unique(tokens[seq.num_prompt_tokens :], return_counts=True)
        values[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        values[ids] -= np.float32(params.presence_penalty)


def _restrict(values: Row, seq: Sequence, eos_token_ids: tuple[int, ...]) -> None:
    """Lower what may not come next to -inf, in place. Added, not set: a NaN stays one."""
    with np.errstate(invalid="ignore"):
        if seq.params.allowed_token_ids is not None:
            bans = np.full(len(values), -np.inf, dtype=np.float32)
            bans[list(seq.params.allowed_token_ids)] = 0.0
            values += bans
        values[forbidden(seq, seq.num_output_tokens, eos_token_ids)] -= np.inf


def _threshold(weights: Row, params: SamplingParams) -> float:
    """The smallest weight that min_p, top_k and top_p keep; 0 if they keep all.

    weights: [vocab], the largest 1.
    """
    threshold = params.min_p or 0.0
    if params.top_k is not None and params.top_k < len(weights):
        position = len(weights) - params.top_k
        threshold = max(threshold, float(np.partition(weights, position)[position]))
    if params.top_p is None or params.top_p >= 1.0:
        return threshold
    kept = weights if threshold == 0.0 else weights[weights >= np.float32(threshold)]
    total = float(kept.sum(dtype=np.float64))
    large = kept >= np.float32((1.0 - params.top_p) * total / len(kept) * 0.999)
    # Picking costs more than it saves if most weights are large.
    if np.count_nonzero(large) * 8 < len(kept):
        kept = kept[large]
    descending = np.sort(kept)[::-1]
    sums = np.cumsum(descending, dtype=np.float64)
    last = int(np.searchsorted(sums, params.top_p * total))
    return max(threshold, float(descending[min(last, len(descending) - 1)]))


def _inverse_cdf(weights: Tensor, uniforms: npt.NDArray[np.float64]) -> list[int]:
    """For each row the first token at which the running sum exceeds uniform * sum.

    weights: [n, blocks * _BLOCK], float32. Sums of blocks first, then inside the block that holds
    the token: one pass in float32, and float64 where many terms meet.
    """
    n = len(uniforms)
    blocks = weights.view(n, -1, _BLOCK)
    sums = np.cumsum(blocks.sum(-1).numpy(), axis=1, dtype=np.float64)
    target = uniforms * sums[:, -1]
    block = _first_above(sums, target)
    rows = np.arange(n)
    before = np.where(block > 0, sums[rows, block - 1], 0.0)
    inside = np.cumsum(blocks[rows, block].numpy(), axis=1, dtype=np.float64)
    ids: list[int] = (block * _BLOCK + _first_above(inside, target - before)).tolist()
    return ids


def _first_above(
    sums: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.intp]:
    """Per row the first position with a sum above the target, at most the last term that is not 0.

    sums: [n, m], rising. Rounding may put a target at the very end of its row, or past it.
    """
    above = np.count_nonzero(sums <= target[:, None], axis=1)
    last = np.argmax(sums >= sums[:, -1:], axis=1)
    first: npt.NDArray[np.intp] = np.minimum(above, last)
    return first
