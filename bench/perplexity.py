"""Perplexity of each weight format on the bundled English text.

    python -m headstart.bench.perplexity [MODEL]

The figures a speed is worth nothing without: f32, bf16 and int8 on the same 4,000 tokens and more,
in windows of 1,024. Beside int8: the 95% intervals of what it costs against each of the others,
paired by token. Exit status 1 if all of that is more than 1% above float32.
"""

from __future__ import annotations

import argparse
import os
import sys

from headstart.engine.config import default_home
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.formats.choice import INT8_TOLERANCE
from headstart.engine.models.formats.quality import (
    WINDOW,
    excess,
    perplexity,
    text_losses,
    text_tokens,
)
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.models.store import resolve
from headstart.kernels.cpu.backend import ACTIVATIONS
from headstart.kernels.devices import load_backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headstart.bench.perplexity")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    folder = resolve(args.model, default_home())
    config = ModelConfig.from_folder(folder)
    text = text_tokens(folder, "evaluation")
    print(f"{args.model}: {len(text)} tokens in windows of {WINDOW}")
    losses: dict[str, list[float]] = {}
    for weights in ACTIVATIONS:
        backend = load_backend("cpu", isa="auto", weights=weights, threads=args.threads)
        decoder = load_decoder(folder, config, backend, weights, WINDOW)
        runner = ModelRunner(decoder, backend, -(-WINDOW // backend.page_size))
        losses[weights] = text_losses(runner, text)
        against = ""
        if weights == "int8":
            for other in ("bf16", "f32"):
                least, most = excess(losses["int8"], losses[other])
                against += f"  ({least - 1:+.2%} to {most - 1:+.2%} of {other})"
        print(f"{weights:>5}  {perplexity(losses[weights]):.3f}{against}", flush=True)
    if least > INT8_TOLERANCE:
        sys.exit(f"int8 is more than {INT8_TOLERANCE - 1:.0%} above float32")


if __name__ == "__main__":
    main()
