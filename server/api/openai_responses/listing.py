"""Lists of items, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from headstart.server.api.openai_responses.store import Item
from headstart.server.http.errors import bad_request

MAX_LIMIT = 100


def json_response(value: Any) -> Response:
    """A 200."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def page_of(items: Sequence[Item], query: Mapping[str, str]) -> Response:
    """The page that a query's ``order``, ``after`` and ``limit`` ask for; raises a 400."""
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise bad_request("order must be asc or desc", "order", "invalid_value")
    if not (
        limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LIMIT
    ):
        raise bad_request(f"limit must be from 1 to {MAX_LIMIT}", "limit", "invalid_value")
    ordered = list(items) if order == "asc" else list(reversed(items))
    if (after := query.get("after")) is not None:
        places = [i for i, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise bad_request(f"after: there is no item {after[:80]!r}", "after", "item_not_found")
        ordered = ordered[places[-1] + 1 :]
    page = ordered[: int(limit)]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(ordered) > len(page),
        }
    )
