"""Log-probabilities in the two shapes of the API: chat completions and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headstart.engine.messages import TokenLogprobs
from headstart.server.openai.shown import TokenNames

# JSON has no infinity; a token that a filter has ruled out gets this instead, as vLLM has it.
MIN_LOGPROB = -9999.0


def chat_logprobs(tokenizer: TokenNames, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}``."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(data),
        }

    content = [
        entry(token.token_id, token.logprob)
        | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: TokenNames, tokens: Sequence[TokenLogprobs], offsets: Sequence[int]
) -> dict[str, Any]:
    """``{"text_offset", "tokens", "token_logprobs", "top_logprobs"}``, lists of equal length.

    ``top_logprobs`` holds the sampled token beside the most likely ones. A token that is no text by
    itself is written ``bytes:\\xe2\\x82``.
    """

    def text(token_id: int) -> str:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def top(token: TokenLogprobs) -> dict[str, float]:
        likely = {text(token_id): max(logprob, MIN_LOGPROB) for token_id, logprob in token.top}
        likely.setdefault(text(token.token_id), max(token.logprob, MIN_LOGPROB))
        return likely

    return {
        "text_offset": list(offsets),
        "tokens": [text(token.token_id) for token in tokens],
        "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
        "top_logprobs": [top(token) for token in tokens],
    }
