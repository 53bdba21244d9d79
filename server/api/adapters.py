"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.

They are closed until ``--lora-dir`` names a folder, and nothing outside of it is ever read. The
path that goes to the engine has its links resolved already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from headstart.engine.errors import RequestError
from headstart.server.api.adapter_names import check_adapter_name, find_adapter
from headstart.server.api.models import describe
from headstart.server.http.errors import APIError, bad_request
from headstart.server.http.policy import Body, Refused
from headstart.server.http.runtime import Runtime


class LoadAdapterBody(Body):
    """``lora_path``: a folder, relative to that of ``--lora-dir``."""

    lora_name: str
    lora_path: str
    load_inplace: Annotated[Any, Refused("unload the adapter first", harmless=(False,))] = None


class UnloadAdapterBody(Body):
    lora_name: str
    lora_int_id: Annotated[Any, Refused("give lora_name")] = None


def routes(runtime: Runtime) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    @router.post("/v1/load_lora_adapter", response_class=Response)
    async def load_lora_adapter(request: Request) -> Response:
        """Load a LoRA adapter of the folder of ``--lora-dir``; requests may then name it."""
        root = _require_root(runtime)
        body = await runtime.parse(request, LoadAdapterBody)
        name = body.lora_name
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise bad_request(f"lora_name: {error}", "lora_name", "invalid_value") from error
        runtime.require_model()
        if name in runtime.model_names:
            raise bad_request(f"lora_name: {name!r} is the model's name", "lora_name")
        if name in runtime.engine.adapters:
            raise bad_request(
                f"lora_name: an adapter {name!r} is loaded; unload it first", "lora_name"
            )
        try:
            folder = find_adapter(root, body.lora_path)
        except ValueError as error:
            message = f"lora_path {body.lora_path[:200]!r}: {error}"
            raise bad_request(message, "lora_path", "invalid_value") from error
        try:
            await runtime.engine.load_adapter(name, folder)
        except RequestError as error:
            raise bad_request(str(error), error.param or "lora_path") from error
        return JSONResponse(describe(runtime, name))

    @router.post("/v1/unload_lora_adapter", response_class=Response)
    async def unload_lora_adapter(request: Request) -> Response:
        """Take no more requests for an adapter; those that run end as they would have."""
        _require_root(runtime)
        body = await runtime.parse(request, UnloadAdapterBody)
        name = body.lora_name
        runtime.require_model()
        if name in runtime.model_names:
            raise bad_request(f"lora_name: {name!r} is the model, not an adapter", "lora_name")
        try:
            await runtime.engine.unload_adapter(name)
        except RequestError as error:  # there is none of that name
            raise runtime.not_found(name, "lora_name") from error
        runtime.metrics.forget(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    return router


def _require_root(runtime: Runtime) -> Path:
    root = runtime.settings.lora_dir
    if root is None:
        raise APIError(
            403,
            "adapters are not loaded or unloaded at run time here; the server allows it when it is "
            "started with --lora-dir DIR, for those in DIR",
            code="lora_dir_required",
        )
    return root
