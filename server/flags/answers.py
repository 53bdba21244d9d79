"""How the model writes calls of tools, and thoughts."""

from __future__ import annotations

import argparse

from headstart.server.settings import REASONING_PARSERS, TOOL_CALL_PARSERS


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers: tool calls and reasoning")
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_CALL_PARSERS,
        default="auto",
        help="how the model writes calls of tools; auto: as its chat template says",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        default="auto",
        help="how it writes what it thinks before it answers; think: between <think> and </think>; "
        "auto: so if its chat template or its vocabulary knows these",
    )
