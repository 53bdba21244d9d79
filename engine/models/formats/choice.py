"""Which format a model's weights are computed in, and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from headstart.engine.errors import ConfigError
from headstart.engine.models.formats.int8 import read_quality
from headstart.kernels.backend import WEIGHT_FORMATS
from headstart.kernels.devices import gpu_is_there

CPU_FORMATS = ("f32", "bf16", "int8")

INT8_TOLERANCE = 1.01
"""int8 is chosen by "auto" unless its perplexity is shown to be over so many times float32's."""

FAST_INT8 = (
    "avx512_bf16",
    "avx512_vnni",
    "avx512",
    "avx_vnni",
    "avx2",
    "neon_i8mm",
    "neon_dotprod",
)
"""Instruction sets on which int8 weights are faster than any others (`python -m
headstart.bench.linear`)."""

AUTO_WEIGHTS = "HEADSTART_AUTO_WEIGHTS"
"""Variable: the format of weights that "auto" means on a CPU, however fast it is there."""


class WeightChoice(NamedTuple):
    """``reason``: in words; empty where the format was asked for."""

    format: str
    reason: str


def choose_weights(asked: str, backend: str, isa: str, folder: Path) -> WeightChoice:
    """The weight format: as asked, or the fastest one this machine and model allow.

    AUTO_WEIGHTS decides instead of the machine; int8 is taken only where the model has it good.
    Raises ConfigError for a format there is not.
    """
    if asked != "auto":
        if asked not in WEIGHT_FORMATS:
            raise ConfigError(f"--weights must be auto, {', '.join(WEIGHT_FORMATS)}; got {asked}")
        return WeightChoice(asked, "")
    if backend == "gpu":
        if gpu_is_there():
            return WeightChoice("bf16", "the fastest on a GPU")
        return WeightChoice("f32", "Triton's interpreter has no bf16")
    if backend == "reference":
        return WeightChoice("f32", "the reference computes in nothing else")
    held = os.environ.get(AUTO_WEIGHTS)
    if held and held not in CPU_FORMATS:
        raise ConfigError(f"{AUTO_WEIGHTS} must be {', '.join(CPU_FORMATS)}; got {held}")
    fastest = held or ("int8" if isa in FAST_INT8 else "f32")
    reason = f"{AUTO_WEIGHTS} says so" if held else f"the fastest with {isa} kernels"
    if fastest != "int8":
        return WeightChoice(fastest, reason)
    quality = read_quality(folder)
    if quality is None:
        why_not = "the model has no int8 weights"
    else:
        least, most = quality["int8_least"], quality["int8_most"]
        perplexity = f"perplexity {least - 1:+.1%} to {most - 1:+.1%} of float32's"
        if least <= INT8_TOLERANCE:
            return WeightChoice("int8", f"{reason}; {perplexity}")
        why_not = f"int8 has {perplexity}"
    return WeightChoice("bf16" if isa == "avx512_bf16" else "f32", f"not int8, because {why_not}")
