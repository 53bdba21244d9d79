"""The chain of processes that compute long prompts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from headstart.engine.errors import ConfigError
from headstart.server.cli.values import host_port, positive, positive_or_env, seconds

SECRET_VARIABLE = "HEADSTART_RUNAHEAD_SECRET"


def add_runahead_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV-Runahead: long prompts computed by a chain of processes")
    group.add_argument(
        "--runahead",
        type=positive_or_env,
        default=1,
        metavar="N|env",
        help="processes of this machine that compute a long prompt, the engine included; env: one "
        "per machine or more, told apart by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as "
        "torchrun sets them, the last one serving",
    )
    group.add_argument(
        "--runahead-hosts",
        type=host_port,
        nargs="+",
        action="extend",
        metavar="HOST:PORT",
        help="ranks on other machines (headstart runahead-rank), before those of this one",
        default=argparse.SUPPRESS,
    )
    add_runahead_rank_flags(group)
    group.add_argument(
        "--runahead-min",
        type=positive,
        metavar="TOKENS",
        help="let prompts run ahead that have so many tokens, cached ones apart (default: those "
        "for which it is predicted to be quicker)",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--runahead-cuts",
        choices=("auto", "even", "predicted", "modelled"),
        default="auto",
        help="where prompts are cut: evenly, as interpolated from what headstart runahead-tune "
        "found, by the costs of ranks and links; auto: predicted where it was tuned, else modelled",
    )
    group.add_argument(
        "--runahead-timeout",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long a rank may not answer, or hand on nothing, until it is left out and the "
        "prompt is computed without it",
    )


def add_runahead_rank_flags(group: argparse._ArgumentGroup) -> None:
    """Those that all ranks of a chain have."""
    group.add_argument(
        "--runahead-secret-file",
        type=Path,
        metavar="FILE",
        help="what all ranks have to know, 16 characters or more (default: the environment's "
        f"{SECRET_VARIABLE})",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--runahead-transport",
        choices=("auto", "gloo"),
        default="auto",
        help="how KV goes from rank to rank: through shared memory where they are on one machine, "
        "NCCL between GPUs, else Gloo; or always Gloo",
    )


def runahead_secret(args: argparse.Namespace) -> str | None:
    """Raises ConfigError for a file that cannot be read."""
    path: Path | None = getattr(args, "runahead_secret_file", None)
    if path is None:
        return os.environ.get(SECRET_VARIABLE)
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--runahead-secret-file: {error}") from error
