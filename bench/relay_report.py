"""What bench/relay.py reports: a point of its grid, and the tables of all points."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headstart.bench.report import markdown
from headstart.bench.samples import Result


@dataclass(frozen=True, slots=True)
class Point:
    """One length of the shared prefix at one number of streams, measured on both servers.

    Every ratio is above 1 where `--relay auto` is ahead; None where a figure is missing.
    """

    prefix: int
    streams: int
    auto: Result
    off: Result

    @property
    def throughput_ratio(self) -> float | None:
        return _ratio(self.auto.output_tokens_per_s, self.off.output_tokens_per_s)

    @property
    def ttft_ratio(self) -> float | None:
        return _ratio(self.off.ttft_ms_median, self.auto.ttft_ms_median)

    @property
    def tpot_ratio(self) -> float | None:
        return _ratio(self.off.tpot_ms_median, self.auto.tpot_ms_median)

    def as_json(self, threads: int, serve_args: str) -> str:
        """The line that --out keeps: the ratios, and everything reported of each side."""
        line = {
            "benchmark": "relay",
            "prefix_tokens": self.prefix,
            "streams": self.streams,
            "threads": threads,
            "serve_args": serve_args,
            "throughput_ratio": _rounded(self.throughput_ratio),
            "ttft_ratio": _rounded(self.ttft_ratio),
            "tpot_ratio": _rounded(self.tpot_ratio),
            "auto": dataclasses.asdict(self.auto),
            "off": dataclasses.asdict(self.off),
        }
        return json.dumps(line, ensure_ascii=False)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)


def point_table(points: Sequence[Point]) -> str:
    """Every figure of every point, as a Markdown table."""
    heads = [
        "prefix", "streams", "tokens/s auto", "off", "ratio",
        "TTFT ms auto", "off", "TPOT ms auto", "off", "ratio",
    ]  # fmt: skip
    rows = [
        [
            str(point.prefix),
            str(point.streams),
            _cell(point.auto.output_tokens_per_s, 1),
            _cell(point.off.output_tokens_per_s, 1),
            _cell(point.throughput_ratio, 2),
            _cell(point.auto.ttft_ms_median, 1),
            _cell(point.off.ttft_ms_median, 1),
            _cell(point.auto.tpot_ms_median, 2),
            _cell(point.off.tpot_ms_median, 2),
            _cell(point.tpot_ratio, 2),
        ]
        for point in points
    ]
    return markdown(heads, rows)


def ratio_table(points: Sequence[Point], ratio: Callable[[Point], float | None]) -> str:
    """One ratio over the whole grid: a row per prefix, a column per number of streams."""
    found = {(point.prefix, point.streams): ratio(point) for point in points}
    prefixes = list(dict.fromkeys(prefix for prefix, _ in found))
    streams = list(dict.fromkeys(count for _, count in found))
    heads = ["prefix", *(f"{n} stream{'s' if n > 1 else ''}" for n in streams)]
    return markdown(
        heads, [[str(p), *(_cell(found.get((p, n)), 2) for n in streams)] for p in prefixes]
    )


def tables(points: Sequence[Point], title: str) -> str:
    """What the command prints."""
    parts = [
        title,
        point_table(points),
        "**Output tokens/s, auto over off**",
        ratio_table(points, lambda point: point.throughput_ratio),
        "**TPOT, off over auto**",
        ratio_table(points, lambda point: point.tpot_ratio),
    ]
    return "\n\n".join(parts)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
