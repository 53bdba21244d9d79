"""Runtime: what the endpoints of one app share. There are no globals beside it."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from headstart.engine.errors import RequestError
from headstart.engine.process.messages import ModelInfo
from headstart.server.generation.defaults import OPENAI, GenerationDefaults
from headstart.server.generation.engine_client import EngineClient
from headstart.server.generation.grammar_check import GrammarChecker
from headstart.server.generation.structure import Structure
from headstart.server.http.access_log import note_ignored
from headstart.server.http.admission import Admission
from headstart.server.http.bounds import Bodies, Places, check_messages, check_values
from headstart.server.http.errors import APIError, bad_request, unavailable
from headstart.server.http.ledger import Ledger
from headstart.server.http.metrics import Metrics
from headstart.server.http.policy import Body, Notes
from headstart.server.settings import MANY_TOKENS, ServerSettings
from headstart.server.text.answer_format import AnswerFormat
from headstart.server.text.templates import ChatTemplate
from headstart.server.text.tokenizer import Tokenizer

_BODY_SIZE = "headstart.body_size"
INLINE_BODY = 32 * 1024
"""Bytes of a body up to which it is checked at once; a larger one is in a thread."""

T = TypeVar("T")
B = TypeVar("B", bound=Body)


def _text_threads() -> ThreadPoolExecutor:
    # Two, so that one huge prompt does not hold up the other long ones; the engine needs the cores.
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")


def _body_threads() -> ThreadPoolExecutor:
    # One: it takes the GIL from the event loop, if not for long at a time.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="body")


def _chat_threads() -> ThreadPoolExecutor:
    # More than one, so that a template that has to be stopped does not hold up all chats.
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="chat")


@dataclass(frozen=True, slots=True)
class Served:
    """What ``model`` in a request stands for: the model, or an adapter over it.

    ``name``: what answers call it. ``adapter``: None for the model. ``chat_mask``: the segment mask
    of chats that name none. ``for_segments``: its config, or the flag, declares one.
    """

    name: str
    adapter: str | None
    chat_mask: str
    for_segments: bool


@dataclass(slots=True, eq=False)
class Runtime:
    """``model_names``: what clients may call the model; answers use the first.

    ``draining``: no new requests are taken (503). ``chat_template``: None when the model has none.
    ``answers``: how the model writes thoughts and calls of tools. ``defaults``: how tokens are
    chosen where a request does not say. ``clock``: of rates and of how fast requests end, seconds.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    settings: ServerSettings
    metrics: Metrics
    model_names: tuple[str, ...]
    answers: AnswerFormat = field(default_factory=AnswerFormat)
    defaults: GenerationDefaults = OPENAI
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    clock: Callable[[], float] = time.monotonic
    threads: ThreadPoolExecutor = field(default_factory=_text_threads)
    chat_threads: ThreadPoolExecutor = field(default_factory=_chat_threads)
    body_threads: ThreadPoolExecutor = field(default_factory=_body_threads)
    grammars: GrammarChecker = field(init=False)
    bodies: Bodies = field(init=False)
    texts: Places = field(init=False)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.admission = Admission(self.engine, settings, self.clock)
        self.bodies = Bodies(settings.max_bodies_bytes)
        self.texts = Places(settings.max_waiting_texts, "their prompts to be tokenised")
        waiting = Places(settings.max_waiting_grammars, "their grammars or schemas to be checked")
        self.grammars = GrammarChecker(
            self.tokenizer.backend.to_str, settings.grammar_timeout, waiting.place
        )

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    def served(self, name: str) -> Served:
        """What ``name`` stands for; raises a 404 that names what there is."""
        model, adapter = self.engine.model, None
        declared = [self.settings.segment_mask, model.segment_mask if model else None]
        if name not in self.model_names:
            if model is None:
                self.require_model()  # a 503: its adapters are not known yet
            adapter = self.engine.adapters.get(name)
            if adapter is None:
                raise self.not_found(name, "model")
            if adapter.segment_mask is not None:
                declared = [adapter.segment_mask]
        return Served(
            name=self.model_name if adapter is None else name,
            adapter=None if adapter is None else name,
            chat_mask=next(filter(None, declared), "causal"),
            for_segments="turns" in declared,
        )

    def not_found(self, name: str, param: str) -> APIError:
        """A 404 for a model, or an adapter, that is not served here."""
        served = ", ".join(map(repr, (*self.model_names, *self.engine.adapters)))
        return APIError(
            404,
            f"the model {name[:200]!r} does not exist; this server has {served}",
            param=param,
            code="model_not_found",
        )

    def require_model(self) -> ModelInfo:
        """The loaded model; a 503 when there is none, or none any more."""
        if self.draining:
            raise unavailable("the server is shutting down")
        model = self.engine.model
        if not self.engine.ready or model is None:
            raise unavailable("the engine is not ready; /health says when it is")
        return model

    def require_text_model(self) -> ModelInfo:
        """The loaded model; a 400 where it writes no text."""
        model = self.require_model()
        if model.no_text is not None:
            raise bad_request(
                f"the model {self.model_name!r} does not generate text: {model.no_text}; "
                "/v1/embeddings, /v1/score and /v1/rerank take it",
                "model",
                "no_text_generation",
            )
        return model

    def require_chat_template(self) -> ChatTemplate:
        """The model's template; a 400 when it has none."""
        if self.chat_template is None:
            raise bad_request(
                f"the model {self.model_name!r} has no chat template; use /v1/completions, "
                "or a prompt instead of messages",
                "messages",
                "no_chat_template",
            )
        return self.chat_template

    async def checked(self, structure: Structure | None) -> str | None:
        """The grammar of what an answer has to follow, once it is known that it can be followed;
        a 400 that says why not."""
        if structure is None:
            return None
        model = self.require_model()
        try:
            await self.grammars.check(structure.grammar, model.vocab_size, model.eos_token_ids)
        except RequestError as error:
            raise bad_request(
                structure.explain(str(error)), structure.path, "invalid_grammar"
            ) from error
        return structure.grammar

    async def with_body(self, request: Request, work: Callable[[], T]) -> T:
        """Run ``work`` that goes through a body that ``parse`` has read, in a thread when it is
        large."""
        if request.scope[_BODY_SIZE] <= INLINE_BODY:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.body_threads, work)

    async def with_text(self, size: int, work: Callable[[], T]) -> T:
        """Run tokenising ``work`` over ``size`` characters, in a thread when that takes long."""
        if size <= self.settings.inline_chars:
            return work()
        self._check_size(size)
        return await self._in_thread(self.threads, work)

    def _check_size(self, size: int) -> None:
        """Raise APIError for a text that is too long, whatever tokens it has: it is not read."""
        model = self.engine.model
        if model is None:
            return
        most = max(self.settings.max_contexts * model.max_model_len, MANY_TOKENS)
        if (fewest := self.tokenizer.fewest_tokens(size)) > most:
            raise bad_request(
                f"the prompt has {size} characters, and so {fewest} tokens or more; the model's "
                f"maximum context length is {model.max_model_len} tokens",
                code="context_length_exceeded",
            )

    async def with_chat(self, size: int, work: Callable[[], T]) -> T:
        """Run ``work`` that renders ``size`` characters of a chat, in a thread: how long a template
        takes nobody knows."""
        self._check_size(size)
        if size > (most := self.settings.max_template_chars):
            raise bad_request(
                f"the chat has more than {most} characters; no chat template may write more",
                "messages",
            )
        threads = self.chat_threads if size <= self.settings.inline_chars else self.threads
        return await self._in_thread(threads, work)

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        with self.texts.place():
            return await asyncio.get_running_loop().run_in_executor(threads, work)

    async def parse(self, request: Request, body_type: type[B]) -> B:
        """Read and validate a JSON body; raises APIError and ValidationError. What is ignored of it
        is told in the answer's head."""
        notes = Notes(strict=self.settings.unknown_fields == "refuse")
        with self.bodies.body() as add:
            data = await self._read(request, add)
            work = partial(self._validated, data, body_type, notes)
            request.scope[_BODY_SIZE] = len(data)
            body = await self.with_body(request, work)
        note_ignored(request.scope, notes)
        body.note(request.scope, self.settings)
        Ledger.of(request.scope).mark("receive")
        return body

    def _validated(self, data: bytes, body_type: type[B], notes: Notes) -> B:
        data = data.removeprefix(codecs.BOM_UTF8)  # as of a file that a client sends as it is
        check_values(data, self.settings.max_body_values)
        if len(data) > INLINE_BODY:
            check_messages(data, self.settings.max_messages)
        body = body_type.model_validate_json(data)
        body.settle(notes)
        notes.check()
        return body

    async def _read(self, request: Request, add: Callable[[int], None]) -> bytes:
        """The body; a 413 as soon as it is known to be too large, a 408 when it takes too long."""
        limit = self.settings.max_body_bytes
        too_large = APIError(
            413, f"the body is larger than {limit} bytes", code="request_too_large"
        )
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise too_large
                    add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise APIError(
                408,
                f"the body was not complete within {self.settings.body_timeout:g} s",
                code="request_timeout",
                headers={"connection": "close"},  # the rest of the body is not waited for
            ) from None
        return b"".join(chunks)
