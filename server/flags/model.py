"""What the model is called."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names clients may use; answers carry the first (default: from MODEL)",
        default=argparse.SUPPRESS,
    )


def model_names(args: argparse.Namespace) -> list[str]:
    """What the model is called: as asked for, or by the last part of a path."""
    given: list[str] | None = getattr(args, "served_model_name", None)
    if given:
        return given
    path = Path(args.model)
    return [path.resolve().name if path.exists() else args.model]
