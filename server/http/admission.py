"""Admission: which requests are let in, decided before anything of them is read.

    head, key ──▶ rate of the caller ──▶ places ──▶ first token predicted ──▶ let in: a Ticket
                     429                   503           503 (529 for Anthropic's clients)

It looks at the head of a request, at what this server has let in, and at what the engine said last:
it waits neither for the engine, which may be amid a long step, nor for a thread. Of the body there
is its length alone; a request that turns out to be more than it looked like (choices, prompts,
tokens) is looked at once more before the engine is asked. Whatever was let in is answered.

Places       choices on their way: the engine computes --max-running, --max-queue more may wait
First token  what is ahead of it, in seconds (engine/costs/backlog.py), and its own prompt: the
             engine's figures, and what it was sent since. Nothing is predicted by costs that the
             engine does not know yet.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from headstart.engine.costs.backlog import CLASSES, Backlog
from headstart.engine.process.messages import Output
from headstart.server.generation.engine_client import EngineClient, Stream
from headstart.server.http.auth import sent_key
from headstart.server.http.deadline import Watch
from headstart.server.http.habits import TOKENS_PER_BYTE, Endings, Habits
from headstart.server.http.keys import key_digest
from headstart.server.http.rates import Bucket, address_of
from headstart.server.http.refusals import overloaded, rate_limited
from headstart.server.settings import ServerSettings

MAX_CALLERS = 16_384
"""Of whom something is remembered; those who have asked last."""

MOST_WAITING = 1024
"""Places for requests that wait, where --max-queue does not say: 4 for each that runs, at most
these."""

REASONS = ("queue", "ttft_slo", "deadline", "rate_requests", "rate_tokens", "connections")
_TICKET = "headstart.ticket"
SLOW_BODY = 1.0
"""Seconds that a body may take to come before its request's place is given to others: clients that
send a byte now and then would take all of them."""

_SLACK = 1.25
"""A prompt that takes so many times what it was thought to take is looked at once more."""


@dataclass(slots=True)
class Caller:
    """Who asks. The buckets are None where there is no such limit."""

    requests: Bucket | None
    tokens: Bucket | None
    habits: Habits = field(default_factory=Habits)


class Ticket:
    """A request that was let in, until it has ended.

    ``choices``: places it has, of which ``waiting`` have no first token yet. ``seconds``: what each
    of its prompts is thought to take. ``size``: of its body, in bytes; 0 where its head does not
    say. ``charged``: tokens of its caller's rate. ``allowed``: seconds that it gives its answer.
    ``trial``: what the cache holds of its caller's prompts is learned by it.
    """

    def __init__(self, admission: Admission, caller: Caller, size: int) -> None:
        self.caller = caller
        self.size = size
        self.choices = 0
        self.waiting = 0
        self.seconds: list[float] = []
        self.charged = 0.0
        self.allowed = math.inf
        self.settled = False
        self.trial = False
        self._admission = admission
        self._streams: list[Stream] = []

    @classmethod
    def of(cls, scope: Scope) -> Ticket:
        """KeyError for a request that needed none."""
        ticket: Ticket = scope[_TICKET]
        return ticket

    def keep(self, scope: Scope) -> None:
        scope[_TICKET] = self

    def settle(self, scope: Scope, prompts: Sequence[int], choices: int) -> None:
        """It has prompts of so many tokens, and so many choices: raises APIError where that is more
        than it looked like, and too much."""
        self._admission.settle(self, scope, prompts, choices)

    def asked(self, stream: Stream) -> Stream:
        """The engine was asked for a choice."""
        self._streams.append(stream)
        return stream

    def first_token(self, prompt: int, output: Output) -> None:
        """A choice has begun, or has a vector. ``prompt``: tokens of a prompt that nobody else of
        this request has; 0: it is another choice's, too, and so is in the cache."""
        self._admission.begun(self, prompt, output.cached_tokens)

    @property
    def reported(self) -> bool:
        """What the engine says counts it."""
        return self.settled and all(stream.reported for stream in self._streams)

    @property
    def was_asked(self) -> bool:
        return bool(self._streams)


