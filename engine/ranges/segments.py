"""Segments: spans of the prompt whose tokens see each other whole (MAS, arXiv 2412.18487).

    row i sees key j   iff   j <= i   or   i and j lie in the same segment

Segments come from turns: each system turn and each user turn is one, the template's own tokens of
that turn included. Everything else is causal: the token that begins the text, assistant turns, the
header that opens the answer, and whatever is generated.

    tokens    B  s s s s  u u u  a a  u u     B: begin of text
    turns        system   user   asst user
    row 2     x  x x x x  . . .  . .  . .     a row sees all of its segment, and what is before
    row 6     x  x x x x  x x x  . .  . .
    row 8     x  x x x x  x x x  x .  . .     an assistant's row sees up to itself
    visible   1  5 5 5 5  8 8 8  9 10 12 12   so a row still sees a *prefix* of the keys

Hence no custom mask: KV ranges with these limits (batch.py). And two rules. A segment's rows go
through each layer together, since a row's keys feed all others: whoever computes rows of a segment
computes it to its end (schedule/scheduler.py). And the KV of a token depends on the whole segment,
beyond the token and beyond its page, so the cache compares whole segments (``cache_keys``).
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headstart.engine.errors import RequestError

Span = tuple[int, int]
"""First token, and the one after the last."""

SEGMENT_ROLES = ("system", "user")
"""Whose turns are segments (the paper, section 3: the blocks)."""

MASKS = ("causal", "turns")
"""What a model, an adapter or a request may ask for by name. turns: segments from the chat's."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens ``[start, end)`` of a rendered chat: one message, or messages the template joins."""

    role: str
    start: int
    end: int


def turn_spans(turns: Iterable[Turn]) -> list[Span]:
    """The turns that are segments, without the token that begins the text.

    Where no special token does, the first turn holds it. It is causal all the same: models park
    attention on it, and it is what they know only while it sees nothing but itself. Letting it see
    the default model's system turn costs 3.6 nats a token of an answer, all else of the mask 0.1.
    """
    return [
        (max(turn.start, 1), turn.end)
        for turn in turns
        if turn.role in SEGMENT_ROLES and turn.end > 1
    ]


@dataclass(frozen=True, slots=True)
class Segments:
    """Disjoint spans in order, each of two tokens or more: a segment of one token is causal."""

    spans: tuple[Span, ...] = ()
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(start for start, _ in self.spans))

    @classmethod
    def of(cls, spans: Iterable[Span], num_tokens: int) -> Segments:
        """Segments of a prompt. Raises RequestError for spans outside it, empty or overlapping."""
        ordered = sorted(spans)
        before = None
        for start, end in ordered:
            if not 0 <= start < end <= num_tokens:
                raise RequestError(
                    f"segment [{start}, {end}) is not a span of a prompt of {num_tokens} tokens",
                    "segment_mask",
                )
            if before is not None and start < before[1]:
                raise RequestError(
                    f"segments [{before[0]}, {before[1]}) and [{start}, {end}) overlap",
                    "segment_mask",
                )
            before = (start, end)
        return cls(tuple((start, end) for start, end in ordered if end - start > 1))

    def __bool__(self) -> bool:
        return bool(self.spans)

    def end_of(self, position: int) -> int:
        """End of the segment that begins before ``position`` and ends after it; else ``position``.

        KV of ``[0, position)`` can be computed by itself only where that is ``position``.
        """
        i = bisect_right(self._starts, position - 1) - 1
        return max(self.spans[i][1], position) if i >= 0 else position

    def start_of(self, position: int) -> int:
        """The start of that segment; else ``position``."""
        i = bisect_right(self._starts, position - 1) - 1
        return self.spans[i][0] if i >= 0 and self.spans[i][1] > position else position

    def visible(self, start: int, end: int) -> array[int]:
        """How many keys each of the rows ``[start, end)`` sees."""
        limits = array("i", range(start + 1, end + 1))
        for first, last in self.spans:
            if first < end and last > start:
                a, b = max(first, start), min(last, end)
                limits[a - start : b - start] = array("i", [last]) * (b - a)
        return limits

    def mask(self, num_tokens: int) -> npt.NDArray[np.bool_]:
        """What each row sees, bool ``[num_tokens, num_tokens]``: to train and to test with."""
        visible = np.array(self.visible(0, num_tokens))
        seen: npt.NDArray[np.bool_] = np.arange(num_tokens)[None, :] < visible[:, None]
        return seen

    def extend_keys(self, keys: array[int], token_ids: array[int], page_size: int) -> None:
        """Bring ``keys``, by which the cache compares, up to the last full page of ``token_ids``.

        A page that no segment touches is its tokens. One that is touched is a digest of its tokens
        and of each of those segments from end to end, as long as its tokens would be: pages are
        equal only if the segments are, beyond the page.
        """
        page_bytes = page_size * token_ids.itemsize
        digests: dict[Span, bytes] = {}
        for start in range(len(keys), len(token_ids) // page_size * page_size, page_size):
            end = start + page_size
            page = token_ids[start:end]
            i = bisect_right(self._starts, end - 1)
            touching = [span for span in self.spans[max(i - page_size, 0) : i] if span[1] > start]
            if touching:
                digest = hashlib.shake_256(page.tobytes())
                for span in touching:
                    if span not in digests:
                        whole = array("i", span) + token_ids[slice(*span)]
                        digests[span] = hashlib.blake2b(whole.tobytes()).digest()
                    digest.update(digests[span])
                page = array("i")
                page.frombytes(digest.digest(page_bytes))
            keys.extend(page)


CAUSAL = Segments()
"""No segments: each token sees itself and those before it."""
