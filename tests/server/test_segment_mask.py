"""The field segment_mask: what reaches the engine, what is refused, and when a header warns."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import accumulate

import httpx
import msgspec
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, processors

from headstart.engine.process.messages import AdapterInfo
from headstart.engine.ranges.segments import Segments
from headstart.server.api.segment_mask import Spans
from headstart.server.http.app import create_app
from headstart.server.http.errors import APIError
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WARNING = "x-headstart-warning"
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over"},
]


def adapter(name: str, segment_mask: str | None) -> AdapterInfo:
    return AdapterInfo(
        name=name, path=f"/x/{name}", rank=8, targets=[], num_bytes=0, segment_mask=segment_mask
    )


@pytest.fixture
def post(engine, tokenizer):
    """``await post(url, body, **settings)`` to an app of its own."""

    async def send(url, body, tokenizer=tokenizer, **limits):
        app = create_app(engine, tokenizer, model_names=["tiny"], settings=ServerSettings(**limits))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(url, json=body)

    return send


@pytest.fixture
def turns(say):
    """The segments of CONVERSATION: its turns but the assistant's."""
    lengths = [
        len(say(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n")) for m in CONVERSATION
    ]
    ends = list(accumulate(lengths))
    starts = [0, *ends]
    # The token that begins the text is in no segment.
    return [(max(starts[i], 1), ends[i]) for i in (0, 1, 3)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "flag", "declared", "asked", "segmented", "warns"),
    [
        # model: the base one, or an adapter that declares something; then who has the last word
        ("tiny", None, None, None, False, False),
        ("tiny", None, None, "turns", True, True),
        ("tiny", None, "turns", None, True, False),
        ("tiny", None, "turns", "causal", False, False),
        ("tiny", "causal", "turns", None, False, False),
        ("tiny", "causal", "turns", "turns", True, False),
        ("tiny", "causal", None, "turns", True, True),
        ("tiny", "turns", None, None, True, False),
        ("tiny", "turns", None, "turns", True, False),
        ("tiny", "turns", "causal", "causal", False, False),
        ("plain", None, None, None, False, False),
        ("plain", None, None, "turns", True, True),
        ("plain", "turns", None, None, True, False),
        ("plain", None, "turns", None, True, False),
        ("tuned", None, None, None, True, False),
        ("tuned", "causal", "causal", None, True, False),
        ("tuned", None, None, "causal", False, False),
        ("tuned", None, None, "turns", True, False),
        ("causal", "turns", "turns", None, False, False),
        ("causal", "turns", "turns", "turns", True, True),
    ],
)
async def test_whose_mask_a_chat_has(
    post, engine, chat_body, turns, model, flag, declared, asked, segmented, warns, stream
):
    engine.model = msgspec.structs.replace(engine.model, segment_mask=declared)
    engine.adapters = {
        name: adapter(name, mask)
        for name, mask in (("plain", None), ("tuned", "turns"), ("causal", "causal"))
    }
    body = chat_body(model=model, messages=CONVERSATION, segment_mask=asked, stream=stream)
    response = await post(CHAT, body, segment_mask=flag)
    assert response.status_code == 200, response.text
    [added] = engine.added
    assert added.segments == (turns if segmented else [])
    assert added.adapter == (None if model == "tiny" else model)
    assert (WARNING in response.headers) == warns
    assert response.headers["content-type"].startswith(
        "text/event-stream" if stream else "application/json"
    )
    if warns:
        assert "--segment-mask" in response.headers[WARNING]


async def test_segments_change_no_token(client, engine, chat_body):
    for mask in ("causal", "turns"):
        await client.post(CHAT, json=chat_body(messages=CONVERSATION, segment_mask=mask))
    assert engine.added[0].token_ids == engine.added[1].token_ids


@pytest.mark.parametrize("default", ["turns", None])
@pytest.mark.parametrize("asked", ["causal", None, {"tokens": []}, {"characters": []}])
async def test_completions_are_causal_by_default(post, engine, default, asked):
    body = {"model": "tiny", "prompt": "the fox", "segment_mask": asked}
    response = await post(TEXT, body, segment_mask=default)
    assert response.status_code == 200
    assert engine.added[0].segments == []
    assert WARNING not in response.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("flag", ["turns", None])
@pytest.mark.parametrize("prompt", ["the quick brown fox", ["the quick brown fox"], "ids"])
async def test_token_spans(post, engine, say, prompt, flag, stream):
    body = {
        "model": "tiny",
        "prompt": say("the quick brown fox") if prompt == "ids" else prompt,
        "segment_mask": {"tokens": [[2, 4], [0, 1]]},
        "stream": stream,
        "n": 2,
    }
    response = await post(TEXT, body, segment_mask=flag)
    assert response.status_code == 200, response.text
    assert [added.segments for added in engine.added] == [[(2, 4), (0, 1)]] * 2
    assert (WARNING in response.headers) == (flag is None)


async def test_character_spans(client, engine, say):
    text = "the quick é\U0001f44d fox<|im_end|> over"
    parts = ["the quick", " é\U0001f44d", " fox<|im_end|>", " over"]
    ends = list(accumulate(map(len, parts)))
    counts = list(accumulate(len(say(part)) for part in parts))
    assert counts[-1] == len(say(text))
    mask = {"characters": [[0, ends[0]], [ends[1], ends[2]], [ends[0], ends[1]]]}
    body = {"model": "tiny", "prompt": text, "segment_mask": mask}
    response = await client.post(TEXT, json=body)
    assert response.status_code == 200, response.text
    assert engine.added[0].token_ids == say(text)
    assert engine.added[0].segments == [
        (0, counts[0]),
        (counts[1], counts[2]),
        (counts[0], counts[1]),
    ]


@pytest.fixture(scope="module")
def backends(backend):
    """The backend, and others that add a token in front and one behind; the one called trimmed
    leaves spaces out of its offsets."""
    made = {"plain": backend}
    for name in ("trimmed", "untrimmed"):
        made[name] = tokenizers.Tokenizer.from_str(backend.to_str())
        made[name].post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=name == "trimmed"),
                processors.TemplateProcessing(
                    single="<|eos|> $A <|im_end|>",
                    special_tokens=[("<|eos|>", 0), ("<|im_end|>", 2)],
                ),
            ]
        )
    return made


