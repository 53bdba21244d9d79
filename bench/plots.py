"""Plots of measurements, as SVG and PNG. The one module that imports matplotlib.

Figures are drawn without pyplot, so nothing is shown and no state is shared; equal data give
equal files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from headstart.bench.runahead_report import ALONE, BASELINES, Row

if TYPE_CHECKING:
    from headstart.bench.relay_report import Point
    from headstart.bench.samples import Result

DPI = 150
GREY = "0.45"
WIDTH = 1.8  # points, like MARKER
MARKER = 4.5
SMOOTH = 8  # steps

Colour = tuple[float, float, float, float]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.svg and NAME.png; the same figure gives the same bytes, whenever it is drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=DPI)
    return [svg, png]


def relay_plots(folder: Path, title: str, points: Sequence[Point]) -> list[Path]:
    """relay-throughput and relay-latency: each a ratio and the figures behind it, over prefix."""
    throughput = _relay_figure(
        points,
        f"RelayAttention, throughput\n{title}",
        ratio=lambda point: point.throughput_ratio,
        ratio_label="output tokens/s, relay auto ÷ off",
        figure_of=lambda result: result.output_tokens_per_s,
        label="output tokens/s",
    )
    latency = _relay_figure(
        points,
        f"RelayAttention, latency\n{title}",
        ratio=lambda point: point.tpot_ratio,
        ratio_label="TPOT, relay off ÷ auto",
        figure_of=lambda result: result.tpot_ms_median,
        label="TPOT, median (ms)",
    )
    return save(throughput, folder, "relay-throughput") + save(latency, folder, "relay-latency")


def _relay_figure(
    points: Sequence[Point],
    title: str,
    *,
    ratio: Callable[[Point], float | None],
    ratio_label: str,
    figure_of: Callable[[Result], float | None],
    label: str,
) -> Figure:
    """The ratio on the left, the figures on the right: a colour per number of streams."""
    figure, (left, right) = _panels(title, 2)
    colours = _colours([point.streams for point in points])
    for streams, colour in colours.items():
        line = sorted((p for p in points if p.streams == streams), key=lambda p: p.prefix)
        prefixes = [point.prefix for point in line]
        _draw(left, prefixes, [ratio(p) for p in line], colour)
        _draw(right, prefixes, [figure_of(p.auto) for p in line], colour)
        _draw(right, prefixes, [figure_of(p.off) for p in line], colour, dashed=True)
    _mark_parity(left)
    # From zero, so that no gain looks larger than it is.
    left.set_ylim(bottom=0.0)
    left.set_ylabel(ratio_label)
    left.set_title("above 1: relay auto is ahead", fontsize=10, color=GREY)
    right.set_yscale("log")
    _ticks_in_view(right, [n * 10.0**power for power in range(-1, 7) for n in (1, 2, 5)])
    right.set_ylabel(label)
    right.set_title("what the ratio is made of", fontsize=10, color=GREY)
    for axes in (left, right):
        axes.set_xlabel("shared prefix (tokens)")
        _measured_ticks(axes, [point.prefix for point in points])
    lines = [_key(f"{n} stream{'s' if n > 1 else ''}", color=c) for n, c in colours.items()]
    styles = [
        _key("relay auto", color=GREY, marker="o", markersize=MARKER),
        _key("relay off", color=GREY, marker="o", markerfacecolor="white", linestyle="--"),
    ]
    _legend(figure, [*lines, *styles])
    return figure


def attention_plot(
    folder: Path, name: str, title: str, rows: Sequence[Mapping[str, float]]
) -> list[Path]:
    """Speed-up of attention over batch size, a line per prefix length; writes NAME.svg and .png.

    Each row is a measurement with the keys batch, prefix, plain_ms, relay_ms, auto_ms, ratio and
    auto_relay (whether `auto` chose relay: drawn as a filled marker).
    """
    figure, (axes,) = _panels(title, 1)
    colours = _colours([int(row["prefix"]) for row in rows])
    for prefix, colour in colours.items():
        line = sorted((r for r in rows if r["prefix"] == prefix), key=lambda row: row["batch"])
        batches = [row["batch"] for row in line]
        speed_ups = [row["plain_ms"] / row["relay_ms"] for row in line]
        axes.plot(batches, speed_ups, color=colour, linewidth=WIDTH, zorder=2)
        axes.scatter(
            batches,
            speed_ups,
            s=(MARKER + 1.5) ** 2,
            facecolors=[colour if row["auto_relay"] else "white" for row in line],
            edgecolors=[colour],
            linewidths=1.5,
            zorder=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    _mark_parity(axes)
    _ticks_in_view(axes, [2.0**power for power in range(-4, 12)])
    _measured_ticks(axes, [row["batch"] for row in rows])
    axes.set_xlabel("batch (sequences that share the prefix)")
    axes.set_ylabel("speed-up of attention, plain ÷ relay")
    axes.set_title("above 1: relay is ahead", fontsize=10, color=GREY)
    lines = [_key(f"prefix {n}", color=c) for n, c in colours.items()]
    marks = [
        _key("auto: relay", color=GREY, marker="o", linestyle="none"),
        _key("auto: plain", color=GREY, marker="o", markerfacecolor="white", linestyle="none"),
    ]
    _legend(figure, [*lines, *marks])
    return save(figure, folder, name)


def segments_plot(
    folder: Path,
    title: str,
    chance: float,
    losses: Mapping[str, Sequence[Sequence[float]]],
    accuracy: Mapping[str, tuple[Sequence[float], float, float]],
) -> list[Path]:
    """segments: how training went on the left, held-out accuracy on the right.

    ``losses`` per mask: those of every step, a row per seed, drawn as means of `SMOOTH` steps.
    ``accuracy`` per way of serving: that of every seed, and the ends of the interval of the mean.
    """
    figure, (left, right) = _panels(title, 2)
    colours = dict(zip(accuracy, _colours(range(len(accuracy))).values(), strict=True))
    for mask, rows in losses.items():
        for row in rows:
            ends = range(SMOOTH, len(row) + 1, SMOOTH)
            means = [sum(row[end - SMOOTH : end]) / SMOOTH for end in ends]
            left.plot(ends, means, color=colours[mask], linewidth=WIDTH, alpha=0.8)
    left.set_ylim(bottom=0.0)
    left.set_xlabel("step")
    left.set_ylabel(f"training loss, means of {SMOOTH} steps")
    left.set_title("a line per seed", fontsize=10, color=GREY)
    for place, (name, (seeds, low, high)) in enumerate(accuracy.items()):
        mean = sum(seeds) / len(seeds)
        right.bar(place, mean, color=colours[name], width=0.6)
        right.plot([place, place], [low, high], color="black", linewidth=1.2)
        right.scatter(
            [place] * len(seeds), seeds, s=20, color="white", edgecolors="black", zorder=3
        )
    right.axhline(chance, color=GREY, linestyle="--", linewidth=1.2)
    right.set_ylim(0.0, 1.0)
    right.set_xticks([])
    right.set_ylabel("held-out accuracy, served")
    right.set_title("dots: seeds; line: 95%; dashed: chance", fontsize=10, color=GREY)
    _legend(figure, [_key(name, color=colour) for name, colour in colours.items()])
    return save(figure, folder, "segments")


def peers_plot(
    folder: Path, workloads: Sequence[str], ratios: Mapping[str, Mapping[str, float]]
) -> list[Path]:
    """peers: a bar for each workload and machine, from 1 to how many times better headstart is.

    ``ratios`` per machine: those of the workloads that were measured there.
    """
    figure = Figure(
        figsize=(8.6, 0.31 * len(workloads) * max(len(ratios), 2) + 1.3), layout="constrained"
    )
    figure.set_facecolor("white")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    height = 0.8 / len(ratios)
    colours = dict(zip(ratios, ("#2a6f97", "#e07a1f", "#8a5a9e"), strict=False))
    for place, (machine, measured) in enumerate(ratios.items()):
        for row, name in enumerate(workloads):
            if name not in measured:
                continue
            ratio = measured[name]
            y = row + (place - (len(ratios) - 1) / 2) * height
            axes.barh(y, ratio - 1, left=1, height=height, color=colours[machine])
            ahead = ratio >= 1
            axes.annotate(
                f"{ratio:.2f}",
                (ratio, y),
                xytext=(3 if ahead else -3, 0),
                textcoords="offset points",
                ha="left" if ahead else "right",
                va="center",
                fontsize=9 if len(ratios) < 3 else 8,
            )
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xlim(0.16, 8)
    _plain_ticks(axes, [0.25, 0.5, 1, 2, 4])
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlabel("◂ OpenVINO GenAI is ahead    ratio, in one run    headstart is ahead ▸")
    handles = [_key(name, color=colour, linewidth=7.0) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return save(figure, folder, "peers")


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def runahead_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Per number of ranks: runahead-ttft-N, runahead-ratio-N and runahead-idle-N, over the prompt.

    A panel per link, a line per method; those that do not run ahead are dashed.
    """
    paths = []
    for ranks in sorted({row.ranks for row in rows}):
        mine = [row for row in rows if row.ranks == ranks]
        for name, figure in _runahead_figures(mine, f"{rows[0].model}, ranks: {ranks}"):
            paths += save(figure, folder, f"runahead-{name}-{ranks}")
    return paths


