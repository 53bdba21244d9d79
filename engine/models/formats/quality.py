"""Perplexity on a fixed English text: the price of a weight format, beside its speed.

Formats are compared in pairs: most of what makes one stretch of text harder than another is the
same in both, so that a difference of 1% shows in far less text than two perplexities would need.
"""

from __future__ import annotations

import math
import statistics
from array import array
from pathlib import Path

import torch
from tokenizers import Tokenizer

from headstart.engine.batch import build_batch
from headstart.engine.models.runner import ModelRunner
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence

TEXTS = Path(__file__).parent / "text"
WINDOW = 1024
_CHUNK = 256  # rows whose logits are held at a time
_PAIRED = 64  # tokens
_TWO_SIDED = 1.96  # standard errors either side of a mean hold 95% of it


def text_tokens(folder: Path, name: str, limit: int | None = None) -> list[int]:
    """Token ids of the bundled text ``name`` under the model's own tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids[:limit]


def windows(token_ids: list[int], size: int = WINDOW) -> list[list[int]]:
    """The tokens in runs of ``size``; a last run of fewer than two tokens predicts nothing."""
    runs = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    return [run for run in runs if len(run) > 1]


def window_of(runner: ModelRunner) -> int:
    """Tokens of a window: no more than the KV pool and the model's context hold."""
    room = runner.num_pages * runner.backend.page_size
    return min(WINDOW, room, runner.decoder.config.max_position_embeddings)


def token_losses(runner: ModelRunner, token_ids: list[int]) -> list[float]:
    """-log p(token | tokens before it) of all but the first token, natural logarithm."""
    page_size = runner.backend.page_size
    pages = list(range(-(-len(token_ids) // page_size)))
    tokens = array("i", token_ids)
    seq = Sequence(0, tokens, len(tokens), SamplingParams(max_tokens=1), pages=pages)
    losses: list[float] = []
    for start in range(0, len(tokens), _CHUNK):
        count = min(_CHUNK, len(tokens) - start)
        batch = build_batch([ScheduledSequence(seq, start, count, False)], page_size)
        logits = runner.run(batch.with_all_logits())
        targets = torch.tensor(token_ids[start + 1 : start + count + 1])
        chosen = torch.log_softmax(logits[: len(targets)].double(), dim=-1)
        losses += (-chosen.gather(1, targets[:, None])[:, 0]).tolist()
    return losses


def text_losses(runner: ModelRunner, token_ids: list[int]) -> list[float]:
    """``token_losses`` in windows of WINDOW tokens, or what fits."""
    runs = windows(token_ids, window_of(runner))
    return [loss for run in runs for loss in token_losses(runner, run)]


def perplexity(losses: list[float]) -> float:
    return math.exp(math.fsum(losses) / len(losses))


def excess(losses: list[float], others: list[float]) -> tuple[float, float]:
    """The perplexity of ``losses`` over that of ``others``, token by token the same text: the ends
    of its 95% interval, by the differences of runs of _PAIRED tokens, which are independent enough.
    """
    runs = [
        math.fsum(losses[i : i + _PAIRED]) - math.fsum(others[i : i + _PAIRED])
        for i in range(0, len(losses) - _PAIRED + 1, _PAIRED)
    ]
    if len(runs) < 2:
        return 0.0, math.inf
    mean = statistics.fmean(runs) / _PAIRED
    error = _TWO_SIDED * statistics.stdev(runs) / _PAIRED / math.sqrt(len(runs))
    return math.exp(mean - error), math.exp(mean + error)
