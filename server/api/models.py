"""/v1/models: what this server serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter

from headstart.server.http.runtime import Runtime


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The names this server's model goes by, and the adapters that are loaded."""
        names = (*runtime.model_names, *runtime.engine.adapters)
        return {"object": "list", "data": [describe(runtime, name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """One model; ``max_model_len`` is null until the engine is ready."""
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
