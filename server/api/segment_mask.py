"""The field ``segment_mask``: which spans of a prompt are segments (engine/ranges/segments.py).

    chat           null | "causal" | "turns"
    completions    null | "causal" | {"characters": [[start, end], ...]} | {"tokens": ...}

Characters are Unicode code points of the prompt; tokens those the server computes, special tokens
that it adds included. Either way ``end`` is the one after the last.
"""

from __future__ import annotations

from bisect import bisect, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import WithJsonSchema

from headstart.engine.ranges.segments import MASKS, Span
from headstart.server.http.errors import bad_request
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Place

FIELD = "segment_mask"
UNITS = ("characters", "tokens")

_PAIRS = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
}
ChatMaskField = Annotated[Any, WithJsonSchema({"enum": [*MASKS, None]}, mode="validation")]
CompletionMaskField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["causal", None]},
                *(
                    {
                        "type": "object",
                        "properties": {unit: _PAIRS},
                        "required": [unit],
                        "additionalProperties": False,
                    }
                    for unit in UNITS
                ),
            ]
        },
        mode="validation",
    ),
]


@dataclass(frozen=True, slots=True)
class Spans:
    """Segments of a completion's prompt as they came, at least one; ``of_prompt`` checks them."""

    unit: str
    entries: Sequence[Any]

    def check_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """Raise APIError for prompts that cannot have such spans."""
        if len(prompts) > 1:
            raise bad_request(
                f"{FIELD} with spans needs a single prompt; there are {len(prompts)}", FIELD
            )
        if self.unit == "characters" and not isinstance(prompts[0], str):
            raise bad_request(
                f'{FIELD} with "characters" needs a prompt that is text; with a prompt of token '
                'ids use "tokens"',
                FIELD,
            )

    def of_prompt(self, num_tokens: int, text: str, places: Sequence[Place | None]) -> list[Span]:
        """In tokens. ``text`` and ``places`` matter to characters. Raises APIError."""
        tokens = _Boundaries(text, places) if self.unit == "characters" else None
        length = num_tokens if tokens is None else len(text)
        spans: list[Span] = []
        before: list[tuple[int, int, str]] = []  # in order
        for i, entry in enumerate(self.entries):
            path = f"{FIELD}.{self.unit}[{i}]"
            start, end = self._checked(entry, path, length)
            at = bisect(before, (start, end))
            for other in before[max(at - 1, 0) : at + 1]:
                if start < other[1] and other[0] < end:
                    raise bad_request(
                        f"{path}, [{start}, {end}), overlaps {other[2]}, [{other[0]}, {other[1]})",
                        path,
                    )
            before.insert(at, (start, end, path))
            if tokens is not None:
                start, end = tokens.before(start, f"{path}[0]"), tokens.before(end, f"{path}[1]")
                if start == end:
                    raise bad_request(f"{path}: no token comes of these characters", path)
            spans.append((start, end))
        return spans

    def _checked(self, entry: Any, path: str, length: int) -> Span:
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not is_pair or any(type(value) is not int for value in entry):
            raise bad_request(f"{path} must be [start, end], two whole numbers", path)
        start, end = entry
        if not 0 <= start < end <= length:
            shown = ", ".join(str(value) if abs(value) < 2**63 else "..." for value in entry)
            raise bad_request(
                f"{path} is [{shown}); the prompt has {length} {self.unit}, and "
                f"0 <= start < end <= {length} has to hold",
                path,
            )
        return start, end


class _Boundaries:
    """Where a text may be cut without cutting a token."""

    def __init__(self, text: str, places: Sequence[Place | None]) -> None:
        self._text = text
        self._first = next((i for i, place in enumerate(places) if place is not None), 0)
        of_text = [place for place in places if place is not None]
        self._starts = [start for start, _ in of_text]
        self._ends = [end for _, end in of_text]

    def before(self, character: int, path: str) -> int:
        """The token that begins at ``character``, or later; raises APIError within a token."""
        # Several tokens may have the same place: parts of one character.
        at = bisect_right(self._ends, character)
        if at < len(self._ends) and self._starts[at] < character:
            start, end = self._starts[at], self._ends[at]
            token = self._text[start:end]
            raise bad_request(
                f"{path} is {character}, inside of the token {token[:80]!r}, characters "
                f"[{start}, {end}); a segment has to begin and end where tokens do",
                path,
            )
        return self._first + at


def chat_mask(value: Any) -> str | None:
    """One of MASKS, or None for the default. Raises APIError."""
    if value is None or (isinstance(value, str) and value in MASKS):
        return value
    raise bad_request(
        f'{FIELD} must be "causal", "turns" or null in a chat; '
        "/v1/completions takes spans of its prompt",
        FIELD,
        "invalid_value",
    )


def completion_spans(value: Any, settings: ServerSettings) -> Spans | None:
    """The segments asked for; None for a causal mask. Raises APIError."""
    if value is None or value == "causal":
        return None
    if value == "turns":
        raise bad_request(
            f'{FIELD} "turns" needs turns, and the prompt of /v1/completions has none: '
            "give its spans, or use /v1/chat/completions",
            FIELD,
            "invalid_value",
        )
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in UNITS:
        raise bad_request(
            f'{FIELD} must be "causal", null, {{"characters": [[start, end], ...]}} or '
            '{"tokens": [[start, end], ...]}',
            FIELD,
            "invalid_value",
        )
    [(unit, entries)] = value.items()
    path = f"{FIELD}.{unit}"
    if not isinstance(entries, list):
        raise bad_request(f"{path} must be a list of [start, end]", path)
    if len(entries) > settings.max_segments:
        raise bad_request(
            f"{path} has {len(entries)} spans; at most {settings.max_segments} are allowed", path
        )
    return Spans(unit, entries) if entries else None
