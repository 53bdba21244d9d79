"""Plots: both files are written, the same bytes for the same data, and say what they show."""

import math
import re
from pathlib import Path

from headstart.bench import peers_plot
from headstart.bench.plots import attention_plot

ROWS = [
    {
        "batch": batch,
        "prefix": prefix,
        "plain_ms": batch * prefix / 1000,
        "relay_ms": (prefix + batch * 64) / 1000,
        "auto_ms": 1.0,
        "ratio": 1.0,
        "auto_relay": batch > 1,
    }
    for prefix in (64, 2048)
    for batch in (1, 2, 8)
]


def test_attention_plot(tmp_path: Path) -> None:
    svg, png = attention_plot(tmp_path / "new", "attention", "The title", ROWS)
    assert (svg.name, png.name) == ("attention.svg", "attention.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 10_000
    text = svg.read_text()
    # Glyphs are outlines; matplotlib keeps each text as a comment.
    for words in ("The title", "prefix 2048", "auto: relay", "batch (sequences"):
        assert f"<!-- {words}" in text
    assert "<dc:date>" not in text
    first = svg.read_bytes(), png.read_bytes()
    attention_plot(tmp_path / "new", "attention", "The title", ROWS)
    assert (svg.read_bytes(), png.read_bytes()) == first


def test_a_missing_figure_leaves_a_gap(tmp_path: Path) -> None:
    rows = [{**row, "plain_ms": math.nan} if row["batch"] == 2 else row for row in ROWS]
    svg, png = attention_plot(tmp_path, "gap", "The title", rows)
    assert min(svg.stat().st_size, png.stat().st_size) > 5_000


def test_the_first_page_has_the_plot_of_the_results(tmp_path: Path) -> None:
    """docs/peers.svg is what the command draws of bench/results/peers.csv."""
    root = Path(__file__).parents[2]
    results = root / "bench" / "results" / "peers.csv"
    assert peers_plot.main(["--results", str(results), "--out", str(tmp_path)]) == 0
    texts = [
        sorted(re.findall(r"<!-- (.*?) -->", (folder / "peers.svg").read_text()))
        for folder in (tmp_path, root / "docs")
    ]
    assert texts[0] == texts[1]
    assert {"5.23", "1.93", "AVX2 only (Zen 3)"} <= set(texts[0])
