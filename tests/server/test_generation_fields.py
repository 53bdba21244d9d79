"""Fields of vLLM's that choose tokens, or say what of them is text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.engine.process.messages import Output
from headstart.server.text.assembler import StopStrings, TextAssembler, TextOptions

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(params=[CHAT, TEXT])
def ask(request, client, chat_body):
    """Posts fields to one of the endpoints; gives the response and the text of its answer."""

    async def send(**fields):
        text = {"model": "tiny", "prompt": "the fox", "max_tokens": 16} | fields
        body = chat_body(**fields) if request.param == CHAT else text
        response = await client.post(request.param, json=body)
        if response.status_code != 200:
            return response, response.json()["error"]
        choice = response.json()["choices"][0]
        return response, choice["text"] if request.param == TEXT else choice["message"]["content"]

    return send


async def test_bad_words_are_tokens_with_and_without_a_space(ask, engine, say):
    response, _ = await ask(bad_words=["fox", " dog"])
    assert response.status_code == 200
    assert engine.added[0].params.bad_words == tuple(
        tuple(say(form)) for form in ("fox", " fox", " dog")
    )


async def test_allowed_ids_and_min_tokens_reach_the_engine(ask, engine):
    await ask(allowed_token_ids=[5, 7], min_tokens=3)
    params = engine.added[0].params
    assert (params.allowed_token_ids, params.min_tokens) == ((5, 7), 3)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"bad_words": "fox"}, "bad_words", "a list of strings"),
        ({"bad_words": ["a", 1]}, "bad_words[1]", "must be a string"),
        ({"bad_words": [" "]}, "bad_words[0]", "not all spaces"),
        ({"bad_words": ["x" * 257]}, "bad_words[0]", "1 to 256 characters"),
        ({"bad_words": ["x"] * 129}, "bad_words", "at most 128"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "is empty"),
        ({"allowed_token_ids": [400]}, "allowed_token_ids", "the vocabulary has 400"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids", "a list of token ids"),
        ({"allowed_token_ids": [1] * 4097}, "allowed_token_ids", "at most 4096"),
        ({"allowed_token_ids": [5], "bad_words": ["x"]}, "allowed_token_ids", "combined"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens", "at most 16"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
    ],
)
async def test_what_is_refused(ask, engine, fields, param, words):
    response, error = await ask(**fields)
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.added


async def test_the_stop_string_is_included_if_asked_for(ask):
    assert (await ask(stop="o w"))[1] == "hell"
    assert (await ask(stop="o w", include_stop_str_in_output=True))[1] == "hello w"


async def test_no_stop_string_within_min_tokens(ask, engine, say):
    pieces = [say("he"), say("llo"), say(" wo"), say("rld hello")]
    engine.answer = lambda _: [token for piece in pieces for token in piece]
    until = len(pieces[0]) + len(pieces[1])
    assert (await ask(stop="hello"))[1] == ""
    assert (await ask(stop="hello", min_tokens=until))[1] == "hello world "


async def test_special_tokens_are_shown_if_asked_for(ask, engine, say):
    engine.answer = lambda _: [*say("a"), 1, *say("b")]
    assert (await ask())[1] == "ab"
    assert (await ask(skip_special_tokens=False))[1] == "a<|im_start|>b"
    # The token that ended it is text only if that was asked for, too.
    shown = await ask(skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown[1] == "a<|im_start|>b<|im_end|>"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_a_special_token_may_be_a_stop_string(
    client, engine, chat_body, events, say, url, stream
):
    """Though it is no text."""
    engine.answer = lambda _: [*say("hello"), 1, *say(" world")]
    body = {"model": "tiny", "prompt": "x"} if url == TEXT else chat_body()
    body |= {"stop": ["planet", "<|im_start|>"], "stream": stream}
    body["logprobs"] = True if url == CHAT else 0
    response = await client.post(url, json=body)
    answers = events(response.text)[:-1] if stream else [response.json()]
    choices = [answer["choices"][0] for answer in answers]
    parts = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    text = "".join(part.get("content") or part.get("text") or "" for part in parts)
    assert text == "hello"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "<|im_start|>")
    assert engine.added[0].stream.aborted >= 1
    assert "<|im_start|>" not in str([choice["logprobs"] for choice in choices])
    shown = await client.post(url, json=body | {"include_stop_str_in_output": True})
    assert "<|im_start|>" in shown.text


async def test_special_stop_strings_obey_min_tokens(ask, engine, say):
    engine.answer = lambda _: [1, *say("hello"), 1, *say(" world")]
    assert (await ask(stop="<|im_start|>"))[1] == ""
    assert (await ask(stop="<|im_start|>", min_tokens=2))[1] == "hello"


async def test_top_p_of_nothing_is_the_likeliest_token(ask, engine):
    response, _ = await ask(top_p=0, temperature=1)
    assert response.status_code == 200
    params = engine.added[0].params
    assert (params.temperature, params.top_p) == (0.0, None)


async def test_prompts_are_truncated_to_their_end(client, engine, chat_body, say):
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body(truncate_prompt_tokens=3))
    await client.post(CHAT, json=chat_body(truncate_prompt_tokens=1000))
    whole, end, all_of_it = (added.token_ids for added in engine.added)
    assert (end, all_of_it) == (whole[-3:], whole)
    too_many = {"model": "tiny", "prompt": [7] * 300 + [8], "truncate_prompt_tokens": -1}
    assert (await client.post(TEXT, json=too_many | {"max_tokens": 10**6})).status_code == 200
    assert engine.added[-1].token_ids == [7] * 254 + [8]
    body = {"model": "tiny", "prompt": [7] * 300 + [8], "max_tokens": 56}
    assert (await client.post(TEXT, json=body)).status_code == 400
    answer = await client.post(TEXT, json=body | {"truncate_prompt_tokens": -1})
    assert answer.status_code == 200
    assert engine.added[-1].token_ids == [7] * 199 + [8]
    assert answer.json()["usage"]["prompt_tokens"] == 200


async def test_echo_is_of_the_truncated_prompt(client, say):
    body = {"model": "tiny", "prompt": "the fox", "echo": True, "max_tokens": 1}
    kept = len(say(" fox"))
    answer = (await client.post(TEXT, json=body | {"truncate_prompt_tokens": kept})).json()
    assert answer["choices"][0]["text"].startswith(" fox")


async def test_truncation_would_move_segments(client, engine, chat_body):
    body = chat_body(truncate_prompt_tokens=3, segment_mask="turns")
    response = await client.post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "truncate_prompt_tokens"
    assert not engine.added


@given(
    st.lists(st.text(alphabet="abc", max_size=6), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
)
def test_included_stop_strings_do_not_depend_on_the_cuts(pieces, stops):
    matcher, text = StopStrings(stops, include=True), ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.hit:
            break
    if not matcher.hit:
        text += matcher.flush()
    whole = "".join(pieces)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    assert text == (whole[: min(ends)] if ends else whole)


@given(st.text(alphabet="ab ", max_size=30), st.integers(0, 12), st.integers(1, 4))
def test_min_tokens_does_not_depend_on_the_cuts(tokenizer, text, least, per_output):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    texts = []
    for count in (1, per_output):
        assembler = TextAssembler(tokenizer, TextOptions(["ab"], min_tokens=least))
        got = ""
        for i in range(0, len(token_ids), count):
            last = i + count >= len(token_ids)
            delta = assembler.push(Output(0, token_ids[i : i + count], "length" if last else None))
            got += delta.text
            if delta.finish_reason:
                break
        texts.append(got)
    assert texts[0] == texts[1]
    assert texts[0].startswith(tokenizer.decode(token_ids[:least]))


@pytest.mark.parametrize("url", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "reason", "stopped_by"),
    [
        ({}, "stop", None),  # the model's own end
        ({"stop": ["planet", "wor"]}, "stop", "wor"),
        ({"stop_token_ids": [7, 2]}, "stop", 2),
        ({"stop_token_ids": [7]}, "stop", None),
        ({"stop": ["wor"], "stop_token_ids": [2]}, "stop", "wor"),
        ({"stop": ["planet"], "max_tokens": 1}, "length", None),
        ({"stop_token_ids": [2], "include_stop_str_in_output": True}, "stop", 2),
    ],
)
async def test_the_end_says_what_stopped_it(
    client, chat_body, events, url, fields, reason, stopped_by
):
    body = {"prompt": "the fox", "max_tokens": 32} if url == TEXT else chat_body()
    body = body | {"model": "tiny"} | fields
    answer = (await client.post(url, json=body)).json()["choices"][0]
    assert (answer["finish_reason"], answer["stop_reason"]) == (reason, stopped_by)
    *chunks, _ = events((await client.post(url, json=body | {"stream": True})).text)
    ends = [chunk["choices"][0] for chunk in chunks]
    assert (ends[-1]["finish_reason"], ends[-1]["stop_reason"]) == (reason, stopped_by)
    assert not any("stop_reason" in choice for choice in ends[:-1])