def _runahead_figures(rows: Sequence[Row], about: str) -> Iterator[tuple[str, Figure]]:
    """The figures of one number of ranks, by name; those without data are left out."""
    title = f"Time to first token\n{about}"
    yield "ttft", _runahead_figure(rows, title, "ms", lambda row: 1000 * row.ttft)
    baseline = {row.point: row.ttft for row in rows if row.method == "allgather"}
    if baseline:
        figure = _runahead_figure(
            rows,
            f"TTFT against all-gather with causal attention; above 1: ahead\n{about}",
            "all-gather ÷ method",
            lambda row: baseline.get(row.point, math.nan) / row.ttft,
        )
        for axes in figure.axes:
            _mark_parity(axes)
        yield "ratio", figure
    moving = [row for row in rows if row.sent_bytes]
    if moving:
        figure = _runahead_figure(
            moving,
            f"What all ranks together wait for one another, and send\n{about}",
            "seconds waiting",
            lambda row: sum(row.idle_s),
            last=("MB sent", lambda row: sum(row.sent_bytes) / 1e6),
        )
        yield "idle", figure


def _runahead_figure(
    rows: Sequence[Row],
    title: str,
    label: str,
    figure_of: Callable[[Row], float],
    last: tuple[str, Callable[[Row], float]] | None = None,
) -> Figure:
    """A panel per link of one figure; ``last`` adds a panel of another one, on the first link."""
    links = list(dict.fromkeys(row.link for row in rows))
    panels = [(link, label, figure_of, link) for link in links]
    if last is not None:
        panels.append((links[0], *last, "on any link"))
    figure, each = _panels(title, len(panels), columns=3)
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = dict(zip(methods, _colours(range(len(methods))).values(), strict=True))
    for axes, (link, y_label, value_of, name) in zip(each, panels, strict=True):
        here = [row for row in rows if row.link == link]
        for method in methods:
            line = sorted((r for r in here if r.method == method), key=lambda r: r.prompt_tokens)
            lengths = [row.prompt_tokens for row in line]
            values = [value_of(row) for row in line]
            _draw(axes, lengths, values, colours[method], dashed=method in (*ALONE, *BASELINES))
        axes.set_xscale("log", base=2)
        _measured_ticks(axes, [row.prompt_tokens for row in here])
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("prompt (tokens)")
        axes.set_ylabel(y_label)
        axes.set_title(name, fontsize=10, color=GREY)
    _legend(
        figure,
        [
            _key(m, color=c, linestyle="--" if m in (*ALONE, *BASELINES) else "-")
            for m, c in colours.items()
        ],
    )
    return figure


