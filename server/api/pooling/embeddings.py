"""/v1/embeddings."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from headstart.engine.process.messages import ModelInfo
from headstart.server.api.openai_completions.prompts import PromptField, given_prompts, most_ids
from headstart.server.api.pooling.pooling import (
    Floats,
    PooledBody,
    PooledText,
    normalized,
    vectors_of,
)
from headstart.server.http.errors import bad_request
from headstart.server.http.policy import Refused
from headstart.server.http.runtime import Runtime


class EmbeddingBody(PooledBody):
    """``dimensions``: so many of the first components, for models trained for that (Matryoshka
    Representation Learning, arXiv 2205.13147)."""

    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool | None = None
    embed_dtype: Annotated[Any, Refused(harmless=("float32",))] = None
    endianness: Annotated[Any, Refused(harmless=("native", "little"))] = None
    messages: Annotated[Any, Refused("give input")] = None

    def shown(self, vector: Floats) -> list[float] | str:
        """A vector in the encoding that was asked for."""
        if self.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        values: list[float] = vector.tolist()
        return values


def check_dimensions(dimensions: int | None, field: str, model: ModelInfo) -> None:
    """Raise APIError for more than a vector has."""
    if dimensions is not None and dimensions > model.hidden_size:
        raise bad_request(
            f"{field} must be at most {model.hidden_size}, the model's hidden size; got "
            f"{dimensions}",
            field,
        )


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["embeddings"])

    @router.post("/v1/embeddings", response_class=Response)
    async def create_embeddings(request: Request) -> Response:
        """A vector for each prompt."""
        body = await runtime.parse(request, EmbeddingBody)
        served = runtime.served(body.model)
        model = runtime.require_model()
        check_dimensions(body.dimensions, "dimensions", model)
        given = given_prompts(
            body.input,
            "input",
            runtime.settings.max_texts,
            ids=most_ids(runtime.settings, model),
        )
        texts = [PooledText(*prompt) for prompt in given]
        vectors = await vectors_of(runtime, request, body, served, model, texts)
        rows = vectors.rows[:, : body.dimensions]
        if body.normalize is not False:
            rows = normalized(rows)
        answer = {
            "id": f"embd-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "data": [
                {"object": "embedding", "index": i, "embedding": body.shown(row)}
                for i, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": vectors.num_tokens, "total_tokens": vectors.num_tokens},
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router
