"""--generation-config: what a model recommends, under what a request asks for."""

from __future__ import annotations

import json

import pytest

from headstart.engine.errors import ConfigError, ModelError
from headstart.server.cli.configure import generation_defaults
from headstart.server.cli.main import parse
from headstart.server.generation.defaults import OPENAI, GenerationDefaults
from headstart.server.http.app import create_app

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
QWEN = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [1, 2],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def body_of(url, **fields):
    said = {"role": "user", "content": "hello"}
    bodies = {
        CHAT: {"messages": [said]},
        TEXT: {"prompt": "hello"},
        RESPONSES: {"input": "hello"},
        MESSAGES: {"messages": [said], "max_tokens": 20},
    }
    return {"model": "tiny"} | bodies[url] | fields


@pytest.fixture
def recommended(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(QWEN))
    return GenerationDefaults.from_file(path)


@pytest.fixture
def ask(engine, tokenizer, settings, connect_to):
    """Asks an app with these defaults; what the engine is asked then, and the answer."""

    async def send(defaults, url, **fields):
        app = create_app(
            engine, tokenizer, model_names=["tiny"], settings=settings, defaults=defaults
        )
        response = await connect_to(app).post(url, json=body_of(url, **fields))
        assert response.status_code == 200, response.text
        return engine.added[-1].params, response.json()

    return send


def chosen(params):
    return (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
    )


@pytest.mark.parametrize("url", [CHAT, TEXT, RESPONSES, MESSAGES])
async def test_a_request_that_names_nothing_gets_what_the_model_recommends(ask, recommended, url):
    params, answer = await ask(recommended, url)
    assert chosen(params) == (0.7, 20, 0.8, None, 1.05)
    if url == RESPONSES:
        assert (answer["temperature"], answer["top_p"]) == (0.7, 0.8)
    params, answer = await ask(OPENAI, url)
    assert chosen(params) == (1.0, None, None, None, 1.0)
    if url == RESPONSES:
        assert (answer["temperature"], answer["top_p"]) == (1.0, 1.0)


@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_what_a_request_names_is_above_it(ask, recommended, url):
    asked = {"temperature": 0, "top_k": -1, "top_p": 1.0, "min_p": 0.1, "repetition_penalty": 1.0}
    params, _ = await ask(recommended, url, **asked)
    assert chosen(params) == (0.0, None, 1.0, 0.1, 1.0)
    params, _ = await ask(recommended, url, temperature=None, top_k=5)
    assert chosen(params) == (0.7, 5, 0.8, None, 1.05)


async def test_messages_and_responses_are_above_it_too(ask, recommended):
    params, _ = await ask(recommended, MESSAGES, temperature=0.2, top_k=0)
    assert chosen(params) == (0.2, None, 0.8, None, 1.05)
    params, answer = await ask(recommended, RESPONSES, top_p=0.5)
    assert chosen(params) == (0.7, 20, 0.5, None, 1.05)
    assert (answer["temperature"], answer["top_p"]) == (0.7, 0.5)


@pytest.mark.parametrize(
    ("url", "field", "most"),
    [(CHAT, "max_tokens", 7), (RESPONSES, "max_output_tokens", 7), (TEXT, "max_tokens", 16)],
)
async def test_max_new_tokens_is_the_length_of_chats_that_name_none(ask, url, field, most):
    defaults = GenerationDefaults(max_tokens=7)
    assert (await ask(defaults, url))[0].max_tokens == most
    assert (await ask(defaults, url, **{field: 30}))[0].max_tokens == 30


async def test_max_new_tokens_beyond_the_context_is_what_there_is_room_for(ask, engine):
    params, _ = await ask(GenerationDefaults(max_tokens=100_000), CHAT)
    assert params.max_tokens == engine.model.max_model_len - len(engine.added[-1].token_ids)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": 2.5}, "temperature must be at most 2.0"),
        ({"top_k": 2.0}, "top_k must be an integer"),
        ({"top_p": 1.5}, "top_p must be at most 1.0"),
        ({"min_p": -1}, "min_p must be at least 0.0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([], "not a JSON object"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, raw, words):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError) as error:
        GenerationDefaults.from_file(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def test_what_is_off_in_a_file_is_off(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"top_k": 0, "temperature": None, "top_p": 1}))
    assert GenerationDefaults.from_file(path) == GenerationDefaults(top_p=1)


def test_the_flag(tmp_path):
    def defaults(*flags):
        return generation_defaults(parse("serve", "x", *flags), tmp_path)

    assert defaults() == OPENAI
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    assert defaults().top_k == 20
    assert str(defaults()) == "temperature 0.7, top_k 20, top_p 0.8, repetition_penalty 1.05"
    assert defaults("--generation-config", "none") == OPENAI
    assert str(OPENAI) == "OpenAI's"
    other = tmp_path / "mine.json"
    other.write_text('{"max_new_tokens": 9}')
    assert defaults("--generation-config", str(other)) == GenerationDefaults(max_tokens=9)
    with pytest.raises(ConfigError, match=r"^--generation-config: .*nowhere\.json: cannot be read"):
        defaults("--generation-config", str(tmp_path / "nowhere.json"))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="--generation-config none does without it"):
        defaults()
