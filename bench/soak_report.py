"""What a soak test has to show, decided from what it has seen: no server, no clock."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.bench.soak_load import Outcome

GOODPUT_SHARE = 0.9
"""Of the closed loop's, what has to be left at overload."""
REJECTED_SECONDS = 0.020
"""In which 99 of 100 refusals have to be there, seen by the client."""
GROWTH, GROWTH_BYTES = 0.02, 16e6
"""A process may grow by so much in the second half: a share of its size, and bytes."""
FEWEST = 20
"""Outcomes from which a share or a percentile is taken."""


@dataclass(frozen=True, slots=True)
class Phase:
    """``outcomes`` of requests that came from ``begin`` to ``end``, by the clock of theirs."""

    name: str
    begin: float
    end: float
    outcomes: Sequence[Outcome]

    def of(self, kind: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == kind]

    @property
    def settled(self) -> float:
        """From when on it is measured: places and the queue have filled by then."""
        return self.begin + (self.end - self.begin) / 5

    def rate(self, kind: str) -> float:
        """So many a second, of those that ended while others came."""
        return self._a_second(len(self.measured(kind)))

    @property
    def goodput(self) -> float:
        """Tokens a second, of answers that came whole."""
        return self._a_second(sum(outcome.tokens for outcome in self.measured("answered")))

    def measured(self, kind: str) -> list[Outcome]:
        """Those that ended while it was measured."""
        return [one for one in self.of(kind) if self.settled <= one.ended <= self.end]

    def _a_second(self, count: int) -> float:
        return count / max(self.end - self.settled, 1e-9)

    def report(self) -> dict[str, Any]:
        """Figures to print."""
        kinds = Counter(outcome.kind for outcome in self.outcomes)
        answered = [outcome.seconds for outcome in self.of("answered")]
        return {
            "seconds": round(self.end - self.begin, 1),
            "outcomes": dict(sorted(kinds.items())),
            "answers_per_s": round(self.rate("answered"), 3),
            "goodput_tokens_per_s": round(self.goodput, 2),
            "answer_s_median": round(statistics.median(answered), 3) if answered else None,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that ``share`` of them do not exceed; ValueError without any."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def growth(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(bytes at the beginning, bytes grown) over the second half of (seconds, bytes), by a line
    fitted to it; ValueError for fewer than two."""
    if len(samples) < 2:
        raise ValueError("a line needs two points")
    middle = (samples[0][0] + samples[-1][0]) / 2
    later = [sample for sample in samples if sample[0] >= middle]
    if len(later) < 2:
        later = list(samples[-2:])
    times, sizes = zip(*later, strict=True)
    slope, intercept = statistics.linear_regression(times, sizes)
    return intercept + slope * times[0], slope * (times[-1] - times[0])


def judge(
    capacity: Phase, overload: Phase, memory: Mapping[str, Sequence[tuple[float, float]]]
) -> tuple[dict[str, Any], list[str]]:
    """Figures to print, and what is not as it has to be, in words."""
    wrong = [
        f"{phase.name}: a request that was let in is lost: {outcome.reason}"
        for phase in (capacity, overload)
        for outcome in phase.of("lost")
    ]
    figures: dict[str, Any] = {
        "capacity": capacity.report(),
        "overload": overload.report() | {"offered_per_s": _offered(overload)},
    }
    if min(len(phase.measured("answered")) for phase in (capacity, overload)) < FEWEST:
        wrong.append(
            f"fewer than {FEWEST} answers in a phase: goodput cannot be told; more --minutes"
        )
    else:
        share = overload.goodput / capacity.goodput if capacity.goodput else 0.0
        figures["goodput_share"] = round(share, 3)
        if share < GOODPUT_SHARE:
            wrong.append(f"goodput at overload is {share:.2f} of the peak, not {GOODPUT_SHARE}")
    refused = [outcome.seconds for outcome in overload.of("refused")]
    if len(refused) < FEWEST:
        wrong.append(f"{len(refused)} requests were refused: that is no overload; more --minutes")
    else:
        late = percentile(refused, 0.99)
        figures["refused_ms"] = {
            "median": round(1000 * statistics.median(refused), 2),
            "p99": round(1000 * late, 2),
        }
        if late > REJECTED_SECONDS:
            wrong.append(
                f"refusals took {1000 * late:.0f} ms (p99), not {1000 * REJECTED_SECONDS:.0f}"
            )
    figures["memory_mb"] = {}
    for name, samples in memory.items():
        size, grown = growth(samples)
        figures["memory_mb"][name] = {"size": round(size / 1e6, 1), "grown": round(grown / 1e6, 2)}
        if grown > GROWTH * size + GROWTH_BYTES:
            wrong.append(f"the {name} process grew by {grown / 1e6:.0f} MB in the second half")
    return figures, wrong


def _offered(phase: Phase) -> float:
    return round(len(phase.outcomes) / max(phase.end - phase.begin, 1e-9), 3)
