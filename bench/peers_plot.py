"""Draws bench/results/peers.csv into docs/peers.svg: `python -m headstart.bench.peers_plot`.

A row of the file is a workload on a machine: how many times better headstart was than OpenVINO
GenAI in one run of headstart.bench.peers.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from headstart.bench.plots import peers_plot

RESULTS = Path("bench/results/peers.csv")
WORKLOADS = {
    "cold-1748": "first token, new prompt of 1,748",
    "warm-1748": "first token, system prompt cached",
    "stream1-248": "1 stream, 248 tokens of context",
    "stream1-1748": "1 stream, 1,748",
    "streams16-248": "16 streams, 248 shared",
    "streams16-1748": "16 streams, 1,748 shared",
    "streams32-6048": "32 streams, 6,048 shared",
}
MACHINES = {
    "Zen 4": "AVX512 with BF16 and VNNI (Zen 4)",
    "Zen 3": "AVX2 only (Zen 3)",
    "Zen 1": "AVX2 in halves (Zen 1)",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = argparse.ArgumentParser(
        prog="python -m headstart.bench.peers_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    command.add_argument("--out", type=Path, default=Path("docs"), help="folder (%(default)s)")
    args = command.parse_args(argv)
    ratios: dict[str, dict[str, float]] = {name: {} for name in MACHINES.values()}
    with args.results.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["workload"] in WORKLOADS:
                label = WORKLOADS[row["workload"]]
                ratios[MACHINES[row["machine"]]][label] = float(row["ratio"])
    for path in peers_plot(args.out, list(WORKLOADS.values()), ratios):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
