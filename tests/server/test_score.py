"""Scores and ranks are cosines of the texts' vectors."""

from __future__ import annotations

import numpy as np
import pytest

SCORE = ("/v1/score", "/score")
RERANK = ("/v1/rerank", "/rerank", "/v2/rerank")


@pytest.fixture
def cosine(say):
    """Of what the stand-in engine makes of two texts."""

    def of(left, right):
        one, other = (
            [sum(token % 8 == i for token in say(text)) for i in range(8)] for text in (left, right)
        )
        product = sum(a * b for a, b in zip(one, other, strict=True))
        lengths = sum(a * a for a in one) * sum(b * b for b in other)
        return pytest.approx(product / lengths**0.5, abs=1e-6)

    return of


@pytest.mark.parametrize("path", SCORE)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("the fox", "the dog"),
        ("the fox", ["the dog", "the fox", "hello"]),
        (["the fox"], ["the dog", "hello"]),
        (["the fox", "lazy", "over"], ["the dog", "hello", "over"]),
    ],
)
async def test_scores(client, engine, say, cosine, path, left, right):
    asked = {"model": "tiny", "text_1": left, "text_2": right}
    answer = (await client.post(path, json=asked)).json()
    lefts, rights = ([side] if isinstance(side, str) else side for side in (left, right))
    pairs = [(lefts[i % len(lefts)], text) for i, text in enumerate(rights)]
    assert [entry["score"] for entry in answer["data"]] == [cosine(*pair) for pair in pairs]
    assert [entry["index"] for entry in answer["data"]] == list(range(len(rights)))
    assert [added.token_ids for added in engine.added] == [say(text) for text in lefts + rights]
    assert answer["usage"]["total_tokens"] == sum(len(added.token_ids) for added in engine.added)


@pytest.mark.parametrize("path", RERANK)
async def test_ranks(client, cosine, path):
    documents = ["hello world", {"text": "the quick fox"}, "the fox", "dog"]
    asked = {"model": "tiny", "query": "the fox", "documents": documents}
    answer = (await client.post(path, json=asked)).json()
    results = answer["results"]
    texts = ["hello world", "the quick fox", "the fox", "dog"]
    assert sorted(result["index"] for result in results) == [0, 1, 2, 3]
    assert results[0]["index"] == 2
    for result in results:
        text = texts[result["index"]]
        assert result["document"] == {"text": text}
        assert result["relevance_score"] == cosine("the fox", text)
    found = [result["relevance_score"] for result in results]
    assert found == sorted(found, reverse=True)

    few = (await client.post(path, json=asked | {"top_n": 2, "return_documents": False})).json()
    assert few["results"] == [
        {key: result[key] for key in ("index", "relevance_score")} for result in results[:2]
    ]


async def test_a_thousand_documents_with_ids(client, engine, cosine):
    documents = [{"id": i, "text": "fox" if i == 700 else "dog", "new": 1} for i in range(1000)]
    asked = {"model": "tiny", "query": "fox", "documents": documents, "top_n": 1}
    response = await client.post("/v1/rerank", json=asked)
    assert response.status_code == 200, response.text
    [best] = response.json()["results"]
    assert (best["index"], best["relevance_score"]) == (700, cosine("fox", "fox"))
    assert response.headers["x-headstart-ignored"] == "documents[].id, documents[].new"
    assert len(engine.added) == 1001


async def test_only_the_beginning_of_documents_counts(client, engine, say):
    asked = {"model": "tiny", "query": "the quick fox", "documents": ["the quick fox", "dog"]}
    await client.post("/v2/rerank", json=asked | {"max_tokens_per_doc": 2})
    query, first, second = (added.token_ids for added in engine.added)
    assert query == say("the quick fox")
    assert (first, second) == (query[:2], say("dog")[:2])


@pytest.mark.parametrize("seed", range(4))
async def test_scores_are_within_their_range(client, engine, seed):
    """Rounding makes cosines larger than 1."""
    engine.vector = np.random.default_rng(seed).standard_normal(8).tolist()
    asked = {"model": "tiny", "text_1": "a", "text_2": ["b"] * 3}
    data = (await client.post("/v1/score", json=asked)).json()["data"]
    assert [entry["score"] for entry in data] == [pytest.approx(1)] * 3
    assert all(entry["score"] <= 1 for entry in data)


async def test_ranks_go_from_nothing_to_one(client, engine, monkeypatch):
    """As Cohere's and Jina's do; what is opposed still comes last."""
    vectors = iter([[1.0, 0.5], [-1.0, 0.5], [-0.1, 0.1], [1.0, 0.5]])
    pooled = engine._pooled

    def next_one(token_ids, params):
        engine.vector = [*next(vectors), 0, 0, 0, 0, 0, 0]
        return pooled(token_ids, params)

    monkeypatch.setattr(engine, "_pooled", next_one)
    asked = {"model": "tiny", "query": "a", "documents": ["b", "c", "d"]}
    results = (await client.post("/v1/rerank", json=asked)).json()["results"]
    assert [result["index"] for result in results] == [2, 1, 0]
    assert [result["relevance_score"] for result in results] == [pytest.approx(1), 0.0, 0.0]
    assert all(result["relevance_score"] <= 1 for result in results)


async def test_adapter_and_pooling(client, engine):
    asked = {"model": "tiny", "text_1": "a", "text_2": "b", "pooling": "mean"}
    await client.post("/v1/score", json=asked)
    assert {added.params.pooling for added in engine.added} == {"mean"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "as many"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1", "as many"),
        ({"text_1": [], "text_2": "c"}, "text_1", "empty list"),
        ({"text_1": "a", "text_2": [1]}, "text_2[0]", "not a text"),
        ({"text_1": "a", "text_2": 1}, "text_2", "string or a list"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2[1]", "empty"),
        ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2", "at most 2048"),
        ({"text_1": "a"}, "text_2", "required"),
    ],
)
async def test_bad_scores(client, engine, fields, param, words):
    await _refused(client, engine, "/v1/score", fields, param, words)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"query": "", "documents": ["a"]}, "query", "empty"),
        ({"query": "a", "documents": []}, "documents", "empty list"),
        ({"query": "a", "documents": "b"}, "documents", "must be a list"),
        ({"query": "a", "documents": ["b", 1]}, "documents[1]", "must be an object"),
        ({"query": "a", "documents": [{"title": "b"}]}, "documents[0].text", "required"),
        ({"query": "a", "documents": [{}]}, "documents[0].text", "required"),
        ({"query": "a", "documents": ["b"] * 2049}, "documents", "at most 2048"),
        ({"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, "max_tokens_per_doc", "1"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ({"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields", "supported"),
    ],
)
async def test_bad_reranks(client, engine, fields, param, words):
    await _refused(client, engine, "/v1/rerank", fields, param, words)


async def _refused(client, engine, path, fields, param, words):
    response = await client.post(path, json={"model": "tiny"} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.added == []
