"""/v1/score and /v1/rerank, also under the paths that vLLM, Jina and Cohere have for them.

The model is a bi-encoder here: each text becomes a vector by itself, and a score is the cosine of
the angle between two of them. A cross-encoder, which reads both texts at once, is another model.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from headstart.server.api.fields import Ignored
from headstart.server.api.pooling.pooling import (
    PooledBody,
    PooledText,
    Vectors,
    check_count,
    normalized,
    texts_of,
    vectors_of,
)
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Body, Refused, body_at
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings

_TEXT = {"type": "string"}
TextsField = Annotated[
    Any,
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}, mode="validation"),
]
DocumentsField = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "anyOf": [
                    _TEXT,
                    {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]},
                ]
            },
        },
        mode="validation",
    ),
]


class Document(Body):
    text: str
    id: Ignored = None
    title: Ignored = None


class ScoreBody(PooledBody):
    """One text against one or many, or as many against as many, pair by pair."""

    text_1: TextsField
    text_2: TextsField

    def pairs(self, settings: ServerSettings) -> tuple[list[PooledText], list[PooledText]]:
        """The texts of both sides; raises APIError if they make no pairs."""
        left = texts_of(self.text_1, "text_1", settings)
        right = texts_of(self.text_2, "text_2", settings)
        if len(left) not in (1, len(right)):
            raise bad_request(
                f"text_1 has {len(left)} texts and text_2 {len(right)}; they must be as many, or "
                "text_1 only one",
                "text_1",
            )
        return left, right


class RerankBody(PooledBody):
    """``max_tokens_per_doc``: only so many of a document's first tokens count."""

    query: str
    documents: DocumentsField
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    max_chunks_per_doc: Ignored = None
    rank_fields: Annotated[Any, Refused("documents are ranked by their text", (["text"],))] = None

    def texts(self, settings: ServerSettings) -> list[PooledText]:
        """The documents; raises APIError."""
        given = self.documents
        if not isinstance(given, list):
            raise bad_request("documents must be a list", "documents", "invalid_value")
        check_count(given, "documents", settings)
        texts: list[PooledText] = []
        for i, document in enumerate(given):
            path = f"documents[{i}]"
            if not isinstance(document, str):
                document = body_at(Document, document, path, self.notes).text
            texts.append(PooledText(path, document, self.max_tokens_per_doc))
        self.notes.check()
        return texts


def _cosines(vectors: Vectors, num_left: int) -> list[float]:
    """Of the first ``num_left`` rows, or the only one of them, with the others."""
    rows = normalized(vectors.rows)
    cosines = (rows[:num_left] * rows[num_left:]).sum(-1)
    found: list[float] = np.clip(cosines, -1, 1).tolist()  # rounding may lead beyond
    return found


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["scores"])

    @router.post("/score", response_class=Response, include_in_schema=False)
    @router.post("/v1/score", response_class=Response)
    async def score(request: Request) -> Response:
        """How alike texts are, from -1 to 1."""
        body = await runtime.parse(request, ScoreBody)
        served = runtime.served(body.model)
        left, right = body.pairs(runtime.settings)
        model = runtime.require_model()
        vectors = await vectors_of(runtime, request, body, served, model, [*left, *right])
        answer = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "data": [
                {"object": "score", "index": i, "score": value}
                for i, value in enumerate(_cosines(vectors, len(left)))
            ],
            "usage": {"prompt_tokens": vectors.num_tokens, "total_tokens": vectors.num_tokens},
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post("/rerank", response_class=Response, include_in_schema=False)
    @router.post("/v2/rerank", response_class=Response, include_in_schema=False)
    @router.post("/v1/rerank", response_class=Response)
    async def rerank(request: Request) -> Response:
        """Documents in the order in which they are like a query."""
        body = await runtime.parse(request, RerankBody)
        served = runtime.served(body.model)
        documents = body.texts(runtime.settings)
        model = runtime.require_model()
        prompts = [PooledText("query", body.query), *documents]
        vectors = await vectors_of(runtime, request, body, served, model, prompts)
        ranked = sorted(enumerate(_cosines(vectors, 1)), key=lambda entry: -entry[1])
        results = []
        for i, value in ranked[: body.top_n]:
            # Cohere's and Jina's are from 0 to 1.
            result: dict[str, Any] = {"index": i, "relevance_score": max(value, 0.0)}
            if body.return_documents is not False:
                result["document"] = {"text": documents[i].prompt}
            results.append(result)
        answer = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": served.name,
            "usage": {"prompt_tokens": vectors.num_tokens, "total_tokens": vectors.num_tokens},
            "results": results,
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router
