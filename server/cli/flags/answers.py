"""How the model writes calls of tools, and thoughts; what its vectors are."""

from __future__ import annotations

import argparse

from headstart.engine.sampling.params import POOLINGS
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
    group.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="which hidden state is the vector of a prompt: its last token's, the mean of all, its "
        "first token's (default: what the model's sentence-transformers settings say, else last)",
        default=argparse.SUPPRESS,
    )
