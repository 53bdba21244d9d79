"""Prints docs/request-fields.md: the fields of every kind of request, and what becomes of them.

``python -m headstart.server.api.field_table > docs/request-fields.md``

Made from the tables the server checks requests with, so they say what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from headstart.server.api.adapters import (
    REFUSED_IN_LOAD,
    REFUSED_IN_UNLOAD,
    LoadAdapterBody,
    UnloadAdapterBody,
)
from headstart.server.api.anthropic_messages.routes import (
    DESCRIPTIVE_IN_MESSAGES,
    REFUSED_IN_COUNT,
    REFUSED_IN_MESSAGES,
    CountTokensBody,
    MessagesBody,
)
from headstart.server.api.fields import (
    DESCRIPTIVE,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_STREAM_OPTIONS,
    Body,
    StreamOptions,
)
from headstart.server.api.openai_chat.routes import ChatBody, ChatMessage
from headstart.server.api.openai_completions.routes import CompletionBody
from headstart.server.api.openai_responses.routes import (
    REFUSED_IN_REASONING,
    REFUSED_IN_RESPONSES,
    ReasoningBody,
    ResponsesBody,
)
from headstart.server.api.pooling.embeddings import REFUSED_IN_EMBEDDINGS, EmbeddingBody
from headstart.server.api.pooling.pooling import REFUSED_IN_POOLING
from headstart.server.api.pooling.score import REFUSED_IN_RERANK, RerankBody, ScoreBody
from headstart.server.api.tokens import (
    REFUSED_IN_TOKENIZE,
    ApplyTemplateBody,
    DetokenizeBody,
    TokenizeBody,
)

SECTIONS: tuple[tuple[str, type[Body], Mapping[str, tuple[Any, ...]], tuple[str, ...]], ...] = (
    ("/v1/chat/completions", ChatBody, REFUSED_IN_CHAT, DESCRIPTIVE),
    ("messages[]", ChatMessage, REFUSED_IN_MESSAGE, ()),
    ("/v1/completions", CompletionBody, REFUSED_IN_COMPLETIONS, DESCRIPTIVE),
    ("/v1/responses", ResponsesBody, REFUSED_IN_RESPONSES, ()),
    ("reasoning", ReasoningBody, REFUSED_IN_REASONING, ()),
    ("/v1/messages", MessagesBody, REFUSED_IN_MESSAGES, DESCRIPTIVE_IN_MESSAGES),
    (
        "/v1/messages/count_tokens",
        CountTokensBody,
        REFUSED_IN_COUNT,
        DESCRIPTIVE_IN_MESSAGES,
    ),
    ("stream_options", StreamOptions, REFUSED_IN_STREAM_OPTIONS, ()),
    ("/v1/embeddings", EmbeddingBody, REFUSED_IN_EMBEDDINGS, DESCRIPTIVE),
    ("/v1/score", ScoreBody, REFUSED_IN_POOLING, DESCRIPTIVE),
    ("/v1/rerank", RerankBody, REFUSED_IN_RERANK, DESCRIPTIVE),
    ("/v1/load_lora_adapter", LoadAdapterBody, REFUSED_IN_LOAD, ()),
    ("/v1/unload_lora_adapter", UnloadAdapterBody, REFUSED_IN_UNLOAD, ()),
    ("/tokenize", TokenizeBody, REFUSED_IN_TOKENIZE, ()),
    ("/detokenize", DetokenizeBody, {}, ()),
    ("/apply-template", ApplyTemplateBody, REFUSED_IN_TOKENIZE, ()),
)


HEAD = """# Request fields

Printed by `python -m headstart.server.api.field_table`. What fields mean is in [api.md](api.md).
A field that is not here is a 400 that names it; so is a refused one with another value than those
it may have.

"""


def field_tables() -> str:
    """The page in Markdown: one table for each kind of body."""
    return HEAD + "\n".join(_table(*section) for section in SECTIONS)


def _table(
    title: str,
    body: type[Body],
    refused: Mapping[str, tuple[Any, ...]],
    descriptive: tuple[str, ...],
) -> str:
    rows = dict.fromkeys(body.model_fields, "supported")
    rows |= dict.fromkeys(descriptive, "accepted, changes nothing")
    for name, values in refused.items():
        harmless = " or ".join(f"`{msgspec.json.encode(value).decode()}`" for value in values)
        rows[name] = f"refused, unless null or {harmless}" if harmless else "refused, unless null"
    lines = [f"| `{title}` | |", "| --- | --- |"]
    lines += [f"| `{name}` | {rows[name]} |" for name in sorted(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(field_tables(), end="")
