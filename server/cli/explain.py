"""headstart explain: where a second request leaves the first, and what the cache would have of it.

    headstart explain A.json B.json --model MODEL

Both are rendered and tokenised by the app that serves requests, over an engine that computes
nothing: it keeps the first prompt as if it had been answered, and says of the second what
``cache_explain`` would. So every kind of body means here what it means to a server.

A file has one request: its JSON body, or a line as run-batch takes it; ``FILE:N`` is line N.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from headstart import __version__
from headstart.engine.errors import ConfigError
from headstart.engine.explain import Asked, explain, found_of
from headstart.engine.kv.history import Earlier, History, Namespace
from headstart.engine.models.config import ModelConfig
from headstart.engine.process.messages import AdapterInfo, ModelInfo, Output, Stats
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
URLS = (CHATS, COMPLETIONS, RESPONSES, MESSAGES)
MOST_TOKENS = 1 << 20
"""Of a prompt that is explained, whatever the model is made for."""
ANTHROPIC = ("system", "stop_sequences", "thinking", "output_config")
"""Fields by which a body with messages is Anthropic's."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a file, and what its answer would be asked at."""

    name: str
    url: str
    body: dict[str, Any]


def read_request(text: str, url: str | None) -> Request:
    """What ``text`` names, FILE or FILE:LINE. ``url``: None: as its fields say. Raises
    ConfigError."""
    path, line = Path(text), None
    if (match := re.fullmatch(r"(.+):(\d+)", text)) and not path.exists():
        path, line = Path(match[1]), int(match[2])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if line is not None:
        lines = content.splitlines()
        if not 1 <= line <= len(lines):
            raise ConfigError(f"{path} has {len(lines)} lines, and no line {line}")
        content = lines[line - 1]
    try:
        value = msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(
            f"{text} is not one JSON value ({error}); {path}:N is line N of a file of them"
        ) from error
    body = value.get("body") if isinstance(value, dict) and "body" in value else value
    if not isinstance(body, dict):
        raise ConfigError(f"{text} has no request: neither a body, nor a line with one")
    asked = url or (value.get("url") if body is not value else None) or _url_of(body)
    if asked not in URLS:
        raise ConfigError(
            f"{text}: a request to {asked!r:.80} cannot be explained; {', '.join(URLS)} can"
            if asked
            else f"{text} has neither messages, nor a prompt, nor input: name what it is with --url"
        )
    return Request(text, asked, body)


def _url_of(body: Mapping[str, Any]) -> str | None:
    if "messages" in body:
        return MESSAGES if any(name in body for name in ANTHROPIC) else CHATS
    if "prompt" in body:
        return COMPLETIONS
    return RESPONSES if "input" in body else None


@dataclass(eq=False)
class PaperEngine:
    """An engine that computes nothing: of each prompt it keeps what the cache would, and explains
    it by the one before."""

    model: ModelInfo
    ready: bool = True
    restarts: int = 0
    stats: Stats = field(default_factory=Stats)
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    _history: History = field(default_factory=History)
    _earlier: list[Earlier] = field(default_factory=list)

    async def start(self) -> None:
        """There is no process."""

    async def stop(self) -> None:
        """Nor one to end."""

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        raise ConfigError("adapters are not loaded here")

    async def unload_adapter(self, name: str) -> None:
        raise ConfigError("adapters are not loaded here")

    def add(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        *,
        salt: bytes = b"",
        segments: Sequence[Span] = (),
        adapter: str | None = None,
        priority: int = 0,
        owner: bytes = b"",
    ) -> PaperStream:
        """The prompt's explanation, if it asks."""
        ids, page = array("i", token_ids), self.model.page_size
        mask = Segments.of(segments, len(ids))
        # Salts are told of in words: here both requests are the caller's own.
        namespace = Namespace(b"", b"", bool(mask)).key
        last = len(ids) - 1
        asked = Asked(token_ids=ids, namespace=namespace, page_size=page, reach=last, segments=mask)
        explains = isinstance(params, SamplingParams) and params.cache_explain
        found = max((found_of(asked, earlier) for earlier in self._earlier), default=0)
        explanation = explain(asked, self._earlier, self._history, [(0, found)])
        self._earlier.append(
            Earlier(
                namespace=namespace,
                owner=owner,
                token_ids=ids,
                kept=len(ids) // page * page,
                segments=mask,
                when=self._history.clock(),
            )
        )
        output = Output(0, [], "length", found, explanation=explanation if explains else None)
        return PaperStream(output)


@dataclass(frozen=True)
class PaperStream:
    """One output, which has no tokens."""

    output: Output
    reported: bool = True

    async def __aiter__(self) -> AsyncIterator[Output]:
        yield self.output

    def abort(self) -> None:
        """It has ended."""


def model_of(folder: Path, page_size: int) -> ModelInfo:
    """What the server asks of a model, of its config alone; raises ModelError."""
    config = ModelConfig.from_folder(folder)
    return ModelInfo(
        max_model_len=max(config.max_position_embeddings, MOST_TOKENS),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        page_size=page_size,
        num_pages=MOST_TOKENS // page_size,
        eos_token_ids=list(config.eos_token_ids),
        backend="none",
        weights="none",
        version=__version__,
        segment_mask=config.segment_mask,
    )


async def compare(app: FastAPI, first: Request, second: Request) -> dict[str, Any]:
    """The object ``cache_explain`` of the second request behind the first; raises ConfigError."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    name = app.state.runtime.model_name
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://explain", timeout=None, trust_env=False
    ) as client:
        for request in (first, second):
            body = request.body | {"model": name, "cache_explain": True, "stream": False}
            body.pop("stream_options", None)
            answer = await client.post(request.url, json=body)
            if answer.status_code != 200:
                error = answer.json().get("error", {})
                raise ConfigError(f"{request.name}: {error.get('message', answer.text)}")
            found = answer.json()["cache_explain"]
    return found


def notes(first: Request, second: Request) -> list[str]:
    """What else keeps the two apart."""
    found = []
    for name, what in (
        ("cache_salt", "KV is never shared between two of them"),
        ("model", "an adapter's KV is its own; here both are taken for the same"),
    ):
        one, other = first.body.get(name), second.body.get(name)
        if one != other:
            found.append(f"{name} is {one!r} and {other!r}: {what}.")
    return found


def report(found: Mapping[str, Any], first: Request, second: Request) -> str:
    """What is printed of it."""
    size, cached, page = found["prompt_tokens"], found["cached_tokens"], found["page_size"]
    lines = [
        f"{second.name} has {size} prompt tokens. Behind {first.name}, {cached} of them come from "
        f"the cache: {cached // page} pages of {page}.",
        "",
        f"{'from':>8} {'to':>8} {'tokens':>8}  cause",
    ]
    lines += [
        f"{span['from']:>8} {span['to']:>8} {span['tokens']:>8}  {span['cause']}: {span['why']}"
        for span in found["missed"]
    ]
    if (difference := found["difference"]) is not None:
        where = (
            ""
            if difference["message"] is None
            else (f", in message {difference['message']} ({difference['role']})")
        )
        lines += [
            "",
            f"They part at token {difference['token']}{where}:",
            f"    both    {difference['shared']!r}",
            f"    first   {difference['earlier']!r}",
            f"    second  {difference['here']!r}",
        ]
    return "\n".join([*lines, *(["", *told] if (told := notes(first, second)) else [])])
