"""/v1/conversations: items that answers are put behind, kept where answers are."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from headstart.server.api.conversation import Conversation
from headstart.server.api.fields import Ignored
from headstart.server.api.openai_responses.body import InputField, Metadata
from headstart.server.api.openai_responses.items import (
    add_items,
    item_list,
    references,
    resolved,
    stored_items,
)
from headstart.server.api.openai_responses.listing import MAX_LIMIT, json_response, page_of
from headstart.server.api.openai_responses.store import PREFIXES, Item, Stored
from headstart.server.http.errors import APIError
from headstart.server.http.policy import Body, Notes
from headstart.server.http.runtime import Runtime

KIND = "conversation"
PATH = "/v1/conversations/{conversation_id}"


class MetadataBody(Body):
    metadata: Metadata | None = None


class ConversationCreateBody(MetadataBody):
    items: InputField = None


class ItemsBody(Body):
    items: InputField
    include: Ignored = None


def add_routes(router: APIRouter, runtime: Runtime, stored: Stored) -> None:
    """Add the endpoints of conversations."""

    def checked(request: Request, earlier: Sequence[Item], given: Any, notes: Notes) -> list[Item]:
        """Items that go behind those before them, as they are listed; raises APIError."""
        new = item_list(given, "items", runtime.settings)
        new = resolved(new, stored.items(request, references(new, "items")), "items")
        add_items(Conversation(), [*earlier, *new], "items", notes)
        notes.check()
        return stored_items(new)

    @router.post("/v1/conversations", response_class=Response)
    async def create_conversation(request: Request) -> Response:
        """A new conversation, maybe with items."""
        body = await runtime.parse(request, ConversationCreateBody)
        items: list[Item] = []
        if body.items not in (None, []):
            items = checked(request, [], body.items, body.notes)
        conversation_id = f"{PREFIXES[KIND]}{secrets.token_hex(24)}"
        shown = {
            "id": conversation_id,
            "object": KIND,
            "created_at": int(time.time()),
            "metadata": body.metadata or {},
        }
        stored.keep(request, conversation_id, msgspec.json.encode(shown), items, items)
        return json_response(shown)

    @router.get(PATH, response_class=Response)
    async def get_conversation(request: Request, conversation_id: str) -> Response:
        """What there is to say of a conversation, its items apart."""
        found = stored.find(request, conversation_id, KIND)
        return Response(found.body, media_type="application/json")

    @router.post(PATH, response_class=Response)
    async def update_conversation(request: Request, conversation_id: str) -> Response:
        """Give a conversation other metadata."""
        body = await runtime.parse(request, MetadataBody)
        found = stored.find(request, conversation_id, KIND)
        shown = msgspec.json.decode(found.body) | {"metadata": body.metadata or {}}
        items = found.item_list()
        stored.keep(request, conversation_id, msgspec.json.encode(shown), items, items)
        return json_response(shown)

    @router.delete(PATH, response_class=Response)
    async def delete_conversation(request: Request, conversation_id: str) -> Response:
        """Forget a conversation; answers stay."""
        stored.delete(request, conversation_id, KIND)
        shown = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
        return json_response(shown)

    @router.get(f"{PATH}/items", response_class=Response)
    async def list_items(request: Request, conversation_id: str) -> Response:
        """The items, the newest first."""
        return page_of(
            stored.find(request, conversation_id, KIND).item_list(), request.query_params
        )

    @router.post(f"{PATH}/items", response_class=Response)
    async def create_items(request: Request, conversation_id: str) -> Response:
        """Put items behind those that are there."""
        body = await runtime.parse(request, ItemsBody)
        earlier = stored.find(request, conversation_id, KIND).item_list()
        new = checked(request, earlier, body.items, body.notes)
        stored.extend(request, conversation_id, new)
        return page_of(new, {"order": "asc", "limit": str(MAX_LIMIT)})

    @router.get(f"{PATH}/items/{{item_id}}", response_class=Response)
    async def get_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """One of the items."""
        for item in stored.find(request, conversation_id, KIND).item_list():
            if item["id"] == item_id:
                return json_response(item)
        raise _no_item(item_id)

    @router.delete(f"{PATH}/items/{{item_id}}", response_class=Response)
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """Take an item out of a conversation, and tell of what is left."""
        found = stored.find(request, conversation_id, KIND)
        items = found.item_list()
        left = [item for item in items if item["id"] != item_id]
        if len(left) == len(items):
            raise _no_item(item_id)
        stored.keep(request, conversation_id, found.body, left, left)
        return Response(found.body, media_type="application/json")


def _no_item(item_id: str) -> APIError:
    return APIError(404, f"there is no item {item_id[:80]!r}", code="item_not_found")
