"""Prints docs/request-fields.md: the fields of every kind of request, and what becomes of them.

``python -m headstart.server.api.field_table > docs/request-fields.md``

Made from the bodies that the server checks requests with, so it says what it does.
"""

from __future__ import annotations

import msgspec

from headstart.server.api.adapters import LoadAdapterBody, UnloadAdapterBody
from headstart.server.api.anthropic_messages.conversation import MessageBody
from headstart.server.api.anthropic_messages.routes import (
    CountTokensBody,
    MessagesBody,
    OutputConfig,
    ThinkingBody,
)
from headstart.server.api.anthropic_messages.tools import Tool
from headstart.server.api.fields import StreamOptions
from headstart.server.api.openai_chat import tools as chat_tools
from headstart.server.api.openai_chat.messages import ChatMessage, RefusalPart, TextPart
from headstart.server.api.openai_chat.rendering import Document as ChatDocument
from headstart.server.api.openai_chat.rendering import ReasoningOptions
from headstart.server.api.openai_chat.routes import ChatBody
from headstart.server.api.openai_completions.routes import CompletionBody
from headstart.server.api.openai_responses.body import (
    CountBody,
    ReasoningBody,
    ResponsesBody,
    TextBody,
)
from headstart.server.api.openai_responses.conversations import ConversationCreateBody, ItemsBody
from headstart.server.api.pooling.cohere_embed import CohereEmbedBody
from headstart.server.api.pooling.embeddings import EmbeddingBody
from headstart.server.api.pooling.score import Document as RankedDocument
from headstart.server.api.pooling.score import RerankBody, ScoreBody
from headstart.server.api.tokens import ApplyTemplateBody, DetokenizeBody, TokenizeBody
from headstart.server.generation.structure import (
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from headstart.server.http.policy import Body, Refused, field_names, policies

SECTIONS: tuple[tuple[str, type[Body]], ...] = (
    ("/v1/chat/completions", ChatBody),
    ("messages[]", ChatMessage),
    ("messages[].content[], text", TextPart),
    ("messages[].content[], refusal", RefusalPart),
    ("messages[].tool_calls[]", chat_tools.ToolCall),
    ("tools[]", chat_tools.Tool),
    ("tools[].function", chat_tools.FunctionBody),
    ("tools[].custom", chat_tools.CustomTool),
    ("response_format", ResponseFormat),
    ("response_format.json_schema", JsonSchemaFormat),
    ("structured_outputs", StructuredOutputs),
    ("documents[]", ChatDocument),
    ("reasoning, in chats", ReasoningOptions),
    ("/v1/completions", CompletionBody),
    ("/v1/responses", ResponsesBody),
    ("reasoning", ReasoningBody),
    ("text", TextBody),
    ("/v1/responses/input_tokens", CountBody),
    ("/v1/conversations", ConversationCreateBody),
    ("/v1/conversations/{conversation_id}/items", ItemsBody),
    ("/v1/messages", MessagesBody),
    ("/v1/messages/count_tokens", CountTokensBody),
    ("messages[] of /v1/messages", MessageBody),
    ("tools[] of /v1/messages", Tool),
    ("thinking", ThinkingBody),
    ("output_config", OutputConfig),
    ("stream_options", StreamOptions),
    ("/v1/embeddings", EmbeddingBody),
    ("/v2/embed", CohereEmbedBody),
    ("/v1/score", ScoreBody),
    ("/v1/rerank", RerankBody),
    ("documents[], in ranks", RankedDocument),
    ("/v1/load_lora_adapter", LoadAdapterBody),
    ("/v1/unload_lora_adapter", UnloadAdapterBody),
    ("/tokenize", TokenizeBody),
    ("/detokenize", DetokenizeBody),
    ("/apply-template", ApplyTemplateBody),
)

HEAD = """# Request fields

Printed by `python -m headstart.server.api.field_table`. What fields mean is in [api.md](api.md).
*Ignored*: any value is accepted, and the header `x-headstart-ignored` names the field; so it does
with fields that are not here, which `--unknown-fields refuse` makes a 400. *Refused*: another value
than null, or those named here, is a 400.

"""


def field_tables() -> str:
    """The page in Markdown: one table for each kind of body."""
    return HEAD + "\n".join(_table(*section) for section in SECTIONS)


def _table(title: str, body: type[Body]) -> str:
    rows = dict.fromkeys(field_names(body), "supported")
    for name, policy in policies(body).items():
        rows[name] = "ignored"
        if isinstance(policy, Refused):
            values = (f"`{msgspec.json.encode(value).decode()}`" for value in policy.harmless)
            said = " or ".join(("null", *values))
            remedy = f": {policy.remedy}" if policy.remedy else ""
            rows[name] = f"refused, unless {said}{remedy}"
    lines = [f"| `{title}` | |", "| --- | --- |"]
    lines += [f"| `{name}` | {rows[name]} |" for name in sorted(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(field_tables(), end="")
