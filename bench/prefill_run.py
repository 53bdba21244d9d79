"""PrefillRun: what is reported of one prompt, whichever way its prefill was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from headstart.engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """One prompt's prefill.

    end:          when the first token was there, seconds of ``time.perf_counter()``
    token:        the first token, greedy
    idle_s:       seconds each rank waited for others' keys and values
    sent_bytes:   bytes of keys and values each rank sent
    bounds:       where the prompt was cut: rank i computed tokens [bounds[i], bounds[i + 1])
    predicted_s:  what the time was predicted to be, seconds
    """

    end: float
    token: int
    idle_s: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    predicted_s: float | None = None


def kv_room(model_path: str, max_tokens: int) -> int:
    """Bytes of KV memory for two prompts of ``max_tokens`` tokens, in float32 even."""
    model = ModelConfig.from_folder(Path(model_path))
    token = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4
    return 2 * (max_tokens + 64) * token


class Contestant(Protocol):
    """A way to compute a prefill. ``start`` may take only what counts as time to first token."""

    def prepare(self, tokens: Sequence[int]) -> None:
        """Have the prompt where it will be needed first, and everything quiet."""
        ...

    def start(self) -> PrefillRun:
        """Compute the prompt that was prepared."""
        ...
