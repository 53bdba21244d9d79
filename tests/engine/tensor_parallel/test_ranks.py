"""Several ranks give the tokens of one engine and of transformers, whatever they compute.

The other ranks are threads here, at the far end of the same sockets;
test_tensor_parallel_processes.py has them as the processes that they are.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import socket
import threading
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from headstart.engine.batch import build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError, HeadstartError, ModelError
from headstart.engine.models.loading import load_model
from headstart.engine.process.messages import Output
from headstart.engine.ranges.segments import Span
from headstart.engine.sampling.params import PoolingParams, SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.engine.tensor_parallel import follower, leader
from headstart.engine.tensor_parallel.messages import Channel, ToRank
from headstart.engine.work import LongChunk
from headstart.kernels.cpu.backend import CpuBackend

pytestmark = pytest.mark.covering

NEW = 8
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # A vocabulary that no number of ranks divides.
    "llama": ("llama", {"vocab_size": 323, "num_key_value_heads": 4, "head_dim": 32}),
    "llama, all biases, tied": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
    ),
    "qwen2": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}),
    "qwen3": ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}),
}
TinyModel = Callable[..., Path]


class ThreadRank:
    """A follower in a thread; see leader.Process."""

    def __init__(self, connection: socket.socket) -> None:
        self.status: int | None = None
        self.channel = Channel(socket.socket(fileno=os.dup(connection.fileno())), ToRank)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.status = follower.serve(self.channel.receive(), self.channel)
        self.channel.close()

    def poll(self) -> int | None:
        return self.status

    def wait(self, timeout: float | None = None) -> int:
        self.thread.join(timeout)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        raise AssertionError("it did not end by itself")


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ThreadRank]]:
    started: list[ThreadRank] = []

    def start(connection: socket.socket) -> ThreadRank:
        started.append(ThreadRank(connection))
        return started[-1]

    monkeypatch.setattr(leader, "start_process", start)
    yield started
    for rank in started:
        assert rank.wait(10) is not None


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def engine(folder: Path, count: int, **settings: Any) -> Engine:
        engines.append(Engine(settings_of(folder, tensor_parallel=count, **settings)))
        return engines[-1]

    yield engine
    for one in engines:
        one.close()


def settings_of(folder: Path, **settings: Any) -> EngineConfig:
    fields = {"weights": "f32", "threads": 1, "kv_memory": 16 << 20, "max_model_len": 512}
    return EngineConfig(model_path=str(folder), **{**fields, **settings})


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)


def some(seed: int, n: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 320) for _ in range(n)]


@cache
def alone(folder: Path) -> list[list[int]]:
    """What the reference backend answers ``prompts`` with, in one process."""
    return Engine(settings_of(folder, backend="reference")).generate(prompts(), greedy(NEW))


def prompts() -> list[list[int]]:
    shared = some(0, 70)
    return [[5], some(1, 33), some(2, 64), some(3, 90), *(shared + some(n, n) for n in (4, 21))]


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Path:
    arch, overrides = MODELS[request.param]
    return tiny_model(arch, **overrides)


@pytest.fixture
def llama(tiny_model: TinyModel) -> Path:
    arch, overrides = MODELS["llama"]
    return tiny_model(arch, **overrides)


# --------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("count", [2, 4])
def test_tokens_are_those_of_one_rank_and_of_transformers(
    tiny: Path, make: Callable[..., Engine], references: Any, count: int, backend: str
) -> None:
    together = make(tiny, count, backend=backend, max_batched_tokens=40)
    outputs = together.generate(prompts(), greedy(NEW))
    references(tiny).check(prompts(), outputs, NEW)
    assert outputs == alone(tiny)
    # The next turn finds the pages of all ranks.
    turns = [prompt + output + [9] for prompt, output in zip(prompts(), outputs, strict=True)]
    before = together.stats.cached_tokens
    references(tiny).check(turns, together.generate(turns, greedy(3)), 3)
    assert together.stats.cached_tokens > before
    together.check()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits(tiny: Path, references: Any, count: int, backend: str) -> None:
    tokens = some(11, 130)
    loaded = load_model(settings_of(tiny, tensor_parallel=count, backend=backend))
    runner, page = loaded.runner, loaded.backend.page_size
    seq = Sequence(0, array("i", tokens), len(tokens), greedy(1), pages=[4, 1, 7, 2, 3])
    parts = []
    for start, rows in ((0, 50), (50, 80)):
        batch = build_batch([ScheduledSequence(seq, start, rows, False)], page).with_all_logits()
        parts.append(runner.run(batch).clone())
    runner.followers.close()
    expected = references(tiny).logits(tokens)
    found = torch.cat(parts)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.slow
def test_int8(make: Callable[..., Engine], smollm2: Path) -> None:
    """As near to one rank's logits as rounding is: rows are rounded by other scales."""
    texts = [some(1, 40)]
    logits = []
    for count in (1, 3):
        loaded = load_model(settings_of(smollm2, tensor_parallel=count, weights="int8"))
        seq = Sequence(0, array("i", texts[0]), 40, greedy(1), pages=[0, 1])
        batch = build_batch([ScheduledSequence(seq, 0, 40, False)], 32).with_all_logits()
        logits.append(loaded.runner.run(batch).clone())
        loaded.runner.followers.close()
    cosine = torch.nn.functional.cosine_similarity(logits[0], logits[1])
    assert float(cosine.min()) > 0.99


