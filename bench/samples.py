"""What is measured of one request (Sample), and what is reported of many (Result).

    sent        first                                last
     |           |----|----|----|----|----|----|----|        times of the output events
     |-- TTFT ---|
                 |---------- (n - 1) * TPOT ---------|        n output tokens

All times are seconds on one monotonic clock. Medians and percentiles are over requests.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headstart.bench.prompts import Messages


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `times` holds the arrival of each piece of output, first to last.

    `error` says what went wrong; such a sample counts as an error and in nothing else.
    `cached_tokens` is None where the target does not report it.
    """

    sent: float
    times: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Burst:
    """The requests of one repetition, and the share of one CPU the load generator took itself."""

    samples: Sequence[Sample]
    client_cpu_share: float | None = None

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    def output_rate(self) -> float | None:
        """Output tokens per second over the whole run: first request sent to last token."""
        good = self.good
        if not good:
            return None
        wall = max(s.times[-1] for s in good) - min(s.sent for s in good)
        return sum(s.output_tokens for s in good) / wall if wall > 0 else None

    def decode_rate(self) -> float | None:
        """Output tokens per second while every request decodes.

        The window opens when the last request has its first token and closes when the first one
        has its last; None if there is no such window. Each piece of output counts as the
        request's tokens per piece.
        """
        good = self.good
        if not good or any(s.output_tokens < 2 for s in good):
            return None
        start, end = max(s.times[0] for s in good), min(s.times[-1] for s in good)
        if end <= start:
            return None
        tokens = sum(
            sum(start < t <= end for t in s.times) * s.output_tokens / len(s.times) for s in good
        )
        return tokens / (end - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One reported line; the field names are the keys of the JSON."""

    target: str
    model: str
    workload: str
    date: str
    seed: int
    streams: int
    repetitions: int
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    ttft_ms_median: float | None
    ttft_ms_p95: float | None
    tpot_ms_median: float | None
    tpot_ms_p95: float | None
    output_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    client_cpu_share: float | None
    error: str | None = None
    notes: list[str] = field(default_factory=list)


class Target(Protocol):
    """An engine under test, addressed with conversations."""

    @property
    def name(self) -> str:
        """What the result lines call it."""
        ...

    @property
    def model(self) -> str: ...

    async def count(self, messages: Messages) -> int:
        """Prompt tokens of this conversation as the engine counts them."""
        ...

    async def burst(self, conversations: list[Messages], output_tokens: int) -> Burst:
        """Send all conversations at once; wait for exactly `output_tokens` of each."""
        ...


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def summarise(
    bursts: Sequence[Burst],
    *,
    target: Target,
    workload: str,
    streams: int,
    seed: int,
    date: str,
    notes: Sequence[str] = (),
) -> Result:
    """One line for the repetitions of a workload; rates are medians over repetitions."""
    samples = [sample for burst in bursts for sample in burst.samples]
    good = [sample for sample in samples if sample.error is None]
    ttft = [sample.ttft * 1e3 for sample in good]
    tpot = [value * 1e3 for sample in good if (value := sample.tpot) is not None]
    cached = [s.cached_tokens for s in good if s.cached_tokens is not None]
    return Result(
        target=target.name,
        model=target.model,
        workload=workload,
        date=date,
        seed=seed,
        streams=streams,
        repetitions=len(bursts),
        requests=len(samples),
        errors=len(samples) - len(good),
        prompt_tokens=round(_median([s.prompt_tokens for s in good]) or 0),
        cached_tokens=round(statistics.median(cached)) if cached else None,
        output_tokens=sum(s.output_tokens for s in good),
        ttft_ms_median=_round(_median(ttft), 2),
        ttft_ms_p95=_round(percentile(ttft, 0.95), 2),
        tpot_ms_median=_round(_median(tpot), 3),
        tpot_ms_p95=_round(percentile(tpot, 0.95), 3),
        output_tokens_per_s=_round(
            _median([rate for b in bursts if (rate := b.output_rate()) is not None]), 1
        ),
        decode_tokens_per_s=_round(
            _median([rate for b in bursts if (rate := b.decode_rate()) is not None]), 1
        ),
        client_cpu_share=_round(
            _median([b.client_cpu_share for b in bursts if b.client_cpu_share is not None]), 3
        ),
        error=next((s.error for s in samples if s.error is not None), None),
        notes=list(notes),
    )
