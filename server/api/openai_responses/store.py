"""ResponseStore: answers of /v1/responses, kept in memory for those that go on from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """``body``: the answer as JSON. ``messages``: JSON of the whole conversation, the answer
    included and instructions left out."""

    body: bytes
    messages: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.messages)


class ResponseStore:
    """At most ``max_entries`` answers of together ``max_bytes``; the least recently used go first.

    ``owner``: the digest of the key that an answer was asked for with; nobody else finds it.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[bytes, str], StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, owner: bytes, response_id: str, response: StoredResponse) -> None:
        """Keep an answer; one that alone is too large is not kept."""
        if response.num_bytes > self._max_bytes:
            return
        self._entries[owner, response_id] = response
        self.num_bytes += response.num_bytes
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, owner: bytes, response_id: str) -> StoredResponse | None:
        found = self._entries.get((owner, response_id))
        if found is not None:
            self._entries.move_to_end((owner, response_id))
        return found

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Whether there was one."""
        found = self._entries.pop((owner, response_id), None)
        if found is not None:
            self.num_bytes -= found.num_bytes
        return found is not None
