"""/v1/chat/completions: answers, streaming, n, usage, stop strings, log-probabilities."""

from __future__ import annotations

import asyncio
import threading

import msgspec
import pytest

from headstart.engine.errors import EngineDeadError, RequestError

URL = "/v1/chat/completions"


async def test_whole_answer(client, engine, chat_body, say):
    response = await client.post(URL, json=chat_body())
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello world", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    prompt = say("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    [added] = engine.added
    assert added.token_ids == prompt
    assert added.params.max_tokens == 256 - len(prompt)
    assert added.stream.aborted == 0
    generated = len(say("hello world")) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": generated,
        "total_tokens": len(prompt) + generated,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_streamed_answer(client, chat_body, events):
    response = await client.post(URL, json=chat_body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello world"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert deltas[-1] == {}


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_tokens": 2}, {"stop": "ld"}, {"logprobs": True}, {"return_token_ids": True}],
)
async def test_the_end_has_an_event_of_its_own(client, engine, chat_body, events, fields):
    """Some clients read no text beside a finish_reason."""
    for per_output in (1, 100):
        engine.per_output = per_output
        *chunks, _ = events((await client.post(URL, json=chat_body(stream=True, **fields))).text)
        *others, last = (chunk["choices"][0] for chunk in chunks)
        assert last["delta"] == {}
        assert last["finish_reason"] == ("length" if "max_tokens" in fields else "stop")
        assert {choice["finish_reason"] for choice in others} == {None}
        whole = (await client.post(URL, json=chat_body(**fields))).json()["choices"][0]
        text = "".join(choice["delta"].get("content", "") for choice in others)
        assert text == whole["message"]["content"]
        if "logprobs" in fields:
            entries = [
                e for c in (*others, last) if c["logprobs"] for e in c["logprobs"]["content"]
            ]
            assert entries == whole["logprobs"]["content"]
        if "return_token_ids" in fields:
            ids = [i for choice in (*others, last) for i in choice.get("token_ids", ())]
            assert ids == whole["token_ids"]


async def test_stream_usage(client, chat_body, events):
    body = chat_body(stream=True, stream_options={"include_usage": True})
    whole = (await client.post(URL, json=chat_body())).json()
    *chunks, usage, done = events((await client.post(URL, json=body)).text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_n(client, engine, chat_body, events, say, stream):
    engine.answer = lambda i: say(f"answer {i}")
    body = chat_body(n=3, seed=7, stream=stream, stream_options=None)
    response = await client.post(URL, json=body)
    assert [added.params.seed for added in engine.added] == [7, 8, 9]
    texts = ["", "", ""]
    if stream:
        for chunk in events(response.text)[:-1]:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        answer = response.json()
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["message"]["content"]
        assert answer["usage"]["prompt_tokens"] == len(engine.added[0].token_ids)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
        counts = [len(say(f"answer {i}")) + 1 for i in range(3)]
        assert answer["usage"]["completion_tokens"] == sum(counts)
    assert texts == ["answer 0", "answer 1", "answer 2"]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_answer(client, engine, chat_body, events, say, stream):
    engine.answer = lambda _: say("the quick brown fox")
    response = await client.post(URL, json=chat_body(stop=["k br", "zzz"], stream=stream))
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("the quic", "stop")
    assert engine.added[0].stream.aborted >= 1


async def test_length(client, chat_body):
    answer = (await client.post(URL, json=chat_body(max_completion_tokens=1))).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1


async def test_sampling_fields_reach_the_engine(client, engine, chat_body):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": 3,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "max_tokens": 4,
    }
    response = await client.post(URL, json=chat_body(cache_salt="tenant", **fields))
    assert response.status_code == 200, response.text
    [added] = engine.added
    for name in fields.keys() - {"logit_bias", "stop_token_ids"}:
        assert getattr(added.params, name) == fields[name], name
    assert added.params.logit_bias == {5: -100.0, 6: 1.5}
    assert added.params.stop_token_ids == (9,)
    assert added.params.logprobs is None
    assert added.salt == b"tenant"


