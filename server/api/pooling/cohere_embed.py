"""/v2/embed, Cohere's form of /v1/embeddings."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from headstart.engine.process.messages import ModelInfo
from headstart.server.api.fields import Ignored, StringsField
from headstart.server.api.pooling.embeddings import check_dimensions
from headstart.server.api.pooling.pooling import (
    PooledBody,
    PooledText,
    normalized,
    texts_of,
    vectors_of,
)
from headstart.server.http.policy import Refused
from headstart.server.http.runtime import Runtime
from headstart.server.settings import ServerSettings


class CohereEmbedBody(PooledBody):
    """``truncate``: the end of a text that is too long is cut, or its START, or it is a 400."""

    texts: StringsField
    input_type: Ignored = None
    output_dimension: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    embedding_types: Annotated[Any, Refused('vectors are ["float"]', harmless=([], ["float"]))] = (
        None
    )
    images: Annotated[Any, Refused("this model reads text", harmless=([],))] = None
    inputs: Annotated[Any, Refused("give texts", harmless=([],))] = None

    def pooled(self, model: ModelInfo, settings: ServerSettings) -> list[PooledText]:
        """The texts; raises APIError."""
        most = self.max_tokens
        if self.truncate in (None, "END"):
            most = min(most or model.max_model_len, model.max_model_len - 1)
        elif self.truncate == "START":
            self.truncate_prompt_tokens = -1
        return [text._replace(most=most) for text in texts_of(self.texts, "texts", settings)]


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["embeddings"])

    @router.post("/v2/embed", response_class=Response)
    async def embed(request: Request) -> Response:
        """A vector for each text, in Cohere's form."""
        body = await runtime.parse(request, CohereEmbedBody)
        served = runtime.served(body.model)
        model = runtime.require_model()
        check_dimensions(body.output_dimension, "output_dimension", model)
        texts = body.pooled(model, runtime.settings)
        vectors = await vectors_of(runtime, request, body, served, model, texts)
        rows = normalized(vectors.rows[:, : body.output_dimension])
        answer = {
            "id": str(uuid.uuid4()),
            "embeddings": {"float": rows.tolist()},
            "texts": [text.prompt for text in texts],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": vectors.num_tokens},
            },
            "response_type": "embeddings_by_type",
        }
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router
