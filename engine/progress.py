"""PromptProgress: how far prompts are computed, for the requests that asked to be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headstart.engine.process.messages import Output
from headstart.engine.sequence import Sequence, Status
from headstart.engine.work import Work


class PromptProgress:
    """Costs nothing while nobody asks."""

    def __init__(self) -> None:
        self._asked: dict[int, Sequence] = {}
        self._told: dict[int, int] = {}

    def add(self, seq: Sequence) -> None:
        self._asked[seq.id] = seq

    def forget(self, ids: Iterable[int]) -> None:
        for request_id in ids:
            self._asked.pop(request_id, None)
            self._told.pop(request_id, None)

    def outputs(self, beside: Mapping[Sequence, Work]) -> list[Output]:
        """Of each prompt that has come further since the last call."""
        if not self._asked:
            return []
        self.forget(
            [
                request_id
                for request_id, seq in self._asked.items()
                if seq.status is Status.FINISHED or seq.num_output_tokens
            ]
        )
        outputs = []
        for request_id, seq in self._asked.items():
            if seq.status is not Status.RUNNING:
                continue
            computed = beside[seq].num_computed if seq in beside else seq.num_computed_tokens
            if computed > self._told.get(request_id, -1):
                self._told[request_id] = computed
                outputs.append(
                    Output(request_id, [], None, seq.num_cached_tokens, computed=computed)
                )
        return outputs
