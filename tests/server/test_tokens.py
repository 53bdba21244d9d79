"""/tokenize, /detokenize, /apply-template: the ids that requests have, and what is refused."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from headstart.bench.token_texts import texts
from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

SPECIAL = ("<|eos|>", "<|im_start|>", "<|im_end|>")
USER = {"role": "user", "content": "the fox"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL))).map("".join)
few_examples = settings(
    deadline=None,
    max_examples=2 * settings.default.max_examples // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def post(app):
    """``await post(path, body)``, to another app than the usual one if that is given."""

    async def send(path, body, app=app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(path, json=body)

    return send


@pytest.fixture
def ask(post, app):
    """``await ask(path, field=value)``: the answer, which has to be a 200."""

    async def send(path, app=app, **body):
        response = await post(path, body, app)
        assert response.status_code == 200, response.text
        return response.json()

    return send


@pytest.fixture
def with_bos(backend, engine):
    """An app whose tokenizer puts a BOS in front, and whose template writes tools."""
    own = Backend.from_str(backend.to_str())
    own.post_processor = processors.TemplateProcessing(
        single="<|eos|> $A", special_tokens=[("<|eos|>", 0)]
    )
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0]['content'] }}"
    tokenizer = Tokenizer(own, chat_template=template)
    return create_app(engine, tokenizer, model_names=["tiny"])


@few_examples
@given(text=TEXTS)
async def test_round_trip(ask, text):
    tokens = await ask("/tokenize", prompt=text)
    assert tokens["count"] == len(tokens["tokens"])
    assert await ask("/detokenize", tokens=tokens["tokens"]) == {"prompt": text}


@few_examples
@given(content=TEXTS, system=st.none() | TEXTS)
async def test_the_ids_of_a_chat_are_those_the_engine_gets(ask, post, engine, content, system):
    engine.added.clear()
    messages = [] if system is None else [{"role": "developer", "content": system}]
    parts = [{"type": "text", "text": content}, {"type": "text", "text": "b"}]
    messages.append({"role": "user", "content": parts})
    tokens = await ask("/tokenize", messages=messages)
    response = await post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    if response.status_code == 200:
        assert engine.added[0].token_ids == tokens["tokens"]
    else:  # only for its length
        assert tokens["count"] >= tokens["max_model_len"]
    shown = await ask("/detokenize", tokens=tokens["tokens"])
    assert shown == await ask("/apply-template", messages=messages)


async def test_the_ids_of_a_prompt_are_those_the_engine_gets(ask, post, engine):
    text = "the <|im_end|> fox"
    await post("/v1/completions", {"model": "tiny", "prompt": text})
    tokens = await ask("/tokenize", prompt=text, return_token_strs=True)
    assert tokens["tokens"] == engine.added[0].token_ids
    assert 2 in tokens["tokens"]
    assert tokens["max_model_len"] == 256
    assert len(tokens["token_strs"]) == tokens["count"]
    assert "".join(tokens["token_strs"]) == "the\u0120<|im_end|>\u0120fox"


async def test_the_ids_of_the_default_model_are_those_of_llama_cpp(ask, engine, smollm2):
    """`bench.tokens --write` has kept llama.cpp's."""
    file = Path(__file__).parents[1] / "engine" / "models" / "files" / "llama_cpp_tokens.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["default model"]
    app = create_app(engine, Tokenizer.from_folder(smollm2), model_names=["smollm2"])
    answer = await ask("/tokenize", app, prompt="List:\n\n1. a")
    assert answer["tokens"] == [6106, 42, 1116, 33, 30, 253]
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for text, token_ids in zip(texts(), kept, strict=True):
            response = await http.post("/tokenize", json={"prompt": text})
            assert response.json()["tokens"] == token_ids, text


async def test_special_tokens_in_a_message_are_text(ask, say):
    chat = [{"role": "user", "content": "<|im_end|>"}]
    tokens = (await ask("/tokenize", messages=chat, add_generation_prompt=False))["tokens"]
    assert [i for i in tokens if i in (0, 1, 2)] == [1, 2]
    assert len(tokens) > len(say("<|im_start|>user\n<|im_end|><|im_end|>\n"))
    assert (await ask("/detokenize", tokens=tokens))["prompt"] == (
        "<|im_start|>user\n<|im_end|><|im_end|>\n"
    )


async def test_the_answer_is_opened_unless_it_is_not_wanted(ask, say):
    opened = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    closed = "<|im_start|>user\nthe fox<|im_end|>\n"
    for fields, text in (
        ({}, opened),
        ({"add_generation_prompt": None}, opened),
        ({"add_generation_prompt": True}, opened),
        ({"add_generation_prompt": False}, closed),
    ):
        assert await ask("/apply-template", messages=[USER], **fields) == {"prompt": text}
        tokens = await ask("/tokenize", messages=[USER], **fields)
        assert tokens["tokens"] == say(text)
        assert tokens["token_strs"] is None


async def test_special_tokens_that_the_tokenizer_adds(ask, with_bos, say):
    ask = partial(ask, app=with_bos)
    assert (await ask("/tokenize", prompt="fox"))["tokens"] == [0, *say("fox")]
    assert (await ask("/tokenize", prompt=""))["tokens"] == [0]
    off = await ask("/tokenize", prompt="fox", add_special_tokens=False)
    assert off["tokens"] == say("fox")
    chat = await ask("/tokenize", messages=[USER], add_special_tokens=False)
    assert chat["tokens"] == say("the fox")
    assert (await ask("/detokenize", tokens=[0, *say("fox")]))["prompt"] == "<|eos|>fox"


async def test_tools_reach_the_template(ask, with_bos):
    ask = partial(ask, app=with_bos)
    tool = TOOL | {"function": TOOL["function"] | {"description": "<|im_end|>"}}
    text = (await ask("/apply-template", messages=[USER], tools=[tool]))["prompt"]
    assert text.startswith('[{"type": "function"')
    assert '"<|im_end|>"' in text
    assert text.endswith("the fox")
    tokens = (await ask("/tokenize", messages=[USER], tools=[tool]))["tokens"]
    assert 2 not in tokens
    assert (await ask("/detokenize", tokens=tokens))["prompt"] == text
    assert (await ask("/apply-template", messages=[USER], tools=[]))["prompt"] == "the fox"


async def test_the_model_is_optional_and_checked(ask, post):
    for path, body in (
        ("/tokenize", {"prompt": "fox"}),
        ("/detokenize", {"tokens": [5]}),
        ("/apply-template", {"messages": [USER]}),
    ):
        answer = await ask(path, **body)
        assert answer == await ask(path, model="also-tiny", **body)
        assert answer == await ask(path, model=None, **body)
        response = await post(path, body | {"model": "other"})
        assert response.status_code == 404
        assert "'other'" in response.json()["error"]["message"]


async def test_nothing_is_answered_without_a_model(post, engine):
    engine.ready = False
    for path, body in (
        ("/tokenize", {"prompt": "fox"}),
        ("/detokenize", {"tokens": [5]}),
        ("/apply-template", {"messages": [USER]}),
    ):
        assert (await post(path, body)).status_code == 503


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "or messages, is required"),
        ("/tokenize", {"prompt": None}, "prompt", "or messages, is required"),
        ("/tokenize", {"prompt": 3}, "prompt", "valid string"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "valid string"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "messages", "exclude"),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "goes with messages"),
        (
            "/tokenize",
            {"prompt": "a", "add_generation_prompt": True},
            "add_generation_prompt",
            "goes with messages",
        ),
        (
            "/tokenize",
            {"messages": [USER], "add_special_tokens": True},
            "add_special_tokens",
            "goes with prompt",
        ),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens", "boolean"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "no"}, "return_token_strs", "boolean"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template", "not supported"),
        ("/detokenize", {}, "tokens", "required"),
        ("/detokenize", {"tokens": None}, "tokens", "a list of token ids"),
        ("/detokenize", {"tokens": "abc"}, "tokens", "a list of token ids"),
        ("/detokenize", {"tokens": [5, "a"]}, "tokens[1]", "not a token id"),
        ("/detokenize", {"tokens": [5, True]}, "tokens[1]", "not a token id"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "not a token id"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]", "not a token id"),
        ("/detokenize", {"tokens": [5, 400]}, "tokens[1]", "vocabulary has 400"),
        ("/detokenize", {"tokens": [5] * 1025}, "tokens", "at most 1024 are allowed"),
        ("/apply-template", {}, "messages", "required"),
        ("/apply-template", {"messages": None}, "messages", "valid array"),
    ],
)
async def test_bad_requests(post, path, body, param, words):
    response = await post(path, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a", "content": "a"}),
        ("/tokenize", {"messages": [USER], "content": "a"}),
        ("/detokenize", {"tokens": [5], "content": ""}),
        ("/apply-template", {"messages": [USER], "content": ""}),
    ],
)
async def test_unknown_fields_are_named(post, path, body):
    response = await post(path, body)
    assert response.status_code == 200, response.text
    assert response.headers["x-headstart-ignored"] == "content"


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "required"),
        ({"messages": [{"role": "no", "content": ""}]}, "messages[0].role", "'user'"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "messages[0].content[0]", ""),
        ({"messages": [USER] * 4097}, "messages", "at most 4096"),
        ({"add_generation_prompt": 0}, "add_generation_prompt", "boolean"),
        ({"tools": TOOL}, "tools", "a valid array"),
        ({"tools": [TOOL, 3]}, "tools[1]", "an object"),
        ({"tools": [{"type": "code"}]}, "tools[0].type", "'function' or 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
    ],
)
async def test_bad_chats(engine, tokenizer, post, path, fields, param, words):
    app = create_app(engine, tokenizer, model_names=["tiny"])
    response = await post(path, {"messages": [USER]} | fields, app)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
async def test_a_template_that_refuses_or_is_missing(engine, backend, post, path):
    for template, words in (
        ("{{ raise_exception('users first') }}", "users first"),
        (None, "no chat template"),
    ):
        tokenizer = Tokenizer(backend, chat_template=template)
        app = create_app(engine, tokenizer, model_names=["tiny"])
        response = await post(path, {"messages": [USER]}, app)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"
        assert words in response.json()["error"]["message"]


async def test_as_many_ids_as_allowed(ask):
    assert await ask("/detokenize", tokens=[]) == {"prompt": ""}
    text = (await ask("/detokenize", tokens=[5] * 1024))["prompt"]
    assert len(text) == 1024


async def test_ids_without_a_token_are_no_text(ask, tokenizer, engine):
    engine.model = msgspec.structs.replace(engine.model, vocab_size=500)
    assert tokenizer.entries([5, 499])[1] == ""
    assert await ask("/detokenize", tokens=[499]) == {"prompt": ""}


async def test_chats_and_long_texts_go_to_a_thread(engine, tokenizer, ask, monkeypatch):
    limits = ServerSettings(inline_chars=100)
    app = create_app(engine, tokenizer, model_names=["tiny"], settings=limits)
    ask = partial(ask, app=app)
    threads = []

    def noting(kind, name):
        method = getattr(kind, name)

        def noted(*args, **named):
            threads.append(threading.current_thread())
            return method(*args, **named)

        monkeypatch.setattr(kind, name, noted)

    noting(Tokenizer, "encode")
    noting(Tokenizer, "decode_all")
    noting(ChatTemplate, "render")
    noting(ChatTemplate, "encode")
    for size in (1, 101):
        threads.clear()
        await ask("/tokenize", prompt="a" * size)
        await ask("/detokenize", tokens=[5] * size)
        assert len(threads) == 2
        assert all((thread is threading.main_thread()) == (size == 1) for thread in threads)
        threads.clear()
        for path in ("/tokenize", "/apply-template"):
            await ask(path, messages=[USER | {"content": "a" * size}])
            if size > 100:
                tool = {"type": "function", "function": {"name": "a", "description": "a" * size}}
                await ask(path, messages=[USER], tools=[tool])
        assert len(threads) >= 2
        # Long ones keep clear of the threads of the short ones.
        kind = "chat" if size == 1 else "text"
        assert all(thread.name.startswith(kind) for thread in threads)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 500) | st.floats(-9, 9) | st.sampled_from(SPECIAL),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("type", "function", "name")), inner, max_size=3)
    ),
    max_leaves=6,
)


@few_examples
@given(
    path=st.sampled_from(("/tokenize", "/detokenize", "/apply-template")),
    body=st.fixed_dictionaries(
        {},
        optional={"messages": st.just([USER]) | JSON}
        | dict.fromkeys(("prompt", "tokens", "tools", "add_generation_prompt"), JSON),
    ),
)
async def test_no_body_makes_a_5xx(post, path, body):
    assert (await post(path, body)).status_code in (200, 400)
