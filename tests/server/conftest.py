"""A small byte-level tokenizer, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import tokenizers
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from headstart.engine.errors import EngineDeadError, RequestError
from headstart.engine.process.messages import (
    AdapterInfo,
    ModelInfo,
    Output,
    ScoredToken,
    Stats,
    TokenLogprobs,
)
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.server.http.app import create_app
from headstart.server.http.serving import ServingConfig
from headstart.server.settings import ServerSettings
from headstart.server.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 256


def build_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[
            AddedToken(name, special=True) for name in ("<|eos|>", "<|im_start|>", "<|im_end|>")
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog. hello world"], trainer
    )
    return backend


@dataclass
class FakeStream:
    """Replays outputs; ``gate`` holds them back until set, ``error`` comes after them.

    ``taken``: how many have been given out. ``reported``: the engine's counters know of it.
    """

    outputs: list[Output]
    gate: asyncio.Event | None = None
    error: Exception | None = None
    aborted: int = 0
    taken: int = 0
    reported: bool = True

    async def __aiter__(self) -> AsyncIterator[Output]:
        for output in self.outputs:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            self.taken += 1
            yield output
        if self.error is not None:
            raise self.error

    def abort(self) -> None:
        self.aborted += 1


@dataclass
class Added:
    token_ids: list[int]
    params: SamplingParams | PoolingParams
    salt: bytes
    segments: list[Span]
    adapter: str | None
    stream: FakeStream
    priority: int = 0
    owner: bytes = b""


@dataclass
class FakeEngine:
    """``answer`` makes the ids of an answer out of the index of the request; ``stop_token`` ends
    it, when it fits into max_tokens. ``logprob`` makes the log-probability of each of its tokens
    out of that index. ``reason``: why answers end, whatever they are. Keeps every request in
    ``added``, and what it was asked about adapters in ``asked``; the files of one are right unless
    its folder holds "broken"."""

    answer: Callable[[int], list[int]]
    stop_token: int
    ready: bool = True
    restarts: int = 0
    logprob: Callable[[int], float] = lambda _: -0.5
    cached_tokens: int = 3
    hold: bool = False
    vector: list[float] | None = None
    fail_after: tuple[int, Exception] | None = None
    per_output: int = 1
    reason: str | None = None
    stats: Stats = field(default_factory=Stats)
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    model: ModelInfo | None = field(
        default_factory=lambda: ModelInfo(
            max_model_len=MAX_MODEL_LEN,
            vocab_size=400,
            hidden_size=8,
            page_size=16,
            num_pages=64,
            eos_token_ids=[0],
            backend="fake",
            weights="f32",
            version="0",
        )
    )
    added: list[Added] = field(default_factory=list)
    started: int = 0
    stopped: int = 0

    def begin(self) -> None:
        """There is no process."""

    def kill(self) -> None:
        """Nor is there one to end."""

    async def start(self) -> None:
        self.started += 1

    async def stop(self) -> None:
        self.stopped += 1

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        self.asked.append(("load", name, path))
        if not self.ready:
            raise EngineDeadError("the engine has died")
        if (Path(path) / "broken").exists():
            raise RequestError(f"{path}/adapter_model.safetensors: truncated")
        if name in self.adapters:
            raise RequestError(f"an adapter {name!r} came first", "lora_name")
        info = AdapterInfo(name=name, path=path, rank=8, targets=["q_proj"], num_bytes=1000)
        self.adapters[name] = info
        return info

    async def unload_adapter(self, name: str) -> None:
        self.asked.append(("unload", name))
        if self.adapters.pop(name, None) is None:
            raise RequestError(f"no adapter {name!r}", "lora_name")

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
    ) -> FakeStream:
        if not self.ready:
            raise EngineDeadError("the engine has died")
        tokens = list(token_ids)
        if isinstance(params, PoolingParams):
            stream = FakeStream([self._pooled(tokens, params)])
        else:
            stream = FakeStream(self._outputs(tokens, params))
        if self.hold:
            stream.gate = asyncio.Event()
        if self.fail_after is not None:
            count, stream.error = self.fail_after
            del stream.outputs[count:]
        self.added.append(
            Added(list(token_ids), params, salt, list(segments), adapter, stream, priority, owner)
        )
        return stream

    def _pooled(self, token_ids: list[int], params: PoolingParams) -> Output:
        """``vector``, or how often each token of the prompt is there, modulo 8."""
        counts = [float(sum(token % 8 == i for token in token_ids)) for i in range(8)]
        pooled = array("f", counts if self.vector is None else self.vector).tobytes()
        return Output(len(self.added), [], "stop", self.cached_tokens, pooled=pooled)

    def _outputs(self, token_ids: list[int], params: SamplingParams) -> list[Output]:
        ids = [*self.answer(len(self.added)), self.stop_token]
        reason = self.reason or ("stop" if len(ids) <= params.max_tokens else "length")
        ids = ids[: params.max_tokens]
        starts = range(0, max(len(ids), 1), self.per_output)
        groups = [ids[i : i + self.per_output] for i in starts]
        return [
            Output(
                id=len(self.added),
                token_ids=group,
                finish_reason=reason if i == len(groups) - 1 else None,
                cached_tokens=self.cached_tokens,
                logprobs=(
                    None if params.logprobs is None else [self._logprobs(x, params) for x in group]
                ),
                prompt_logprobs=None if i else _scores(token_ids, params),
            )
            for i, group in enumerate(groups)
        ]

    def _logprobs(self, token_id: int, params: SamplingParams) -> TokenLogprobs:
        count, logprob = params.logprobs or 0, self.logprob(len(self.added))
        top = [((token_id + j) % 400, logprob - j) for j in range(count)]
        return TokenLogprobs(token_id, logprob, top)


def _scores(token_ids: list[int], params: SamplingParams) -> list[ScoredToken] | None:
    """The token of a prompt is the second likeliest, before the one whose id is the next."""
    if params.prompt_logprobs is None:
        return None
    return [
        ScoredToken(
            token_id,
            -1.5,
            [((token_id + 1 - j) % 400, -0.5 - j) for j in range(params.prompt_logprobs)],
            2,
        )
        for token_id in token_ids[1:]
    ]


@pytest.fixture(scope="session")
def backend() -> tokenizers.Tokenizer:
    return build_backend()


@pytest.fixture(scope="session")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, special_tokens={"eos_token": "<|eos|>"}, chat_template=CHATML)


@pytest.fixture
def model_folder(backend: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {
        "eos_token": {"content": "<|eos|>", "lstrip": False},
        "bos_token": None,
        "pad_token": "<|eos|>",
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def say(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Ids of a text."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def engine(say: Callable[[str], list[int]]) -> FakeEngine:
    return FakeEngine(answer=lambda _: say("hello world"), stop_token=2)


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(max_body_bytes=64 * 1024)


@pytest.fixture
def app(engine: FakeEngine, tokenizer: Tokenizer, settings: ServerSettings) -> FastAPI:
    return create_app(engine, tokenizer, model_names=["tiny", "also-tiny"], settings=settings)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


@pytest.fixture
async def connect_to() -> AsyncIterator[Callable[[FastAPI], httpx.AsyncClient]]:
    """Clients of apps that a test has made itself."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(app: FastAPI) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            stack.push_async_callback(client.aclose)
            return client

        yield connect


