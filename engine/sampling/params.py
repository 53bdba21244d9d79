"""What a request asks of the engine: tokens, or a vector. Travels as it is (msgspec)."""

from collections.abc import Collection
from typing import Literal, get_args

import msgspec

from headstart.engine.errors import RequestError

MAX_LOGPROBS = 20

Pooling = Literal["last", "mean", "cls"]
"""Which hidden state stands for a prompt: its last token's, the mean of all, its first token's."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class PoolingParams(msgspec.Struct, frozen=True, tag=True):
    """The prompt's vector is wanted, and no token."""

    pooling: Pooling


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """How the next tokens of one sequence are chosen, and when it ends.

    ``temperature`` 0 is greedy. ``None`` switches a filter off. ``logprobs`` is the number of
    most likely alternatives reported beside each sampled token (0: only the token itself).
    ``seed`` fixes the random draws: draw i of a sequence depends on (seed, i) alone, never on
    what else is in the batch. ``logit_bias`` is added to the raw logits. ``min_tokens``: until so
    many have come, no token is chosen that would end the sequence. ``bad_words``: runs of tokens
    whose last one is not chosen behind the others. ``allowed_token_ids``: no others are chosen.
    ``grammar``: what the output has to follow, as text that llguidance compiles (grammar.py).
    ``prompt_logprobs`` is the number of most likely alternatives reported beside each token of the
    prompt but the first. ``prompt_progress``: how far the prompt is computed is reported, too;
    ``cache_explain``: why the cache did not have more of it. With ``max_tokens`` 0 the prompt is
    computed, and that is all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_progress: bool = False
    cache_explain: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    grammar: str | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def is_end(self, token_id: int, eos_token_ids: Collection[int]) -> bool:
        """Whether the token ends the sequence; ``eos_token_ids`` are the model's."""
        if token_id in eos_token_ids and not self.ignore_eos:
            return True
        return token_id in self.stop_token_ids

    @property
    def needs_tokens(self) -> bool:
        """Whether what may come next depends on the tokens so far."""
        if self.grammar is not None:
            return True
        return self.penalised or any(len(word) > 1 for word in self.bad_words)

    @property
    def penalised(self) -> bool:
        """Whether logits are lowered for the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def validate(self, vocab_size: int) -> None:
        """Raise RequestError, naming the field, if a value is out of its range."""
        for name, value, low, high in (
            ("max_tokens", self.max_tokens, 0, None),
            ("temperature", self.temperature, 0.0, 2.0),
            ("top_k", self.top_k, 1, None),
            ("top_p", self.top_p, None, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
        ):
            if value is None:
                continue
            # Written so that NaN fails both comparisons.
            if low is not None and not value >= low:
                raise RequestError(f"{name} must be at least {low}, got {value}", name)
            if high is not None and not value <= high:
                raise RequestError(f"{name} must be at most {high}, got {value}", name)
        if self.top_p is not None and not self.top_p > 0:
            raise RequestError(f"top_p must be above 0, got {self.top_p}", "top_p")
        if not 0 < self.repetition_penalty < float("inf"):
            raise RequestError(
                f"repetition_penalty must be above 0, got {self.repetition_penalty}",
                "repetition_penalty",
            )
        for token_id, bias in (self.logit_bias or {}).items():
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"logit_bias names token {token_id}; the vocabulary has {vocab_size}",
                    "logit_bias",
                )
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias must be in [-100, 100], got {bias}", "logit_bias")
        self._check_grammar()
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty", "allowed_token_ids")
            if self.bad_words:
                raise RequestError(
                    "allowed_token_ids and bad_words cannot be combined", "allowed_token_ids"
                )
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            *(("bad_words", word) for word in self.bad_words),
        ):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name} names token {token_id}; the vocabulary has {vocab_size}", name
                    )

    def _check_grammar(self) -> None:
        """What leaves a grammar no token, or its output no end, cannot be combined with it."""
        if self.grammar is None:
            return
        for name in ("min_tokens", "bad_words", "allowed_token_ids", "ignore_eos"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} and an answer that follows a grammar or schema cannot be combined",
                    name,
                )
