"""Thoughts before an answer: told from it however the text is cut, shown, and left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.server.answer import AnswerParser, Reasoning, Text
from headstart.server.reasoning import THINK, ThoughtReader


def read(pieces, *, inside=False):
    """The thoughts and the text."""
    parser = AnswerParser(ThoughtReader(THINK, inside=inside), None)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    kinds = [type(part) for part in parts]
    assert kinds == sorted(kinds, key=[Reasoning, Text].index)
    return tuple(
        "".join(part.text for part in parts if isinstance(part, kind)) for kind in (Reasoning, Text)
    )


@pytest.mark.parametrize(
    ("text", "outside", "inside"),
    [
        ("<think>\nhm\n</think>\n\nYes.\n", ("hm", "Yes.\n"), ("hm", "Yes.\n")),
        ("\n<think>hm</think>Yes.", ("hm", "Yes."), ("hm", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", ("", "Yes."), ("", "Yes.")),
        ("hm\n </think> Yes.", ("", "hm\n </think> Yes."), ("hm", "Yes.")),
        (" Yes <think>", ("", " Yes <think>"), ("Yes <think>", "")),
        ("<think>hm </thin", ("hm </thin", ""), ("hm </thin", "")),
        ("<think>a</think>b</think>", ("a", "b</think>"), ("a", "b</think>")),
        ("<th", ("", "<th"), ("<th", "")),
        (" ", ("", " "), ("", "")),
        ("", ("", ""), ("", "")),
    ],
)
def test_thoughts_and_text(text, outside, inside):
    for pieces in ([text], text):
        assert read(pieces) == outside
        assert read(pieces, inside=True) == inside


PIECES = st.sampled_from(("<think>", "</think>", "<", "</th", "ink>", " ", "\n", "a", "é"))


@given(pieces=st.lists(PIECES, max_size=10), inside=st.booleans(), data=st.data())
def test_cuts_change_nothing(pieces, inside, data):
    text = "".join(pieces)
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    cuts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(cuts, inside=inside) == read([text], inside=inside)


def test_thoughts_come_as_they_grow():
    reader = ThoughtReader(THINK, inside=False)
    pieces = ("<thi", "nk>\n", "so ", "what", "</", "think>\n", "\nYes", " ")
    found = [reader.push(piece) for piece in pieces]
    assert found == [
        [],
        [],
        [Reasoning("so")],
        [Reasoning(" what")],
        [],
        [],
        [Text("Yes")],
        [Text(" ")],
    ]