def test_shared_prefixes_are_read_once(
    llama: Path, make: Callable[..., Engine], references: Any
) -> None:
    shared = some(0, 256)
    texts = [shared + some(n, n) for n in (5, 17, 40)]
    engine = make(llama, 2, relay="on", relay_check=2)
    engine.warm_up()
    engine.generate([[*shared, 7]], greedy(1))
    references(llama).check(texts, engine.generate(texts, greedy(NEW)), NEW)
    relay = engine.stats.relay
    assert relay.ranges > 0
    assert relay.checks > 2
    assert relay.enabled
    assert relay.largest_difference < 1e-4
    assert engine.prepare_memory()  # the other rank prepares its pages, too


def test_preempted(llama: Path, make: Callable[..., Engine], references: Any) -> None:
    page = 32 * 2 * 4 * 32 * 4 * 2  # tokens, k and v, heads, head size, bytes, layers
    engine = make(llama, 4, kv_memory=6 * page + 3, max_model_len=192)
    assert engine.model.num_pages == 6
    texts = [some(n, 20) for n in range(6)]
    references(llama).check(texts, engine.generate(texts, greedy(60)), 60)
    assert engine.stats.preemptions > 0
    engine.check()


@pytest.mark.parametrize("count", [2, 4])
def test_prompts_that_are_read(
    llama: Path, make: Callable[..., Engine], references: Any, count: int
) -> None:
    """All ranks compute the same rows for rank 0 to read; a chunk's logits come in tiles."""
    engine = make(llama, count, max_batched_tokens=100)
    scored = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    engine.add(0, array("i", some(0, 150)), scored)
    engine.add(1, array("i", some(1, 130)), PoolingParams("mean"))
    engine.add(2, array("i", some(2, 130)), PoolingParams("last"), segments=[(3, 120)])
    engine.add(3, array("i", some(3, 20)), greedy(NEW))
    outputs: dict[int, list[Output]] = {i: [] for i in range(4)}
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].append(output)
    reference = references(llama)
    expected = torch.log_softmax(reference.logits(some(0, 150))[:-1].double(), dim=-1)
    scores = outputs[0][0].prompt_logprobs or []
    own = [float(row[token]) for row, token in zip(expected, some(0, 150)[1:], strict=True)]
    assert [score.logprob for score in scores] == pytest.approx(own, abs=2e-4)
    for i, wanted in (
        (1, reference.states(some(1, 130)).mean(0)),
        (2, reference.states(some(2, 130), [(3, 120)])[-1]),
    ):
        found = torch.frombuffer(bytearray(outputs[i][0].pooled or b""), dtype=torch.float32)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    for i, length in ((0, 150), (3, 20)):
        answer = [token for output in outputs[i] for token in output.token_ids]
        reference.check([some(i, length)], [answer], NEW)


# ------------------------------------------------------------------- chunks beside the steps


def run_beside(engine: Engine, abort_first: bool) -> dict[int, list[int]]:
    """Requests 0 and 1 have a segment longer than a step, 2 decodes beside them."""
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    engine.add(2, array("i", some(2, 20)), greedy(30))
    for i in (0, 1):
        engine.add(i, array("i", some(i, 150)), greedy(NEW), segments=SPANS)
    steps = 0
    while engine.has_work:
        for output in engine.step():
            outputs[output.id] += output.token_ids
        engine.check()
        steps += 1
        if steps == 3 and abort_first:
            engine.abort([0])
    return outputs


SPANS: list[Span] = [(3, 140)]


@pytest.mark.parametrize("aborted", [False, True])
def test_long_segments(
    llama: Path,
    make: Callable[..., Engine],
    references: Any,
    monkeypatch: pytest.MonkeyPatch,
    ranks: list[ThreadRank],
    aborted: bool,
) -> None:
    """Pieces of a long chunk and steps alternate on all ranks alike; one may be dropped."""
    monkeypatch.setattr(CpuBackend, "tile_rows", 32)
    advance, pieces = LongChunk.advance, []

    def one_piece(chunk: LongChunk, count: int) -> Any:
        pieces.append(chunk.seq.id)
        return advance(chunk, 1)

    monkeypatch.setattr(LongChunk, "advance", one_piece)
    engine = make(llama, 2, max_batched_tokens=40)
    outputs = run_beside(engine, aborted)
    assert pieces.count(1) > 4
    assert pieces.count(0) > 4 or aborted
    kept = [1] if aborted else [0, 1]
    references(llama).check(
        [some(i, 150) for i in kept],
        [outputs[i] for i in kept],
        NEW,
        spans=[SPANS for _ in kept],
    )
    references(llama).check([some(2, 20)], [outputs[2]], 30)


