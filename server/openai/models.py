"""/v1/models: what this server serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from headstart.server.runtime import Runtime


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["models"])

    def describe(name: str) -> dict[str, Any]:
        model = runtime.engine.model
        return {
            "id": name,
            "object": "model",
            "created": runtime.created,
            "owned_by": "headstart",
            "max_model_len": None if model is None else model.max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The names this server's model goes by."""
        return {"object": "list", "data": [describe(name) for name in runtime.model_names]}

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """One model; ``max_model_len`` is null until the engine is ready."""
        runtime.check_model(name)
        return describe(name)

    return router
