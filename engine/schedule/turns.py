"""Turns: whose prompt a step computes, where steps are a time.

    step                  1           2           3           4
    first in the order    soonest     soonest     soonest     oldest

The soonest done come first: by the seconds that are left of each prompt, its cached part left out.
A tenant's prompts count one behind the other, and behind what it has got while it had prompts here:
a hundred of one do not go before the first of another. In every fourth step the prompt that came
first of all has its turn before them: a prompt of any length gets that share of the machine, and
so does everybody, in order of arrival. Priorities stand above both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.sequence import Sequence, Status

OLDEST_EVERY = 4
"""In every so many steps the oldest prompt comes first."""


class Costs(Protocol):
    """What a step takes (costs/steps.py), as the scheduler asks it."""

    @property
    def prefill(self) -> PrefillCosts: ...

    def decode_seconds(self, rows: int, keys: int) -> float: ...


class Pace(NamedTuple):
    """``seconds``: what a step may take; ``undisturbed`` times as many where nobody decodes, who
    would wait for a token. ``layers``: of the model; one of a tile of rows is the least that is
    computed of a chunk that takes longer."""

    seconds: float
    costs: Costs
    layers: int
    undisturbed: float = 3.0

    def for_prompts(self, rows: int, keys: int) -> float:
        """Seconds of a step that prompts get where ``rows`` sequences decode, which read ``keys``
        keys: what these leave; or three times what they take, as long as that is no more than a
        step; and as much as they take at least. So many streams take little of a prompt's speed,
        and prompts half of the streams' at most where decoding alone is as long as a step.
        """
        if not rows:
            return self.undisturbed * self.seconds
        decoding = self.costs.decode_seconds(rows, keys)
        return max(self.seconds - decoding, min(3 * decoding, self.seconds), decoding)

    def left(self, seq: Sequence) -> float:
        """Seconds until the first token of ``seq``, alone; of one that waits, what was cached when
        the scheduler last looked is taken to be so still."""
        waits = seq.status is Status.WAITING
        start = seq.num_expected_tokens if waits else seq.num_computed_tokens
        return self.costs.prefill.seconds(start, max(len(seq.token_ids) - start, 1))


class Turns:
    """Remembers what tenants got, for as long as they have prompts here."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._served: dict[bytes, float] = {}
        self._num_steps = 0

    def serve(self, seq: Sequence, seconds: float) -> None:
        """A step computes ``seq`` for so long."""
        self._served[seq.namespace] = self._served.get(seq.namespace, 0.0) + seconds

    def order(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """``sequences`` in the order in which the next step takes them."""
        self._num_steps += 1
        tenants: dict[tuple[int, bytes], list[tuple[float, int, Sequence]]] = defaultdict(list)
        for seq in sequences:
            prompt = self._pace.left(seq), seq.arrival, seq
            tenants[seq.priority, seq.namespace].append(prompt)
        # Who comes begins where the one stands that has got the least.
        names = {name for _, name in tenants}
        least = min((self._served[name] for name in names & self._served.keys()), default=0.0)
        self._served = {name: self._served.get(name, least) - least for name in names}
        order: list[tuple[int, float, int, Sequence]] = []
        for (priority, name), prompts in tenants.items():
            until = self._served[name]
            for left, arrival, seq in sorted(prompts):
                until += left
                order.append((priority, until, arrival, seq))
        order.sort()
        found = [seq for _, _, _, seq in order]
        if found and self._num_steps % OLDEST_EVERY == 0:
            oldest = min(found, key=lambda seq: (seq.priority, seq.arrival))
            found.remove(oldest)
            found.insert(0, oldest)
        return found
