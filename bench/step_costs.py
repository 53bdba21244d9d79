"""How well the seconds of steps are predicted: ``python -m headstart.bench.step_costs``.

An engine in this process computes steps of every kind in random order: 1 to 64 sequences that
decode at contexts up to ``--context``, with and without chunks of prompts beside them, prefixes
shared or not. Each step is predicted before it is known how long it took, by what was measured at
start and corrected by the steps before. Prints |predicted / actual - 1| by batch and context, and
exits with 1 where the median is above 15% or the 95th percentile above 40%.

The default model's context ends at 8,192 tokens; for 16,384 a random one of its shape does:

    python -m headstart.bench.random_model smollm2-135m-16k X.gguf
    python -m headstart.bench.step_costs --model X.gguf --context 16384
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from array import array
from collections import defaultdict

from headstart.bench.command import exit_status
from headstart.bench.report import markdown
from headstart.bench.serve import at_least
from headstart.engine.config import EngineConfig, default_home
from headstart.engine.engine import Engine
from headstart.engine.models.store import resolve
from headstart.engine.sampling.params import SamplingParams

MEDIAN_GOAL, P95_GOAL = 0.15, 0.40
BATCHES = (1, 4, 16, 64)
DECODED = 12
"""Steps of each batch that decode, beside those of its prompts."""
LEARNING = 50
"""Steps that are not counted: a server has had them after its first requests."""

Errors = dict[tuple[str, int, int], list[float]]


def _words(draw: random.Random, engine: Engine, count: int) -> list[int]:
    return [draw.randrange(100, engine.model.vocab_size) for _ in range(count)]


def measure(args: argparse.Namespace) -> Errors:
    """Errors by (kind of step, batch, context)."""
    config = EngineConfig(
        model_path=str(resolve(args.model, default_home())),
        weights=args.weights,
        kv_memory=args.kv_memory,
        step_time=args.step_time,
    )
    engine = Engine(config)
    engine.warm_up()
    while engine.prepare_memory():
        pass
    costs = engine.step_costs
    assert costs is not None
    print(f"{args.model}, {engine.model.weights}, {engine.model.backend}", file=sys.stderr)
    draw = random.Random(args.seed)
    contexts = [n for n in (256, 2048, 8192, 16384) if n < args.context] + [args.context]
    room = engine.model.num_pages * engine.model.page_size
    kinds = [
        (batch, context)
        for batch in BATCHES
        for context in contexts
        if context + batch * 256 < room
    ]
    errors: Errors = defaultdict(list)
    count = next_id = 0
    for _ in range(args.rounds):
        draw.shuffle(kinds)
        for batch, context in kinds:
            shared = draw.random() < 0.5 or batch * context > room // 2
            prefix = _words(draw, engine, context - 64)
            for _ in range(batch):
                tokens = [*prefix, *_words(draw, engine, 32)]
                if not shared:
                    tokens = _words(draw, engine, context - 32)
                params = SamplingParams(max_tokens=DECODED, temperature=0.0, ignore_eos=True)
                engine.add(next_id, array("i", tokens), params)
                next_id += 1
            while engine.has_work:
                known, before = costs.latest, engine.stats.backlog.seconds
                engine.step()
                if costs.latest is None or costs.latest is known:
                    continue  # nothing but work beside steps
                predicted, actual = costs.latest
                prompts = before or engine.stats.backlog.seconds
                count += 1
                if count > LEARNING:
                    kind = "prompts" if prompts else "decoding"
                    errors[kind, batch, context].append(abs(predicted / actual - 1))
    return errors


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def report(errors: Errors) -> int:
    """Print them; how many goals are missed."""
    rows = []
    for (kind, batch, context), found in sorted(errors.items()):
        median, p95 = statistics.median(found), _quantile(found, 0.95)
        rows.append(
            [kind, str(batch), str(context), str(len(found)), f"{median:.1%}", f"{p95:.1%}"]
        )
    print(markdown(["steps", "batch", "context", "count", "median", "95th percentile"], rows))
    found = [error for each in errors.values() for error in each]
    median, p95 = statistics.median(found), _quantile(found, 0.95)
    print(f"\nof {len(found)} steps: median {median:.1%} (goal {MEDIAN_GOAL:.0%}), ", end="")
    print(f"95th percentile {p95:.1%} (goal {P95_GOAL:.0%})")
    return (median > MEDIAN_GOAL) + (p95 > P95_GOAL)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="step_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--context", type=at_least(512), default=8000)
    parser.add_argument("--kv-memory", type=at_least(1 << 20, 1 << 40), default=4 << 30)
    parser.add_argument("--step-time", type=float, default=0.15)
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sys.exit(exit_status(lambda: report(measure(args))))


if __name__ == "__main__":
    main()
