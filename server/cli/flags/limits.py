"""What one request may ask for at most: a flag for each limit in ServerSettings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

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
    Limit("--max-n", "max_n", "n and best_of"),
    Limit("--max-prompts", "max_prompts", "prompts of one completion"),
    Limit("--max-texts", "max_texts", "texts to embed, compare or rank in one request"),
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
    Limit("--max-contexts", "max_contexts", "ids in one /detokenize, in contexts of the model"),
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


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits: the most that one request may ask for")
    defaults = ServerSettings()
    for limit in LIMITS:
        group.add_argument(
            limit.flag,
            dest=limit.setting,
            type=limit.value,
            default=getattr(defaults, limit.setting),
            metavar=limit.metavar,
            help=limit.help,
        )


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """Setting to value."""
    return {limit.setting: getattr(args, limit.setting) for limit in LIMITS}