def _panels(title: str, count: int, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with a title over `count` panels, `columns` (else all) side by side, on a grid."""
    across = min(count, columns or count)
    down = -(-count // across)
    size = (1.8 + 4.6 * across, 4.6 * down)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    axes = [figure.add_subplot(down, across, i + 1) for i in range(count)]
    for panel in axes:
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(values: Sequence[int]) -> dict[int, Colour]:
    """A colour for each different value, the largest first and darkest."""
    ordered = sorted(set(values))
    colour_map = matplotlib.colormaps["viridis_r"]
    # The palest sixth is hard to see on white.
    step = (5 / 6) / max(1, len(ordered) - 1)
    return {value: colour_map(1.0 - step * i) for i, value in enumerate(reversed(ordered))}


def _draw(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float | None],
    colour: Colour,
    *,
    dashed: bool = False,
) -> None:
    """A line through measured points; no line goes to a figure that is missing."""
    axes.plot(
        x,
        [math.nan if value is None else value for value in y],
        color=colour,
        marker="o",
        markersize=MARKER,
        markerfacecolor="white" if dashed else colour,
        linestyle="--" if dashed else "-",
        linewidth=WIDTH,
    )


def _mark_parity(axes: Axes) -> None:
    """A dashed line at 1, where both sides are equal."""
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, zorder=1)


def _measured_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks where something was measured, as plain numbers."""
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _ticks_in_view(axes: Axes, ticks: Sequence[float]) -> None:
    """Those of `ticks` that the logarithmic y axis covers, as plain numbers instead of powers."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, entries: Sequence[Line2D]) -> None:
    """Beside the panels, where it hides nothing."""
    figure.legend(handles=entries, loc="outside right center", frameon=False, handlelength=3.0)


def _key(label: str, **style: object) -> Line2D:
    """An entry of the legend."""
    return Line2D([], [], label=label, **{"linewidth": WIDTH, **style})  # type: ignore[arg-type]
