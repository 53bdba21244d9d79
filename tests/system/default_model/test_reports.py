"""What users of other servers have reported, sent to the default model as they sent it.

Each row is one report: a request that was refused or answered wrongly somewhere, and what is right.
The kinds behind them are tested in tests/server; this is the list to add the next report to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HELLO = {"role": "user", "content": "Hello"}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function"}


@pytest.fixture
def send(server):
    """``send(path, field=value)``: the response."""
    with httpx.Client(base_url=server.url, timeout=300) as client:

        def post(path: str, **fields: Any) -> httpx.Response:
            body: dict[str, Any] = {"model": "smollm2-135m"}
            if path in (CHAT, MESSAGES):
                body |= {"messages": [HELLO], "max_tokens": 1}
            return client.post(path, json=body | fields)

        yield post


def history(arguments: str) -> list[dict[str, Any]]:
    """A chat in which the assistant called a tool so."""
    call = CALL | {"function": {"name": "look", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "nothing"}
    return [HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]


def responses_history(arguments: str) -> list[dict[str, Any]]:
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": arguments}
    return [HELLO, call, {"type": "function_call_output", "call_id": "c1", "output": "nothing"}]


TOOL = {"type": "function", "function": FUNCTION}
ACCEPTED = {
    "a call's JSON is cut, in a chat": (CHAT, {"messages": history('{"a": "b')}),
    "a call's JSON is wrong, in a chat": (CHAT, {"messages": history("look now")}),
    "a call's JSON is cut, in Responses": (RESPONSES, {"input": responses_history('{"a": "b')}),
    "no content beside reasoning, as headstart writes it": (
        CHAT,
        {
            "messages": [
                HELLO,
                {"role": "assistant", "content": None, "reasoning_content": "Hm."},
                HELLO,
            ]
        },
    ),
    "an agent's max_tokens": (CHAT, {"max_tokens": 32_000, "stop": ["."]}),
    "max_tokens without a limit": (CHAT, {"max_tokens": -1, "stop": ["."]}),
    "7 stop strings": (CHAT, {"stop": list("abcdefg")}),
    "100 texts": ("/v1/embeddings", {"input": [f"text {i}" for i in range(100)]}),
    "100 documents": (
        "/v1/rerank",
        {"query": "a", "documents": [{"text": f"text {i}", "id": i} for i in range(100)]},
    ),
    "a tool's name of 72 characters": (
        CHAT,
        {"tools": [TOOL | {"function": FUNCTION | {"name": "n" * 72}}]},
    ),
    "top_p 0": (CHAT, {"top_p": 0}),
    "top_logprobs 0 without logprobs": (CHAT, {"top_logprobs": 0}),
    "cache_control of a message": (
        CHAT,
        {"messages": [HELLO | {"cache_control": {"type": "ephemeral"}}]},
    ),
    "cache_control of a part": (
        CHAT,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
                    ],
                }
            ]
        },
    ),
    "a system turn among Anthropic's": (
        MESSAGES,
        {"messages": [HELLO, {"role": "system", "content": "Be brief."}, HELLO]},
    ),
    "context_management": (
        MESSAGES,
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    ),
    "output_config.effort": (MESSAGES, {"output_config": {"effort": "medium"}}),
    "thinking": (
        MESSAGES,
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048},
    ),
    "client_metadata": (RESPONSES, {"input": "a", "client_metadata": {"id": "1"}}),
    "reasoning that is wanted back": (
        RESPONSES,
        {"input": "a", "include": ["reasoning.encrypted_content"]},
    ),
    "reasoning.summary": (RESPONSES, {"input": "a", "reasoning": {"summary": "auto"}}),
    "other tools beside functions": (
        RESPONSES,
        {"input": "a", "tools": [{"type": "web_search"}, {"type": "function"} | FUNCTION]},
    ),
}


@pytest.mark.parametrize("report", ACCEPTED)
def test_accepted(send: Callable[..., httpx.Response], report: str) -> None:
    path, fields = ACCEPTED[report]
    if path == RESPONSES:
        fields = {"max_output_tokens": 16} | fields
    response = send(path, **fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("field", "value"), [("enable_thinking", False), ("reasoning_effort", "low")]
)
def test_what_the_template_cannot_read_is_named(send, field, value):
    response = send(CHAT, **{field: value})
    assert response.status_code == 200, response.text
    assert field in response.headers["x-headstart-ignored"]


def test_a_prompt_beyond_the_context_has_its_code(send):
    long = [HELLO | {"content": "one two " * 6000}]
    error = send(CHAT, messages=long).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length" in error["message"]
    assert "prompt is too long" in send(MESSAGES, messages=long).json()["error"]["message"]


def test_an_empty_line_is_the_token_that_the_model_knows(send):
    tokens = send("/tokenize", prompt="List:\n\n1. a", add_special_tokens=False).json()["tokens"]
    assert tokens == [6106, 42, 1116, 33, 30, 253]  # llama.cpp's of the same file


def test_a_special_token_ends_the_answer(send):
    end = "<|im_start|>"
    [token] = send("/tokenize", prompt=end, add_special_tokens=False).json()["tokens"]
    answer = send(CHAT, stop=[end], logit_bias={str(token): 100}, max_tokens=8).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_stream_ends_with_an_event_of_its_own(send):
    response = send(CHAT, stream=True, max_tokens=3, ignore_eos=True)
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if "{" in line]
    last = events[-1]["choices"][0]
    assert (last["finish_reason"], last["delta"]) == ("length", {})
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])


def test_scores_are_within_their_range(send):
    documents = ["abc", "abc", "q", "Paris is in France"]
    results = send("/v1/rerank", query="abc", documents=documents).json()["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores[0] == scores[1] == max(scores.values())


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_head(server, path):
    assert httpx.head(server.url + path, timeout=60).status_code == 200


def test_a_slash_at_the_end(send):
    assert send(CHAT + "/", messages=[HELLO], max_tokens=1).status_code == 200


def test_what_a_response_was_asked_is_kept(send, server):
    said = send(RESPONSES, input="Hello", max_output_tokens=16).json()
    listed = httpx.get(f"{server.url}{RESPONSES}/{said['id']}/input_items", timeout=60).json()
    assert [item["role"] for item in listed["data"]] == ["user"]
    item = {"type": "item_reference", "id": said["output"][0]["id"]}
    again = send(RESPONSES, input=[item, HELLO], max_output_tokens=16)
    assert again.status_code == 200, again.text
