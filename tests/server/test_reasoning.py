"""Thoughts before an answer: told from it however the text is cut, shown, and left out."""

from __future__ import annotations

import httpx
import msgspec
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from headstart.server.http.app import create_app
from headstart.server.text.answer import AnswerParser, Reasoning, Text
from headstart.server.text.reasoning import THINK, ThoughtReader
from headstart.server.text.tokenizer import Tokenizer


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


# In chats

URL = "/v1/chat/completions"
OPENED = (
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)
NOT_OPENED = OPENED.replace("<think>\n", "{# <think> #}")


@pytest.fixture
def ask(engine, backend):
    """``await ask(text, template, field=value)``: the response to an answer of this text."""

    async def send(text, template=NOT_OPENED, *, special=(), **fields):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        own.add_special_tokens([AddedToken(token, special=True) for token in special])
        engine.model = msgspec.structs.replace(engine.model, vocab_size=own.get_vocab_size())
        tokenizer = Tokenizer(own, chat_template=template)
        engine.answer = lambda _: tokenizer.encode(text, add_special_tokens=False)
        app = create_app(engine, tokenizer, model_names=["tiny"])
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
            response = await http.post(URL, json=body)
        assert response.status_code == 200, response.text
        return response

    return send


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize(
    ("text", "template"),
    [("<think>\nhm\n</think>\n\nYes.", NOT_OPENED), ("hm\n</think>\n\nYes.", OPENED)],
)
async def test_whole_answers(ask, text, template, special):
    [choice] = (await ask(text, template, special=special)).json()["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("include", [None, True, False])
async def test_streams(ask, events, include):
    response = await ask("<think>so what</think>Yes.", stream=True, include_reasoning=include)
    chunks = [chunk["choices"][0] for chunk in events(response.text)[:-1]]
    deltas = [chunk["delta"] for chunk in chunks]
    thoughts, text = (
        "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")
    )
    assert text == "Yes."
    assert thoughts == ("" if include is False else "so what")
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    assert all(len(set(delta) & {"content", "reasoning"}) < 2 for delta in deltas)
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_thoughts_are_left_out_if_asked_for(ask):
    [choice] = (await ask("<think>hm</think>Yes.", include_reasoning=False)).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


async def test_thoughts_cut_short(ask):
    answer = (await ask("hm hm hm", OPENED, max_tokens=2)).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"].startswith("h")
    assert choice["finish_reason"] == "length"


async def test_models_that_do_not_think(ask):
    text = "<think>hm</think>Yes."
    [choice] = (await ask(text, "{{ messages[0].content }}")).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thoughts_of_earlier_answers_reach_the_template(ask, engine, tokenizer, field):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Yes.", field: "the fox"},
        {"role": "user", "content": "so"},
    ]
    template = (
        "{% for message in messages %}{{ message.reasoning_content }}/{{ message.reasoning }}/"
        "{{ message.content }};{% endfor %}"
    )
    await ask("", template, messages=chat)
    assert tokenizer.decode(engine.added[0].token_ids) == "//hi;the fox/the fox/Yes.;//so;"
