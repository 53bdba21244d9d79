"""/v1/embeddings: prompt forms, encodings, pooling, limits, hang-ups."""

from __future__ import annotations

import asyncio
import base64
from array import array
from dataclasses import replace

import httpx
import msgspec
import pytest

from headstart.engine.errors import EngineDeadError, RequestError
from headstart.engine.process.messages import AdapterInfo
from headstart.engine.sampling.params import PoolingParams
from headstart.server.http.app import create_app

URL = "/v1/embeddings"


@pytest.fixture
def body():
    return lambda **fields: {"model": "tiny", "input": "the fox"} | fields


def counts(token_ids):
    """The vector that the stand-in engine gives."""
    return [float(sum(token % 8 == i for token in token_ids)) for i in range(8)]


def length(values):
    return sum(value * value for value in values) ** 0.5


def unit(values):
    return pytest.approx([value / length(values) for value in values], abs=1e-6)


async def test_one_text(client, engine, body, say):
    answer = (await client.post(URL, json=body(user="me"))).json()
    ids = say("the fox")
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    [entry] = answer["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    assert entry["embedding"] == unit(counts(ids))
    assert answer["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}
    [added] = engine.added
    assert (added.token_ids, added.params) == (ids, PoolingParams("last"))
    assert added.stream.aborted == 0


@pytest.mark.parametrize("as_ids", [False, True])
async def test_many_prompts(client, engine, body, say, as_ids):
    texts = ["the", "quick brown", "fox"]
    sent = [say(text) for text in texts] if as_ids else texts
    answer = (await client.post(URL, json=body(input=sent))).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for text, entry in zip(texts, answer["data"], strict=True):
        assert entry["embedding"] == unit(counts(say(text)))
    assert answer["usage"]["total_tokens"] == sum(len(say(text)) for text in texts)


async def test_ids(client, engine, body):
    await client.post(URL, json=body(input=[5, 6, 7]))
    assert engine.added[0].token_ids == [5, 6, 7]


async def test_base64_of_what_is_not_normalised(client, body, say):
    asked = body(encoding_format="base64", normalize=False)
    [entry] = (await client.post(URL, json=asked)).json()["data"]
    values = array("f", base64.b64decode(entry["embedding"]))
    assert values.tolist() == counts(say("the fox"))


async def test_dimensions(client, engine, body):
    """The first components, of length 1 again."""
    engine.vector = [3.0, 4.0, 12.0, 0, 0, 0, 0, 0]
    for dimensions, expected in ((2, [0.6, 0.8]), (3, [3 / 13, 4 / 13, 12 / 13])):
        [entry] = (await client.post(URL, json=body(dimensions=dimensions))).json()["data"]
        assert entry["embedding"] == pytest.approx(expected)


async def test_a_vector_of_zeros_stays_one(client, engine, body):
    engine.vector = [0.0] * 8
    [entry] = (await client.post(URL, json=body())).json()["data"]
    assert entry["embedding"] == [0.0] * 8


@pytest.mark.parametrize(
    ("asked", "flag", "declared", "used"),
    [
        (None, None, None, "last"),
        (None, None, "mean", "mean"),
        (None, "cls", "mean", "cls"),
        ("last", "cls", "mean", "last"),
    ],
)
async def test_pooling(engine, tokenizer, settings, body, asked, flag, declared, used):
    """What the request says, else the flag, else the model."""
    engine.model = msgspec.structs.replace(engine.model, pooling=declared)
    app = create_app(
        engine, tokenizer, model_names=["tiny"], settings=replace(settings, pooling=flag)
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(URL, json=body(pooling=asked))
    assert response.status_code == 200
    assert engine.added[0].params == PoolingParams(used)


async def test_truncated(client, engine, body):
    for most, left in ((2, [8, 9]), (-1, [*range(5, 10)])):
        await client.post(URL, json=body(input=[*range(5, 10)], truncate_prompt_tokens=most))
        assert engine.added[-1].token_ids == left
    await client.post(URL, json=body(input=[5] * 300, truncate_prompt_tokens=-1))
    assert len(engine.added[-1].token_ids) == 255


async def test_adapter_and_salt(client, engine, body):
    engine.adapters["other"] = AdapterInfo(
        name="other", path="", rank=8, targets=["q_proj"], num_bytes=1
    )
    answer = await client.post(URL, json=body(model="other", cache_salt="mine"))
    assert answer.json()["model"] == "other"
    assert (engine.added[0].adapter, engine.added[0].salt) == ("other", b"mine")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input[1]", "empty"),
        ({"input": ["a", 3]}, "input[1]", "a prompt is"),
        ({"input": None}, "input", "a prompt is"),
        ({"input": [[1], [400]]}, "input[1][0]", "vocabulary has 400"),
        ({"input": [[5], [5] * 256]}, "input[1]", "256 tokens; this model's maximum context"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [[5] * 255] * 65}, "input", "16575 tokens; at most 16384"),
        ({"dimensions": 9}, "dimensions", "at most 8"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"pooling": "max"}, "pooling", "'last', 'mean' or 'cls'"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"messages": [{}]}, "messages", "not supported"),
    ],
)
async def test_bad_requests(client, engine, body, fields, param, words):
    response = await client.post(URL, json=body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.added == []


@pytest.mark.parametrize("as_ids", [False, True])
async def test_many_texts_are_computed_in_groups(client, engine, body, say, monkeypatch, as_ids):
    """So that the engine's queue is not full of them."""
    waiting: list[int] = []
    add = engine.add

    def counted(*given, **named):
        waiting.append(sum(added.stream.taken == 0 for added in engine.added[-100:]))
        return add(*given, **named)

    monkeypatch.setattr(engine, "add", counted)
    texts = [f"{i % 10}" for i in range(2048)]
    sent = [say(text) for text in texts] if as_ids else texts
    response = await client.post(URL, json=body(input=sent))
    assert response.status_code == 200, response.text
    assert max(waiting) == 63
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(2048))
    for entry, text in zip(data[:20], texts[:20], strict=True):
        assert entry["embedding"] == unit(counts(say(text)))


