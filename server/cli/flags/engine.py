"""Who computes, with what, and in which order."""

from __future__ import annotations

import argparse
from pathlib import Path

from headstart.engine.config import EngineConfig, default_home
from headstart.server.cli.values import byte_size, count, positive, seconds_or_never


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=Path, default=default_home(), help="where models are kept"
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        choices=("auto", "gpu", "cpu", "reference"),
        default="auto",
        help="who computes (default: an NVIDIA GPU if torch sees one, else the CPU)",
    )
    engine.add_argument(
        "--isa",
        choices=(
            *("auto", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2"),
            *("neon_i8mm", "neon_dotprod", "portable"),
        ),
        default="auto",
        help="instruction set of the CPU kernels (default: the machine's best one, or what "
        "HEADSTART_AUTO_ISA names)",
    )
    engine.add_argument(
        "--weights",
        choices=("auto", "f32", "f16", "bf16", "int8"),
        default="auto",
        help="format of the weights: f16 for GPUs, int8 for CPUs (default: what the machine is "
        "fastest with and the model is good in, or on CPUs what HEADSTART_AUTO_WEIGHTS names)",
    )
    engine.add_argument(
        "--kv-format",
        choices=("auto", "f32", "bf16", "fp8", "int8"),
        default="auto",
        help="format of the KV cache: f32 or bf16 on a CPU (default: f32 beside f32 weights, else "
        "bf16), fp8 or int8 with a scale per token and head on a GPU (default: as the weights)",
    )
    engine.add_argument(
        "--kv-memory",
        type=byte_size,
        help="size of the KV cache, as 2GiB or 500MB (default: from free memory)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help="longest prompt plus answer (default: what the model and the memory allow)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--max-batched-tokens",
        type=positive,
        metavar="TOKENS",
        help="token budget of one step (default: 512, on a GPU 2048)",
    )
    engine.add_argument(
        "--max-running",
        type=positive,
        metavar="N",
        help="sequences computed in one step (default: 64, on a GPU 256)",
    )
    engine.add_argument(
        "--threads",
        type=positive,
        help="threads of the kernels (default: one per core, shared among --tensor-parallel or "
        "--runahead processes)",
        default=argparse.SUPPRESS,
    )
    engine.add_argument(
        "--no-prefix-caching",
        action="store_true",
        help="forget the KV of finished requests",
    )
    engine.add_argument(
        "--relay",
        choices=("auto", "on", "off"),
        default="auto",
        help="read a prefix that running requests share once for all of them: where it is "
        "predicted to pay, always, never",
    )
    engine.add_argument(
        "--relay-check",
        type=count,
        default=0,
        metavar="N",
        help="on every Nth step that does so, compute it without, too, compare, and stop doing so "
        "if they differ; 0: at start-up only",
    )
    engine.add_argument(
        "--async-scheduling",
        choices=("auto", "on", "off"),
        default="auto",
        help="plan and launch a step while the one before is computed: where the backend computes "
        "beside the host, always, never",
    )
    engine.add_argument(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        default="fcfs",
        help="who is computed first, and preempted last: who came first; or who has the lowest "
        "priority, a field of requests, and of those who came first",
    )
    engine.add_argument(
        "--engine-stuck-after",
        type=seconds_or_never,
        default=EngineConfig(model_path="").stuck_after,
        metavar="SECONDS",
        help="how long the engine's process may show no sign of life, before it is killed and "
        "started again; longer than any step takes; 0: for ever (%(default)g)",
    )


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensor parallelism: a model held by several processes")
    group.add_argument(
        "--tensor-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="processes of this machine, the engine included, each with 1/N of every layer and of "
        "the KV cache; N has to divide the attention heads, key/value heads and MLP features",
    )
