"""Ledger: where the time of a request goes, from its first byte to its last token.

    first byte                                                                     first token's
      |receive|template|tokenise|grammar|hand_over|queue|prefill, yielded|sample|deliver|  bytes
       ---- this process -----------------|------- the engine's ---------|---- this one ----

A phase is the time from one moment to the next, by one clock that both processes read. So the
phases add up to the time to the first token: there is nothing between two of them. What a client
measures beyond that is the network, the two kernels and its own.

Clients ask for it with ``timings: true`` or the header ``x-headstart-timings: 1``.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.types import Scope

from headstart.engine.process.messages import QueueAhead, Times
from headstart.server.http.deadline import begun
from headstart.server.http.policy import Body
from headstart.server.settings import ServerSettings

PHASES = (
    "receive",
    "template",
    "tokenise",
    "grammar",
    "hand_over",
    "queue",
    "prefill",
    "yielded",
    "sample",
    "deliver",
)
TIMINGS_HEADER = "x-headstart-timings"
_LEDGER = "headstart.ledger"


class Moment(NamedTuple):
    """``phase`` ended ``at`` this time of ``time.monotonic``."""

    phase: str
    at: float


class Gaps:
    """The times between the tokens of one choice."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds = array("d")

    def add(self, seconds: float, count: int) -> None:
        """``count`` tokens, each so long after the one before."""
        for _ in range(count):
            self._seconds.append(seconds)

    @property
    def mean(self) -> float | None:
        return sum(self._seconds) / len(self._seconds) if self._seconds else None

    @property
    def p95(self) -> float | None:
        """The nearest rank: 95 of 100 are no longer."""
        ordered = sorted(self._seconds)
        return ordered[(95 * len(ordered) + 99) // 100 - 1] if ordered else None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What came of a choice behind its first token. ``seconds``: from that to the last one, which
    was there when it ``ended``; None: there was none."""

    num_tokens: int
    seconds: float
    gaps: Gaps
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the engine was asked for, for those who are told of the request. ``choices``: of all
    prompts."""

    model: str
    answer_id: str
    choices: int
    max_tokens: int
    temperature: float
    top_p: float | None


class Ledger:
    """Of one request. Its phases are those of the choice whose first token came first."""

    __slots__ = (
        "_clock",
        "_moments",
        "asked",
        "begun",
        "cached_tokens",
        "decoded",
        "finish_reasons",
        "first",
        "num_prompt_tokens",
        "times",
        "wants_metrics",
        "wants_timings",
    )

    def __init__(self, begun: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begun = begun
        self._moments: list[Moment] = []
        self.times: Times | None = None
        self.first: float | None = None
        """When the first token's bytes were handed to the system, or of an answer that is sent
        whole, when the token was here."""
        self.asked: Asked | None = None
        self.num_prompt_tokens = self.cached_tokens = 0
        self.decoded: Decoded | None = None
        self.finish_reasons: Sequence[str] = ()
        self.wants_timings = self.wants_metrics = False

    @classmethod
    def of(cls, scope: Scope) -> Ledger:
        """The request's; new, if nobody has asked for it before."""
        ledger: Ledger | None = scope.get(_LEDGER)
        if ledger is None:
            ledger = scope[_LEDGER] = cls(begun(scope))
            ledger.wants_timings = _asked_for(scope)
        return ledger

    @classmethod
    def kept(cls, scope: Scope) -> Ledger | None:
        """The request's, if it has one."""
        return scope.get(_LEDGER)

    def mark(self, phase: str) -> None:
        """The phase ends now, and the next begins."""
        self._moments.append(Moment(phase, self._clock()))

    def begin_answer(self, times: Times | None) -> None:
        """The first output of all is here; ``times``: what the engine says of it."""
        self.times = times
        if times is None:  # an engine that says nothing of its time
            self.mark("queue")
            return
        yielded = times.computed - times.scheduled - times.seconds
        self._moments += (
            Moment("hand_over", times.arrived),
            Moment("grammar", times.ready),
            Moment("queue", times.scheduled),
            # Their chunks alternate: the sums are told, one behind the other.
            Moment("prefill", times.computed - yielded),
            Moment("yielded", times.computed),
            Moment("sample", times.made),
        )

    def deliver(self) -> None:
        """The first token is out; the phases are known from now on."""
        self.mark("deliver")
        self.first = self._moments[-1].at

    @property
    def moments(self) -> list[Moment]:
        """In order. ``yielded`` is as if it had come behind all of ``prefill``."""
        return list(self._moments)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase until now, or until the first token."""
        found = dict.fromkeys(PHASES, 0.0)
        before = self.begun
        for phase, at in self._moments:
            found[phase] += at - before
            before = at
        return found

    def told(self) -> dict[str, Any]:
        """The fields of an answer that were asked for."""
        found: dict[str, Any] = {}
        if self.wants_timings:
            found["timings"] = self.timings()
        if self.wants_metrics:
            found["metrics"] = self.metrics()
        return found

    def timings(self) -> dict[str, Any]:
        """In milliseconds. The fields that llama.cpp's ``timings`` have are named as there."""
        phases, times, decoded = self.phases(), self.times, self.decoded
        prompt = sum(phases[phase] for phase in ("prefill", "yielded", "sample"))
        computed = times.num_tokens if times else self.num_prompt_tokens - self.cached_tokens
        generated = decoded.num_tokens if decoded else 0
        seconds = decoded.seconds if decoded else 0.0
        ahead = times.ahead if times else QueueAhead()
        return {
            "first_token_ms": _ms(sum(phases.values())),
            "phases_ms": {phase: _ms(value) for phase, value in phases.items()},
            "ahead": {
                "running": ahead.running,
                "waiting": ahead.waiting,
                "tokens": ahead.tokens,
            },
            "chunks": times.num_chunks if times else 0,
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": _ms(prompt),
            "prompt_per_token_ms": _ms(prompt / computed) if computed else None,
            "prompt_per_second": _rate(computed, prompt),
            "predicted_n": generated,
            "predicted_ms": _ms(seconds),
            "predicted_per_token_ms": _ms(decoded.gaps.mean if decoded else None),
            "predicted_per_token_p95_ms": _ms(decoded.gaps.p95 if decoded else None),
            "predicted_per_second": _rate(generated - 1, seconds),
            "total_ms": _ms(self._clock() - self.begun),
        }

    def metrics(self) -> dict[str, Any] | None:
        """What vLLM calls so. None where it would be of one choice among several."""
        decoded, phases = self.decoded, self.phases()
        if decoded is None or self.asked is None or self.asked.choices != 1:
            return None
        prompt = sum(phases[phase] for phase in ("prefill", "yielded", "sample"))
        return {
            "time_to_first_token_ms": _ms(prompt),
            "generation_time_ms": _ms(decoded.seconds),
            "queue_time_ms": _ms(phases["queue"]),
            "mean_itl_ms": _ms(decoded.gaps.mean),
            "tokens_per_second": _rate(decoded.num_tokens, prompt + decoded.seconds),
        }

    def line(self) -> str:
        """For the log."""
        return json.dumps(self.timings())


class TimedBody(Body):
    """The body of a request whose time may be asked for. ``include_metrics``: in vLLM's form."""

    timings: bool | None = None
    include_metrics: bool | None = None

    def note(self, scope: Scope, settings: ServerSettings) -> None:
        super().note(scope, settings)
        ledger = Ledger.of(scope)
        if self.timings is not None:  # the body knows better than the head
            ledger.wants_timings = self.timings
        ledger.wants_metrics = bool(self.include_metrics)


def _asked_for(scope: Scope) -> bool:
    name = TIMINGS_HEADER.encode()
    return any(key == name and value.strip() == b"1" for key, value in scope["headers"])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 3) if count > 0 and seconds > 0 else None
