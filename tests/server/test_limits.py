"""Every limit of ServerSettings, by a request over it and one that is just within it."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from fastapi import FastAPI

import headstart
from headstart.server.generation.chat import MUCH, chat_size
from headstart.server.generation.grammar_check import GrammarChecker
from headstart.server.http.app import create_app
from headstart.server.http.bounds import PIECE, has_values
from headstart.server.settings import Limits, ServerSettings, SharedLimits, settings_of
from headstart.server.text.tokenizer import Tokenizer

CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/tokenize"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ mood }} {{ m['content'] }}{% endfor %}"
    "{% for d in documents or [] %}{{ d['text'] }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi"} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": said(1)} | fields


def said(count: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hi"}] * count


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


class Case(NamedTuple):
    """``value`` of a setting, a body over it and one within it; what the refusal has to say."""

    value: float
    path: str
    over: Any
    within: Any
    words: str
    status: int = 400


CASES = {
    "max_body_bytes": Case(100, TEXT, text(prompt="x" * 100), text(), "larger than 100 bytes", 413),
    "max_body_values": Case(
        64, TEXT, text(prompt=[1] * 64), text(prompt=[1] * 32), "more than 64 numbers", 413
    ),
    "max_n": Case(2, TEXT, text(n=3), text(n=2), "n must be at most 2"),
    "max_prompts": Case(
        2, TEXT, text(prompt=["a"] * 3), text(prompt=["a"] * 2), "at most 2 are allowed"
    ),
    "max_choices": Case(
        4, TEXT, text(prompt=["a"] * 3, n=2), text(prompt=["a"] * 2, n=2), "at most 4 are allowed"
    ),
    "max_messages": Case(
        2, CHAT, chat(messages=said(3)), chat(messages=said(2)), "at most 2 are allowed"
    ),
    "max_stop": Case(2, TEXT, text(stop=["a"] * 3), text(stop=["a"] * 2), "at most 2 are allowed"),
    "max_stop_chars": Case(3, TEXT, text(stop="aaaa"), text(stop="aaa"), "1 to 3 characters"),
    "max_stop_token_ids": Case(
        2, TEXT, text(stop_token_ids=[1] * 3), text(stop_token_ids=[1] * 2), "at most 2"
    ),
    "max_logit_bias": Case(
        1, TEXT, text(logit_bias={"1": 1, "2": 1}), text(logit_bias={"1": 1}), "at most 1"
    ),
    "max_allowed_token_ids": Case(
        2, TEXT, text(allowed_token_ids=[1] * 3), text(allowed_token_ids=[1] * 2), "at most 2"
    ),
    "max_bad_words": Case(
        2, TEXT, text(bad_words=["a"] * 3), text(bad_words=["a"] * 2), "at most 2"
    ),
    "max_bad_word_chars": Case(
        3, TEXT, text(bad_words=["aaaa"]), text(bad_words=["aaa"]), "1 to 3 characters"
    ),
    "max_schema_chars": Case(
        9, TEXT, text(guided_regex="a" * 10), text(guided_regex="a" * 9), "1 to 9 characters"
    ),
    "max_schema_depth": Case(
        2,
        TEXT,
        text(guided_json={"properties": {"a": {"type": "null"}}}),
        text(guided_json={"type": "null"}),
        "at most 2 are allowed",
    ),
    "max_choice": Case(
        2, TEXT, text(guided_choice=["a", "b", "c"]), text(guided_choice=["a", "b"]), "at most 2"
    ),
    "grammar_timeout": Case(
        1e-6, TEXT, text(guided_regex="a+"), text(), "takes more than 1e-06 s to compile"
    ),
    "max_segments": Case(
        1,
        TEXT,
        text(segment_mask={"tokens": [[0, 1], [1, 2]]}),
        text(segment_mask={"tokens": [[0, 1]]}),
        "at most 1 are allowed",
    ),
    "max_contexts": Case(
        2, "/detokenize", {"tokens": [1] * 513}, {"tokens": [1] * 512}, "at most 512 are allowed"
    ),
    "max_documents": Case(
        1,
        CHAT,
        chat(documents=[{"text": "a"}] * 2),
        chat(documents=[{"text": "a"}]),
        "at most 1 are allowed",
    ),
    "max_template_kwarg_chars": Case(
        3,
        CHAT,
        chat(chat_template_kwargs={"mood": "glad"}),
        chat(chat_template_kwargs={"mood": "sad"}),
        "longer than 3 characters",
    ),
    "max_template_chars": Case(
        40, CHAT, chat(messages=said(3)), chat(), "makes more than 40 characters"
    ),
    "template_timeout": Case(1e-9, CHAT, chat(), text(), "took longer than 1e-09 s"),
    "max_tools": Case(
        1,
        TOKENS,
        chat(tools=[tool("a"), tool("b")]),
        chat(tools=[tool("a")]),
        "at most 1 are allowed",
    ),
    "max_tool_bytes": Case(
        60, TOKENS, chat(tools=[tool("a" * 60)]), chat(tools=[tool("a")]), "larger than 60 bytes"
    ),
    "request_timeout": Case(1.0, CHAT, chat(), chat(), "within 1 s", 504),
}
BY_THEMSELVES = {
    "max_texts",  # test_embeddings.py
    "max_text_contexts",
    "body_timeout",  # here, below
    "max_stored_responses",
    "max_stored_bytes",
    "max_connections",
    "max_bodies_bytes",
    "max_waiting_texts",
    "max_waiting_grammars",
    "max_queue",  # test_admission.py
    "ttft_slo",
    "rate_limit",
    "rate_limit_tokens",
}
NO_LIMITS = {
    "access_log_format",
    "cache_explain",
    "allowed_hosts",
    "allowed_origins",
    "inline_chars",
    "keys",
    "lora_dir",
    "otlp_traces_endpoint",
    "pooling",
    "reasoning_parser",
    "segment_mask",
    "shared_cache",
    "tool_call_parser",
    "unknown_fields",
    "ping_interval",
}


@pytest.fixture
def make_app(engine, backend):
    def make(**settings: Any) -> FastAPI:
        tokenizer = Tokenizer(
            backend, special_tokens={"eos_token": "<|eos|>"}, chat_template=TEMPLATE
        )
        return create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )

    return make


def test_no_setting_is_left_out() -> None:
    named = {field.name for field in dataclasses.fields(ServerSettings)}
    assert named == {*CASES, *BY_THEMSELVES, *NO_LIMITS}
    assert not {*CASES, *BY_THEMSELVES} & NO_LIMITS
    flags = {field.name for one in (Limits, SharedLimits) for field, _ in settings_of(one)}
    assert flags < {*CASES, *BY_THEMSELVES}


def test_the_page_of_operators_has_each_flag_and_its_default() -> None:
    root = (Path(headstart.__file__).parent / "server").resolve().parent
    rows = dict(
        re.findall(r"^\| `(--[a-z-]+) [A-Z]+` \| ([^|]+?) \|", _limits_of(root), re.MULTILINE)
    )
    defaults = ServerSettings()
    for field, setting in (*settings_of(Limits), *settings_of(SharedLimits)):
        value, kind = getattr(defaults, field.name), setting.metavar
        shown = f"{value // 1024} KiB" if kind == "SIZE" else f"{value:,}"
        shown = f"{value // 1024**2} MiB" if kind == "SIZE" and value >= 2**20 else shown
        shown = f"{value:g} s" if kind == "SECONDS" else shown
        flag = setting.flag_of(field.name)
        assert rows.get(flag) == shown, flag


def _limits_of(root: Path) -> str:
    page = (root / "docs" / "operations.md").read_text()
    return page.split("## Limits and times")[1].split("\n## ")[0]


@pytest.mark.parametrize("setting", CASES)
async def test_over_and_within(make_app, connect_to, engine, monkeypatch, setting) -> None:
    case = CASES[setting]
    app = make_app(**{setting: case.value})
    client = connect_to(app)
    engine.hold = setting == "request_timeout"
    over = await client.post(case.path, json=case.over)
    assert over.status_code == case.status, over.text
    assert case.words in over.json()["error"]["message"]
    engine.hold = False

    async def passes(*_: Any) -> None:
        pass

    monkeypatch.setattr(GrammarChecker, "check", passes)
    path = TEXT if "prompt" in case.within else case.path
    within = await client.post(path, json=case.within)
    assert within.status_code == 200, within.text
    await app.state.runtime.grammars.close()


async def test_a_body_that_does_not_come(make_app, connect_to) -> None:
    async def body(seconds: float):
        yield b'{"model":"tiny",'
        await asyncio.sleep(seconds)
        yield b'"prompt":"hi"}'

    client = connect_to(make_app(body_timeout=1.0))
    assert (await client.post(TEXT, content=body(0))).status_code == 200
    late = await client.post(TEXT, content=body(60))
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    ("limit", "bodies", "kept"),
    [("max_stored_responses", 2, 2), ("max_stored_bytes", 2.6, 2), ("max_stored_bytes", 0.9, 0)],
)
async def test_answers_that_are_kept(make_app, connect_to, limit, bodies, kept) -> None:
    body = {"model": "tiny", "input": "hi"}
    answer = await connect_to(make_app()).post("/v1/responses", json=body)
    size = len(answer.content) if limit == "max_stored_bytes" else 1
    client = connect_to(make_app(**{limit: int(bodies * size)}))
    answers = [await client.post("/v1/responses", json=body) for _ in range(4)]
    ids = [answer.json()["id"] for answer in answers]
    found = [(await client.get(f"/v1/responses/{one}")).status_code for one in ids]
    assert found == [404] * (4 - kept) + [200] * kept


class Held:
    """A body of which the last piece is held back."""

    def __init__(self, size: int) -> None:
        self.end = asyncio.Event()
        self.begun = asyncio.Event()
        self._size = size

    async def __aiter__(self):
        yield b'{"model":"tiny","prompt":"hi"' + b" " * self._size
        self.begun.set()
        await self.end.wait()
        yield b"}"


def check_refusal(answer: httpx.Response, words: str) -> None:
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    assert error["code"] == "service_unavailable"
    assert words in error["message"]


async def test_bodies_that_are_read_at_once(make_app, connect_to) -> None:
    client = connect_to(make_app(max_bodies_bytes=10_000))
    held = Held(6000)
    first = asyncio.create_task(client.post(TEXT, content=held))
    await held.begun.wait()
    refused = await client.post(TEXT, content=b" " * 6000)
    check_refusal(refused, "too many large requests are being read")
    assert (await client.post(TEXT, json=text())).status_code == 200  # it still fits
    held.end.set()
    assert (await first).status_code == 200
    for _ in range(3):  # those that were refused have given back what they held
        answer = await client.post(TEXT, content=b" " * 6000)
        assert answer.status_code == 400  # no JSON, but read
    assert (await client.post(TEXT, json=text())).status_code == 200


async def test_bodies_that_break_off_are_forgotten(make_app, connect_to) -> None:
    client = connect_to(make_app(max_bodies_bytes=10_000, body_timeout=0.05))
    for _ in range(3):
        assert (await client.post(TEXT, content=Held(6000))).status_code == 408


async def test_prompts_that_wait_to_be_tokenised(make_app, connect_to, monkeypatch) -> None:
    app = make_app(max_waiting_texts=2, inline_chars=100)
    client, gate, begun = connect_to(app), asyncio.Event(), []
    loop = asyncio.get_running_loop()
    in_thread = loop.run_in_executor

    async def late(*args: Any) -> Any:
        begun.append(args)
        await gate.wait()
        return await in_thread(*args)

    monkeypatch.setattr(loop, "run_in_executor", late)
    for path, body in ((CHAT, chat()), (TEXT, text(prompt="hi " * 50))):
        gate.clear()
        begun.clear()
        waiting = [asyncio.create_task(client.post(path, json=body)) for _ in range(2)]
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        check_refusal(await client.post(path, json=body), "to be tokenised")
        assert (await client.post(TEXT, json=text())).status_code == 200  # it need not wait
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


async def test_grammars_that_wait_to_be_checked(make_app, connect_to, monkeypatch) -> None:
    app = make_app(max_waiting_grammars=2)
    client, grammars = connect_to(app), app.state.runtime.grammars
    gate, asked = asyncio.Event(), []

    async def ask(grammar: str, *_: Any) -> None:
        asked.append(grammar)
        await gate.wait()

    monkeypatch.setattr(grammars, "_ask", ask)
    waiting = [
        asyncio.create_task(client.post(TEXT, json=text(guided_regex=letter))) for letter in "ab"
    ]
    while not asked:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)  # the second waits for the first
    check_refusal(await client.post(TEXT, json=text(guided_regex="c")), "grammars or schemas")
    gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
    gate.clear()
    known = await client.post(TEXT, json=text(guided_regex="a"))  # it does not wait
    assert known.status_code == 200
    assert len(asked) == 2


# ------------------------------------------------------------------------------ connections


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    [length] = re.findall(rb"(?i)content-length: (\d+)", head)
    return int(head.split()[1]), head + await reader.readexactly(int(length))


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def get(connection: Connection, path: str) -> tuple[int, bytes]:
    reader, writer = connection
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return await read_answer(reader)


class TestConnections:
    @pytest.fixture
    def settings(self, monkeypatch):
        monkeypatch.setattr("headstart.server.http.serving.SPARE_CONNECTIONS", 2)
        return ServerSettings(max_connections=3, body_timeout=300)

    @pytest.fixture
    def head_seconds(self):
        return 300.0

    @pytest.fixture
    async def connect(self, live_url):
        """Opens a connection."""
        port, writers = int(live_url.rsplit(":", 1)[1]), []

        async def connect() -> Connection:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        async with asyncio.timeout(300):
            yield connect
        for writer in writers:
            writer.close()

    async def test_those_that_wait_for_a_request_make_room(self, connect) -> None:
        opened = [await connect() for _ in range(3)]
        assert (await get(opened[0], "/v1/models"))[0] == 200  # it waits for its next one
        for connection in opened[1:]:
            new = await connect()
            assert (await get(new, "/v1/models"))[0] == 200
            assert await connection[0].read() == b""  # the one that has waited longest is closed
        assert (await get(opened[0], "/v1/models"))[0] == 200

    async def test_those_with_a_request_stay(self, connect, app) -> None:
        busy = []
        for _ in range(3):
            busy.append(await connect())
            busy[-1][1].write(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n"
            )
            await asyncio.sleep(0.05)
        told, probe = await connect(), await connect()
        assert (await get(probe, "/live"))[0] == 200
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await get(await connect(), "/live")  # even more than those who are told
        status, whole = await get(told, "/v1/models")
        assert status == 503
        assert b"too many connections are open" in whole
        assert b"retry-after: 1" in whole
        assert app.state.runtime.admission.refused["connections"] == 1
        assert await told[0].read() == b""  # closed
        for reader, writer in busy:
            writer.write(b'{"model":"tiny","prompt":"ab"}')
            assert (await read_answer(reader))[0] == 200
        assert (await get(await connect(), "/v1/models"))[0] == 200


# ---------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        (b"1", 0),
        (b"[1,2,3]", 4 + 2),
        (b'{"a":1,"b":2}', 16 + 1 + 2),
        (b'[[1],[2],{"a":[]}]', 4 + 4 + 1 + 4 + 1 + 16 + 1 + 4),
        (b'"a,b,[{"', 0),
        (b'"a\\",b,[{"', 0),
        (b'["a\\\\",2,3]', 4 + 2),
        (b'["\\\\\\\\",2,"\\\\\\",3"]', 4 + 2),
        (b'["\\u0022,",",\\n"]', 4 + 1),
    ],
)
@pytest.mark.parametrize("before", [0, 1, PIECE - 30, PIECE - 7, PIECE - 3, PIECE - 1, 3 * PIECE])
def test_values_are_counted_outside_of_texts(body, weight, before) -> None:
    # A text in front of it, so that the pieces that are counted begin and end anywhere.
    for filling in (b'"' + b"," * before + b'"', b'"' + b"\\\\" * (before // 2) + b'",', b" "):
        whole = filling + body
        least = weight + (filling[-1:] == b",")
        if len(whole) * 16 <= least:
            continue
        assert not has_values(whole, max(least, 1))
        if least > 1:
            assert has_values(whole, least - 1)


def test_what_is_too_much_is_not_read_to_its_end() -> None:
    class Counted(bytes):
        reads = 0

        def __getitem__(self, key):
            Counted.reads += 1
            return super().__getitem__(key)

    body = Counted(b"[" + b"1," * (8 * 1024 * 1024) + b"1]")
    assert has_values(body, 256 * 1024)
    assert Counted.reads * PIECE <= 1024 * 1024


async def test_a_body_of_many_values_makes_no_objects(make_app, connect_to, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        "headstart.server.api.openai_completions.routes.CompletionBody.model_validate_json",
        lambda data: made.append(data),
    )
    client = connect_to(make_app())
    answer = await client.post(TEXT, content=b'{"prompt":[' + b"1," * 4_000_000 + b"1]}")
    assert answer.status_code == 413
    assert "--max-body-values" in answer.json()["error"]["message"]
    assert made == []


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", TOKENS])
async def test_messages_are_counted_before_they_are_made(
    make_app, connect_to, monkeypatch, path
) -> None:
    for kind in ("openai_chat.messages.ChatMessage", "anthropic_messages.conversation.MessageBody"):
        monkeypatch.setattr(f"headstart.server.api.{kind}.model_post_init", lambda *_: 1 / 0)
    client = connect_to(make_app())
    body = {"model": "tiny", "max_tokens": 1, "messages": said(4097)}
    answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    message = "messages has 4097 entries; at most 4096 are allowed"
    assert answer.json()["error"]["message"] == message
    for wrong in (b'{"messages":' + b"[" * 40_000, b'{"messages":"' + b"x" * 40_000 + b'"}'):
        assert (await client.post(path, content=wrong)).status_code == 400


@pytest.mark.parametrize("field", ["prompt", "input"])
async def test_ids_are_counted_before_they_are_looked_at(make_app, connect_to, field) -> None:
    client = connect_to(make_app())
    path = TEXT if field == "prompt" else "/v1/embeddings"
    ids = ["wrong"] * 70_000
    for given in ([1, *ids], [[1], ids]):
        answer = await client.post(path, json={"model": "tiny", field: given})
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert "at most 65536 are looked at" in error["message"]
        assert error["code"] == "context_length_exceeded"
    short = await client.post(path, json={"model": "tiny", field: [1, *ids[:1000]]})
    assert short.json()["error"]["message"] == f"{field}[1] is not a token id"


@pytest.mark.parametrize(
    "schema", [{"enum": [1] * 70_000}, {str(i): i for i in range(70_000)}, {"a": [[1]] * 40_000}]
)
async def test_a_schema_of_many_values_is_not_written(
    make_app, connect_to, monkeypatch, schema
) -> None:
    client = connect_to(make_app(max_body_values=10**6))
    written = []
    monkeypatch.setattr("json.dumps", lambda value, **_: written.append(value))
    content = msgspec.json.encode(text(guided_json=schema))
    answer = await client.post(TEXT, content=content)
    assert answer.status_code == 400
    assert "guided_json has more than 65536 characters" in answer.json()["error"]["message"]
    assert written == []


async def test_metadata_is_counted_before_it_is_looked_at(make_app, connect_to) -> None:
    client = connect_to(make_app())
    for metadata in ({str(i): i for i in range(17)}, {str(i): "a" for i in range(17)}):
        body = {"model": "tiny", "input": "hi", "metadata": metadata}
        answer = await client.post("/v1/responses", json=body)
        assert answer.status_code == 400
        assert "17 entries; at most 16 are allowed" in answer.json()["error"]["message"]


async def test_a_text_that_cannot_fit_is_not_tokenised(
    make_app, connect_to, monkeypatch, backend
) -> None:
    app = make_app()
    client, tokenizer = connect_to(app), app.state.runtime.tokenizer
    monkeypatch.setattr(tokenizer, "backend", None)
    longest = max(map(len, backend.get_vocab()))
    words = "x" * (longest * 65_537)
    for path, body in (
        (TEXT, text(prompt=words)),
        (CHAT, chat(messages=[{"role": "user", "content": words}])),
        (TOKENS, {"prompt": words}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "65537 tokens or more" in error["message"]


def test_ids_of_a_huge_text_are_not_made(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("headstart.server.text.tokenizer.MAX_IDS", 10)
    monkeypatch.setattr("headstart.server.text.tokenizer.MAX_PLACED", 5)
    assert len(tokenizer.encode("x" * 10, add_special_tokens=False)) == 10
    with pytest.raises(Exception, match="11 tokens; at most 10 are looked at"):
        tokenizer.encode("x" * 11, add_special_tokens=False)
    with pytest.raises(Exception, match="at most 5 are looked at"):
        tokenizer.encode_placed("x" * 6)


async def test_a_chat_that_no_template_may_write_is_not_rendered(
    make_app, connect_to, monkeypatch
) -> None:
    app = make_app(max_template_chars=1000)
    client, template = connect_to(app), app.state.runtime.chat_template
    monkeypatch.setattr(type(template), "encode", lambda *_, **__: 1 / 0)
    body = chat(messages=[{"role": "user", "content": "x" * 1001}])
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert "more than 1000 characters" in answer.json()["error"]["message"]


def test_calls_are_not_all_written_to_know_that_a_chat_is_long() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": {"a": [1] * 20_000}}}
    size = len(msgspec.json.encode(call))
    message = {"role": "assistant", "content": "hi", "tool_calls": [call] * 3}
    assert chat_size([message, message], [call]) == 4 + 7 * size
    assert MUCH < chat_size([message] * 1000, [call] * 100) <= MUCH + size