# ------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), None])
def test_adapters(
    tiny: Path,
    make: Callable[..., Engine],
    references: Any,
    lora: Any,
    count: int,
    targets: tuple[str, ...] | None,
) -> None:
    path = lora.write(tiny, **({} if targets is None else {"targets": targets}))
    merged = references(lora.merged(tiny, path))
    engine = make(tiny, count, adapters={"one": str(path)})
    outputs: dict[int, list[int]] = {}
    for i, text in enumerate(prompts()):
        outputs[i] = []
        engine.add(i, array("i", text), greedy(NEW), adapter="one" if i % 2 else None)
    while engine.has_work:
        for output in engine.step():
            outputs[output.id] += output.token_ids
    for i, text in enumerate(prompts()):
        (merged if i % 2 else references(tiny)).check([text], [outputs[i]], NEW)


def held(ranks: list[ThreadRank]) -> list[int]:
    """Adapters that each follower has."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) is follower.Follower]
    return [len(one._adapters) for one in found if one._share.ranks == len(ranks) + 1]


def test_an_adapter_goes_when_its_last_request_has_ended(
    llama: Path, make: Callable[..., Engine], references: Any, lora: Any, ranks: list[ThreadRank]
) -> None:
    path = lora.write(llama, seed=3)
    engine = make(llama, 4)
    engine.load_adapter("one", str(path))
    engine.generate([[5]], greedy(1))
    assert held(ranks) == [1, 1, 1]
    engine.add(0, array("i", some(1, 40)), greedy(NEW), adapter="one")
    output = [token for one in engine.step() for token in one.token_ids]
    engine.unload_adapter("one")
    while engine.has_work:
        output += [token for one in engine.step() for token in one.token_ids]
    references(lora.merged(llama, path)).check([some(1, 40)], [output], NEW)
    gc.collect()
    engine.generate([[5]], greedy(1))  # carries what is to be forgotten
    assert held(ranks) == [0, 0, 0]


def test_an_adapter_that_another_rank_cannot_read_is_not_loaded(
    llama: Path,
    make: Callable[..., Engine],
    lora: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(lora.write(llama, seed=4), path)
    engine = make(llama, 2)
    read = follower.load_adapter

    def gone(*args: Any) -> Any:
        shutil.rmtree(path)
        return read(*args)

    monkeypatch.setattr(follower, "load_adapter", gone)
    with pytest.raises(ModelError, match=r"rank 1: .*adapter_config.json"):
        engine.load_adapter("one", str(path))
    other = lora.write(llama, seed=5)
    monkeypatch.setattr(follower, "load_adapter", lambda name, _, *rest: read(name, other, *rest))
    path = lora.write(llama, seed=4)
    with pytest.raises(ModelError, match=r"rank 1: the adapter in .* is another one now"):
        engine.load_adapter("one", str(path))
    monkeypatch.undo()
    assert len(engine.generate([[5]], greedy(NEW))[0]) == NEW


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "count", "message"),
    [
        ({}, 4, "does not divide the model's 2 key/value heads; possible: 1, 2"),
        ({}, 3, "does not divide the model's 4 attention heads; possible: 1, 2"),
        ({"intermediate_size": 97}, 2, "does not divide the model's 97 MLP features; possible: 1$"),
    ],
)
def test_numbers_of_ranks_that_do_not_fit(
    tiny_model: TinyModel,
    ranks: list[ThreadRank],
    overrides: dict[str, int],
    count: int,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel {count} {message}"):
        Engine(settings_of(tiny_model("llama", **overrides), tensor_parallel=count))
    assert not ranks


@pytest.mark.parametrize("other", [{"runahead": 2}, {"runahead_hosts": ["a:1"]}])
def test_not_with_runahead(llama: Path, other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel and --runahead cannot be combined"):
        Engine(settings_of(llama, tensor_parallel=2, **other))


def test_not_with_steps_that_overlap(llama: Path, ranks: list[ThreadRank]) -> None:
    """The other ranks would not know the tokens of the step in flight."""
    with pytest.raises(ConfigError, match="--async-scheduling on and --tensor-parallel cannot"):
        Engine(settings_of(llama, tensor_parallel=2, async_scheduling="on"))
    assert not ranks


def test_what_a_rank_lacks_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that goes away under it, and memory it does not get."""
    set_up = follower.set_up

    def elsewhere(config: EngineConfig) -> Any:
        return set_up(msgspec.structs.replace(config, model_path=str(tmp_path / "gone")))

    monkeypatch.setattr(follower, "set_up", elsewhere)
    with pytest.raises(HeadstartError, match=r"^tensor parallel: rank 1: .*gone"):
        Engine(settings_of(llama, tensor_parallel=2))
    monkeypatch.undo()


def test_memory_a_rank_does_not_get_is_told(
    llama: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[ThreadRank]
) -> None:
    def runner(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(follower, "ModelRunner", runner)
    with pytest.raises(HeadstartError, match=r"^tensor parallel: rank [12]: MemoryError$"):
        Engine(settings_of(llama, tensor_parallel=4))
    assert all(rank.wait(10) in (0, 1) for rank in ranks)


def test_too_little_memory_is_told_for_all_ranks(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 1.00 MiB of KV pool and 0.50 MiB are there"):
        Engine(settings_of(llama, tensor_parallel=4, kv_memory=1 << 19))
