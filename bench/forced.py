"""What it saves to compute tokens that a grammar leaves no choice of at once:

    python -m headstart.bench.forced [MODEL] [--rounds 5] [--json FILE]

Two workloads, JSON with long names of properties and a forced call of a tool, at several batch
sizes; in turn with every token sampled, and with certain ones taken in runs (A B A B ...), in one
engine without a server. Every answer has to be the same, token by token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from llguidance import LLMatcher
from tokenizers import Tokenizer

from headstart.bench.own_engine import start_engine
from headstart.engine.config import default_home
from headstart.engine.engine import Engine
from headstart.engine.models.store import resolve
from headstart.engine.sampling.grammar import Constraint
from headstart.engine.sampling.params import SamplingParams
from headstart.server.text.tool_formats import FORMATS
from headstart.server.text.tool_formats.schemas import WHITESPACE

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

PROMPT = (
    "<|im_start|>user\nList the orders of a large shop as JSON, or the weather in Rome.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ORDER = {
    "type": "object",
    "properties": {
        "customer_identifier": {"type": "string", "maxLength": 12},
        "shipping_address": {
            "type": "object",
            "properties": {
                "street_name": {"type": "string", "maxLength": 24},
                "postal_code": {"type": "string", "maxLength": 8},
            },
            "required": ["street_name", "postal_code"],
            "additionalProperties": False,
        },
        "payment_method": {"enum": ["credit_card", "bank_transfer", "cash_on_delivery"]},
    },
    "required": ["customer_identifier", "shipping_address", "payment_method"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
BATCHES = (1, 4, 16)


def grammars() -> dict[str, tuple[str, int]]:
    """Of each workload, and how long its answers may be."""
    orders = {"type": "array", "items": ORDER, "minItems": 1000}
    options: JsonCompileOptions = {"lenient": False, "whitespace_pattern": WHITESPACE}
    calls = FORMATS["hermes"]({}).grammar([WEATHER], parallel=False)
    return {
        "orders": (LLMatcher.grammar_from_json_schema(json.dumps(orders), overrides=options), 150),
        "call": (f"start: calls\n{calls}", 100),
    }


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every token is sampled, certain ones too."""
    with (
        mock.patch.object(Constraint, "forced", side_effect=list),
        mock.patch.object(Constraint, "complete", False),
    ):
        yield


def answer(engine: Engine, prompt: list[int], grammar: str, size: int, most: int) -> dict[str, Any]:
    """One batch: its outputs, seconds and steps."""
    asked = [
        SamplingParams(max_tokens=most, temperature=0.8, seed=i, grammar=grammar)
        for i in range(size)
    ]
    before, begin = engine.stats, time.perf_counter()
    outputs = engine.generate([prompt] * size, asked)
    seconds, after = time.perf_counter() - begin, engine.stats
    return {
        "outputs": outputs,
        "seconds": seconds,
        "steps": after.steps - before.steps,
        "forced": after.forced_tokens - before.forced_tokens,
    }


def measure(engine: Engine, prompt: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each workload and batch size. Raises ValueError if answers differ."""
    rows = []
    for name, (grammar, most) in grammars().items():
        for size in BATCHES:
            runs, single = [], []
            for _ in range(rounds + 1):  # the first one warms caches, and compiles the grammar
                runs.append(answer(engine, prompt, grammar, size, most))
                with one_by_one():
                    single.append(answer(engine, prompt, grammar, size, most))
                if runs[-1]["outputs"] != single[-1]["outputs"]:
                    raise ValueError(f"{name} x {size}: the answers differ")
            at_once, stepping = (
                statistics.median(each["seconds"] for each in kind[1:]) for kind in (runs, single)
            )
            last = runs[-1]
            rows.append(
                {
                    "workload": name,
                    "batch": size,
                    "tokens": sum(map(len, last["outputs"])),
                    "forced": last["forced"],
                    "steps": {"one_by_one": single[-1]["steps"], "runs": last["steps"]},
                    "ms": {
                        "one_by_one": round(stepping * 1e3, 1),
                        "runs": round(at_once * 1e3, 1),
                    },
                    "times_as_fast": round(stepping / at_once, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    folder = resolve(args.model, default_home())
    engine = start_engine(args.model, "auto")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = measure(engine, tokenizer.encode(PROMPT).ids, args.rounds)
    if args.json:
        args.json.write_text(json.dumps({"bench": "forced", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
