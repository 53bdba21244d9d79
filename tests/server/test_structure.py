"""What an answer has to follow: every field to a grammar, or to an error that names what is wrong.

That outputs follow grammars is in tests/engine/test_grammar.py, and for JSON schemas by the
hundred in tests/system/default_model/test_schema_suite.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI
from llguidance import LLMatcher, LLTokenizer

from headstart.engine.errors import RequestError
from headstart.server.generation.grammar_check import GrammarChecker
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

URLS = ("/v1/chat/completions", "/v1/completions")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARK_CHAIN = "start: r0\n" + "\n".join(f"r{i}:r{i + 1}" for i in range(6000)) + '\nr6000: "a"'
SLOW = "start: R0\n" + "\n".join(f'R{i}:R{i + 1}|"x{i}"' for i in range(3000)) + '\nR3000: "a"'
"""Some 30 seconds of compiling."""


def body(url: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "hi"}
    if "chat" in url:
        prompt = {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": "tiny", **prompt, **fields}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings()


@pytest.fixture
def spells(tokenizer: Tokenizer) -> Callable[[str, str], bool]:
    """Whether a grammar accepts a text, whole."""
    vocabulary = LLTokenizer(tokenizer.backend.to_str(), n_vocab=400, eos_token=0)

    def check(grammar: str, text: str) -> bool:
        matcher = LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = vocabulary.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.fixture
async def app(app: FastAPI) -> AsyncIterator[FastAPI]:
    yield app
    await app.state.runtime.grammars.close()


ASKED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"response_format": {"type": "json_object"}},
        ["{}", '{"a": [1, null]}', '{\n  "a": {}\n}'],
        ["[]", "1", "{} ", "text", '{"a":' + " " * 3 + "1}", '{\n\n"a":1}'],
    ),
    (
        {"response_format": json_schema(PERSON, strict=True, description="who")},
        ['{"name": "x", "age": 1}', '{"name":"é\\n","age":-1}'],
        ['{"name": "x"}', '{"age": 1, "name": "x"}', '{"name": "x", "age": 1, "b": 2}'],
    ),
    ({"response_format": json_schema(True)}, ["1", "[]", '"a"'], ["a"]),
    (
        {"response_format": {"type": "json_object", "schema": PERSON}},
        ['{"name":"","age":0}'],
        ["{}"],
    ),
    ({"response_format": {"type": "regex", "pattern": "[ab]+-[0-9]"}}, ["ab-1"], ["ab-", "c-1"]),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a" "b"?'}}, ["a", "ab"], ["b"]),
    ({"structured_outputs": {"json": PERSON}}, ['{"name":"","age":0}'], ["{}"]),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, ['{"name":"","age":0}'], ["{}"]),
    ({"structured_outputs": {"json_object": True}}, ["{}", '{ "a":1}'], ["[]"]),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        ['{"a":1}'],
        ['{"a": 1}'],
    ),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " {2}"}},
        ["[1,  2]"],
        ["[1, 2]", "[1,\n\n2]"],
    ),
    ({"structured_outputs": {"regex": "a{3}"}}, ["aaa"], ["aa", "aaaa"]),
    ({"structured_outputs": {"choice": ['a"b', "c\nd", "é\\"]}}, ['a"b', "c\nd", "é\\"], ["a"]),
    ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]+'}}, ["x12"], ["x"]),
    ({"guided_json": PERSON}, ['{"name":"","age":0}'], ["{}"]),
    ({"guided_regex": "yes|no"}, ["yes", "no"], ["maybe"]),
    ({"guided_choice": ["yes", "no"]}, ["yes", "no"], ["maybe"]),
    ({"guided_grammar": "start: /[xy]/"}, ["x"], ["xy"]),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("fields", "right", "wrong"), ASKED)
async def test_fields_become_grammars(
    client: httpx.AsyncClient,
    engine: Any,
    spells: Callable[[str, str], bool],
    url: str,
    fields: dict[str, Any],
    right: list[str],
    wrong: list[str],
) -> None:
    response = await client.post(url, json=body(url, **fields))
    assert response.status_code == 200, response.text
    grammar = engine.added[-1].params.grammar
    assert [text for text in right if not spells(grammar, text)] == []
    assert [text for text in wrong if spells(grammar, text)] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"structured_outputs": None, "guided_json": None},
        {"structured_outputs": {"json_object": False}},
        {"response_format": {"type": "text", "json_schema": None, "other": 1}},
        {"structured_outputs": {"jsn": {}, "disable_fallback": True}},
    ],
)
async def test_nothing_asked_for_is_no_grammar(
    client: httpx.AsyncClient, engine: Any, fields: dict[str, Any]
) -> None:
    for url in URLS:
        assert (await client.post(url, json=body(url, **fields))).status_code == 200
        assert engine.added[-1].params.grammar is None


async def test_what_is_ignored_of_them_is_named(client: httpx.AsyncClient) -> None:
    asked = (
        {"response_format": json_schema({}, other=1) | {"more": 1}},
        {"structured_outputs": {"jsn": {}, "disable_fallback": True, "regex": None}},
    )
    names = (
        {"response_format.more", "response_format.json_schema.other"},
        {"structured_outputs.jsn", "structured_outputs.disable_fallback"},
    )
    for url in URLS:
        for fields, ignored in zip(asked, names, strict=True):
            response = await client.post(url, json=body(url, **fields))
            assert response.status_code == 200, response.text
            assert set(response.headers["x-headstart-ignored"].split(", ")) == ignored


NESTED: Any = {}
for _ in range(70):
    NESTED = {"items": NESTED}

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format must be an object", "response_format"),
    (
        {"response_format": {"type": "xml"}},
        "'text', 'json_object'",
        "response_format.type",
    ),
    ({"response_format": {"type": "structural_tag"}}, "'regex'", "response_format.type"),
    ({"response_format": {}}, "required", "response_format.type"),
    ({"response_format": {"type": "regex"}}, "1 to 65536", "response_format.pattern"),
    ({"response_format": {"type": "grammar"}}, "1 to 65536", "response_format.grammar"),
    (
        {"response_format": {"type": "json_schema"}},
        "required",
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "required",
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "required",
        "response_format.json_schema.name",
    ),
    (
        {"response_format": json_schema({}, name="x" * 65)},
        "at most 64 characters",
        "response_format.json_schema.name",
    ),
    (
        {"response_format": json_schema({}, name="")},
        "at least 1 character",
        "response_format.json_schema.name",
    ),
    (
        {"response_format": json_schema({}, strict="yes")},
        "a valid boolean",
        "response_format.json_schema.strict",
    ),
    ({"response_format": json_schema(3)}, "a JSON schema", "response_format.json_schema.schema"),
    (
        {"response_format": json_schema(False)},
        "a JSON schema",
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": json_schema(NESTED)},
        "71 levels deep; at most 64",
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": json_schema({"enum": ["x" * 30000, "y" * 30000, "z" * 9000]})},
        "at most 65536",
        "response_format.json_schema.schema",
    ),
    (
        {"guided_json": {"properties": {"a": {"not": {"type": "string"}}}}},
        "guided_json: the keyword 'properties.a.not' cannot be followed",
        "guided_json",
    ),
    (
        {"guided_json": {"items": [{"x": 1}], "x-guidance": {"lenient": True}}},
        "'x-guidance' is not supported",
        "guided_json",
    ),
    (
        {"guided_json": {"type": "array", "uniqueItems": True, "contains": {"const": 1}}},
        "the keywords 'contains', 'uniqueItems' cannot be followed",
        "guided_json",
    ),
    ({"guided_json": {"$ref": "http://example.com/s"}}, "http://example.com/s", "guided_json"),
    ({"guided_json": {"$ref": "file:///etc/passwd"}}, "file:///etc/passwd", "guided_json"),
    ({"guided_json": {"type": "strin"}}, "strin", "guided_json"),
    ({"guided_json": {"$ref": "#"}}, "nothing can follow", "guided_json"),
    ({"guided_json": "{"}, "not JSON", "guided_json"),
    ({"guided_regex": "(?=a)b"}, "look-around", "guided_regex"),
    ({"guided_regex": "("}, "guided_regex: ", "guided_regex"),
    ({"guided_regex": ""}, "1 to 65536 characters", "guided_regex"),
    ({"guided_regex": "a" * 70000}, "1 to 65536 characters", "guided_regex"),
    ({"guided_choice": []}, "list of strings", "guided_choice"),
    ({"guided_choice": ["a", 1]}, "must be a string", "guided_choice[1]"),
    ({"guided_choice": ["a"] * 1025}, "at most 1024", "guided_choice"),
    ({"guided_grammar": "start: b"}, "guided_grammar: ", "guided_grammar"),
    ({"structured_outputs": []}, "must be an object", "structured_outputs"),
    ({"structured_outputs": {"json_object": 1}}, "boolean", "structured_outputs.json_object"),
    (
        {"structured_outputs": {"structural_tag": {}}},
        "not supported: use tools, or a grammar",
        "structured_outputs.structural_tag",
    ),
    (
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
        'not supported: say "additionalProperties": false',
        "structured_outputs.disable_additional_properties",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs.regex and structured_outputs.choice cannot be combined",
        "structured_outputs.choice",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "cannot be combined",
        "guided_regex",
    ),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens and an answer that follows", "min_tokens"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos and", "ignore_eos"),
    ({"guided_regex": "a", "bad_words": ["b"]}, "bad_words and", "bad_words"),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("fields", "message", "param"), WRONG)
async def test_what_is_wrong_is_said_before_any_token(
    client: httpx.AsyncClient,
    engine: Any,
    url: str,
    fields: dict[str, Any],
    message: str,
    param: str,
) -> None:
    for stream in (False, True):
        response = await client.post(url, json=body(url, stream=stream, **fields))
        assert response.status_code == 400
        error = response.json()["error"]
        assert message in error["message"]
        assert error["param"] == param
    assert engine.added == []


async def test_hostile_grammars_are_refused_in_time_and_cost_nobody_else_anything(
    engine: Any, tokenizer: Tokenizer
) -> None:
    """One overflows a stack, one takes half a minute: the process that tries them ends with them,
    while others get their answers."""
    settings = ServerSettings(max_schema_chars=200_000, grammar_timeout=1.5)
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=settings)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(**fields: Any) -> tuple[int, str]:
                reply = await client.post(URLS[0], json=body(URLS[0], **fields), timeout=300)
                text = reply.json().get("error", {}).get("message", "")
                return reply.status_code, text

            assert (await ask(guided_choice=["warm"]))[0] == 200
            hostile = asyncio.create_task(ask(guided_grammar=SLOW))
            answered = -1  # the last one may have ended after the grammar
            while not hostile.done():
                assert (await ask())[0] == 200
                answered += 1
                await asyncio.sleep(0.05)
            assert answered > 0
            status, message = await hostile
            assert status == 400
            assert "more than 1.5 s to compile" in message
            # Known by now: no process tries it again.
            assert await ask(guided_grammar=SLOW) == (status, message)
            assert app.state.runtime.grammars._process is None
            status, message = await ask(guided_grammar=LARK_CHAIN)
            assert (status, "too deep or too large" in message) == (400, True)
            assert (await ask(guided_choice=["others"]))[0] == 200
    finally:
        await app.state.runtime.grammars.close()


async def test_a_grammar_is_checked_once(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer.backend.to_str, 20)
    grammar = LLMatcher.grammar_from_regex("a+")
    try:
        await asyncio.gather(*(checker.check(grammar, 400, [0]) for _ in range(5)))
        assert checker._process is not None
        checker._process.kill()
        await checker.check(grammar, 400, [0])
        with pytest.raises(RequestError, match="regex"):
            await checker.check(LLMatcher.grammar_from_regex("("), 400, [0])
    finally:
        await checker.close()


async def test_who_hangs_up_while_a_grammar_is_checked_leaves_no_answer_behind(
    tokenizer: Tokenizer,
) -> None:
    """The next one must not be told the fate of the one before."""
    checker = GrammarChecker(tokenizer.backend.to_str, 20)
    good, bad = LLMatcher.grammar_from_regex("a"), LLMatcher.grammar_from_regex("(")
    try:
        await checker.check(LLMatcher.grammar_from_regex("b"), 400, [0])
        task = asyncio.create_task(checker.check(bad, 400, [0]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await checker.check(good, 400, [0])
        with pytest.raises(RequestError):
            await checker.check(bad, 400, [0])
    finally:
        await checker.close()


async def test_the_checker_ends_with_the_server(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer.backend.to_str, 20)
    await checker.check(LLMatcher.grammar_from_regex("a"), 400, [0])
    assert checker._process is not None
    process = psutil.Process(checker._process.pid)
    await checker.close()
    assert not process.is_running()
