"""ServerSettings: settings of the HTTP side. Engine settings are in engine/config.py."""

from dataclasses import dataclass, field
from pathlib import Path

from headstart.engine.sampling.params import Pooling
from headstart.server.http.keys import Keys

MIB = 1024 * 1024

MANY_TOKENS = 64 * 1024
"""So many of a prompt are always looked at: it may be longer than the context, and be cut."""

TOOL_CALL_PARSERS = (
    *("auto", "none", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "glm"),
    *("deepseek_v3", "deepseek_v31", "phi4", "granite", "tool_code", "harmony"),
)
REASONING_PARSERS = ("auto", "none", "think")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Mostly limits on what one HTTP request may ask for; going over one is a 4xx that names it.

    max_body_bytes:     request body, bytes (413)
    max_body_values:    numbers and texts in one, where a list counts as 4, an object as 16 (413)
    max_n:              ``n``
    max_prompts:        prompts of one completion
    max_texts:          texts to embed, compare or rank in one request
    max_text_contexts:  tokens of these, in contexts of the model
    max_choices:        prompts times ``n``
    max_messages:       messages in one chat
    max_stop:           stop strings
    max_stop_chars:     length of one stop string, characters
    max_stop_token_ids: entries of ``stop_token_ids``
    max_logit_bias:     entries of ``logit_bias``
    max_allowed_token_ids: entries of ``allowed_token_ids``
    max_bad_words:      strings of ``bad_words``
    max_bad_word_chars: length of one of them, characters
    max_schema_chars:   length of a schema, regex, grammar or list of choices, characters
    max_schema_depth:   levels of objects and lists in a schema
    max_choice:         strings of one ``choice``
    grammar_timeout:    until a schema or grammar is compiled, seconds
    max_segments:       spans of one ``segment_mask``
    max_contexts:       ids in one /detokenize, and, if that is more than MANY_TOKENS, tokens of a
                        prompt, in contexts of the model
    max_documents:      entries of ``documents``
    max_template_kwarg_chars: length of one value of ``chat_template_kwargs``
    max_template_chars: what a chat template makes of one chat, characters (400)
    template_timeout:   how long it may take, seconds (400)
    max_tools:          tools in one request
    max_tool_bytes:     one of them as JSON
    max_stored_responses: answers of /v1/responses, and conversations, kept; the least recently
                        used go
    max_stored_bytes:   these, as JSON, with their items
    inline_chars:       longer texts are tokenised in a thread, so that streams are not held up
    max_connections:    open at a time (503)
    max_bodies_bytes:   bodies being read at a time (503)
    max_waiting_texts:  requests whose prompts are rendered and tokenised, or wait for it (503)
    max_waiting_grammars: those whose grammars are checked, or wait for it (503)
    segment_mask:       of chats that name none, "causal" or "turns"; None: as the model declares
    pooling:            of prompts to vectors, where none is named; None: as the model declares
    lora_dir:           where adapters may be loaded from at run time; None: nowhere
    tool_call_parser:   how calls of tools are written, one of TOOL_CALL_PARSERS
    reasoning_parser:   how thoughts are, one of REASONING_PARSERS
    body_timeout:       until a body is complete, seconds (408)
    request_timeout:    until an answer is complete, seconds (504); None: as long as it takes
    ping_interval:      the longest silence within a stream, seconds; 0: any
    keys:               who may ask what; none: everybody may everything
    shared_cache:       KV is shared between keys, too (http/cache_scope.py)
    allowed_hosts:      without API keys, what Host may be beside this machine's loopback; "*" is
                        all. None: neither Host nor Origin is looked at, for an app that no socket
                        leads to
    allowed_origins:    web pages that may ask from a browser (CORS); "*" is all
    access_log_format:  "text" or "json"
    unknown_fields:     those that no API knows: "ignore" (told in a header) or "refuse" (400)
    """

    max_body_bytes: int = 8 * MIB
    max_body_values: int = 256 * 1024
    max_n: int = 16
    max_prompts: int = 64
    max_texts: int = 2048
    max_text_contexts: int = 64
    max_choices: int = 128
    max_messages: int = 4096
    max_stop: int = 64
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 256
    max_logit_bias: int = 1024
    max_allowed_token_ids: int = 4096
    max_bad_words: int = 128
    max_bad_word_chars: int = 256
    max_schema_chars: int = 64 * 1024
    max_schema_depth: int = 64
    max_choice: int = 1024
    grammar_timeout: float = 5.0
    max_segments: int = 4096
    max_contexts: int = 4
    max_documents: int = 256
    max_template_kwarg_chars: int = 4096
    max_template_chars: int = 4 * MIB
    template_timeout: float = 5.0
    max_tools: int = 128
    max_tool_bytes: int = 64 * 1024
    max_stored_responses: int = 1024
    max_stored_bytes: int = 64 * MIB
    inline_chars: int = 8192
    max_connections: int = 1024
    max_bodies_bytes: int = 64 * MIB
    max_waiting_texts: int = 1024
    max_waiting_grammars: int = 64
    segment_mask: str | None = None
    pooling: Pooling | None = None
    lora_dir: Path | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    body_timeout: float = 60.0
    request_timeout: float | None = None
    ping_interval: float = 10.0
    keys: Keys = field(default_factory=Keys)
    shared_cache: bool = False
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    access_log_format: str = "text"
    unknown_fields: str = "ignore"
