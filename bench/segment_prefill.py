"""What a segment mask costs: prefill under it against causal prefill, in one run.

    python -m headstart.bench.segment_prefill [MODEL] [--system 2000] [--user 500] [--json FILE]

Rows inside a segment see all of it, so there are more scores to compute; everything else is the
same work. Three figures for the whole prompt, and for its user turn after a cached system turn:

    ratio            time under the segment mask / causal time, medians of alternating pairs
    extra GFLOP      scores and values beyond those of causal attention, counted
    beyond           the ratio less the time those take at the rate causal attention reached

Prompts are random tokens, a new one each time; nothing is found in the cache but what is said.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

from headstart.bench.own_engine import start_engine
from headstart.engine.engine import Engine
from headstart.engine.ranges.segments import CAUSAL, Segments
from headstart.engine.sampling.params import SamplingParams

PAIRS = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians in milliseconds; FLOP counts of attention, all layers."""

    what: str
    causal_ms: float
    segment_ms: float
    causal_attention_ms: float
    segment_attention_ms: float
    causal_gflop: float
    extra_gflop: float

    @property
    def ratio(self) -> float:
        return self.segment_ms / self.causal_ms

    @property
    def beyond(self) -> float:
        """The ratio without the extra scores, at the rate of causal attention."""
        extra_ms = self.causal_attention_ms * self.extra_gflop / self.causal_gflop
        return (self.segment_ms - extra_ms) / self.causal_ms


class PrefillBench:
    """An engine, and prompts of a system turn and a user turn."""

    def __init__(self, engine: Engine, system: int, user: int) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._system, self._user = system, user
        self._ids = 0
        spans = [(0, system), (system, system + user)]
        self.masks = {"causal": CAUSAL, "segment": Segments.of(spans, system + user)}

    def tokens(self, count: int) -> list[int]:
        return self._random.choices(range(100, self._engine.model.vocab_size), k=count)

    def first_token(self, tokens: list[int], mask: str) -> tuple[float, float]:
        """Seconds to the first token of a prompt, and those of them inside attention."""
        self._ids += 1
        decoder = self._engine.decoder
        attended, begin = decoder.attention_seconds, time.perf_counter()
        params = SamplingParams(max_tokens=1)
        self._engine.add(self._ids, array("i", tokens), params, segments=self.masks[mask].spans)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - begin, decoder.attention_seconds - attended

    def compare(self, what: str, *, cached_system: bool) -> Comparison:
        """Both masks in turn over the same prompts, causal first in every other pair."""
        times: dict[str, list[tuple[float, float]]] = {mask: [] for mask in self.masks}
        start = 0
        for pair in range(PAIRS):
            system = self.tokens(self._system)
            for mask in list(self.masks)[:: -1 if pair % 2 else 1]:
                if cached_system:
                    self.first_token(system + self.tokens(self._user), mask)
                    start = self._system // self._engine.model.page_size
                    start *= self._engine.model.page_size
                times[mask].append(self.first_token(system + self.tokens(self._user), mask))
        pairs = {m: self._pairs(mask, start) for m, mask in self.masks.items()}
        config = self._engine.decoder.config
        per_pair = 4 * config.num_heads * config.head_dim * config.num_layers / 1e9

        def median(mask: str, which: int) -> float:
            return 1e3 * statistics.median(sample[which] for sample in times[mask])

        return Comparison(
            what,
            median("causal", 0),
            median("segment", 0),
            median("causal", 1),
            median("segment", 1),
            per_pair * pairs["causal"],
            per_pair * (pairs["segment"] - pairs["causal"]),
        )

    def _pairs(self, mask: Segments, start: int) -> int:
        """Query-key pairs of one head from token ``start`` on."""
        return sum(mask.visible(start, self._system + self._user))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.segment_prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--system", type=int, default=2000, help="tokens of the system turn")
    parser.add_argument("--user", type=int, default=500, help="tokens of the user turn")
    parser.add_argument("--json", type=Path, help="write everything as one JSON line")
    args = parser.parse_args()
    engine = start_engine(args.model, args.weights)
    bench = PrefillBench(engine, args.system, args.user)
    for mask in bench.masks:
        bench.first_token(bench.tokens(args.system + args.user), mask)
    print(f"system turn {args.system} tokens, user turn {args.user}; {PAIRS} pairs\n")
    head = ("prefill of", "causal ms", "segment ms", "ratio", "extra GFLOP", "of causal", "beyond")
    print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    results = [
        bench.compare("the whole prompt", cached_system=False),
        bench.compare("the user turn, system cached", cached_system=True),
    ]
    for r in results:
        cells = (f"{r.causal_ms:.0f}", f"{r.segment_ms:.0f}", f"{r.ratio:.3f}x")
        flops = (f"{r.extra_gflop:.1f}", f"{r.extra_gflop / r.causal_gflop:.0%}")
        print("| " + " | ".join((r.what, *cells, *flops, f"{r.beyond:.3f}x")) + " |", flush=True)
    if args.json:
        line = {"model": args.model, "backend": engine.model.backend}
        args.json.write_text(json.dumps(line | {"results": [asdict(r) for r in results]}) + "\n")


if __name__ == "__main__":
    main()
