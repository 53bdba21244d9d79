"""When the first token is there: a chain of ranks, simulated from what each rank and link costs.

KV-Runahead (arXiv 2405.05329, section 4). Rank i computes tokens ``[bounds[i], bounds[i + 1])``
without those it holds already, and needs the keys and values of all before. In every layer

    own keys written ─┬─ max ── attention ── MLP, next layer's queries and keys ── ...
    KV received ──────┘   └──── KV sent to rank i + 1, one message after the other

    rank 0   k│attend│mlp+k│attend│mlp+k│             a rank runs ahead of those that wait for its
    link       └─layer 0─┘  └─layer 1─┘               keys: no barrier, no all-gather
    rank 1   k ·········│attend│mlp+k│···│attend│     · idle

Ranks before the last need only the keys of their last layer: its attention and MLP are left out.

What is compared with, the paper's TSP: equal chunks, and in every layer all ranks all-gather keys
and values before they attend (``simulate_gathered``).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from headstart.engine.costs.prefill import PrefillCosts, check_costs

KEY_SHARE = 0.2
"""Of a layer's linear part, until its keys are written: 0.16 to 0.25 in Llama-like models."""

Noise = Callable[[], float]
"""A factor on the time of the next message."""


class LinkCosts(msgspec.Struct, frozen=True):
    """What a message costs: ``latency`` seconds, and ``seconds_per_byte``."""

    latency: float
    seconds_per_byte: float

    def __post_init__(self) -> None:
        check_costs(self.latency, self.seconds_per_byte)

    def seconds(self, size: int) -> float:
        """Seconds in which a message of ``size`` bytes has the link for itself."""
        return self.latency + self.seconds_per_byte * size


