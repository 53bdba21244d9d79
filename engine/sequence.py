"""Sequence: one request on its way from the scheduler to the sampler.

The ground of the engine: what a sequence carries (an adapter, a reading) is known here by protocols
alone; models/adapters.py and models/reading.py supply them.
"""

from __future__ import annotations

import enum
import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from headstart.engine.ranges.segments import CAUSAL, Segments
from headstart.engine.sampling.params import SamplingParams

if TYPE_CHECKING:
    from headstart.engine.kv.tree import Node
    from headstart.engine.process.messages import AdapterInfo
    from headstart.engine.sampling.grammar import Constraint
    from headstart.engine.timeline import Timeline


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended; the values are the API's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # the model's logits were not numbers
    GRAMMAR = "grammar"  # its grammar could not be followed any further


class Adapter(Protocol):
    """LoRA weights that a sequence is computed with, compared by identity.

    ``weights``: the backend's ``lora_adapter``. ``digest``: of all its numbers, a part of the cache
    key.
    """

    @property
    def info(self) -> AdapterInfo: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def weights(self) -> Any: ...


class Reader(Protocol):
    """Takes some rows of a batch, in order and maybe in several parts."""

    @property
    def needs_logits(self) -> bool:
        """Whether it takes logits ``[rows, vocab]``, or hidden states ``[rows, hidden]``."""
        ...

    def take(self, rows: Tensor) -> None:
        """The next rows, float32, valid until this returns. Must not wait for the device."""
        ...

    def fetch(self) -> Callable[[], None]:
        """Queue the way of the results to the host; what is returned waits for them, and books
        them."""
        ...


class Reading(Protocol):
    """What a request wants of its prompt beside KV and an answer.

    ``next``: the first position whose row is still to be read; ``end``: the last one's plus 1.
    """

    next: int

    @property
    def end(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason:
        """Of a sequence that ends with its prompt."""
        ...

    def reader(self, first: int, end: int) -> Reader:
        """For the rows of positions ``[first, end)``, which follow those booked or in flight."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one request, the pages that hold their KV, and how far it has come.

        token_ids  [ p p p p p p p p | o o o o ]      prompt, then output
                     ^ num_cached_tokens: taken from the radix cache at admission
                             ^ num_computed_tokens: KV present in pages
        pages      [ 7 ][ 3 ][ 9 ]                    page i holds positions [i*page, (i+1)*page)

    ``namespace`` is the part of the cache key that is not tokens (adapter, whether there are
    segments, tenant salt): KV is shared only between sequences of equal namespace.
    ``seed`` is that of the params, or a random one drawn here: a sequence that is preempted and
    computed again keeps its draws. ``constraint`` is there if the params have a grammar, once that
    is compiled. ``reading`` is what is wanted of the prompt itself, if anything. ``arrival`` is the
    scheduler's, in order of ``add``; among sequences of the lowest ``priority`` the first to arrive
    comes first. ``num_expected_tokens``: how many the cache had of it when the scheduler last
    looked. ``num_short``: steps in which there were no pages for it. ``began`` and ``scheduled``:
    when it came, and when it was first scheduled, by ``time.monotonic``. ``timeline``: what is
    noted of it until its first output, if anything. ``owner``: who may be told what it holds,
    beside those of equal salt. ``taken``: the spans of its tokens that came from the cache.
    """

    id: int
    token_ids: array[int]
    num_prompt_tokens: int
    params: SamplingParams
    namespace: bytes = b""
    segments: Segments = CAUSAL
    adapter: Adapter | None = None
    priority: int = 0
    constraint: Constraint | None = None
    reading: Reading | None = None
    status: Status = Status.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_expected_tokens: int = 0
    num_short: int = 0
    node: Node | None = None
    finish_reason: FinishReason | None = None
    arrival: int = 0
    num_preemptions: int = 0
    owner: bytes = b""
    taken: list[tuple[int, int]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    timeline: Timeline | None = None
    seed: int = field(init=False)
    _keys: array[int] = field(init=False, default_factory=lambda: array("i"))

    def __post_init__(self) -> None:
        seed = self.params.seed
        self.seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generates(self) -> bool:
        """Whether tokens are sampled; else it ends with its prompt."""
        return self.params.max_tokens > 0

    @property
    def cacheable(self) -> int:
        """How many tokens' KV may come from the cache: not the last one's, whose row is wanted,
        and none from a row on that is still to be read."""
        reading, most = self.reading, len(self.token_ids) - 1
        return most if reading is None or reading.next >= reading.end else min(most, reading.next)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is not computed yet; 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed_tokens

    def cache_keys(self, page_size: int) -> array[int]:
        """What the cache compares, an int a token, of every full page at least: the tokens, but
        where segments are (``Segments.extend_keys``)."""
        if not self.segments:
            return self.token_ids
        self.segments.extend_keys(self._keys, self.token_ids, page_size)
        return self._keys


class ScheduledSequence(NamedTuple):
    """Compute positions ``[start, start + num_tokens)`` of ``seq``.

    ``samples``: they reach its last token, so the logits of their last row are wanted, unless it
    ends with its prompt. A ``start`` behind the known tokens is that of the one token that the step
    in flight samples.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens
