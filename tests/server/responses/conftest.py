"""/v1/responses over the fake engine: apps, clients that ask them, and what the template got."""

from __future__ import annotations

import json

import httpx
import msgspec
import openai
import pytest
import tokenizers

from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

URL = "/v1/responses"
SHOWS_ALL = (
    "{% if tools %}TOOLS {{ tools | tojson }} /TOOLS {# <tool_call> <think> #}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
async def build(engine, backend):
    apps = []

    def make(template=SHOWS_ALL, context=4096, **settings):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        engine.model = msgspec.structs.replace(engine.model, max_model_len=context)
        tokenizer = Tokenizer(own, special_tokens={"eos_token": "<|eos|>"}, chat_template=template)
        app = create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )
        apps.append(app)
        return app

    yield make
    for app in apps:
        await app.state.runtime.grammars.close()


@pytest.fixture
def connect(engine):
    """``async with connect(app, text)``: a client of an app whose model says ``text``."""

    def make(app, text="hello world", key=""):
        encode = app.state.runtime.tokenizer.encode
        engine.answer = lambda _: encode(text, add_special_tokens=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    return make


@pytest.fixture
def ask(build, connect):
    async def send(text="hello world", /, *, app=None, key="", url=URL, **fields):
        app = app or build()
        async with connect(app, text, key) as http:
            return await http.post(url, json={"model": "tiny", "input": "hi"} | fields)

    return send


@pytest.fixture
def official(app_saying):
    """The official client of an app whose model says ``text``."""

    def make(app, text="hello world"):
        return openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key="none",
            max_retries=0,
            http_client=app_saying(app, text),
        )

    return make


@pytest.fixture
def shown(engine):
    """The messages that the template of an app wrote last."""

    def read(app):
        text = app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids)
        _, _, rest = text.rpartition(" /TOOLS ")
        return [
            json.loads(part.split("<|im_end|>")[0]) for part in rest.split("<|im_start|>")[1:-1]
        ]

    return read


@pytest.fixture
def shown_tools(engine):
    """The functions that the template of an app wrote last, by name."""

    def read(app):
        text = app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids)
        tools = json.loads(text.partition("TOOLS ")[2].partition(" /TOOLS")[0])
        return {tool["function"]["name"]: tool["function"] for tool in tools}

    return read


@pytest.fixture
def events_of():
    """The events of a stream, their numbers and framing checked."""

    def read(body):
        found = []
        assert body.endswith("\n\n")
        for number, block in enumerate(body[:-2].split("\n\n")):
            first, second = block.split("\n")
            event = json.loads(second.removeprefix("data: "))
            assert first == f"event: {event['type']}"
            assert event["sequence_number"] == number
            found.append(event)
        return found

    return read


@pytest.fixture
def ignored():
    """The fields that the head of an answer names as ignored."""

    def read(response):
        names = response.headers.get("x-headstart-ignored")
        return set(names.split(", ")) if names else set()

    return read