async def test_null_means_default(client, engine, chat_body):
    names = ("temperature", "top_p", "n", "stop", "logit_bias", "seed", "stream", "tools", "user")
    response = await client.post(URL, json=chat_body(**dict.fromkeys(names)))
    assert response.status_code == 200
    assert engine.added[0].params.temperature == 1.0
    assert engine.added[0].salt == b""


@pytest.mark.parametrize("value", [-1, 0])
async def test_top_k_off(client, engine, chat_body, value):
    await client.post(URL, json=chat_body(top_k=value))
    assert engine.added[0].params.top_k is None


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client, engine, chat_body, events, say, tokenizer, stream):
    engine.answer = lambda _: say("a\U0001f44d")
    response = await client.post(URL, json=chat_body(logprobs=True, top_logprobs=2, stream=stream))
    if stream:
        content = [
            entry
            for chunk in events(response.text)[:-1]
            for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "a\U0001f44d".encode()
    assert content[0]["token"] == "a"
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


async def test_logprobs_without_top(client, engine, chat_body):
    answer = (await client.post(URL, json=chat_body(logprobs=True))).json()
    assert engine.added[0].params.logprobs == 0
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_no_alternatives_without_log_probabilities(client, engine, chat_body):
    assert (await client.post(URL, json=chat_body(top_logprobs=0))).status_code == 200
    assert engine.added[0].params.logprobs is None


async def test_parts_may_be_marked_and_refusals(client, engine, chat_body, tokenizer):
    parts = [
        {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}},
        {"type": "refusal", "refusal": "two"},
    ]
    messages = [
        {"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "content": parts, "annotations": []},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "so", "refusal": None, "audio": None},
        {"role": "assistant", "content": None, "reasoning_content": "because"},
        {"role": "user", "content": "go"},
    ]
    response = await client.post(URL, json=chat_body(messages=messages))
    assert response.status_code == 200, response.text
    assert response.headers["x-headstart-ignored"] == (
        "messages[].cache_control, messages[].content[].cache_control"
    )
    text = b"".join(map(tokenizer.token_bytes, engine.added[0].token_ids)).decode()
    assert "assistant\none\ntwo<" in text
    assert "assistant\nno<" in text
    assert "assistant\nso<" in text
    assert "assistant\n<" in text


async def test_what_is_no_text_is_named_all_at_once(client, engine, chat_body):
    kinds = ("image_url", "input_audio", "file", "video_url")
    parts = [{"type": "text", "text": "a"}, *({"type": kind, kind: {}} for kind in kinds)]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": parts[:2]}]
    response = await client.post(URL, json=chat_body(messages=messages, audio={"voice": "a"}))
    assert response.status_code == 400
    error = response.json()["error"]
    for i, kind in enumerate(kinds, 1):
        assert (
            f"messages[0].content[{i}] is not supported: its type is '{kind}'" in error["message"]
        )
    assert "messages[1].content[1] is not supported" in error["message"]
    assert "audio is not supported: this model writes text" in error["message"]
    assert engine.added == []


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": None, "reasoning": "a"}, "messages[0].reasoning_content"),
        ({"role": "assistant", "content": None, "refusal": None}, "messages[0].content"),
        ({"role": "assistant", "content": None, "reasoning": ""}, "messages[0].content"),
    ],
)
async def test_messages_that_say_nothing(client, chat_body, message, param):
    response = await client.post(URL, json=chat_body(messages=[message]))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_content_parts_and_developer(client, engine, chat_body, tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    assert (await client.post(URL, json=chat_body(messages=messages))).status_code == 200
    text = b"".join(map(tokenizer.token_bytes, engine.added[0].token_ids)).decode()
    assert "system\nbe<" in text
    assert "user\none\ntwo<" in text


async def test_chats_are_rendered_in_threads(app, client, engine, monkeypatch):
    engine.model = msgspec.structs.replace(engine.model, max_model_len=10**6)
    threads: list[str] = []
    template = app.state.runtime.chat_template
    encode = template.encode

    def noting(*chat, **named):
        threads.append(threading.current_thread().name)
        return encode(*chat, **named)

    monkeypatch.setattr(template, "encode", noting)
    for length in (10, 20_000):
        messages = [{"role": "user", "content": "x" * length}]
        response = await client.post(URL, json={"model": "tiny", "messages": messages})
        assert response.status_code == 200
    assert threads == ["chat_0", "text_0"]


async def test_several_tokens_in_one_output(client, engine, chat_body, events):
    engine.per_output = 4
    chunks = events((await client.post(URL, json=chat_body(stream=True))).text)[:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "hello world"
    assert len(chunks) <= 5


async def test_engine_dies_before_the_first_token(client, engine, chat_body):
    engine.fail_after = (0, EngineDeadError("the engine has died"))
    response = await client.post(URL, json=chat_body(stream=True))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"


async def test_engine_dies_in_the_middle_of_a_stream(client, engine, chat_body, events):
    engine.fail_after = (2, EngineDeadError("the engine has died"))
    response = await client.post(URL, json=chat_body(stream=True))
    assert response.status_code == 200
    *_, error, done = events(response.text)
    assert error["error"]["message"] == "the engine has died"
    assert done == "[DONE]"
    assert (await client.post(URL, json=chat_body())).status_code == 503


async def test_one_choice_that_fails_stops_the_others(client, engine, chat_body):
    engine.fail_after = (2, EngineDeadError("the engine has died"))
    response = await client.post(URL, json=chat_body(n=4))
    assert response.status_code == 503
    assert all(added.stream.aborted for added in engine.added)


@pytest.mark.parametrize("stream", [False, True])
async def test_logits_that_are_no_numbers_are_an_error(client, engine, chat_body, events, stream):
    engine.reason = "error"
    response = await client.post(URL, json=chat_body(stream=stream))
    if stream:
        *_, error, done = events(response.text)
        assert done == "[DONE]"
    else:
        assert response.status_code == 500
        error = response.json()
    assert error["error"]["message"] == "the model's logits are not numbers"
    metrics = (await client.get("/metrics")).text
    assert 'request_success_total{finished_reason="error",model_name="tiny"} 1.0' in metrics


async def test_the_engine_refuses(client, engine, chat_body):
    engine.fail_after = (0, RequestError("needs more pages than there are", "messages"))
    response = await client.post(URL, json=chat_body())
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


async def test_bugs_tell_the_client_nothing(client, engine, chat_body):
    engine.fail_after = (0, ValueError("secret"))
    response = await client.post(URL, json=chat_body())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


async def test_a_stream_that_just_ends_is_an_error(client, engine, chat_body):
    original = engine.add

    def add(token_ids, params, **where):
        stream = original(token_ids, params, **where)
        del stream.outputs[1:]
        return stream

    engine.add = add
    assert (await client.post(URL, json=chat_body())).status_code == 500


async def test_requests_run_side_by_side(client, engine, chat_body):
    engine.hold = True
    tasks = [asyncio.create_task(client.post(URL, json=chat_body())) for _ in range(8)]
    while len(engine.added) < 8:
        await asyncio.sleep(0.001)
    for added in engine.added:
        added.stream.gate.set()
    assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * 8


async def test_prompt_logprobs(client, engine, chat_body):
    """Of the rendered prompt, once, whatever n is."""
    answer = (await client.post(URL, json=chat_body(prompt_logprobs=0, n=2))).json()
    prompt = engine.added[0].token_ids
    assert [list(entry) for entry in answer["prompt_logprobs"][1:]] == [
        [str(t)] for t in prompt[1:]
    ]
    assert answer["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in (await client.post(URL, json=chat_body())).json()


async def test_prompt_logprobs_are_not_streamed(client, engine, chat_body):
    response = await client.post(URL, json=chat_body(prompt_logprobs=1, stream=True))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == "prompt_logprobs are not available when stream=True"
    assert engine.added == []
