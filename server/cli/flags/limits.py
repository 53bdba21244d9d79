"""What one request may ask for at most: a flag for each limit in ServerSettings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from headstart.engine.errors import ConfigError
from headstart.server.cli.values import byte_size, positive, seconds
from headstart.server.settings import ServerSettings


class Limit(NamedTuple):
    """A flag, the setting that it makes, and what the help says."""

    flag: str
    setting: str
    help: str
    value: Callable[[str], float] = positive
    metavar: str = "N"


LIMITS = (
    Limit("--max-body-size", "max_body_bytes", "request body, as 8MiB", byte_size, "SIZE"),
    Limit(
        "--max-body-values",
        "max_body_values",
        "numbers and texts in a body, where a list counts as 4 and an object as 16",
    ),
    Limit("--max-n", "max_n", "n and best_of"),
    Limit("--max-prompts", "max_prompts", "prompts of one completion"),
    Limit("--max-texts", "max_texts", "texts to embed, compare or rank in one request"),
    Limit("--max-text-contexts", "max_text_contexts", "their tokens, in contexts of the model"),
    Limit("--max-choices", "max_choices", "choices in one request, prompts times n"),
    Limit("--max-messages", "max_messages", "messages in one chat"),
    Limit("--max-documents", "max_documents", "documents beside one chat"),
    Limit("--max-stop", "max_stop", "stop strings"),
    Limit("--max-stop-chars", "max_stop_chars", "characters of a stop string"),
    Limit("--max-stop-token-ids", "max_stop_token_ids", "entries of stop_token_ids"),
    Limit("--max-logit-bias", "max_logit_bias", "entries of logit_bias"),
    Limit("--max-allowed-token-ids", "max_allowed_token_ids", "entries of allowed_token_ids"),
    Limit("--max-bad-words", "max_bad_words", "strings of bad_words"),
    Limit("--max-bad-word-chars", "max_bad_word_chars", "characters of one of them"),
    Limit("--max-schema-chars", "max_schema_chars", "characters of a schema, regex or grammar"),
    Limit("--max-schema-depth", "max_schema_depth", "levels of objects and lists in a schema"),
    Limit("--max-choice", "max_choice", "strings of one choice, in structured outputs"),
    Limit("--max-tools", "max_tools", "tools in one request"),
    Limit("--max-tool-size", "max_tool_bytes", "one of them as JSON", byte_size, "SIZE"),
    Limit("--max-stored-responses", "max_stored_responses", "answers of /v1/responses kept"),
    Limit("--max-stored-bytes", "max_stored_bytes", "these, as 64MiB", byte_size, "SIZE"),
    Limit("--max-segments", "max_segments", "spans of one segment_mask"),
    Limit(
        "--max-contexts",
        "max_contexts",
        "ids in one /detokenize, and tokens of a prompt, in contexts of the model",
    ),
    Limit(
        "--max-template-kwarg-chars",
        "max_template_kwarg_chars",
        "characters of a value in chat_template_kwargs",
    ),
    Limit("--max-template-chars", "max_template_chars", "characters that a chat template writes"),
    Limit(
        "--grammar-timeout",
        "grammar_timeout",
        "time that a schema or grammar takes to compile",
        seconds,
        "SECONDS",
    ),
    Limit(
        "--template-timeout",
        "template_timeout",
        "time that a chat template takes",
        seconds,
        "SECONDS",
    ),
)

SERVER_LIMITS = (
    Limit("--max-connections", "max_connections", "connections that are open"),
    Limit(
        "--max-bodies-size",
        "max_bodies_bytes",
        "request bodies that are being read, as 64MiB",
        byte_size,
        "SIZE",
    ),
    Limit(
        "--max-waiting-texts",
        "max_waiting_texts",
        "requests that wait for their prompts to be rendered and tokenised",
    ),
    Limit(
        "--max-waiting-grammars",
        "max_waiting_grammars",
        "requests that wait for their grammars or schemas to be checked",
    ),
)
"""Of all requests together: run-batch asks as many at a time as it wants."""


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    _add_flags(parser, "limits: the most that one request may ask for", LIMITS)


def add_server_limit_flags(parser: argparse.ArgumentParser) -> None:
    _add_flags(parser, "limits of all requests together: a 503 beyond them", SERVER_LIMITS)


def _add_flags(parser: argparse.ArgumentParser, title: str, limits: Sequence[Limit]) -> None:
    group = parser.add_argument_group(title)
    defaults = ServerSettings()
    for limit in limits:
        group.add_argument(
            limit.flag,
            dest=limit.setting,
            type=limit.value,
            default=getattr(defaults, limit.setting),
            metavar=limit.metavar,
            help=limit.help,
        )


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """Setting to value; of those of all requests together there is none."""
    return {limit.setting: getattr(args, limit.setting) for limit in LIMITS} | {
        limit.setting: sys.maxsize for limit in SERVER_LIMITS
    }


def server_limits(args: argparse.Namespace) -> dict[str, Any]:
    """Setting to value, of those of all requests together; raises ConfigError."""
    if args.max_bodies_bytes < args.max_body_bytes:
        raise ConfigError("--max-bodies-size is smaller than --max-body-size")
    return {limit.setting: getattr(args, limit.setting) for limit in SERVER_LIMITS}
