"""Fields are supported, advisory or refused: what becomes of each, wherever it stands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from headstart.server.http.app import create_app
from headstart.server.http.errors import APIError
from headstart.server.http.policy import (
    MAX_BODIES,
    Advisory,
    Body,
    Notes,
    Refused,
    body_at,
)
from headstart.server.settings import ServerSettings

IGNORED = "x-headstart-ignored"
CHAT = "/v1/chat/completions"


class Part(Body):
    kind: Literal["a", "b"]
    mark: Annotated[Any, Advisory(harmless=(False,))] = None
    sound: Annotated[Any, Refused("this one is silent")] = None


class Whole(Body):
    n: int | None = None
    hint: Annotated[Any, Advisory()] = None
    effort: Annotated[Any, Refused("see n", harmless=(1, "auto"))] = None
    part: Part | None = None
    parts: list[Part] | None = None
    values: list[int] | None = None


def settled(strict: bool = False, **fields: Any) -> Notes:
    notes = Notes(strict=strict)
    Whole.model_validate(fields).settle(notes)
    return notes


def refusal(notes: Notes) -> APIError:
    with pytest.raises(APIError) as caught:
        notes.check()
    return caught.value


@pytest.mark.parametrize(
    ("fields", "header"),
    [
        ({"n": 1}, ""),
        ({"hint": 0}, "hint"),
        ({"hint": {"a": [1]}, "other": 1}, "hint, other"),
        ({"part": {"kind": "a", "mark": True, "x": 1}}, "part.mark, part.x"),
        ({"part": {"kind": "a", "mark": False}}, ""),
        ({"part": {"kind": "a", "mark": 0}}, "part.mark"),
        (
            {"parts": [{"kind": "a", "x": 1}, {"kind": "b", "x": 2, "mark": 1}]},
            "parts[].x, parts[].mark",
        ),
        ({"effort": 1, "values": [1, 2]}, ""),
    ],
)
def test_what_is_ignored_is_named_once(fields: dict[str, Any], header: str) -> None:
    notes = settled(**fields)
    notes.check()
    assert notes.header() == header


def test_null_asks_for_nothing() -> None:
    part = {"kind": "a", "mark": None, "sound": None, "x": None}
    for strict in (False, True):
        notes = settled(strict, n=None, hint=None, effort=None, part=part, parts=[part], other=None)
        notes.check()
        assert notes.header() == ""


def test_all_that_is_refused_is_in_one_error() -> None:
    parts = [{"kind": "a", "sound": 1}, {"kind": "a", "sound": 2}]
    error = refusal(settled(effort=True, parts=parts, part={"kind": "a", "sound": 0}, new=1))
    assert error.status == 400
    assert error.message == (
        "effort is not supported: see n; part.sound is not supported: this one is silent; "
        "parts[0].sound is not supported: this one is silent; "
        "parts[1].sound is not supported: this one is silent"
    )
    assert (error.param, error.code) == ("effort", "unsupported_parameter")


def test_unknown_fields_may_be_refused() -> None:
    parts = [{"kind": "a"}, {"kind": "a", "y": 1}]
    error = refusal(settled(strict=True, new=1, parts=parts))
    assert error.message == "new is not a known field; parts[1].y is not a known field"
    assert (error.param, error.code) == ("new", "unknown_parameter")
    error = refusal(settled(strict=True, new=1, effort=2))
    assert error.message == "effort is not supported: see n; new is not a known field"
    assert (error.param, error.code) == ("effort", "unsupported_parameter")
    notes = settled(strict=True, hint=1)
    notes.check()
    assert notes.header() == "hint"


@pytest.mark.parametrize("value", ["auto", 1, None])
def test_values_that_ask_for_nothing(value: Any) -> None:
    settled(effort=value).check()


@pytest.mark.parametrize("value", [True, 1.0, "none", 0, [], {}])
def test_values_are_compared_by_type_too(value: Any) -> None:
    refusal(settled(effort=value))


def test_the_header_is_short_and_one_line_of_ascii() -> None:
    odd = {f"é\r\n{i},\u2028 " + "x" * 200: i for i in range(100)}
    header = settled(**odd).header()
    assert header.isascii()
    assert header.isprintable()
    names = header.split(", ")
    assert len(names) == 33
    assert names[-1] == "..."
    assert len(header) < 5000
    assert all("," not in name for name in names)


def test_errors_name_a_few_fields() -> None:
    parts = [{"kind": "a", "sound": 1, "x" * 200: 1}] * 1000
    for strict in (False, True):
        assert len(refusal(settled(strict=strict, parts=parts)).message) < 10_000


def test_parts_that_are_checked_by_hand() -> None:
    notes = Notes()
    part = body_at(Part, {"kind": "a", "mark": 1, "sound": 2, "x": 3}, "parts[4]", notes)
    assert part.kind == "a"
    assert notes.header() == "parts[].mark, parts[].x"
    assert refusal(notes).param == "parts[4].sound"
    for value, param, words in (
        (3, "parts[4]", "must be an object"),
        ({"kind": "c"}, "parts[4].kind", "'a' or 'b'"),
        ({}, "parts[4].kind", "required"),
    ):
        with pytest.raises(APIError, match=words) as caught:
            body_at(Part, value, "parts[4]", notes)
        assert caught.value.param == param


def test_there_are_so_many_objects_at_most() -> None:
    parts = [Part(kind="a")] * MAX_BODIES
    with pytest.raises(APIError, match="more than 65536 objects"):
        Whole.model_construct(parts=parts).settle(Notes())


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_names_what_was_ignored(client, chat_body, stream):
    body = chat_body(stream=stream, temprature=1, metadata={"a": "b"}, store=False)
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200
    assert response.headers[IGNORED] == "metadata, temprature"
    assert IGNORED not in (await client.post(CHAT, json=chat_body(stream=stream))).headers


async def test_errors_name_it_too(client, chat_body):
    response = await client.post(CHAT, json=chat_body(n=99, temprature=1))
    assert response.status_code == 400
    assert response.headers[IGNORED] == "temprature"


async def test_a_server_that_refuses_unknown_fields(engine, tokenizer, connect_to, chat_body):
    settings = ServerSettings(unknown_fields="refuse")
    client = connect_to(create_app(engine, tokenizer, model_names=["tiny"], settings=settings))
    message = {"role": "user", "content": [{"type": "text", "text": "a", "y": 1}], "x": 1}
    body = chat_body(messages=[message], temprature=1, top=None, modalities=["audio"])
    error = (await client.post(CHAT, json=body)).json()["error"]
    assert error["message"] == (
        "modalities is not supported: this model writes text; temprature is not a known field; "
        "messages[0].x is not a known field; messages[0].content[0].y is not a known field"
    )
    assert engine.added == []
    for path, fields in (
        ("/v1/completions", {"prompt": "a", "x": 1}),
        ("/v1/embeddings", {"input": "a", "x": 1}),
        ("/v1/score", {"text_1": "a", "text_2": "b", "x": 1}),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "x": 1}),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "x": 1}]}),
        ("/v2/embed", {"texts": ["a"], "x": 1}),
        ("/tokenize", {"prompt": "a", "x": 1}),
        ("/apply-template", {"messages": [message | {"content": "a"}]}),
    ):
        response = await client.post(path, json={"model": "tiny"} | fields)
        assert response.status_code == 400, path
        assert "x is not a known field" in response.json()["error"]["message"]
    assert engine.added == []
