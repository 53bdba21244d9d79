"""Who may ask what: API keys for everything but the probes, admin keys for what changes the server.

    keys of the server    none    API        admin        both
    OPEN_PATHS            open    open       open         open
    ADMIN_PATHS           open    API key    admin key    admin key
    everything else       open    API key    open         either key

Preflight requests of browsers (CORS, if it is on) are answered before they come here.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.server.http.errors import APIError, error_response
from headstart.server.http.keys import Keys

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics"})
HOW = "send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"


class Authorisation:
    """ASGI middleware: a 401 or 403, before the body is read, for who has not the right key.

    The path is ``scope["path"]``, which the router goes by, too; there are no WebSocket routes.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await error_response(refusal, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        path: str = scope["path"]
        # The router's patterns end with "$", which lets a newline (%0a) follow.
        for_admins = bool(self._keys.admin) and path.rstrip("\n") in ADMIN_PATHS
        if path in OPEN_PATHS or not (for_admins or self._keys.api):
            return None
        key = sent_key(scope)
        owner = self._keys.owner(key)
        if owner == "admin" or (owner == "api" and not for_admins):
            return None
        if owner == "api":
            return APIError(
                403,
                "this needs an admin key, and the key that was sent is an API key",
                code="admin_key_required",
            )
        what = "an admin key" if for_admins else "an API key"
        return APIError(
            401,
            f"the key that was sent is none of this server's: this needs {what}; {HOW}"
            if key
            else f"this needs {what}: {HOW}",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def sent_key(scope: Scope) -> str:
    """The Bearer token, else ``x-api-key``, else nothing."""
    sent: dict[str, str] = {}
    for name, value in scope["headers"]:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key":
            sent.setdefault("x-api-key", text)
        elif name == b"authorization" and text[:7].lower() == "bearer ":
            sent.setdefault("bearer", text[7:].strip())
    return sent.get("bearer") or sent.get("x-api-key") or ""
