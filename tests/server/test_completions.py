"""/v1/completions: prompt forms, echo, log-probabilities, limits."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import AddedToken

from headstart.server.api.openai_completions.fill_in import LAYOUTS
from headstart.server.http.app import create_app
from headstart.server.text.tokenizer import Tokenizer

URL = "/v1/completions"


@pytest.fixture
def body():
    return lambda **fields: {"model": "tiny", "prompt": "the fox"} | fields


async def test_whole_answer(client, engine, body, say):
    answer = (await client.post(URL, json=body())).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hello world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert engine.added[0].token_ids == say("the fox")
    assert engine.added[0].params.max_tokens == 16


async def test_a_byte_order_mark_is_no_part_of_a_body(client, body):
    sent = b"\xef\xbb\xbf" + json.dumps(body()).encode()
    assert (await client.post(URL, content=sent)).status_code == 200
    assert (await client.post(URL, content=b"\xef\xbb\xbf" + sent)).status_code == 400


async def test_default_max_tokens_fits_the_context(client, engine, body):
    response = await client.post(URL, json=body(prompt=[5] * 250))
    assert response.status_code == 200
    assert engine.added[0].params.max_tokens == 6


async def test_streamed_answer(client, body, events):
    response = await client.post(
        URL, json=body(stream=True, stream_options={"include_usage": True})
    )
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_many_prompts_times_n(client, engine, body, events, say, stream, as_ids):
    engine.answer = lambda i: say(f" {i}")
    prompts = ["the", "quick"]
    sent = [say(prompt) for prompt in prompts] if as_ids else prompts
    response = await client.post(URL, json=body(prompt=sent, n=2, echo=True, stream=stream))
    assert [added.token_ids for added in engine.added] == [
        say("the"),
        say("the"),
        say("quick"),
        say("quick"),
    ]
    texts = [""] * 4
    answers = events(response.text)[:-1] if stream else [response.json()]
    for answer in answers:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["the 0", "the 1", "quick 2", "quick 3"]
    if not stream:
        count = len(say("the")) + len(say("quick"))
        assert answers[0]["usage"]["prompt_tokens"] == count


async def test_one_prompt_of_ids(client, engine, body):
    await client.post(URL, json=body(prompt=[5, 6, 7]))
    assert engine.added[0].token_ids == [5, 6, 7]


async def test_logprobs(client, engine, body, say):
    engine.answer = lambda _: say("ab\U0001f44d")
    answer = (await client.post(URL, json=body(logprobs=2))).json()
    logprobs = answer["choices"][0]["logprobs"]
    lengths = {len(values) for values in logprobs.values()}
    assert lengths == {len(say("ab\U0001f44d"))}
    assert logprobs["tokens"][:2] == ["a", "b"]
    assert logprobs["tokens"][2].startswith("bytes:\\x")
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert logprobs["top_logprobs"][0]["a"] == -0.5
    assert len(logprobs["top_logprobs"][0]) == 2


async def test_echo_with_logprobs(client, engine, body, say, events):
    """Those of the prompt, the first of which has none, and of the answer, as one list."""
    asked = body(prompt="the fox 👍", echo=True, logprobs=2)
    choice = (await client.post(URL, json=asked)).json()["choices"][0]
    assert choice["text"] == "the fox 👍hello world"
    assert engine.added[0].params.prompt_logprobs == 2
    logprobs, prompt = choice["logprobs"], say("the fox 👍")
    assert {len(values) for values in logprobs.values()} == {len(prompt) + len(say("hello world"))}
    assert logprobs["tokens"][:2] == ["the", " fox"]
    assert logprobs["tokens"][len(prompt) :] == ["he", "llo", " world"]
    assert logprobs["token_logprobs"][:2] == [None, -1.5]
    assert logprobs["token_logprobs"][-1] == -0.5
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1][" fox"] == -1.5
    assert logprobs["text_offset"][:3] == [0, 3, 7]
    assert logprobs["text_offset"][len(prompt) :] == [9, 11, 14]

    *chunks, _ = events((await client.post(URL, json=asked | {"stream": True})).text)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert pieces[0]["text"] == "the fox 👍"
    for name, values in logprobs.items():
        assert [x for piece in pieces for x in piece["logprobs"][name]] == values


async def test_echo_of_ids_with_logprobs(client, body, say):
    """Special tokens are no text there."""
    prompt = [0, *say("the fox"), 1, *say(" dog")]
    choice = (await client.post(URL, json=body(prompt=prompt, echo=True, logprobs=0))).json()
    choice = choice["choices"][0]
    assert choice["text"] == "the fox doghello world"
    assert choice["logprobs"]["tokens"][:2] == ["<|eos|>", "the"]
    assert choice["logprobs"]["text_offset"][:5] == [0, 0, 3, 7, 7]
    assert choice["logprobs"]["top_logprobs"][:3] == [None, {"the": -1.5}, {" fox": -1.5}]


async def test_special_tokens_written_in_a_prompt_are_echoed(client, body):
    asked = body(prompt="the<|im_end|> fox", echo=True, logprobs=0)
    choice = (await client.post(URL, json=asked)).json()["choices"][0]
    assert choice["text"] == "the<|im_end|> foxhello world"
    assert choice["logprobs"]["text_offset"][:4] == [0, 3, 13, 17]


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_but_the_echo(client, engine, body, say, events, stream):
    asked = body(prompt=["the fox", "the"], echo=True, max_tokens=0, logprobs=1, stream=stream)
    response = await client.post(URL, json=asked)
    answers = events(response.text)[:-1] if stream else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    for i, prompt in enumerate(["the fox", "the"]):
        mine = [choice for choice in choices if choice["index"] == i]
        assert "".join(choice["text"] for choice in mine) == prompt
        assert mine[-1]["finish_reason"] == "length"
        tokens = [token for choice in mine for token in choice["logprobs"]["tokens"]]
        assert len(tokens) == len(say(prompt))
    assert {added.params.max_tokens for added in engine.added} == {0}
    if not stream:
        assert answers[0]["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs(client, engine, body, say):
    """vLLM's form, beside those of the echo, which are fewer."""
    asked = body(prompt="the fox", prompt_logprobs=3, echo=True, logprobs=1, max_tokens=1)
    choice = (await client.post(URL, json=asked)).json()["choices"][0]
    assert engine.added[0].params.prompt_logprobs == 3
    fox = say(" fox")[0]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert list(second) == [str(fox), str(fox + 1), str(fox - 1)]
    assert second[str(fox)] == {"logprob": -1.5, "rank": 2, "decoded_token": " fox"}
    assert second[str(fox + 1)]["rank"] == 1
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2  # the likeliest, and the prompt's


