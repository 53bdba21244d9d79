"""Segments against the definition: which rows see which keys, where KV may be cut, what is equal.

Cache keys of two prompts must be equal in a page just if the pages' tokens are, and the segments
that touch them from end to end: ``pages_alike`` says so without hashing.
"""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.engine.errors import RequestError
from headstart.engine.ranges.segments import CAUSAL, Segments, Span, Turn, turn_spans

PAGE = 4


def together(spans: list[Span], i: int, j: int) -> bool:
    return any(start <= i < end and start <= j < end for start, end in spans)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans of one token or more, side by side or apart, and the length of their prompt."""
    spans, end = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 13)), max_size=6)):
        spans.append((end + gap, end + gap + length))
        end += gap + length
    return spans, end + draw(st.integers(0 if end else 1, 9))


@given(layouts(), st.data())
def test_masks_and_limits_are_the_definition(
    layout: tuple[list[Span], int], data: st.DataObject
) -> None:
    spans, n = layout
    segments = Segments.of(data.draw(st.permutations(spans)), n)
    seen = np.array([[j <= i or together(spans, i, j) for j in range(n)] for i in range(n)])
    mask = segments.mask(n)
    assert mask.dtype == np.bool_
    assert (mask == seen).all()
    start = data.draw(st.integers(0, n))
    end = data.draw(st.integers(start, n))
    assert segments.visible(start, end).tolist() == seen[start:end].sum(axis=1).tolist()
    assert bool(segments) is bool((seen != np.tri(n, dtype=bool)).any())
    # Tokens that come later see all before them and change nothing.
    assert segments.visible(n, n + 5).tolist() == list(range(n + 1, n + 6))


@given(layouts())
def test_kv_can_be_cut_where_no_segment_is_cut(layout: tuple[list[Span], int]) -> None:
    spans, n = layout
    segments = Segments.of(spans, n)
    whole = [p for p in range(n + 1) if not (0 < p < n and together(spans, p - 1, p))]
    for position in range(n + 1):
        assert segments.end_of(position) == min(p for p in whole if p >= position)
        assert segments.start_of(position) == max(p for p in whole if p <= position)
    assert segments.end_of(n + 3) == segments.start_of(n + 3) == n + 3


def test_no_segments() -> None:
    assert not CAUSAL
    assert Segments.of([], 5) == CAUSAL
    # A token by itself sees no more in a segment than outside.
    assert Segments.of([(0, 1), (3, 4)], 5) == CAUSAL
    assert CAUSAL.visible(2, 5).tolist() == [3, 4, 5]
    assert CAUSAL.end_of(3) == CAUSAL.start_of(3) == 3


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 6)], r"segment \[0, 6\) is not a span of a prompt of 5 tokens"),
        ([(-1, 2)], r"segment \[-1, 2\) is not a span of a prompt of 5 tokens"),
        ([(3, 3)], r"segment \[3, 3\) is not"),
        ([(4, 2)], r"segment \[4, 2\) is not"),
        ([(5, 6)], r"segment \[5, 6\) is not"),
        ([(0, 3), (2, 5)], r"segments \[0, 3\) and \[2, 5\) overlap"),
        ([(2, 5), (0, 3)], r"segments \[0, 3\) and \[2, 5\) overlap"),
        ([(1, 4), (1, 4)], r"segments \[1, 4\) and \[1, 4\) overlap"),
        ([(0, 5), (2, 3)], r"segments \[0, 5\) and \[2, 3\) overlap"),
        # Of one token, and yet in another.
        ([(2, 3), (2, 5)], r"segments \[2, 3\) and \[2, 5\) overlap"),
    ],
)
def test_what_is_no_layout_is_refused(spans: list[Span], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        Segments.of(spans, 5)
    assert error.value.param == "segment_mask"


def test_segments_side_by_side_are_apart() -> None:
    segments = Segments.of([(3, 5), (0, 3)], 5)
    assert segments.spans == ((0, 3), (3, 5))
    assert segments.visible(0, 5).tolist() == [3, 3, 3, 5, 5]
    assert segments != Segments.of([(0, 5)], 5)


def test_system_and_user_turns_are_segments() -> None:
    turns = [
        Turn("system", 1, 5), Turn("user", 5, 8), Turn("assistant", 8, 10),
        Turn("tool", 10, 12), Turn("user", 12, 14),
    ]  # fmt: skip
    assert turn_spans(turns) == [(1, 5), (5, 8), (12, 14)]


def test_the_token_that_begins_the_text_is_causal() -> None:
    """Also where no special token does: the first turn then begins at 0."""
    assert turn_spans([Turn("system", 0, 5), Turn("user", 5, 8)]) == [(1, 5), (5, 8)]
    assert turn_spans([Turn("user", 0, 1), Turn("user", 1, 3)]) == [(1, 3)]


# ------------------------------------------------------------------------------- cache keys

Prompt = tuple[list[int], list[Span]]


def keys_of(prompt: Prompt, page_size: int = PAGE) -> list[tuple[int, ...]]:
    """A page's key each, for the full pages."""
    tokens, spans = array("i", prompt[0]), prompt[1]
    keys = array("i")
    Segments.of(spans, len(tokens)).extend_keys(keys, tokens, page_size)
    assert len(keys) == len(tokens) // page_size * page_size
    return [tuple(keys[i : i + page_size]) for i in range(0, len(keys), page_size)]