class Admission:
    """The books of one app. ``refused``: requests by reason."""

    def __init__(
        self,
        engine: EngineClient,
        settings: ServerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.in_flight = 0
        """Choices that have been let in and have not ended."""
        self.waiting = 0
        """Those of them that have no first token yet."""
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._callers: OrderedDict[bytes | str, Caller] = OrderedDict()
        self._all = Habits()
        self._endings = Endings()
        # Both in the order in which they came; of a body that is on its way, since when.
        self._unreported: dict[Ticket, None] = {}
        self._arriving: dict[Ticket, float] = {}

    def now(self) -> float:
        """By the clock of the rates, in seconds."""
        return self._clock()

    # ------------------------------------------------------------------ what is let in

    def caller(self, scope: Scope) -> Caller:
        """Who sent a request: a key of the server's, else an address."""
        key = sent_key(scope)
        name: bytes | str
        if self._settings.keys.owner(key) is not None:
            name = key_digest(key)
        else:
            name = address_of((scope.get("client") or ("",))[0])
        caller = self._callers.get(name)
        if caller is None:
            now = self._clock()
            requests, tokens = self._settings.rate_limit, self._settings.rate_limit_tokens
            caller = self._callers[name] = Caller(
                Bucket(requests, now) if requests else None,
                Bucket(tokens, now) if tokens else None,
            )
            if len(self._callers) > MAX_CALLERS:
                self._callers.popitem(last=False)
        self._callers.move_to_end(name)
        return caller

    def let_in(self, scope: Scope, caller: Caller, size: int) -> Ticket:
        """A ticket for a request whose body has ``size`` bytes; raises APIError."""
        now = self._clock()
        ticket = Ticket(self, caller, size)
        tokens = self._likely_tokens(caller, size)
        self._check_rates(caller, tokens, now)
        self._check(ticket, scope, [tokens], 1, now)
        if caller.requests is not None:
            caller.requests.take(1, now)
        self._charge(ticket, tokens, now)
        if caller.habits.uncached(now) is None and not caller.habits.trial:
            caller.habits.trial = ticket.trial = True
        ticket.seconds = [self._adds(caller, tokens, now)]
        self._give_places(ticket, 1)
        self._unreported[ticket] = None
        self._arriving[ticket] = now
        ticket.allowed = Watch.of(scope).allowed
        ticket.keep(scope)
        return ticket

    def received(self, ticket: Ticket) -> None:
        """Its body is there."""
        self._arriving.pop(ticket, None)

    def _pass_slow_ones(self, now: float) -> None:
        """Take back the places of those whose bodies do not come. They are looked at once more when
        these are there."""
        for ticket, since in list(self._arriving.items()):
            if now - since <= SLOW_BODY:
                return
            del self._arriving[ticket]
            self._unreported.pop(ticket, None)
            self._give_places(ticket, -ticket.choices)

    def settle(self, ticket: Ticket, scope: Scope, prompts: Sequence[int], choices: int) -> None:
        """See ``Ticket.settle``."""
        now, caller = self._clock(), ticket.caller
        seconds = [self._adds(caller, tokens, now) for tokens in prompts]
        more = choices > ticket.choices or sum(seconds) > _SLACK * sum(ticket.seconds)
        if more or Watch.of(scope).allowed < ticket.allowed:
            self._check(ticket, scope, prompts, choices, now)
        self._give_places(ticket, choices - ticket.choices)
        self._unreported.setdefault(ticket)
        if caller.requests is not None:
            caller.requests.take(choices - 1, now)  # owed, where there are none left
        self._charge(ticket, sum(prompts), now)
        for habits in (caller.habits, self._all):
            habits.saw_tokens(sum(prompts), ticket.size)
        ticket.seconds, ticket.settled = seconds, True

    def begun(self, ticket: Ticket, prompt: int, cached: int) -> None:
        """See ``Ticket.first_token``."""
        if ticket.waiting:
            ticket.waiting -= 1
            self.waiting -= 1
        if prompt:
            now = self._clock()
            ticket.trial = False
            for habits in (ticket.caller.habits, self._all):
                habits.saw_prompt(prompt, cached, now)

    def leave(self, ticket: Ticket, tokens: int) -> None:
        """A request has ended, one way or the other, and has had so many ``tokens`` in all."""
        now = self._clock()
        self._unreported.pop(ticket, None)
        self._arriving.pop(ticket, None)
        self.in_flight -= ticket.choices
        self.waiting -= ticket.waiting
        self._charge(ticket, tokens, now)
        if ticket.trial:
            ticket.caller.habits.trial = False
        if ticket.was_asked:
            self._endings.add(ticket.choices, now)
        if not self.in_flight:
            self._endings.clear()

    def _give_places(self, ticket: Ticket, count: int) -> None:
        ticket.choices += count
        ticket.waiting += count
        self.in_flight += count
        self.waiting += count

    def _charge(self, ticket: Ticket, tokens: float, now: float) -> None:
        """Tokens of its caller's, instead of those that were taken for it before."""
        if ticket.caller.tokens is not None:
            ticket.caller.tokens.take(tokens - ticket.charged, now)
        ticket.charged = tokens

    # ------------------------------------------------------------------ what is refused

    @property
    def limit(self) -> int | None:
        """Choices that may be on their way; None: the model is not loaded."""
        model, most = self._engine.model, self._settings.max_queue
        if model is None:
            return None
        return model.max_running + (
            min(4 * model.max_running, MOST_WAITING) if most is None else most
        )

    def _check_rates(self, caller: Caller, tokens: float, now: float) -> None:
        for name, bucket, amount in (
            ("requests", caller.requests, 1.0),
            ("tokens", caller.tokens, tokens),
        ):
            if bucket is not None and (wait := bucket.wait(amount, now)) > 0:
                self.refused[f"rate_{name}"] += 1
                raise rate_limited(name, bucket.limit, wait)

    def _check(
        self, ticket: Ticket, scope: Scope, prompts: Sequence[float], choices: int, now: float
    ) -> None:
        """Raise APIError for a request of these prompts and choices."""
        limit = self.limit
        if limit is None or not self._engine.ready:
            return  # which the route says
        self._pass_slow_ones(now)
        path = scope["path"]
        others = self.in_flight - ticket.choices
        # What is alone is let in, however much it is: it would be told to come back for ever.
        if others and others + choices > limit:
            self.refused["queue"] += 1
            wait = self._wait_for_places(others + choices - limit, now)
            words = f"{others} requests run or wait, and {limit} may (--max-queue)"
            raise overloaded(path, words, wait)
        own = sum(self._own(ticket, tokens, now) for tokens in prompts)
        first = self._first_token(own, ticket, others, choices, now)
        if first is None:
            return
        for reason, most, words in (
            ("ttft_slo", self._settings.ttft_slo, "may take here (--ttft-slo)"),
            ("deadline", Watch.of(scope).left, "are left of the time that the request gives"),
        ):
            if most is not None and first > most:
                self.refused[reason] += 1
                told = (
                    f"the first token is predicted in {first:.2g} s; {max(most, 0):.2g} s {words}"
                )
                raise overloaded(path, told, first - most if own <= most else None)

    def _wait_for_places(self, count: int, now: float) -> float:
        """Seconds until so many more have ended."""
        rate = self._endings.rate(now)
        if rate:
            return count / rate
        backlog = self._ahead(None)
        return max(backlog.total, 1.0)

    # ------------------------------------------------------------------ what is predicted

    @property
    def predicts(self) -> bool:
        """The engine knows what prompts cost."""
        costs = self._engine.stats.prefill
        return any((costs.fixed, costs.per_token, costs.per_pair))

    def predicted(self) -> float | None:
        """Seconds until a request of one token that came now would have its first; None: not
        known."""
        if not self.predicts:
            return None
        own = self._engine.stats.prefill.seconds(0, 1)
        return self._first_token(own, None, self.in_flight, 1, self._clock())

    def backlog_seconds(self) -> float | None:
        """Seconds of prompts that have no first token yet; None: not known."""
        return self._ahead(None).total if self.predicts else None

    def _first_token(
        self, own: float, ticket: Ticket | None, others: int, choices: int, now: float
    ) -> float | None:
        """Seconds until the first token of a prompt that takes ``own``, of ``choices`` beside those
        of ``others``; None: not known."""
        if not self.predicts:
            return None
        ahead = self._ahead(ticket)
        if not others and not ahead.seconds:
            return own  # a pace that is wrong would keep everybody out, and never be corrected
        seconds = ahead.first_token(own)
        model, rate = self._engine.model, self._endings.rate(now)
        if model is not None and rate and others + choices > model.max_running:
            # All places in a step are taken: one that decodes has to end first.
            places = others + choices - model.max_running
            seconds = max(seconds, places / rate + ahead.pace * own)
        return seconds

    def _ahead(self, ticket: Ticket | None) -> Backlog:
        """What the engine has told of, and what has been let in since; before ``ticket``, if it has
        been let in itself."""
        backlog = self._engine.stats.backlog
        unreported = list(self._untold(ticket))
        if not unreported:
            return backlog
        sums = list(backlog.seconds) or [0.0] * (len(CLASSES) + 1)
        for seconds in unreported:
            sums[bisect_left(CLASSES, seconds)] += seconds
        return Backlog(sums, backlog.pace, backlog.long_share)

    def _untold(self, ticket: Ticket | None) -> Iterator[float]:
        for other in list(self._unreported):
            if other is ticket:
                return
            if other.reported:
                del self._unreported[other]
            else:
                yield from other.seconds

    def _likely_tokens(self, caller: Caller, size: int) -> int:
        """Of a body's prompt; no more than a prompt may have."""
        ratio = caller.habits.tokens_per_byte or self._all.tokens_per_byte or TOKENS_PER_BYTE
        model = self._engine.model
        return min(round(size * ratio), model.max_model_len if model is not None else size)

    def _own(self, ticket: Ticket, tokens: float, now: float) -> float:
        """Seconds of a prompt, by which its own first token is predicted.

        Where it is not known what share of the caller's prompts the cache holds, the one that it is
        to be learned by counts as if it were all of it.
        """
        habits = ticket.caller.habits
        if habits.uncached(now) is None and (ticket.trial or not habits.trial):
            return 0.0
        return self._adds(ticket.caller, tokens, now)

    def _adds(self, caller: Caller, tokens: float, now: float) -> float:
        """Seconds of a prompt, by which those of others are predicted."""
        share = caller.habits.uncached(now)
        if share is None:
            share = self._all.uncached(now)
        computed = round(tokens * (1.0 if share is None else share))
        return self._engine.stats.prefill.seconds(round(tokens) - computed, computed)