async def test_special_tokens_that_are_added_count_as_tokens(post, engine, backends):
    tokenizer = Tokenizer(backends["trimmed"])
    body = {"model": "tiny", "prompt": "the fox"}
    for mask in ({"characters": [[0, 3], [3, 7]]}, {"tokens": [[0, 4]]}):
        response = await post(TEXT, body | {"segment_mask": mask}, tokenizer)
        assert response.status_code == 200, response.text
    assert engine.added[0].token_ids[0] == 0
    assert engine.added[0].token_ids[-1] == 2
    assert len(engine.added[0].token_ids) == 4
    assert [added.segments for added in engine.added] == [[(1, 2), (2, 3)], [(0, 4)]]
    response = await post(TEXT, body | {"segment_mask": {"tokens": [[0, 5]]}}, tokenizer)
    assert "the prompt has 4 tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("mask", "param", "words"),
    [
        ("turns", "", '"turns" needs turns'),
        ("Causal", "", 'must be "causal", null, {"characters"'),
        (3, "", 'must be "causal"'),
        (True, "", 'must be "causal"'),
        ([[0, 1]], "", 'must be "causal"'),
        ({}, "", 'must be "causal"'),
        ({"words": [[0, 1]]}, "", 'must be "causal"'),
        ({"tokens": [[0, 1]], "characters": [[0, 1]]}, "", 'must be "causal"'),
        ({"tokens": None}, ".tokens", "must be a list of [start, end]"),
        ({"tokens": {"0": 1}}, ".tokens", "must be a list of [start, end]"),
        ({"tokens": [0, 1]}, ".tokens[0]", "two whole numbers"),
        ({"tokens": [[0, 1], [1]]}, ".tokens[1]", "two whole numbers"),
        ({"tokens": [[0, 1, 2]]}, ".tokens[0]", "two whole numbers"),
        ({"tokens": [[0, 1.0]]}, ".tokens[0]", "two whole numbers"),
        ({"tokens": [[False, 1]]}, ".tokens[0]", "two whole numbers"),
        ({"tokens": [["0", 1]]}, ".tokens[0]", "two whole numbers"),
        ({"tokens": [[1, 1]]}, ".tokens[0]", "is [1, 1); the prompt has 2 tokens"),
        ({"tokens": [[1, 0]]}, ".tokens[0]", "is [1, 0); the prompt has 2 tokens"),
        ({"tokens": [[-1, 1]]}, ".tokens[0]", "is [-1, 1)"),
        ({"tokens": [[0, 3]]}, ".tokens[0]", "0 <= start < end <= 2"),
        ({"tokens": [[0, 10**400]]}, ".tokens[0]", "is [0, ...)"),
        ({"tokens": [[0, 2], [1, 2]]}, ".tokens[1]", "overlaps segment_mask.tokens[0], [0, 2)"),
        ({"tokens": [[1, 2], [0, 2]]}, ".tokens[1]", "overlaps segment_mask.tokens[0], [1, 2)"),
        ({"tokens": [[0, 1], [0, 1]]}, ".tokens[1]", "[0, 1), overlaps segment_mask.tokens[0]"),
        ({"tokens": [[0, 1], [1, 1], "x"]}, ".tokens[1]", "is [1, 1)"),
        ({"characters": [[0, 8]]}, ".characters[0]", "the prompt has 7 characters"),
        ({"characters": [[0, 7], [3, 7]]}, ".characters[1]", "overlaps segment_mask.characters[0]"),
        (
            {"characters": [[0, 3], [5, 7], [9, 9]]},
            ".characters[1][0]",
            "inside of the token ' fox'",
        ),
        ({"characters": [[0, 4]]}, ".characters[0][1]", "is 4, inside of the token ' fox'"),
        ({"characters": [[3, 6]]}, ".characters[0][1]", "characters [3, 7)"),
        ({"tokens": [[0, 1]] * 4097}, ".tokens", "4097 spans; at most 4096"),
    ],
)
async def test_bad_masks_of_completions(client, engine, mask, param, words):
    body = {"model": "tiny", "prompt": "the fox", "segment_mask": mask}
    response = await client.post(TEXT, content=json.dumps(body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == f"segment_mask{param}"
    assert words in error["message"]
    assert f"segment_mask{param}" in error["message"]
    assert len(error["message"]) < 300
    assert engine.added == []


@pytest.mark.parametrize(
    ("prompt", "mask", "words"),
    [
        (["a", "b"], {"tokens": [[0, 1]]}, "a single prompt; there are 2"),
        (["a", "b"], {"characters": [[0, 1]]}, "a single prompt; there are 2"),
        ([[1], [2]], {"tokens": [[0, 1]]}, "a single prompt; there are 2"),
        ([1, 2], {"characters": [[0, 1]]}, 'with a prompt of token ids use "tokens"'),
        ([[1, 2]], {"characters": [[0, 1]]}, 'with a prompt of token ids use "tokens"'),
    ],
)
async def test_prompts_that_take_no_spans(client, engine, prompt, mask, words):
    body = {"model": "tiny", "prompt": prompt, "segment_mask": mask}
    response = await client.post(TEXT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "segment_mask"
    assert words in response.json()["error"]["message"]
    assert engine.added == []
    for harmless in (None, "causal"):
        fine = await client.post(TEXT, json=body | {"segment_mask": harmless})
        assert fine.status_code == 200


@pytest.mark.parametrize(
    "mask", ["full", "", 1, False, [], {}, {"tokens": [[0, 1]]}, {"characters": [[0, 1]]}]
)
async def test_bad_masks_of_chats(client, engine, chat_body, mask):
    response = await client.post(CHAT, json=chat_body(segment_mask=mask))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "segment_mask"
    assert 'segment_mask must be "causal", "turns" or null' in error["message"]
    assert engine.added == []


async def test_many_segments(post, engine):
    engine.model = msgspec.structs.replace(engine.model, max_model_len=10**5)
    spans = [[2 * i, 2 * i + 2] for i in range(4096)][::-1]
    body = {"model": "tiny", "prompt": [5] * 8192, "segment_mask": {"tokens": spans}}
    assert (await post(TEXT, body)).status_code == 200
    assert engine.added[0].segments == [tuple(span) for span in spans]
    assert (await post(TEXT, body, max_segments=4095)).status_code == 400


TEXTS = st.lists(
    st.sampled_from(
        [
            "the quick",
            " ",
            "  ",
            "fox",
            "é",
            "\U0001f44d\U0001f3fd",
            "<|im_end|>",
            "\n",
            "e\u0301",
            "x",
        ]
    ),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", ["plain", "trimmed", "untrimmed"])
@given(text=TEXTS)
@settings(deadline=None)
def test_tokens_end_where_their_bytes_do(backends, name, text):
    tokenizer = Tokenizer(backends[name])
    token_ids, places = tokenizer.encode_placed(text)
    assert token_ids == tokenizer.encode(text, add_special_tokens=True)
    of_text = tokenizer.encode(text, add_special_tokens=False)
    added = 0 if name == "plain" else 1
    assert token_ids[added : len(token_ids) - added] == of_text
    ends = [0, *accumulate(len(tokenizer.token_bytes(token_id)) for token_id in of_text)]
    assert ends[-1] == len(text.encode())
    for character in range(1, len(text) + 1):
        size = len(text[:character].encode())
        spans = Spans("characters", [[0, character]])
        if size in ends:
            expected = [(added, added + ends.index(size))]
            assert spans.of_prompt(len(token_ids), text, places) == expected
        else:
            with pytest.raises(APIError) as caught:
                spans.of_prompt(len(token_ids), text, places)
            named = re.search(r"the token (.*), characters \[(\d+), (\d+)\)", caught.value.message)
            first, last = int(named[2]), int(named[3])
            assert first < character < last
            assert named[1] == repr(text[first:last])


def test_a_space_that_the_tokenizer_puts_in_front_is_part_of_the_first_token():
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer = Tokenizer(backend)

    def spans(text, *pairs):
        token_ids, places = tokenizer.encode_placed(text)
        found = Spans("characters", [list(pair) for pair in pairs])
        return token_ids, found.of_prompt(len(token_ids), text, places)

    assert spans("ab", (0, 1), (1, 2)) == ([4, 3], [(0, 1), (1, 2)])
    assert spans("bb", (0, 1), (1, 2)) == ([1, 3, 3], [(0, 2), (2, 3)])
    assert spans("b a", (0, 1), (1, 3)) == ([1, 3, 4], [(0, 2), (2, 3)])


def test_characters_that_make_no_token():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.normalizer = normalizers.Replace("-", "")
    tokenizer = Tokenizer(backend)
    token_ids, places = tokenizer.encode_placed("a--b-")
    assert token_ids == [0, 1]

    def of(*pairs):
        return Spans("characters", [list(pair) for pair in pairs]).of_prompt(2, "a--b-", places)

    assert of((0, 1), (3, 4)) == [(0, 1), (1, 2)]
    assert of((0, 2), (2, 5)) == [(0, 1), (1, 2)]
    with pytest.raises(APIError, match=r"characters\[0\]: no token comes of these"):
        of((1, 2))


NUMBER = (
    st.integers(-2, 12)
    | st.integers()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.none()
)
ENTRY = st.lists(NUMBER, max_size=3) | NUMBER | st.text(max_size=2)
MASK = (
    st.sampled_from(["causal", "turns", "x", None, 0])
    | st.dictionaries(
        st.sampled_from(["tokens", "characters", "x"]), st.lists(ENTRY, max_size=4), max_size=2
    )
    | st.dictionaries(
        st.sampled_from(["tokens", "characters"]),
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12)), max_size=3),
        min_size=1,
        max_size=1,
    )
    | ENTRY
)
PROMPT = TEXTS | st.lists(st.integers(0, 399), min_size=1, max_size=9) | st.just(["a", "b"])


@given(mask=MASK, prompt=PROMPT, stream=st.booleans())
@settings(
    max_examples=4 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mask_is_segments_or_a_400(post, engine, mask, prompt, stream):
    engine.added.clear()
    base = {"model": "tiny", "max_tokens": 1, "segment_mask": mask, "stream": stream}
    messages = [{"role": "user", "content": "x"}]
    for url, body in ((TEXT, {"prompt": prompt}), (CHAT, {"messages": messages})):
        response = asyncio.run(post(url, base | body))
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"].startswith("segment_mask")
    for added in engine.added:
        Segments.of(added.segments, len(added.token_ids))
