"""/v1/models: what this server serves; in Anthropic's shape for who sends ``anthropic-version``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from headstart.server.http.errors import bad_request
from headstart.server.http.runtime import Runtime

MAX_LISTED = 1000
ANTHROPIC_VERSION = "anthropic-version"


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        """The names this server's model goes by, and the adapters that are loaded."""
        names = [*runtime.model_names, *runtime.engine.adapters]
        if ANTHROPIC_VERSION in request.headers:
            return _page(runtime, names, request.query_params)
        return {"object": "list", "data": [describe(runtime, name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(request: Request, name: str) -> dict[str, Any]:
        """One model; ``max_model_len`` is null until the engine is ready."""
        if ANTHROPIC_VERSION in request.headers:
            return _anthropic(runtime, name)
        return describe(runtime, name)

    return router


def describe(runtime: Runtime, name: str) -> dict[str, Any]:
    """A name of the model, or an adapter. ``segment_mask``: of chats that name none."""
    model = runtime.engine.model
    served = runtime.served(name)
    described = {
        "id": name,
        "object": "model",
        "created": runtime.created,
        "owned_by": "headstart",
        "root": name,
        "parent": None,
        "max_model_len": None if model is None else model.max_model_len,
        "segment_mask": None if model is None else served.chat_mask,
    }
    if served.adapter is not None:
        adapter = runtime.engine.adapters[served.adapter]
        described |= {
            "root": Path(adapter.path).name,
            "parent": runtime.model_name,
            "rank": adapter.rank,
        }
    return described


def _anthropic(runtime: Runtime, name: str) -> dict[str, Any]:
    """The same in Anthropic's shape."""
    runtime.served(name)
    model = runtime.engine.model
    length = None if model is None else model.max_model_len
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": datetime.fromtimestamp(runtime.created, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": length,
        "max_tokens": length,
    }


def _page(runtime: Runtime, names: list[str], query: Mapping[str, str]) -> dict[str, Any]:
    """``limit`` names behind ``after_id``, or in front of ``before_id``; raises APIError."""
    limit = query.get("limit", "20")
    if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= MAX_LISTED:
        raise bad_request(f"limit must be a whole number from 1 to {MAX_LISTED}", "limit")
    after, before = query.get("after_id"), query.get("before_id")
    for param, name in (("after_id", after), ("before_id", before)):
        if name is not None and name not in names:
            raise runtime.not_found(name, param)
    start = 0 if after is None else names.index(after) + 1
    left = names[start : None if before is None else names.index(before)]
    shown = left[: int(limit)] if before is None else left[-int(limit) :]
    return {
        "data": [_anthropic(runtime, name) for name in shown],
        "has_more": len(shown) < len(left),
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }
