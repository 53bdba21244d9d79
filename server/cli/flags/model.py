"""What the model is called, the template of its chats, and how it chooses tokens by default."""

from __future__ import annotations

import argparse
from pathlib import Path

from headstart.engine.errors import ConfigError, ModelError
from headstart.server.generation.defaults import OPENAI, GenerationDefaults
from headstart.server.text.tokenizer import Tokenizer


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
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|none|FILE",
        help="temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens of requests "
        "that name none; auto: the model's generation_config.json if there is one; none: OpenAI's",
    )


def generation_defaults(args: argparse.Namespace, folder: Path) -> GenerationDefaults:
    """How tokens are chosen where a request does not say. Raises ModelError and ConfigError."""
    asked: str = args.generation_config
    if asked == "none":
        return OPENAI
    if asked != "auto":
        try:
            return GenerationDefaults.from_file(Path(asked))
        except ModelError as error:
            raise ConfigError(f"--generation-config: {error}") from error
    path = folder / "generation_config.json"
    if not path.is_file():
        return OPENAI
    try:
        return GenerationDefaults.from_file(path)
    except ModelError as error:
        raise ModelError(f"{error}; --generation-config none does without it") from error


def tokenizer_of(args: argparse.Namespace, folder: Path) -> Tokenizer:
    """The model's, with the chat template asked for. Raises ConfigError and ModelError."""
    tokenizer = Tokenizer.from_folder(folder)
    file: Path | None = getattr(args, "chat_template", None)
    if file is not None:
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
            tokenizer.tool_template = None
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