class Chain(msgspec.Struct, frozen=True):
    """Ranks in order; the last one is the engine that serves.

    layers:       of the model
    token_bytes:  of one token's key and value in one layer
    links:        ``links[i]`` goes from rank i to rank i + 1
    back:         from the engine to whichever rank is first
    """

    layers: int
    token_bytes: int
    ranks: tuple[PrefillCosts, ...]
    links: tuple[LinkCosts, ...]
    back: LinkCosts

    def __post_init__(self) -> None:
        if self.layers < 1 or self.token_bytes < 1 or len(self.links) != len(self.ranks) - 1:
            raise ValueError("a chain has layers, ranks, and a link between any two of them")

    def last(self, count: int) -> Chain:
        """The chain of the last ``count`` ranks, 1 or more."""
        first = len(self.ranks) - count
        return msgspec.structs.replace(self, ranks=self.ranks[first:], links=self.links[first:])

    def work(
        self, held: Sequence[int], bounds: Sequence[int], i: int
    ) -> tuple[float, float, int, float]:
        """Of rank i in one layer: seconds (linear, attention), bytes received, seconds of those.

        Rank j holds the KV of ``[0, held[j])``. Raises ValueError where a rank by itself would
        have to receive.
        """
        begin, end, own = bounds[i], bounds[i + 1], held[i]
        rank = self.ranks[i]
        start = max(begin, min(own, end))
        linear = rank.linear(end - start) / self.layers
        attention = rank.attention(start, end - start) / self.layers
        if own >= begin:
            return linear, attention, 0, 0.0
        if len(self.ranks) == 1:
            raise ValueError(f"a rank alone holds {own} tokens, and begins at {begin}")
        size = (begin - own) * self.token_bytes
        return linear, attention, size, (self.links[i - 1] if i else self.back).seconds(size)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a simulation finds.

    seconds:   until the first token's logits
    idle:      of each rank, seconds it waits for keys and values before it can go on
    received:  of each rank, bytes
    """

    seconds: float
    idle: tuple[float, ...]
    received: tuple[int, ...]


def simulate(
    chain: Chain, held: Sequence[int], bounds: Sequence[int], noise: Noise | None = None
) -> Timeline:
    """KV-Runahead, message by message.

    ``bounds`` rises from where the chain begins to the prompt's end, one entry more than ranks;
    rank i holds the KV of ``[0, held[i])``. What rank 0 lacks before ``bounds[0]`` the engine
    sends it; all layers of that are there at the start.
    """
    idle: list[float] = []
    received: list[int] = []
    sendable = [0.0] * chain.layers  # when the rank before has each layer's KV together
    at = linear = attention = 0.0
    for i in range(len(chain.ranks)):
        linear, attention, size, message = chain.work(held, bounds, i)
        arrived = 0.0  # at the start, where nothing is missing
        waited = waits = 0.0
        own = KEY_SHARE * linear
        ready = []
        for sent in sendable:
            if size:
                # A link carries one message at a time.
                arrived = max(arrived, sent) + (message * noise() if noise else message)
            waits = max(arrived - own, 0.0)
            waited += waits
            at = own + waits
            ready.append(at)
            own = at + attention + linear
        sendable = ready
        last = i == len(chain.ranks) - 1
        idle.append(waited if last else waited - waits)  # others compute no more in the last layer
        received.append(size * chain.layers)
    seconds = at + attention + (1 - KEY_SHARE) * linear
    return Timeline(seconds, tuple(idle), tuple(received))


def first_token_seconds(chain: Chain, held: Sequence[int], bounds: Sequence[int]) -> float:
    """``simulate(...).seconds`` without noise, in a time that does not depend on the layers.

    All layers take a rank as long, and a link. What comes to it at ``at + layer * pace`` leaves it
    at ``at' + layer * max(pace, its own)``: still a line. A rank has each layer's KV together at
    the latest of a few lines, its own and those of the ranks before.
    """
    lines: list[tuple[float, float]] = [(0.0, 0.0)]
    linear = attention = 0.0
    for i in range(len(chain.ranks)):
        linear, attention, size, message = chain.work(held, bounds, i)
        step = attention + linear
        pace = max(message, step)
        lines = [(at + message, max(before, pace)) for at, before in lines] if size else []
        lines.append((KEY_SHARE * linear, step))
    layers = chain.layers - 1
    at = max(at + layers * pace for at, pace in lines)
    return at + attention + (1 - KEY_SHARE) * linear


def simulate_gathered(
    chain: Chain,
    length: int,
    attention: Literal["causal", "dense"],
    noise: Noise | None = None,
) -> Timeline:
    """The baseline (section 3, "TSP"): equal chunks of a prompt of ``length`` tokens, all-gathers.

    In every layer all ranks wait for the slowest to write its keys, pass chunks around a ring in
    one step less than there are ranks, and then attend. dense: each row attends to all keys, and
    half of the scores are masked away, as the paper counts; causal: to those it sees.
    """
    count = len(chain.ranks)
    bounds = [length * i // count for i in range(count + 1)]
    sizes = [(b - a) * chain.token_bytes for a, b in itertools.pairwise(bounds)]
    linear, attend = [], []
    for rank, (start, end) in zip(chain.ranks, itertools.pairwise(bounds), strict=True):
        num = end - start
        linear.append(rank.linear(num) / chain.layers)
        pairs = num * length if attention == "dense" else num * (start + num / 2)
        attend.append(rank.per_pair * pairs / chain.layers)
    ring = (*chain.links, chain.back)
    messages = [link.seconds(max(sizes)) for link in ring]
    done = [0.0] * count  # when each rank has finished the layer before
    for _ in range(chain.layers):
        begin = max(at + KEY_SHARE * part for at, part in zip(done, linear, strict=True))
        for _ in range(count - 1):
            begin += max(message * (noise() if noise else 1.0) for message in messages)
        done = [
            begin + pairs + (1 - KEY_SHARE) * part
            for pairs, part in zip(attend, linear, strict=True)
        ]
    idle = [
        at - chain.layers * (pairs + part)
        for at, pairs, part in zip(done, attend, linear, strict=True)
    ]
    received = [(sum(sizes) - size) * chain.layers for size in sizes]
    return Timeline(done[-1], tuple(idle), tuple(received))


def jitter(seed: int, most: float) -> Noise:
    """Noise: factors drawn from ``[1, 1 + most]``, equal for equal seeds."""
    draw = random.Random(seed).uniform
    return lambda: draw(1.0, 1.0 + most)
