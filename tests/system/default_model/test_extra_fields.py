"""Fields of vLLM and of our own, sent by the official client as ``extra_body``."""

from __future__ import annotations

import json
import re

import httpx
import openai
import pytest

MODEL = "smollm2-135m"
PARIS = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def ask(client, messages=PARIS, max_tokens=16, **extra):
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0, extra_body=extra
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"structured_outputs": {"choice": ["Lyon", "Marseille"]}}, "Lyon|Marseille"),
        ({"guided_choice": ["Lyon", "Marseille"]}, "Lyon|Marseille"),
        ({"structured_outputs": {"regex": "[A-Z][a-z]{2,8}, [0-9]{4}"}}, "[A-Z][a-z]+, [0-9]{4}"),
        ({"guided_regex": "(ab|cd){3}"}, "(ab|cd){3}"),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
        ({"guided_grammar": 'start: "(" /[a-z]{1,5}/ ")"'}, r"\([a-z]{1,5}\)"),
        ({"response_format": {"type": "regex", "pattern": "x{4}"}}, "xxxx"),
    ],
)
def test_answers_follow(client, extra, expected):
    assert re.fullmatch(expected, ask(client, **extra).choices[0].message.content)
    extra = extra | {"temperature": 1.5}
    chunks = client.chat.completions.create(
        model=MODEL, messages=PARIS, max_tokens=16, stream=True, extra_body=extra
    )
    assert re.fullmatch(expected, "".join(c.choices[0].delta.content or "" for c in chunks))


def test_a_json_object_streamed(client):
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        max_tokens=300,
        stream=True,
        seed=1,
        response_format={"type": "json_object"},
        logit_bias={"34": 5, "1270": 5},
        frequency_penalty=1,
    )
    parts = [chunk.choices[0] for chunk in chunks]
    text = "".join(part.delta.content or "" for part in parts)
    assert text.startswith("{")
    if parts[-1].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_an_answer_is_continued(client):
    begun = [*PARIS, {"role": "assistant", "content": "The capital of France is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    text = ask(client, begun, **fields).choices[0].message.content
    assert text.startswith(" Paris")
    echoed = ask(client, begun, **fields, echo=True).choices[0].message.content
    assert echoed == "The capital of France is" + text


def test_token_ids_of_prompt_and_answer(client, server):
    answer = ask(client, return_token_ids=True)
    [choice] = answer.choices
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": answer.prompt_token_ids})
    assert PARIS[0]["content"] in back.json()["prompt"]
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": choice.token_ids}).json()
    assert text["prompt"].startswith(choice.message.content)
    assert len(choice.token_ids) == answer.usage.completion_tokens


def test_the_best_of_several(client):
    fields = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 6, "seed": 5}
    fields |= {"temperature": 1}
    some = client.completions.create(**fields, n=4, logprobs=0)
    best = client.completions.create(**fields, n=1, best_of=4)

    def likelihood(choice):
        values = choice.logprobs.token_logprobs
        return sum(values) / len(values)

    assert best.choices[0].text == max(some.choices, key=likelihood).text
    assert best.usage.completion_tokens == some.usage.completion_tokens


def test_a_prompt_is_truncated(client, text):
    answer = client.completions.create(
        model=MODEL, prompt=text(300, 77), max_tokens=1, extra_body={"truncate_prompt_tokens": 20}
    )
    assert answer.usage.prompt_tokens == 20


def test_a_request_has_a_time_limit(client, server):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, max_tokens=2000, ignore_eos=True, timeout=0.3)
    assert caught.value.status_code == 504
    assert caught.value.code == "timeout"
    server.wait_idle()


def test_variables_of_the_template(tool_server):
    with tool_server.client() as client:
        body = {"model": MODEL, "messages": PARIS, "chat_template_kwargs": {"persona": "a poet"}}
        rendered = httpx.post(f"{tool_server.url}/apply-template", json=body).json()["prompt"]
        assert rendered.endswith("As a poet: ")
        assert ask(client, chat_template_kwargs={"persona": "a poet"}).choices
        unread = body | {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 2}
        response = httpx.post(f"{tool_server.url}/v1/chat/completions", json=unread, timeout=300)
        assert response.status_code == 200
        assert response.headers["x-headstart-ignored"] == "chat_template_kwargs.enable_thinking"


def test_priorities(tool_server, client):
    with tool_server.client() as with_priorities:
        assert ask(with_priorities, priority=-3).choices
    with pytest.raises(openai.BadRequestError, match="--scheduling-policy"):
        ask(client, priority=1)
