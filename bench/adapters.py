"""What LoRA adapters cost: requests spread over several adapters in one batch, against none.

    python -m headstart.bench.adapters [MODEL] [--adapters 8] [--requests 16] [--json FILE]

Prompts and answers are the same in both runs of a pair (A B B A), nothing is found in the cache.
Adapters are random ones in PEFT's format, written to a temporary folder:

    rank 16, all matrices      what most adapters on the hub look like
    rank 32, q and v           the segment-mask paper's (arXiv 2412.18487)
    rank 64, all matrices      large ones: together more bytes than the model's int8 weights

Figures: output tokens per second from the first request to the last token, and of the decode steps
alone (medians of the runs), each with its share of the rate without adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from headstart.bench.own_engine import start_engine
from headstart.engine.engine import Engine
from headstart.engine.models.adapters import CONFIG, PREFIX, WEIGHTS, Target, targets
from headstart.engine.models.config import ModelConfig
from headstart.engine.sampling.params import SamplingParams

RUNS = 4
KINDS = (
    ("rank 16, all matrices", 16, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("rank 32, q and v", 32, "q_proj v_proj"),
    ("rank 64, all matrices", 64, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second: of all output over the whole run, and of the median decode step."""

    output: float
    decode: float


def write_adapter(folder: Path, config: ModelConfig, rank: int, names: list[str]) -> None:
    """A random adapter in PEFT's format, of weights small enough to leave answers sensible."""
    chosen: list[Target] = [target for target in targets(config) if target.name in names]
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_layers):
        for target in chosen:
            module = f"{PREFIX}model.layers.{layer}.{target.module}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, target.in_features) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(target.out_features, rank) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / CONFIG).write_text(json.dumps(settings))


def run(engine: Engine, adapters: list[str | None], args: argparse.Namespace, seed: int) -> Rates:
    """All requests at once, each with the next of ``adapters``."""
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=args.output, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    for i in range(args.requests):
        prompt = draw.choices(range(100, engine.model.vocab_size), k=args.prompt)
        engine.add(i, array("i", prompt), params, adapter=adapters[i % len(adapters)])
    tokens, steps = 0, []
    while engine.has_work:
        before = time.perf_counter()
        new = len(engine.step())
        tokens += new
        if new == args.requests:
            steps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - begin
    return Rates(tokens / seconds, args.requests / statistics.median(steps))


def compare(engine: Engine, names: list[str], args: argparse.Namespace) -> tuple[Rates, Rates]:
    """Medians without adapters and with them."""
    without: list[Rates] = []
    beside: list[Rates] = []
    for i in range(args.runs):
        pair: list[tuple[list[Rates], list[str | None]]] = [(without, [None]), (beside, [*names])]
        for rates, adapters in reversed(pair) if i % 2 else pair:
            rates.append(run(engine, adapters, args, 2 * i + (rates is beside)))
    plain, adapted = (
        Rates(
            statistics.median(r.output for r in rates), statistics.median(r.decode for r in rates)
        )
        for rates in (without, beside)
    )
    return plain, adapted


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headstart.bench.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, in turn")
    parser.add_argument("--json", type=Path, help="write everything as one JSON line")
    args = parser.parse_args()
    engine = start_engine(args.model, args.weights)
    print(f"{args.requests} requests, {args.prompt} tokens in, {args.output} out; ", end="")
    print(f"{args.adapters} adapters; {args.runs} runs of each\n")
    head = (
        "adapters",
        "MiB",
        "tokens/s without",
        "with",
        "share",
        "decode without",
        "with",
        "share",
    )
    print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for title, rank, targets_ in KINDS:
            names, size = [], 0
            for i in range(args.adapters):
                path = Path(temporary) / f"{rank}-{len(targets_)}-{i}"
                write_adapter(path, engine.decoder.config, rank, targets_.split())
                names.append(path.name)
                size += engine.load_adapter(path.name, str(path)).num_bytes
            plain, adapted = compare(engine, names, args)
            for name in names:
                engine.unload_adapter(name)
            cells = [title, f"{size / 2**20:.0f}"]
            for a, b in ((plain.output, adapted.output), (plain.decode, adapted.decode)):
                cells += [f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            lines.append({"adapters": title, "without": asdict(plain), "with": asdict(adapted)})
    if args.json:
        line = {"model": args.model, "backend": engine.model.backend, "results": lines}
        args.json.write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
