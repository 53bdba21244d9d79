"""What the model is called, and the template of its chats."""

from __future__ import annotations

import argparse
from pathlib import Path

from headstart.engine.errors import ConfigError
from headstart.server.tokenizer import Tokenizer


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names clients may use; answers carry the first (default: from MODEL)",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="template of chats, in Jinja, in place of the model's own",
        default=argparse.SUPPRESS,
    )


def tokenizer_of(args: argparse.Namespace, folder: Path) -> Tokenizer:
    """The model's, with the chat template asked for. Raises ConfigError and ModelError."""
    tokenizer = Tokenizer.from_folder(folder)
    file: Path | None = getattr(args, "chat_template", None)
    if file is not None:
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--chat-template {file}: {error}") from error
    return tokenizer


def model_names(args: argparse.Namespace) -> list[str]:
    """What the model is called: as asked for, or by the last part of a path."""
    given: list[str] | None = getattr(args, "served_model_name", None)
    if given:
        return given
    path = Path(args.model)
    return [path.resolve().name if path.exists() else args.model]
