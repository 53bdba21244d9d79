"""StepRecord: what steps have taken, for the predictions of those to come and of newcomers' waits.

pace = seconds that passed / seconds that prompts got of them        while prompts waited
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from headstart.engine.costs.backlog import Backlog
from headstart.engine.costs.prefill import PrefillCosts
from headstart.engine.costs.steps import StepCosts
from headstart.engine.sequence import ScheduledSequence

FORGOTTEN = 0.95
"""What counts of the past after each step, for the pace."""
LEARNED = 500
"""Steps."""
UNKNOWN = PrefillCosts(0.0, 0.0, 0.0)


class StepRecord:
    """``costs``: None where nothing is predicted. ``follows``: whether steps are timed here, and
    correct them; not where a device computes beside the host."""

    def __init__(self, costs: StepCosts | None, follows: bool) -> None:
        self.costs = costs
        self._follows = follows
        self._passed = self._worked = 0.0
        self._num_steps = 0

    @property
    def learned(self) -> bool:
        """Whether so many steps were seen that the costs are worth keeping."""
        return self._num_steps >= LEARNED

    def add(
        self, scheduled: Items[ScheduledSequence], relay_seconds: float | None, seconds: float
    ) -> None:
        """A step took ``seconds``. ``relay_seconds``: as StepCosts.work takes it."""
        if self.costs is not None and self._follows:
            self.costs.observe(self.costs.work(scheduled, relay_seconds), seconds)
            self._num_steps += 1

    def prompt_seconds(self, scheduled: Items[ScheduledSequence]) -> float:
        """That the chunks of prompts in a step take, as predicted."""
        if self.costs is None:
            return 0.0
        prefill = self.costs.prefill
        return sum(
            prefill.seconds(entry.start, entry.num_tokens)
            for entry in scheduled
            if entry.num_tokens > 1
        )

    def add_round(self, worked: float, seconds: float) -> None:
        """In a step and what came beside it ``seconds`` passed, of which prompts got ``worked``.
        The time in which nothing was there to do is in neither."""
        if worked > 0 and self.costs is not None:
            self._passed = FORGOTTEN * self._passed + seconds
            self._worked = FORGOTTEN * self._worked + worked

    @property
    def prefill(self) -> PrefillCosts:
        """Of a prompt, alone; all 0 where that is not known."""
        return UNKNOWN if self.costs is None else self.costs.prefill

    def backlog(self, left: Iterable[float], long_share: float) -> Backlog:
        """Of prompts that have so many seconds left, as the server is told of them."""
        pace = self._passed / self._worked if self._worked > 0 else 1.0
        return Backlog.of(left, max(pace, 0.5), long_share)
