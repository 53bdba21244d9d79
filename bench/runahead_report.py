"""What is kept of a measurement of KV-Runahead, and the tables made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from headstart.bench.links import parse_link
from headstart.bench.report import markdown

ALONE = ("local", "threads")
BASELINES = ("allgather", "allgather-dense")
RUNAHEAD = ("even", "searched", "predicted", "modelled")
SEARCHING = ("searched", "predicted")
METHODS = (*ALONE, *BASELINES, *RUNAHEAD)
NOT_THE_MODEL = "allgather-dense"
"""Its first token is not the model's."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One method at one point, in seconds, bytes and tokens.

    ttft_s:       of each repeat, from the start signal to the last rank's first token
    idle_s:       medians, per rank: waiting for others' keys and values
    sent_bytes:   keys and values each rank sent, in the last repeat
    bounds:       where the prompt was cut, in the last repeat
    predicted_s:  median of what the engine predicted; None where it does not
    differing:    repeats whose first token is not that of the first method
    """

    link: str
    ranks: int
    prompt_tokens: int
    method: str
    threads: int
    cores: int
    model: str
    date: str
    seed: int
    ttft_s: list[float]
    idle_s: list[float] = []
    sent_bytes: list[int] = []
    bounds: list[int] = []
    predicted_s: float | None = None
    differing: int = 0

    @property
    def ttft(self) -> float:
        """The median, seconds."""
        return statistics.median(self.ttft_s)

    @property
    def point(self) -> tuple[str, int, int]:
        return self.link, self.ranks, self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one method is than another: of medians, and of single repeats."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}–{self.most:.2f})"


def ratio(slow: Row | None, fast: Row) -> Ratio | None:
    """Above 1 where ``fast`` is; None without the other."""
    if slow is None or slow is fast:
        return None
    pairs = [a / b for a, b in zip(slow.ttft_s, fast.ttft_s, strict=True)]
    return Ratio(slow.ttft / fast.ttft, min(pairs), max(pairs))


def tables(rows: Sequence[Row]) -> str:
    """Everything that was measured, as Markdown: a table per link, then what jitter costs."""
    by = {(*row.point, row.method): row for row in rows}
    first = rows[0]
    parts = [
        f"{first.model}, ranks of {_count(first.threads, 'thread')}, "
        f"{_count(first.cores, 'core')}, {_count(len(first.ttft_s), 'repeat')}, {first.date[:10]}"
    ]
    crowded = sorted({r.ranks for r in rows if r.ranks * r.threads > r.cores})
    if crowded:
        parts.append(
            f"More threads than cores with {', '.join(map(str, crowded))} ranks: they take turns, "
            "and their times say nothing of as many machines."
        )
    for link in dict.fromkeys(row.link for row in rows):
        parts += [f"**{link}**", link_table([row for row in rows if row.link == link], by)]
    disturbed = jitter_table(rows, by)
    if disturbed:
        parts += ["**TTFT under jitter ÷ without**", disturbed]
    return "\n\n".join(parts)


def link_table(rows: Sequence[Row], by: Mapping[tuple[str, int, int, str], Row]) -> str:
    """Every figure of one link; ratios above 1: the row's method is ahead."""
    against = ("allgather", "allgather-dense", "threads", "local")
    heads = ["prompt", "ranks", "method", "TTFT ms", *(f"{name} ÷ it" for name in against)]
    heads += ["predicted ms", "idle ms", "MB sent", "cuts", "differing"]
    lines = []
    for row in rows:
        ratios = [ratio(by.get((*row.point, name)), row) for name in against]
        predicted = "–" if row.predicted_s is None else f"{1000 * row.predicted_s:.0f}"
        lines.append(
            [
                f"{row.prompt_tokens:,}",
                str(row.ranks),
                row.method,
                f"{1000 * row.ttft:.0f}",
                *("–" if r is None else str(r) for r in ratios),
                predicted,
                _listed(f"{1000 * seconds:.0f}" for seconds in row.idle_s),
                _listed(f"{count / 1e6:.1f}" for count in row.sent_bytes),
                _listed(map(str, row.bounds[1:-1])),
                str(row.differing or "–"),
            ]
        )
    return markdown(heads, lines)


def jitter_table(rows: Sequence[Row], by: Mapping[tuple[str, int, int, str], Row]) -> str | None:
    """How many times longer each method takes on a link others use, too; None without one."""
    slower: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        quiet = by.get((parse_link(row.link).quiet, row.ranks, row.prompt_tokens, row.method))
        if quiet is not None and quiet is not row:
            slower.setdefault(row.point, {})[row.method] = row.ttft / quiet.ttft
    if not slower:
        return None
    methods = [m for m in METHODS if any(m in found for found in slower.values())]
    return markdown(
        ["link", "prompt", "ranks", *methods],
        [
            [
                parse_link(link).quiet,
                f"{tokens:,}",
                str(ranks),
                *(f"{found[m]:.3f}" if m in found else "–" for m in methods),
            ]
            for (link, ranks, tokens), found in slower.items()
        ],
    )


def _listed(values: Iterable[str]) -> str:
    return " ".join(values) or "–"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"