@pytest.fixture
def app_saying(engine: FakeEngine) -> Callable[[FastAPI, str], httpx2.AsyncClient]:
    """What an official client asks an app with, whose model says a text."""

    def connect(app: FastAPI, text: str) -> httpx2.AsyncClient:
        encode = app.state.runtime.tokenizer.encode
        engine.answer = lambda _: encode(text, add_special_tokens=False)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport)

    return connect


@pytest.fixture
def head_seconds() -> float:
    """How long ``live_url`` waits for the head of a request."""
    return 0.4


@pytest.fixture
async def live_url(app: FastAPI, head_seconds: float) -> AsyncIterator[str]:
    """The app behind a real uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = ServingConfig(
            app,
            head_seconds=head_seconds,
            max_connections=app.state.runtime.settings.max_connections,
            log_config=None,
            access_log=False,
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await task


@pytest.fixture
def events() -> Callable[[str], list[Any]]:
    """The events of an SSE body: parsed JSON, and "[DONE]"; fails when the framing is not SSE."""

    def parse(body: str) -> list[Any]:
        assert body.endswith("\n\n")
        found: list[Any] = []
        for block in body[:-2].split("\n\n"):
            assert block.startswith("data: ")
            assert "\n" not in block
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        return found

    return parse


@pytest.fixture
def chat_body() -> Callable[..., dict[str, Any]]:
    def build(**fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields

    return build
