"""History: prompts of a short while ago and what became of their pages, for those who ask why the
cache did not have a prompt (engine/explain.py).

    leave     a sequence has ended: its tokens, and the pages that the tree keeps of them
    evicted   pages have left the tree: when, and what for

Both are bounded, and writing them down is a few references: nothing is compared before somebody
asks. A prompt that goes on where an earlier one ended takes its place, so that a conversation is
one entry.

Nothing is told across tenants. Who asks sees the entries of equal salt and equal *owner*: KV may be
shared among keys (``shared_cache``), the text of prompts is not.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from headstart.engine.kv.tree import Why
from headstart.engine.ranges.segments import CAUSAL, Segments

if TYPE_CHECKING:
    from headstart.engine.sequence import Sequence

MOST_PROMPTS = 64
MOST_BYTES = 16 << 20
MOST_EVICTED = 16384
"""Pages whose eviction is remembered."""

State = Literal["ended", "aborted", "running", "waiting", "preempted"]
"""aborted: it ended before its time."""


class Namespace(NamedTuple):
    """What keeps KV apart beside tokens. ``adapter``: its digest; none for the model itself.
    ``segmented``: the prompt has segments."""

    salt: bytes
    adapter: bytes
    segmented: bool

    @property
    def key(self) -> bytes:
        """No two different ones have the same."""
        return bytes([self.segmented, len(self.adapter)]) + self.adapter + self.salt

    @classmethod
    def of(cls, key: bytes) -> Namespace:
        """The one with this ``key``."""
        end = 2 + key[1]
        return cls(key[end:], key[2:end], bool(key[0]))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Earlier:
    """A sequence that came before.

    token_ids   prompt and answer
    kept        how many of them the tree held when it ended, in whole ``pages``; or, of one that
                runs, holds
    when        it ended, by the history's clock; None: it has not
    evictions   how many had been written down then
    """

    namespace: bytes
    owner: bytes
    token_ids: array[int]
    kept: int
    segments: Segments = CAUSAL
    pages: Items[int] = ()
    adapter: str | None = None
    state: State = "ended"
    when: float | None = None
    evictions: int = 0

    @property
    def num_bytes(self) -> int:
        return 4 * (len(self.token_ids) + len(self.pages))


class Eviction(NamedTuple):
    """``pages`` left the tree at ``when``."""

    when: float
    why: Why
    pages: Items[int]


class History:
    """Bounded by ``most_prompts``, ``most_bytes`` and ``most_evicted`` pages; the oldest goes."""

    def __init__(
        self,
        *,
        most_prompts: int = MOST_PROMPTS,
        most_bytes: int = MOST_BYTES,
        most_evicted: int = MOST_EVICTED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._most_prompts = most_prompts
        self._most_bytes = most_bytes
        self._most_evicted = most_evicted
        self._prompts: deque[Earlier] = deque()  # the oldest first
        self._num_bytes = 0
        self._evictions: deque[Eviction] = deque()
        self._num_evicted = 0  # pages in these
        self._forgotten = 0  # evictions that were written down once

    def leave(self, seq: Sequence, page_size: int, *, aborted: bool) -> None:
        """``seq`` ends. It still holds its pages."""
        kept = 0 if seq.node is None else seq.node.depth
        self.add(
            Earlier(
                namespace=seq.namespace,
                owner=seq.owner,
                token_ids=seq.token_ids,
                kept=kept,
                segments=seq.segments,
                pages=array("i", seq.pages[: kept // page_size]),
                adapter=None if seq.adapter is None else seq.adapter.info.name,
                state="aborted" if aborted else "ended",
                when=self.clock(),
                evictions=self._forgotten + len(self._evictions),
            )
        )

    def add(self, earlier: Earlier) -> None:
        """Remember one, in the place of those that it goes on from."""
        for other in [other for other in self._prompts if _goes_on_from(earlier, other)]:
            self._prompts.remove(other)
            self._num_bytes -= other.num_bytes
        self._prompts.append(earlier)
        self._num_bytes += earlier.num_bytes
        while len(self._prompts) > self._most_prompts or self._num_bytes > self._most_bytes:
            self._num_bytes -= self._prompts.popleft().num_bytes

    def evicted(self, pages: Items[int], why: Why) -> None:
        """``pages`` have left the tree."""
        self._evictions.append(Eviction(self.clock(), why, pages))
        self._num_evicted += len(pages)
        while self._num_evicted > self._most_evicted:
            self._num_evicted -= len(self._evictions.popleft().pages)
            self._forgotten += 1

    def prompts(self, salt: bytes, owner: bytes) -> Iterator[Earlier]:
        """Those of this salt and owner, the last that ended first."""
        for earlier in reversed(self._prompts):
            if earlier.owner == owner and Namespace.of(earlier.namespace).salt == salt:
                yield earlier

    def eviction(self, earlier: Earlier, index: int) -> Eviction | None:
        """That of page ``index`` of an earlier prompt; None if it is forgotten, or never was."""
        if index >= len(earlier.pages):
            return None
        page = earlier.pages[index]
        since = max(earlier.evictions - self._forgotten, 0)
        if earlier.evictions < self._forgotten:
            # The page may have been given out and evicted again since.
            return None
        found = (found for found in islice(self._evictions, since, None) if page in found.pages)
        return next(found, None)


def _goes_on_from(new: Earlier, old: Earlier) -> bool:
    """Whether ``old`` says nothing that ``new`` does not."""
    if (new.namespace, new.owner) != (old.namespace, old.owner):
        return False
    size = len(old.token_ids)
    if size > len(new.token_ids) or old.segments != new.segments:
        return False
    # Most differ in their last token: nothing is copied for them.
    if size and new.token_ids[size - 1] != old.token_ids[-1]:
        return False
    return new.kept >= old.kept and new.token_ids[:size] == old.token_ids
