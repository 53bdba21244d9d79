"""Sampler: logits of the batch's sampling rows to one token id each.

The order of operations, as in vLLM:

    logits ─> logit_bias ─> repetition, frequency, presence penalty ─> tokens that may not come
           ─> / temperature ─> min_p ─> top_k ─> top_p ─> draw

    repetition penalty            prompt and output tokens (CTRL, arXiv 1909.05858)
    frequency, presence penalty   output tokens only
    tokens that may not come      those of min_tokens, bad_words, not of allowed_token_ids, and
                                  not in the mask of the sequence's grammar
    logprobs                      log softmax of the raw logits, before everything above

What is behind / temperature is one operation of the backend (``sample``; kernels/reference.py says
what the filters keep). Draw i of a sequence is ``uniform(seed, i)`` through the inverse of the
cumulative weights in order of token id. It depends on seed, i and the sequence's logits alone, so
neither preemption nor the rest of the batch changes it.

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
from headstart.kernels.backend import Chooser, Draws
from headstart.kernels.reference import ReferenceBackend

GREEDY_BELOW = 1e-5  # temperatures under it are greedy: float32 could not tell the difference
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


class Sampler:
    """``backend``: what chooses; without one, the reference.
    ``eos_token_ids``: what ends a sequence that does not ignore them."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        backend: Chooser | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._backend = backend or ReferenceBackend(page_size=1)
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
        masked = dict(zip(masks.rows, masks.bits, strict=True)) if masks else {}
        here = logits.device.type == "cpu" and logits.is_contiguous()
        # By whether a copy of the logits is changed first, and whether the token is drawn.
        kinds: dict[tuple[bool, bool], list[int]] = {}
        edits: list[_Edit] = []
        for row, seq in enumerate(sequences):
            params = seq.params
            copied = row in masked or params.allowed_token_ids is not None
            if not copied and is_changed(seq):
                if here:
                    edits.append(_Edit(logits[row].numpy(), seq, self._eos_token_ids))
                else:
                    copied = True
            kinds.setdefault((copied, params.temperature >= GREEDY_BELOW), []).append(row)
        tokens: list[int | None] = [None] * len(sequences)
        try:
            for (copied, drawn), rows in kinds.items():
                for part in self._tiles(rows) if copied else (rows,):
                    source, places = logits, part
                    if copied:
                        source = self._changed(logits, part, sequences, masked)
                        places = list(range(len(part)))
                    if drawn:
                        chosen = self._drawn(source, places, [sequences[row] for row in part])
                    else:
                        whole = len(places) == len(source)
                        chosen = self._greedy(source if whole else source[places])
                    _scatter(tokens, part, chosen)
        finally:
            for edit in edits:
                edit.undo()
        logprobs = self._logprobs(logits, sequences, tokens)
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def _tiles(self, rows: list[int]) -> Iterator[list[int]]:
        """The rows in runs that stay in a CPU's cache while several passes go over them."""
        n = max(1, _TILE // self._vocab_size)
        for start in range(0, len(rows), n):
            yield rows[start : start + n]

    def _greedy(self, rows: Tensor) -> list[int | None]:
        ids = self._backend.argmax(rows)
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
            _Edit(values, seq, self._eos_token_ids)
            if seq.params.allowed_token_ids is not None:
                others = np.full(len(values), -np.inf, dtype=np.float32)
                others[list(seq.params.allowed_token_ids)] = 0.0
                with np.errstate(invalid="ignore"):
                    values += others
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

    def _drawn(
        self, logits: Tensor, places: list[int], sequences: list[Sequence]
    ) -> list[int | None]:
        """Tokens drawn from these rows of ``logits``, one for each sequence."""
        params = [seq.params for seq in sequences]
        tokens = self._backend.sample(
            logits,
            Draws(
                rows=np.array(places),
                temperature=np.array([p.temperature for p in params]),
                min_p=np.array([p.min_p or 0.0 for p in params]),
                top_k=np.array([p.top_k or self._vocab_size for p in params]),
                top_p=np.array([1.0 if p.top_p is None else p.top_p for p in params]),
                uniform=np.array([uniform(seq.seed, seq.num_output_tokens) for seq in sequences]),
            ),
        )
        return [None if token < 0 else token for token in tokens]

    def _logprobs(
        self, logits: Tensor, sequences: list[Sequence], tokens: list[int | None]
    ) -> dict[int, TokenLogprobs]:
        """By row, for the rows that want them and have a token."""
        wanted = [
            row
            for row, seq in enumerate(sequences)
            if seq.params.logprobs is not None and tokens[row] is not None
        ]
        result: dict[int, TokenLogprobs] = {}
        if not wanted:
            return result
        counts = [min(sequences[row].params.logprobs or 0, self._vocab_size) for row in wanted]
        ids, values, total = self._backend.top(logits, wanted, max(counts))
        own = logits[wanted, [tokens[row] or 0 for row in wanted]].float().cpu().numpy() - total
        values -= total[:, None]
        for i, (row, count) in enumerate(zip(wanted, counts, strict=True)):
            best = list(zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True))
            result[row] = TokenLogprobs(tokens[row] or 0, float(own[i]), best)
        return result


class _Edit:
    """The biases, penalties and bans of ``seq`` in its logits ``values``, until they are undone.

    They change few tokens of a large vocabulary: those are put back, and no copy is made.
    """

    def __init__(self, values: Row, seq: Sequence, eos_token_ids: tuple[int, ...]) -> None:
        params, self._values = seq.params, values
        biased = list(params.logit_bias or ())
        # A copy: a view would keep the sequence from growing.
        seen = np.array(seq.token_ids if params.penalised else (), dtype=np.int64)
        banned = forbidden(seq, seq.num_output_tokens, eos_token_ids)
        self._ids = np.concatenate([np.array(biased, np.int64), seen, np.array(banned, np.int64)])
        self._before = values[self._ids]
        for token_id, bias in (params.logit_bias or {}).items():
            values[token_id] += bias
        if params.penalised:
            _penalise(values, seen, seq)
        with np.errstate(invalid="ignore"):
            values[banned] -= np.inf  # not set: a NaN stays one

    def undo(self) -> None:
        self._values[self._ids] = self._before


def is_changed(seq: Sequence) -> bool:
    """Whether some of its logits are changed before a token is chosen."""
    params = seq.params
    return (
        bool(params.logit_bias) or params.penalised or is_restricted(params, seq.num_output_tokens)
    )


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


def _penalise(values: Row, tokens: npt.NDArray[np.int64], seq: Sequence) -> None:
    """Apply the penalties of ``seq``, whose tokens these are, to its logits, in place."""
    params = seq.params
    if params.repetition_penalty != 1.0:
        seen = values[tokens]
        penalty = np.float32(params.repetition_penalty)
        values[tokens] = np.where(seen > 0, seen / penalty, seen * penalty)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = np.unique(tokens[seq.num_prompt_tokens :], return_counts=True)
        values[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        values[ids] -= np.float32(params.presence_penalty)