def pages_alike(a: Prompt, b: Prompt, page: int, page_size: int) -> bool:
    """Whether tokens are equal in the page, and in the segments of two tokens that touch it."""
    first, last = page * page_size, (page + 1) * page_size

    def compared(prompt: Prompt) -> object:
        tokens, spans = prompt
        touching = [s for s in spans if s[1] - s[0] > 1 and s[0] < last and s[1] > first]
        return tokens[first:last], [(s, tokens[slice(*s)]) for s in touching]

    return compared(a) == compared(b)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Prompt, Prompt, int]:
    """Two prompts that differ in little or nothing, and a page size."""
    spans, n = draw(layouts())
    tokens = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    other, others = list(tokens), list(spans)
    for _ in range(draw(st.integers(0, 2))):
        change = draw(st.sampled_from(["token", "grow", "move", "drop", "cut", "append"]))
        if change == "token":
            other[draw(st.integers(0, n - 1))] ^= 1
        elif change == "append":
            other += draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        elif not others:
            others = [(0, len(other))]
        else:
            i = draw(st.integers(0, len(others) - 1))
            start, end = others[i]
            before = others[i - 1][1] if i else 0
            after = others[i + 1][0] if i + 1 < len(others) else len(other)
            if change == "grow":
                others[i] = (start, draw(st.integers(end, after)))
            elif change == "move":
                others[i] = (draw(st.integers(before, start)), end)
            elif change == "cut" and end - start > 1:
                at = draw(st.integers(start + 1, end - 1))
                others[i : i + 1] = [(start, at), (at, end)]
            else:
                del others[i]
    return (tokens, spans), (other, others), draw(st.integers(2, 5))


@settings(max_examples=3 * settings.default.max_examples)
@given(neighbours())
def test_pages_are_equal_just_if_their_tokens_and_segments_are(
    drawn: tuple[Prompt, Prompt, int],
) -> None:
    a, b, page_size = drawn
    ours, theirs = keys_of(a, page_size), keys_of(b, page_size)
    for page, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        assert (one == other) is pages_alike(a, b, page, page_size), page


@given(neighbours(), st.data())
def test_keys_grow_with_the_tokens(drawn: tuple[Prompt, Prompt, int], data: st.DataObject) -> None:
    (tokens, spans), _, page_size = drawn
    segments = Segments.of(spans, len(tokens))
    grown, keys = array("i", tokens), array("i")
    for more in data.draw(st.lists(st.integers(0, 9), max_size=9)):
        segments.extend_keys(keys, grown, page_size)
        assert len(keys) == len(grown) // page_size * page_size
        grown.extend([1] * more)
    segments.extend_keys(keys, grown, page_size)
    at_once = array("i")
    segments.extend_keys(at_once, grown, page_size)
    assert keys == at_once


def test_a_causal_page_is_its_tokens() -> None:
    tokens = list(range(100, 120))
    pages = [tuple(tokens[i : i + PAGE]) for i in range(0, 20, PAGE)]
    assert keys_of((tokens, [])) == pages
    keys = keys_of((tokens, [(6, 9)]))
    assert [key == page for key, page in zip(keys, pages, strict=True)] == [
        True, False, False, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("span", "changed", "different"),
    [
        ((6, 11), 7, [1, 2]),  # begins in page 1, ends in page 2
        ((6, 11), 10, [1, 2]),  # a change beyond page 1 changes it all the same
        ((6, 11), 5, [1]),  # before the segment: the tokens of one page
        ((6, 11), 11, [2]),  # after it
        ((5, 7), 6, [1]),  # inside of a page
        ((8, 12), 8, [2]),  # just a page
        ((3, 17), 16, [0, 1, 2, 3, 4]),  # several pages: each of them
        ((4, 16), 9, [1, 2, 3]),
        ((1, 20), 1, [0, 1, 2, 3, 4]),
    ],
)
def test_a_token_of_a_segment_changes_all_its_pages(
    span: Span, changed: int, different: list[int]
) -> None:
    tokens = list(range(100, 120))
    other = [token + (i == changed) for i, token in enumerate(tokens)]
    ours, theirs = keys_of((tokens, [span])), keys_of((other, [span]))
    assert [i for i in range(5) if ours[i] != theirs[i]] == different


@pytest.mark.parametrize(
    ("spans", "others", "different"),
    [
        ([(1, 9)], [(2, 9)], [0, 1, 2]),
        ([(1, 9)], [(1, 8)], [0, 1, 2]),
        ([(1, 9)], [(1, 5), (5, 9)], [0, 1, 2]),
        ([(1, 9)], [], [0, 1, 2]),
        ([(1, 9)], [(1, 9), (9, 11)], [2]),
        ([(1, 9), (13, 18)], [(1, 9), (14, 18)], [3, 4]),
        # Ends of other segments in the same page, each by itself.
        ([(0, 2), (2, 4), (6, 8)], [(0, 4), (6, 8)], [0]),
        ([(2, 5), (5, 7), (7, 10)], [(2, 5), (5, 7), (8, 10)], [1, 2]),
        ([(3, 5), (5, 7), (7, 9)], [(2, 5), (5, 7), (7, 9)], [0, 1]),
    ],
)
def test_another_structure_changes_the_pages_it_touches(
    spans: list[Span], others: list[Span], different: list[int]
) -> None:
    tokens = [7] * 20
    ours, theirs = keys_of((tokens, spans)), keys_of((tokens, others))
    assert [i for i in range(5) if ours[i] != theirs[i]] == different
