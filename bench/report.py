"""Results for people: one table row as each workload ends, on stderr, and Markdown tables."""

import sys
from collections.abc import Sequence

from headstart.bench.samples import Result

_COLUMNS = (
    ("workload", 16),
    ("target", 10),
    ("prompt", 7),
    ("cached", 7),
    ("TTFT ms", 10),
    ("p95", 9),
    ("TPOT ms", 8),
    ("out tok/s", 10),
    ("decode", 8),
    ("errors", 7),
    ("client", 7),
)


def print_header() -> None:
    """Column names; the columns are described in bench/README.md."""
    print(_row([name for name, _ in _COLUMNS]), file=sys.stderr, flush=True)


def print_result(result: Result) -> None:
    """One row, then a line for the first error and for every note."""
    share = result.client_cpu_share
    cells = [
        result.workload,
        result.target,
        str(result.prompt_tokens),
        "-" if result.cached_tokens is None else str(result.cached_tokens),
        _number(result.ttft_ms_median, 1),
        _number(result.ttft_ms_p95, 1),
        _number(result.tpot_ms_median, 2),
        _number(result.output_tokens_per_s, 1),
        _number(result.decode_tokens_per_s, 1),
        f"{result.errors}/{result.requests}",
        "-" if share is None else f"{share:.0%}",
    ]
    print(_row(cells), file=sys.stderr, flush=True)
    if result.error is not None:
        print(f"    first error: {result.error}", file=sys.stderr)
    for note in result.notes:
        print(f"    note: {note}", file=sys.stderr)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(cells: list[str]) -> str:
    first, *rest = zip(cells, (width for _, width in _COLUMNS), strict=True)
    return first[0].ljust(first[1]) + "".join(cell.rjust(width + 1) for cell, width in rest)


def print_comparison(rows: list[tuple[str, str, list[Result]]]) -> None:
    """Headline figures side by side: (workload, field of Result, one result per target).

    A ratio says how many times better the first target is than each of the others: above 1 it is
    ahead, whether the figure is a time (less is better) or a rate (more is better).
    """
    names = [result.target for result in rows[0][2]]
    heads = [*names, *(f"/{name}" for name in names[1:])]
    print(
        f"\n{'workload':16}{'figure':22}" + "".join(f"{head:>12}" for head in heads),
        file=sys.stderr,
    )
    for workload, field, results in rows:
        values: list[float | None] = [getattr(result, field) for result in results]
        cells = [_number(value, 2) for value in values]
        first = values[0]
        for value in values[1:]:
            ratio = "-"
            if first and value:
                ratio = f"{(first / value if field.endswith('_per_s') else value / first):.2f}x"
            cells.append(ratio)
        line = "".join(f"{cell:>12}" for cell in cells)
        print(f"{workload:16}{field:22}{line}", file=sys.stderr)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of numbers, so aligned to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
