"""Bad input against the real server: a clear 4xx each, and the server goes on."""

from __future__ import annotations

import json

import httpx
import pytest

MODEL = "smollm2-135m"
CONTEXT = 8192


def body(**fields) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2, **fields}).encode()


def post(server, content: bytes, path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(f"{server.url}{path}", content=content, timeout=300)


@pytest.fixture
def answers(server):
    """The server must answer a good request after the bad one."""
    yield server
    response = post(server, body())
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] <= 2


def check(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    return error


def test_prompt_longer_than_the_context(answers):
    error = check(post(answers, body(prompt=[100] * 9000)))
    assert "9000" in error["message"]
    assert str(CONTEXT) in error["message"]
    error = check(post(answers, body(prompt="Hi " * 9000)))
    assert "900" in error["message"]
    assert str(CONTEXT) in error["message"]
    assert error["param"] == "prompt"


def test_more_tokens_than_the_context(answers):
    """They are as many as there is room for: here the answer ends before."""
    response = post(answers, body(prompt="Yes?", max_tokens=10 * CONTEXT, guided_choice=["Yes"]))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "Yes"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{'model': 1}",
        b'{"model": "smollm2-135m", "prompt": "x"} trailing',
        b'{"model": "smollm2-135m", "prompt": "\xff\xfe"}',
        b"\xff\xfe\x00\x00",
        b'{"model": "smollm2-135m", "prompt": "x", "temperature": NaN}',
        b'{"model": "smollm2-135m", "prompt": "x", "temperature": 1e999}',
        b"[" * 60_000,
        b'{"a":' * 15_000,
    ],
)
def test_what_is_no_request(answers, content):
    check(post(answers, content))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [10**30]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"top_p": -0.1}, "top_p"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_values_are_named(answers, fields, param):
    assert check(post(answers, body(**fields)))["param"] == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_ten_megabytes(answers, path):
    error = check(post(answers, body(prompt="x" * 10_000_000), path), 413)
    assert error["code"] == "request_too_large"


def test_just_below_the_limit_of_a_body(answers):
    error = check(post(answers, body(prompt="word " * 1_600_000)))
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "text", [rb"\ud800", rb"\udc00 tail", rb"a\ud800\u0041", rb"\ud83d", rb"\udbff\udbff"]
)
def test_lone_surrogates(answers, text):
    completion = b'{"model": "smollm2-135m", "prompt": "%s"}' % text
    check(post(answers, completion))
    chat = b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "%s"}]}' % text
    check(post(answers, chat, "/v1/chat/completions"))
    stop = b'{"model": "smollm2-135m", "prompt": "a", "stop": "%s", "max_tokens": 2}' % text
    check(post(answers, stop))


def test_a_proper_surrogate_pair_is_a_character(answers):
    content = rb'{"model": "smollm2-135m", "prompt": "\ud83d\ude00", "max_tokens": 2, "echo": true}'
    response = post(answers, content)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"].startswith("\N{GRINNING FACE}")


def test_control_characters_and_odd_text(answers):
    for prompt in ("\x00", "\x00" * 500, "\u202e\u200b", "é" * 300, "\N{GRINNING FACE}" * 200):
        assert post(answers, body(prompt=prompt)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_wrong_places(answers, method, path, status):
    response = httpx.request(method, f"{answers.url}{path}")
    assert response.status_code == status
    assert response.json()["error"]["message"]
