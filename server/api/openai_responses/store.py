"""What /v1/responses and /v1/conversations keep in memory, for those that go on from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request

from headstart.server.http.auth import sent_key
from headstart.server.http.errors import APIError
from headstart.server.http.keys import key_digest
from headstart.server.settings import ServerSettings

PREFIXES = {"response": "resp_", "conversation": "conv_"}

Item = dict[str, Any]
"""A part of a conversation, as the API has it: a message, a call, its output, thoughts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """``body``: an answer, or what is told of a conversation, as JSON. ``items``: JSON of the
    conversation, for an answer the one before it. ``ids``: the items that are found here by id."""

    body: bytes
    items: bytes
    ids: Sequence[str] = ()

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.items) + sum(map(len, self.ids))

    def item_list(self) -> list[Item]:
        """The items, and an answer's own."""
        items: list[Item] = msgspec.json.decode(self.items)
        items += msgspec.json.decode(self.body).get("output", [])
        return items


class ResponseStore:
    """At most ``max_entries`` of together ``max_bytes``; the least recently used go first.

    ``owner``: the digest of the key that an entry was made with; nobody else finds it.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[bytes, str], Entry] = OrderedDict()
        self._places: dict[tuple[bytes, str], str] = {}  # item -> the entry that has it
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, owner: bytes, entry_id: str, entry: Entry) -> None:
        """Keep an entry, in the place of an older one; one that alone is too large is not kept."""
        self.delete(owner, entry_id)
        if entry.num_bytes > self._max_bytes:
            return
        self._entries[owner, entry_id] = entry
        self._places.update(((owner, item_id), entry_id) for item_id in entry.ids)
        self.num_bytes += entry.num_bytes
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self.delete(*next(iter(self._entries)))

    def get(self, owner: bytes, entry_id: str) -> Entry | None:
        found = self._entries.get((owner, entry_id))
        if found is not None:
            self._entries.move_to_end((owner, entry_id))
        return found

    def place(self, owner: bytes, item_id: str) -> str | None:
        """The entry that has an item."""
        return self._places.get((owner, item_id))

    def delete(self, owner: bytes, entry_id: str) -> bool:
        """Whether there was one."""
        found = self._entries.pop((owner, entry_id), None)
        if found is None:
            return False
        self.num_bytes -= found.num_bytes
        for item_id in found.ids:
            if self._places.get((owner, item_id)) == entry_id:
                del self._places[owner, item_id]
        return True


class Stored:
    """What one app has stored, as the client of a request finds it: that of its own key."""

    def __init__(self, settings: ServerSettings) -> None:
        self._with_keys = bool(settings.keys.api)
        self._store = ResponseStore(settings.max_stored_responses, settings.max_stored_bytes)

    def find(
        self, request: Request, entry_id: str, kind: str = "response", param: str | None = None
    ) -> Entry:
        """Raises a 404; for what another key has stored it is the same one."""
        found = self._store.get(self._owner(request), entry_id)
        if found is None or not entry_id.startswith(PREFIXES[kind]):
            raise _not_stored(entry_id, kind, param)
        return found

    def delete(self, request: Request, entry_id: str, kind: str = "response") -> None:
        """Raises a 404."""
        self.find(request, entry_id, kind)
        self._store.delete(self._owner(request), entry_id)

    def keep(
        self,
        request: Request,
        entry_id: str,
        body: bytes,
        items: Sequence[Item],
        own: Sequence[Item],
    ) -> None:
        """Store an entry. ``items``: those of the conversation. ``own``: those to be found here."""
        ids = [item["id"] for item in own]
        entry = Entry(body, msgspec.json.encode(items), ids)
        self._store.put(self._owner(request), entry_id, entry)

    def extend(self, request: Request, conversation_id: str, new: Sequence[Item]) -> None:
        """Add items to a conversation, unless it has gone."""
        entry = self._store.get(self._owner(request), conversation_id)
        if entry is not None:
            items = [*entry.item_list(), *new]
            self.keep(request, conversation_id, entry.body, items, items)

    def items(self, request: Request, item_ids: Sequence[str]) -> dict[str, Item]:
        """Those of the items that are stored."""
        owner = self._owner(request)
        places = {self._store.place(owner, item_id) for item_id in item_ids}
        entries = [self._store.get(owner, place) for place in places if place is not None]
        wanted = frozenset(item_ids)
        return {
            item["id"]: item
            for entry in entries
            if entry is not None
            for item in entry.item_list()
            if item["id"] in wanted
        }

    def _owner(self, request: Request) -> bytes:
        return key_digest(sent_key(request.scope)) if self._with_keys else b""


def _not_stored(entry_id: str, kind: str, param: str | None) -> APIError:
    return APIError(
        404,
        f"there is no {kind} {entry_id[:80]!r}: never stored, deleted, or gone for newer ones",
        param=param,
        code=f"{(param or kind).removesuffix('_id')}_not_found",
    )
