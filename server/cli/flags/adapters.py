"""Segment masks and LoRA adapters."""

from __future__ import annotations

import argparse
from pathlib import Path

from headstart.server.cli.flags.model import model_names
from headstart.server.cli.values import existing_folder, named_folder, positive


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("segment masks and LoRA adapters")
    group.add_argument(
        "--segment-mask",
        choices=("causal", "turns"),
        help="of chats that name none (default: what the config of the model declares, else "
        "causal); an adapter's config comes before it",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--lora",
        type=named_folder,
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="adapters to load, each a folder; requests ask for NAME as their model",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--max-loras", type=positive, default=32, metavar="N", help="adapters loaded at a time"
    )


def add_lora_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora-dir",
        type=existing_folder,
        metavar="DIR",
        help="folder whose adapters may be loaded, and any unloaded, at run time over HTTP "
        "(default: none may)",
        default=argparse.SUPPRESS,
    )


def adapters(args: argparse.Namespace) -> dict[str, str]:
    """Name to folder, of ``--lora``; ends the process for wrong usage, as argparse does."""
    given: list[tuple[str, Path]] = getattr(args, "lora", [])
    folders: dict[str, str] = {}
    for name, path in given:
        if name in folders:
            args.refuse(f"argument --lora: the name {name!r} is given twice")
        if name in model_names(args):
            args.refuse(f"argument --lora: {name!r} is the model's name")
        folders[name] = str(path)
    if len(folders) > getattr(args, "max_loras", len(folders)):
        args.refuse(f"argument --lora: {len(folders)} adapters, and --max-loras {args.max_loras}")
    return folders