COHERE = "/v2/embed"


async def test_coheres_form(client, engine, say):
    asked = {"model": "tiny", "texts": ["the", "fox"], "input_type": "search_query"}
    response = await client.post(COHERE, json=asked | {"embedding_types": ["float"]})
    assert response.status_code == 200, response.text
    assert response.headers["x-headstart-ignored"] == "input_type"
    answer = response.json()
    assert answer["embeddings"]["float"] == [unit(counts(say(text))) for text in ("the", "fox")]
    assert answer["texts"] == ["the", "fox"]
    tokens = sum(len(say(text)) for text in ("the", "fox"))
    assert answer["meta"]["billed_units"] == {"input_tokens": tokens}
    engine.vector = [3.0, 4.0, 12.0, 0, 0, 0, 0, 0]
    few = (await client.post(COHERE, json=asked | {"output_dimension": 2})).json()
    assert few["embeddings"]["float"] == [pytest.approx([0.6, 0.8])] * 2


async def test_what_cohere_cuts(client, engine, say):
    text = "the quick brown fox jumps " * 60
    ids = say(text)
    assert len(ids) > 256
    body = {"model": "tiny", "texts": [text]}
    for fields, kept in (
        ({}, ids[:255]),
        ({"truncate": "END"}, ids[:255]),
        ({"truncate": "START"}, ids[-255:]),
        ({"max_tokens": 5}, ids[:5]),
        ({"max_tokens": 5, "truncate": "NONE"}, ids[:5]),
    ):
        response = await client.post(COHERE, json=body | fields)
        assert response.status_code == 200, response.text
        assert engine.added[-1].token_ids == kept
    response = await client.post(COHERE, json=body | {"truncate": "NONE"})
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"embedding_types": ["int8"]}, "embedding_types", 'vectors are ["float"]'),
        ({"images": ["data:,"]}, "images", "reads text"),
        ({"inputs": [{}]}, "inputs", "give texts"),
        ({"texts": []}, "texts", "empty list"),
        ({"texts": ["a", 1]}, "texts[1]", "not a text"),
        ({"output_dimension": 9}, "output_dimension", "at most 8"),
        ({"truncate": "MIDDLE"}, "truncate", "'START'"),
    ],
)
async def test_bad_requests_of_cohere(client, engine, fields, param, words):
    response = await client.post(COHERE, json={"model": "tiny", "texts": ["a"]} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.added == []


async def test_unknown_model(client, body):
    assert (await client.post(URL, json=body(model="huge"))).status_code == 404


@pytest.mark.parametrize(
    ("error", "status"), [(EngineDeadError("gone"), 503), (RequestError("no", "prompt"), 400)]
)
async def test_an_engine_that_fails(client, engine, body, error, status):
    engine.fail_after = (0, error)
    response = await client.post(URL, json=body(input=["a", "b"]))
    assert response.status_code == status
    assert [added.stream.aborted for added in engine.added] == [1, 1]
    metrics = (await client.get("/metrics")).text
    assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in metrics


async def test_vectors_that_are_no_numbers(client, engine, body, monkeypatch):
    pooled = engine._pooled

    def broken(token_ids, params):
        output = pooled(token_ids, params)
        return msgspec.structs.replace(output, finish_reason="error", pooled=None)

    monkeypatch.setattr(engine, "_pooled", broken)
    response = await client.post(URL, json=body(input=["a"]))
    assert response.status_code == 500
    assert "input[0]: the model's hidden states" in response.json()["error"]["message"]


async def test_metrics(client, body):
    await client.post(URL, json=body(input=["a", "b"]))
    metrics = (await client.get("/metrics")).text
    assert 'request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in metrics


@pytest.mark.parametrize(("texts", "started"), [(2, 2), (100, 64)])
async def test_hanging_up_aborts(live_url, engine, body, texts, started):
    """Of many texts the first group has begun."""
    engine.hold = True
    host, port = live_url.removeprefix("http://").split(":")
    sent = msgspec.json.encode(body(input=["a"] * texts))
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    async with asyncio.timeout(300):
        while len(engine.added) < started:
            await asyncio.sleep(0.005)
        writer.close()
        while [added.stream.aborted for added in engine.added] != [1] * started:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        ("/v1/completions", {"prompt": "the", "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/v1/responses", {"input": "the"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
async def test_a_model_that_writes_no_text(client, engine, body, url, fields):
    """It is listed, and answers with vectors; who asks for text learns why there is none."""
    engine.model = msgspec.structs.replace(engine.model, no_text="it has no head")
    response = await client.post(url, json={"model": "tiny", **fields})
    assert response.status_code == 400, response.text
    assert "'tiny' does not generate text: it has no head" in response.json()["error"]["message"]
    assert engine.added == []
    assert "tiny" in [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]
    for asked, given in (
        (URL, body()),
        ("/v1/score", {"text_1": "the", "text_2": "fox"}),
        ("/v1/rerank", {"query": "the", "documents": ["fox"]}),
    ):
        assert (await client.post(asked, json={"model": "tiny", **given})).status_code == 200