async def test_no_infinity_in_json(client, engine, body, monkeypatch):
    from headstart.engine.process.messages import TokenLogprobs

    add = engine.add

    def ruled_out(token_ids, params, **where):
        stream = add(token_ids, params, **where)
        for output in stream.outputs:
            output.logprobs[:] = [
                TokenLogprobs(t.token_id, float("-inf"), [(t.token_id, float("-inf"))])
                for t in output.logprobs
            ]
        return stream

    monkeypatch.setattr(engine, "add", ruled_out)
    answer = (await client.post(URL, json=body(logprobs=1))).json()
    assert set(answer["choices"][0]["logprobs"]["token_logprobs"]) == {-9999.0}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt[0]", "empty"),
        ({"prompt": ["a", ""]}, "prompt[1]", "empty"),
        ({"prompt": 3}, "prompt", "a prompt is"),
        ({"prompt": None}, "prompt", "a prompt is"),
        ({"prompt": ["a", 3]}, "prompt[1]", "a prompt is"),
        ({"prompt": [1, "a"]}, "prompt[1]", "not a token id"),
        ({"prompt": [1, True]}, "prompt[1]", "not a token id"),
        ({"prompt": [1, -1]}, "prompt[1]", "not a token id"),
        ({"prompt": [1, 2**40]}, "prompt[1]", "not a token id"),
        ({"prompt": [[1], [1, 1.5]]}, "prompt[1][1]", "not a token id"),
        ({"prompt": [1, 400]}, "prompt[1]", "vocabulary has 400"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64 are allowed"),
        ({"prompt": ["a"] * 60, "n": 3}, "prompt", "at most 128"),
        ({"max_tokens": 0}, "max_tokens", "without echo"),
        ({"max_tokens": -2, "echo": True}, "max_tokens", "greater than or equal to -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "stream=True"),
        ({"suffix": "x"}, "suffix", "no tokens to fill in text"),
        ({"suffix": "x", "echo": True}, "suffix", "suffix and echo"),
        ({"suffix": "x", "truncate_prompt_tokens": 3}, "suffix", "cannot be combined"),
        ({"suffix": 1}, "suffix", "valid string"),
        ({"best_of": 0}, "best_of", "greater than or equal to 1"),
        ({"best_of": 2, "n": 3}, "best_of", "best_of is 2, and n is 3"),
        ({"best_of": 17}, "best_of", "at most 16"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"prompt": ["a"] * 60, "best_of": 3}, "prompt", "at most 128"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"prompt": [5] * 256}, "prompt", "has 256 tokens; this model's maximum context length"),
    ],
)
async def test_bad_requests(client, engine, body, fields, param, words):
    response = await client.post(URL, json=body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.added == []


async def test_no_prompt_is_started_when_one_is_bad(client, engine, body):
    response = await client.post(URL, json=body(prompt=["fine", "x " * 400]))
    assert response.status_code == 400
    assert engine.added == []


@pytest.fixture
def filling(engine, backend, connect_to):
    """A client of a model with tokens to fill in text, and its tokenizer's encode."""

    def build(layout):
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        own.add_tokens([AddedToken(part, special=True) for part in layout])
        tokenizer = Tokenizer(own)
        app = create_app(engine, tokenizer, model_names=["tiny"])
        return connect_to(app), lambda text: tokenizer.encode(text, add_special_tokens=False)

    return build


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_what_is_between_a_prompt_and_a_suffix(filling, engine, body, layout):
    marks = [part for part in layout if part not in ("prefix", "suffix")]
    client, ids = filling(marks)
    texts = {"prefix": "the fox", "suffix": " dog"}
    expected = [i for part in layout for i in ids(texts.get(part, part))]
    for prompt in ("the fox", ids("the fox")):
        response = await client.post(URL, json=body(prompt=prompt, suffix=" dog"))
        assert response.status_code == 200, response.text
        assert engine.added[-1].token_ids == expected
    assert response.json()["choices"][0]["text"] == "hello world"
    await client.post(URL, json=body(suffix=""))
    assert engine.added[-1].token_ids == ids("the fox")


async def test_half_the_marks_fill_nothing_in(filling, body):
    client, _ = filling(["<|fim_prefix|>", "<|fim_suffix|>"])
    response = await client.post(URL, json=body(suffix="x"))
    assert response.status_code == 400
