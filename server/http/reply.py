"""Reply: the answer to a generation request, streamed (SSE) or whole.

The response starts with the first token, so that whatever goes wrong before it still gets an
honest status. Later errors become an ``{"error": ...}`` event. When the client hangs up, the
engine's streams are aborted at once.

The path of a token, once for each of about a thousand tokens a second:

    stream -> TextAssembler.push (-> AnswerParser.push, if the answer may have parts)
           -> Format.event (bytes around one encoded string) -> ASGI send
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.engine.process.messages import Output, ScoredToken, TokenLogprobs
from headstart.server.generation.engine_client import Stream
from headstart.server.http.access_log import note_usage
from headstart.server.http.deadline import Deadline
from headstart.server.http.errors import APIError, error_response, to_api_error, unavailable
from headstart.server.http.metrics import ChoiceTimer
from headstart.server.text.answer import AnswerParser, Part, Reasoning
from headstart.server.text.assembler import Delta, TextAssembler

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
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


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer on its way: an engine stream and the text so far.

    ``prompt`` is the index of its prompt; ``scores`` are those of the prompt's tokens, if wanted.
    ``parser`` tells the ``parts`` of the text; None: it has none. ``answers``: it has had a part
    that is no thought; ``thought_tokens`` are those before.
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
        self.timer.tokens(len(output.token_ids))
        if output.prompt_logprobs is not None:
            self.scores = output.prompt_logprobs
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


class Format(Protocol):
    """How an endpoint writes its answers down. ``every_token``: also those without text of their
    own have an event."""

    every_token: bool

    def opening(self, choice: Choice) -> bytes:
        """Events that come before the first text of a choice."""

    def event(self, choice: Choice, delta: Delta) -> bytes:
        """The events of one delta; empty when it has no part that is certain."""

    def ending(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The events after all choices, which end the stream."""

    def failure(self, error: APIError) -> bytes:
        """The events that end a stream in which something went wrong."""
        return b"data: " + error.body() + b"\n\n" + DONE

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The whole answer as JSON."""


class Reply(Response):
    """Answers with ``choices``, whose streams it owns from now on.

    ``warning``: ASCII, for a header of an answer that may not be what was hoped for. ``deadline``:
    when it has to be complete; then it ends with a 504, or with an error event.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        format: Format,
        *,
        stream: bool,
        warning: str | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        super().__init__()
        self._more_headers = [(WARNING_HEADER, warning.encode("ascii"))] if warning else []
        self._choices = choices
        self._format = format
        self._stream = stream
        self._deadline = deadline
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.create_task(self._stream_all(send) if self._stream else self._whole(send))
        gone = asyncio.create_task(hang_up(receive))
        error: BaseException | None = None
        try:
            patience = None if self._deadline is None else self._deadline.left()
            done, _ = await asyncio.wait(
                (answer, gone), timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                error = answer.exception()
            elif not done and self._deadline is not None:
                error = self._deadline.error()
        except asyncio.CancelledError:  # the time to drain is over
            error = unavailable("the server is shutting down")
        finally:
            self._release(scope)
            for task in (answer, gone):
                task.cancel()
        if error is not None:
            await asyncio.wait((answer, gone))  # nothing may be sent behind the error
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

    async def _fail(self, error: BaseException, scope: Scope, receive: Receive, send: Send) -> None:
        shown = to_api_error(error)
        if shown.status == 500:
            logger.error("request failed", exc_info=error)
        if not self._started:
            await error_response(shown, scope["path"])(scope, receive, send)
        elif self._stream:
            event = self._format.failure(shown)
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _whole(self, send: Send) -> None:
        await self._each_choice(self._collect, send)
        body = self._format.body(self._choices, Usage.of(self._choices))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self._more_headers,
        ]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream_all(self, send: Send) -> None:
        await self._each_choice(self._stream_one, send)
        last = self._format.ending(self._choices, Usage.of(self._choices))
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

    async def _collect(self, choice: Choice, send: Send) -> None:
        async for output in choice.stream:
            delta = choice.take(output)
            choice.push(delta)
            if delta.finish_reason is not None:
                self._finish(choice, delta.finish_reason, output.finish_reason)
                return
        raise APIError(500, "the engine ended the answer early")

    async def _stream_one(self, choice: Choice, send: Send) -> None:
        format = self._format
        async for output in choice.stream:
            delta = choice.take(output)
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
                        self._started = True
                        start = {"type": "http.response.start", "status": 200}
                        await send(start | {"headers": [*SSE_HEADERS, *self._more_headers]})
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            if reason is not None:
                return
        raise APIError(500, "the engine ended the answer early")

    def _finish(self, choice: Choice, reason: str, engine_reason: str | None) -> None:
        if engine_reason is None:  # a stop string or a call, which the engine knows nothing of
            choice.stream.abort()
        elif reason == "abort":
            raise unavailable("the engine gave the request up")
        choice.finish_reason = reason
        choice.timer.finished(reason, choice.num_prompt_tokens, choice.assembler.num_tokens)
        if reason == "error":
            raise APIError(500, "the model's logits are not numbers")


async def hang_up(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
