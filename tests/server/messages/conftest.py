"""Apps for /v1/messages whose template writes down all it gets, and what they are asked with."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest
import tokenizers

from headstart.server.http.app import create_app
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

URL = "/v1/messages"
SHOWS_ALL = (
    "{% if tools %}TOOLS {{ tools | tojson }} /TOOLS {# <tool_call> #}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    SHOWS_ALL + "{# <think> #}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
)


@pytest.fixture
def thinks():
    """A template that lets thinking be chosen."""
    return THINKS


@pytest.fixture
def build(engine, backend):
    def make(template=SHOWS_ALL, **settings):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        engine.model = msgspec.structs.replace(engine.model, max_model_len=4096)
        tokenizer = Tokenizer(own, special_tokens={"eos_token": "<|eos|>"}, chat_template=template)
        return create_app(
            engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**settings)
        )

    return make


@pytest.fixture
def ask(build, engine):
    """``await ask(text, field=value)``: the response to an answer of this text."""

    async def send(text="hello world", /, *, app=None, url=URL, headers=None, **fields):
        app = app or build()
        encode = app.state.runtime.tokenizer.encode
        engine.answer = lambda _: encode(text, add_special_tokens=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        body |= {"max_tokens": 200} if url == URL else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            response = await http.post(url, json=body | fields, headers=headers)
        await app.state.runtime.grammars.close()
        return response

    return send


@pytest.fixture
def official(app_saying, anthropic):
    """The official client of an app whose model says ``text``."""

    def make(app, text):
        return anthropic.AsyncAnthropic(
            base_url="http://test",
            api_key="none",
            max_retries=0,
            http_client=app_saying(app, text),
        )

    return make


@pytest.fixture
def prompt(engine):
    """The last prompt, as text."""
    return lambda app: app.state.runtime.tokenizer.decode_all(engine.added[-1].token_ids)


@pytest.fixture
def shown(prompt):
    """The messages that the template wrote."""

    def parse(app):
        rest = prompt(app).rpartition(" /TOOLS ")[2]
        return [
            json.loads(part.split("<|im_end|>")[0])
            for part in rest.split("<|im_start|>")[1:]
            if part.startswith("{")
        ]

    return parse


@pytest.fixture
def events_of():
    """The events of a stream, whose names and types are the same."""

    def parse(body):
        found = []
        assert body.endswith("\n\n")
        for block in body[:-2].split("\n\n"):
            first, second = block.split("\n")
            event = json.loads(second.removeprefix("data: "))
            assert first == f"event: {event['type']}"
            found.append(event)
        return found

    return parse
