"""Log-probabilities in the two shapes of the API: chat completions and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from headstart.engine.process.messages import ScoredToken, TokenLogprobs
from headstart.server.api.choices.shown import TokenNames
from headstart.server.http.reply import Echo
from headstart.server.text.detokenizer import Detokenizer
from headstart.server.text.tokenizer import Tokenizer

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
) -> dict[str, list[Any]]:
    """``{"text_offset", "tokens", "token_logprobs", "top_logprobs"}``, lists of equal length.

    ``top_logprobs`` holds the sampled token beside the most likely ones. A token that is no text by
    itself is written ``bytes:\\xe2\\x82``.
    """

    def top(token: TokenLogprobs) -> dict[str, float]:
        likely = {
            _text(tokenizer, token_id): max(logprob, MIN_LOGPROB) for token_id, logprob in token.top
        }
        likely.setdefault(_text(tokenizer, token.token_id), max(token.logprob, MIN_LOGPROB))
        return likely

    return {
        "text_offset": list(offsets),
        "tokens": [_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
        "top_logprobs": [top(token) for token in tokens],
    }


def echoed_logprobs(
    tokenizer: TokenNames, echo: Echo, scores: Sequence[ScoredToken], count: int
) -> dict[str, list[Any]]:
    """The same of a prompt, with the ``count`` likeliest tokens; its first token has none."""
    found = completion_logprobs(tokenizer, [_cut(score, count) for score in scores], ())
    return {
        "text_offset": list(echo.offsets),
        "tokens": [_text(tokenizer, echo.token_ids[0]), *found["tokens"]],
        "token_logprobs": [None, *found["token_logprobs"]],
        "top_logprobs": [None, *found["top_logprobs"]],
    }


def prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[ScoredToken], count: int
) -> list[dict[str, Any] | None]:
    """As vLLM has them: ``[null, {id: {"logprob", "rank", "decoded_token"}, ...}, ...]``, a token
    of the prompt and the ``count`` likeliest ones in its place."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, MIN_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_bytes(token_id).decode("utf-8", "replace"),
        }

    def entries(score: ScoredToken) -> dict[str, Any]:
        likely = enumerate(score.top[:count], 1)
        own = {str(score.token_id): entry(score.token_id, score.logprob, score.rank)}
        return own | {str(token_id): entry(token_id, value, i) for i, (token_id, value) in likely}

    return [None, *map(entries, scores)]


def text_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """The characters of ``text`` before each of the tokens it was made to."""
    detokenizer = Detokenizer(tokenizer.backend, skip_special_tokens=False)
    at, offsets = 0, []
    for token_id in token_ids:
        offsets.append(at)
        piece = detokenizer.push(token_id)
        # A special token may be written in the text, or be none of it.
        if tokenizer.decode([token_id]) or text.startswith(piece, at):
            at += len(piece)
    return offsets


def _cut(score: ScoredToken, count: int) -> ScoredToken:
    return msgspec.structs.replace(score, top=score.top[:count])


def _text(tokenizer: TokenNames, token_id: int) -> str:
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
