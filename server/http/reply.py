"""Reply: the answer to a generation request, streamed (SSE) or whole.

The response starts with the first token, so that whatever goes wrong before it still gets an
honest status; that of a stream after two seconds at the latest, and from then on pings fill every
long silence. Later errors become an ``{"error": ...}`` event. When the client hangs up, the
engine's streams are aborted at once (deadline.py).

The path of a token, once for each of about a thousand tokens a second:

    stream -> TextAssembler.push (-> AnswerParser.push, if the answer may have parts)
           -> Format.event (bytes around one encoded string) -> ASGI send
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.engine.process.messages import Explanation, Output, ScoredToken, TokenLogprobs
from headstart.server.generation.engine_client import Stream
from headstart.server.http.access_log import note_usage, request_id
from headstart.server.http.deadline import Pings, Timer, Watch
from headstart.server.http.errors import (
    APIError,
    error_response,
    note_error,
    to_api_error,
    unavailable,
)
from headstart.server.http.ledger import Ledger
from headstart.server.http.metrics import ChoiceTimer
from headstart.server.text.answer import AnswerParser, Part, Reasoning
from headstart.server.text.assembler import Delta, TextAssembler

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
"""A comment, which clients pass over."""

NO_MORE: Mapping[str, Any] = MappingProxyType({})
"""Fields beside those that each answer has."""

PROGRESS_SECONDS = 0.5
"""The least between two events that tell of a prompt's progress."""

WARNING_HEADER = b"x-headstart-warning"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that goes in front of its answer. ``offsets``: the characters of ``text`` before
    each token; none where log-probabilities are not wanted."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int] = ()


Explain = Callable[[Explanation], Awaitable[dict[str, Any]]]
"""Makes the object ``cache_explain`` of what the engine says."""


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer on its way: an engine stream and the text so far.

    ``prompt`` is the index of its prompt; ``scores`` are those of the prompt's tokens, if wanted.
    ``parser`` tells the ``parts`` of the text; None: it has none. ``answers``: it has had a part
    that is no thought; ``thought_tokens`` are those before. ``explain``: what makes words of the
    ``explanation`` that is asked for, which comes with the first token.
    """

    index: int
    prompt: int
    prompt_token_ids: Sequence[int]
    stream: Stream
    assembler: TextAssembler
    timer: ChoiceTimer
    echo: Echo | None = None
    scores: list[ScoredToken] = field(default_factory=list)
    parser: AnswerParser | None = None
    parts: list[Part] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    opened: bool = False
    answers: bool = False
    thought_tokens: int = 0
    explain: Explain | None = None
    explanation: Explanation | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def echoed(self) -> str:
        """The text that goes in front."""
        return self.echo.text if self.echo else ""

    @property
    def text(self) -> str:
        return self.echoed + "".join(self.texts)

    def take(self, output: Output) -> Delta:
        """What an output adds to the answer; the scores of the prompt, which come with the first,
        are kept."""
        self.timer.take(output)
        if output.prompt_logprobs is not None:
            self.scores = output.prompt_logprobs
        if output.explanation is not None:
            self.explanation = output.explanation
        delta = self.assembler.push(output)
        if self.parser is not None:
            self._parse(delta, self.parser)
        return delta

    def _parse(self, delta: Delta, parser: AnswerParser) -> None:
        parts = parser.push(delta.text)
        if delta.finish_reason is not None and not parser.done:
            parts += parser.finish()
        if parser.done or (parser.calls_tools and delta.finish_reason == "stop"):
            delta.finish_reason = "tool_calls"
        delta.parts = parts
        self.answers = self.answers or not all(isinstance(part, Reasoning) for part in parts)
        if not self.answers:
            self.thought_tokens += len(delta.token_ids)

    def end(self, reason: str | None) -> bytes:
        """JSON of ``finish_reason`` and, at the end, of vLLM's ``stop_reason``, what stopped it."""
        if reason is None:
            return b"null"
        stopped_by = msgspec.json.encode(self.assembler.stop_reason)
        return msgspec.json.encode(reason) + b',"stop_reason":' + stopped_by

    def push(self, delta: Delta) -> None:
        """Keep a delta for an answer that is sent whole."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.parts += delta.parts or ()
        if delta.logprobs and delta.offsets:
            self.logprobs += delta.logprobs
            self.offsets += delta.offsets


class Usage(msgspec.Struct, frozen=True):
    """Token counts of an answer; each prompt counts once, whatever ``n`` is.

    ``cached_tokens`` are those of the first choice of each prompt: the others find the prompt
    that the first one has put there.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Usage:
        first = {choice.prompt: choice for choice in reversed(choices)}.values()
        return cls(
            prompt_tokens=sum(choice.num_prompt_tokens for choice in first),
            completion_tokens=sum(choice.assembler.num_tokens for choice in choices),
            cached_tokens=sum(choice.assembler.cached_tokens for choice in first),
        )

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Progress(msgspec.Struct, frozen=True):
    """Tokens of an answer's prompts: with KV by now, those of them from the cache, and all."""

    computed: int
    cached: int
    total: int


