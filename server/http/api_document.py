"""/openapi.json: what FastAPI cannot know of endpoints that read and write JSON themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

Schema = dict[str, Any]

ERROR = "#/components/schemas/Error"
ERROR_BODY: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}

MESSAGES_ERROR = "#/components/schemas/MessagesError"
MESSAGES_ERROR_BODY: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
"""Of /v1/messages, in Anthropic's shape."""

STATUSES = {
    400: "The request cannot be served as asked; `param` names the field at fault",
    401: "A key is needed, and none of the server's was sent",
    403: "The key that was sent may not do this, or the server is not set up for it",
    404: "No model of that name",
    408: "The body was not complete in time",
    413: "The body is too large",
    429: "The key or address has had its requests or tokens of a minute; `retry-after` says when",
    500: "An error of the server, whose log says more",
    503: "Loading, shutting down, overloaded, or the engine has ended: `retry-after` says when",
    504: "The answer was not complete in the time that the request has",
}
OVERLOADED = {529: "Overloaded: `retry-after` says when"}
"""Of /v1/messages, beside these."""
GET_STATUSES = (401, 403, 404, 500, 503)

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_LIST: Schema = {"type": "array", "items": {"type": "object"}}
_TEXTS: Schema = {"type": "array", "items": _TEXT}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


_USAGE = _object(prompt_tokens=_COUNT, total_tokens=_COUNT)
_GENERATED = _object(
    id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, choices=_LIST, usage=_USAGE
)
_POOLED = _object(id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, data=_LIST, usage=_USAGE)
_STATUS = _object(status=_TEXT)

# Path -> the body of a 200.
ANSWERS: dict[str, Schema] = {
    "/v1/chat/completions": _GENERATED,
    "/v1/completions": _GENERATED,
    "/v1/embeddings": _POOLED,
    "/v2/embed": _object(id=_TEXT, embeddings={"type": "object"}, texts=_TEXTS),
    "/v1/score": _POOLED,
    "/v1/rerank": _object(id=_TEXT, model=_TEXT, usage=_USAGE, results=_LIST),
    "/v1/models": _object(object=_TEXT, data=_LIST),
    "/v1/models/{name}": _object(id=_TEXT, object=_TEXT, owned_by=_TEXT),
    "/v1/load_lora_adapter": _object(id=_TEXT, object=_TEXT, parent=_TEXT, rank=_COUNT),
    "/v1/unload_lora_adapter": _object(id=_TEXT, deleted={"type": "boolean"}),
    "/v1/responses": _object(id=_TEXT, object=_TEXT, model=_TEXT, output=_LIST),
    "/v1/responses/input_tokens": _object(object=_TEXT, input_tokens=_COUNT),
    "/v1/conversations": _object(id=_TEXT, object=_TEXT, created_at=_COUNT),
    "/v1/messages": _object(id=_TEXT, type=_TEXT, role=_TEXT, content=_LIST, model=_TEXT),
    "/v1/messages/count_tokens": _object(input_tokens=_COUNT),
    "/tokenize": _object(
        count=_COUNT, max_model_len=_COUNT, tokens={"type": "array", "items": _COUNT}
    ),
    "/detokenize": _object(prompt=_TEXT),
    "/apply-template": _object(prompt=_TEXT),
    "/health": _STATUS,
    "/live": _STATUS,
    "/ready": _STATUS,
    "/load": _object(
        running=_COUNT,
        waiting=_COUNT,
        in_flight=_COUNT,
        predicted_seconds={"type": ["number", "null"]},
        kv_used={"type": "number"},
    ),
}
STREAMED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
PLAIN_TEXT = frozenset({"/metrics"})


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Put the bodies of requests and answers, and every status, into the app's document."""
    generate = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _described(generate(), bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(document: Schema, bodies: Mapping[str, type[BaseModel]]) -> Schema:
    references, definitions = models_json_schema(
        [(body, "validation") for body in bodies.values()],
        ref_template="#/components/schemas/{model}",
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions.get("$defs", {}))
    schemas |= {"Error": ERROR_BODY, "MessagesError": MESSAGES_ERROR_BODY}
    for path, operations in document["paths"].items():
        error = MESSAGES_ERROR if path.startswith("/v1/messages") else ERROR
        for method, operation in operations.items():
            statuses: Mapping[int, str] = STATUSES
            if method != "post":
                statuses = {status: STATUSES[status] for status in GET_STATUSES}
            elif error is MESSAGES_ERROR:
                statuses = STATUSES | OVERLOADED
            operation["responses"] = {"200": _answer(path)} | {
                str(status): {
                    "description": description,
                    "content": {"application/json": {"schema": {"$ref": error}}},
                }
                for status, description in statuses.items()
            }
    for path, body in bodies.items():
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": references[body, "validation"]}},
        }
    return document


def _answer(path: str) -> Schema:
    content: Schema = {}
    if path in PLAIN_TEXT:
        content["text/plain"] = {"schema": _TEXT}
    else:
        content["application/json"] = {"schema": ANSWERS.get(path, {"type": "object"})}
    if path in STREAMED:
        content["text/event-stream"] = {"schema": _TEXT}
    return {"description": "The answer", "content": content}