class Format(Protocol):
    """How an endpoint writes its answers down. ``every_token``: also those without text of their
    own have an event."""

    every_token: bool

    @property
    def answer_id(self) -> str:
        """The answer's own."""

    def opening(self, choice: Choice) -> bytes:
        """Events that come before the first text of a choice."""

    def event(self, choice: Choice, delta: Delta) -> bytes:
        """The events of one delta; empty when it has no part that is certain."""

    def ending(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        """The events after all choices, which end the stream. ``more``: fields that come where the
        usage does."""

    def failure(self, error: APIError) -> bytes:
        """The events that end a stream in which something went wrong."""
        return b"data: " + error.body() + b"\n\n" + DONE

    def ping(self) -> bytes:
        """What says nothing, amid a stream or before all of it."""
        return PING

    def progress(self, progress: Progress) -> bytes:
        """The event of a prompt on its way, before any token; empty where nobody can ask for it."""
        return b""

    def body(
        self, choices: Sequence[Choice], usage: Usage, more: Mapping[str, Any] = NO_MORE
    ) -> bytes:
        """The whole answer as JSON, with these fields ``more``."""


class Reply(Response):
    """Answers with ``choices``, whose streams it owns from now on.

    ``warning``: ASCII, for a header of an answer that may not be what was hoped for.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        format: Format,
        *,
        stream: bool,
        warning: str | None = None,
    ) -> None:
        super().__init__()
        self._more_headers = [(WARNING_HEADER, warning.encode("ascii"))] if warning else []
        self._choices = choices
        self._first: Choice | None = None  # the one whose first token came first
        self._format = format
        self._stream = stream
        self._started = False
        self._clock = time.monotonic
        self._spoke = 0.0
        self._computed: dict[int, tuple[int, int]] = {}  # of each prompt, and from the cache
        self._told = -PROGRESS_SECONDS
        self._pinging: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch, self._ledger = Watch.of(scope), Ledger.of(scope)
        for choice in self._choices:
            choice.timer.begin(watch.begun)
        timer: Timer | None = None
        error: BaseException | None = None
        try:
            if self._stream:
                timer = self._watch_silence(watch, send)
                await self._stream_all(send)
            else:
                await self._whole(send)
        except asyncio.CancelledError:
            error = watch.error()
            if error is None:
                raise
        except Exception as raised:
            error = raised
        finally:
            self._release(scope)
            if timer is not None:
                timer.cancel()
            if self._pinging is not None:
                self._pinging.cancel()
        if error is not None:
            if self._pinging is not None:
                await asyncio.wait((self._pinging,))  # nothing may be sent behind the error
            with contextlib.suppress(OSError):  # the client may be gone too
                await self._fail(error, scope, receive, send)

    def _release(self, scope: Scope) -> None:
        for choice in self._choices:
            if choice.finish_reason is None:
                choice.stream.abort()
                choice.timer.finished(
                    "abort", choice.num_prompt_tokens, choice.assembler.num_tokens
                )
        usage = Usage.of(self._choices)
        note_usage(scope, usage.prompt_tokens, usage.completion_tokens)
        self._balance()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("timings of %s: %s", request_id(scope), self._ledger.line())

    def _begin(self, choice: Choice, output: Output) -> None:
        """The first output of all choices is here."""
        self._first = choice
        self._ledger.begin_answer(output.times)

    def _deliver(self, choice: Choice) -> None:
        """The first token is out."""
        self._ledger.deliver()
        choice.timer.metrics.delivered(self._ledger)

    def _balance(self) -> Mapping[str, Any]:
        """Enter what has come so far; the fields of the answer that were asked for."""
        first, ledger = self._first or self._choices[0], self._ledger
        ledger.num_prompt_tokens = first.num_prompt_tokens
        ledger.cached_tokens = first.assembler.cached_tokens
        ledger.decoded = first.timer.decoded(first.assembler.num_tokens)
        ledger.finish_reasons = [c.finish_reason or "abort" for c in self._choices]
        return ledger.told()

    async def _fail(self, error: BaseException, scope: Scope, receive: Receive, send: Send) -> None:
        shown = to_api_error(error)
        if shown.status == 500:
            logger.error("request failed", exc_info=error)
        if not self._started:
            await error_response(shown, scope)(scope, receive, send)
        elif self._stream:
            note_error(scope, shown)
            event = self._format.failure(shown)
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _whole(self, send: Send) -> None:
        await self._each_choice(self._collect, send)
        more = await self._more()
        body = self._format.body(self._choices, Usage.of(self._choices), more)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._more_headers,
        ]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _watch_silence(self, watch: Watch, send: Send) -> Timer:
        """A task only where it takes long: most streams have begun when the timer is due."""
        pings = watch.pings
        self._clock = pings.clock

        def due() -> None:
            self._pinging = asyncio.create_task(self._ping(pings, send))

        seconds = watch.begun + pings.head_after - self._clock()
        return pings.call_later(max(seconds, 0), due)

    async def _ping(self, pings: Pings, send: Send) -> None:
        """See that the client is never long without a byte."""
        if not self._started:
            await self._send_head(send)
        while pings.interval:
            left = self._spoke + pings.interval - self._clock()
            if left > 0:
                await pings.sleep(left)
            else:
                await self._say(self._format.ping(), send)

    async def _send_head(self, send: Send) -> None:
        self._started = True
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [*SSE_HEADERS, *self._more_headers]})

    async def _say(self, body: bytes, send: Send) -> None:
        if not self._started:
            await self._send_head(send)
        self._spoke = self._clock()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _stream_all(self, send: Send) -> None:
        await self._each_choice(self._stream_one, send)
        more = await self._more()
        last = self._format.ending(self._choices, Usage.of(self._choices), more)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _each_choice(self, work: Any, send: Send) -> None:
        if len(self._choices) == 1:
            await work(self._choices[0], send)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(work(choice, send))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _more(self) -> dict[str, Any]:
        """The fields of the answer that were asked for beside its own."""
        more = dict(self._balance())
        choice = self._choices[0]
        if choice.explain is not None and choice.explanation is not None:
            more["cache_explain"] = await choice.explain(choice.explanation)
        return more

    async def _collect(self, choice: Choice, send: Send) -> None:
        async for output in choice.stream:
            delta = choice.take(output)
            if self._first is None:
                self._begin(choice, output)
                self._deliver(choice)
            choice.push(delta)
            if delta.finish_reason is not None:
                self._finish(choice, delta.finish_reason, output.finish_reason)
                return
        raise APIError(500, "the engine ended the answer early")

    async def _stream_one(self, choice: Choice, send: Send) -> None:
        format, clock = self._format, self._clock
        async for output in choice.stream:
            if output.computed is not None:
                await self._tell_progress(choice, output, send)
                continue
            delta = choice.take(output)
            if self._first is None:
                self._begin(choice, output)
            reason = delta.finish_reason
            if reason is not None:
                self._finish(choice, reason, output.finish_reason)
            shown = format.every_token or delta.text or reason is not None or delta.logprobs
            if shown or not choice.opened:
                body = b""
                if not choice.opened:
                    choice.opened = True
                    body = format.opening(choice)
                if shown:
                    body += format.event(choice, delta)
                if body:
                    if not self._started:
                        await self._send_head(send)
                    self._spoke = clock()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    if self._ledger.first is None:
                        self._deliver(choice)
            if reason is not None:
                return
        raise APIError(500, "the engine ended the answer early")

    async def _tell_progress(self, choice: Choice, output: Output, send: Send) -> None:
        self._computed[choice.prompt] = output.computed or 0, output.cached_tokens
        now = self._clock()
        if now < self._told + PROGRESS_SECONDS:
            return
        self._told = now
        counts = self._computed.values()
        prompts = {choice.prompt: choice.num_prompt_tokens for choice in self._choices}
        progress = Progress(
            computed=sum(computed for computed, _ in counts),
            cached=sum(cached for _, cached in counts),
            total=sum(prompts.values()),
        )
        if event := self._format.progress(progress):
            await self._say(event, send)

    def _finish(self, choice: Choice, reason: str, engine_reason: str | None) -> None:
        if engine_reason is None:  # a stop string or a call, which the engine knows nothing of
            choice.stream.abort()
        elif reason == "abort":
            raise unavailable("the engine gave the request up")
        choice.finish_reason = reason
        choice.timer.finished(reason, choice.num_prompt_tokens, choice.assembler.num_tokens)
        if reason == "error":
            raise APIError(500, "the model's logits are not numbers")
