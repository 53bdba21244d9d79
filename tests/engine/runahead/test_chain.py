"""Prompts that run ahead get the tokens, and leave the KV, that the engine alone would compute.

The prefill ranks are threads of this process, so that a test can hold one at any point, and has
their books checked at each turn. test_runahead_processes.py has real ones.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import shutil
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.engine import engine as engine_module
from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.errors import ConfigError
from headstart.engine.ranges.segments import Segments, Span
from headstart.engine.runahead import control, forming, measure, membership
from headstart.engine.runahead import planner as planner_module
from headstart.engine.runahead import rank as rank_module
from headstart.engine.runahead.chain import Chain
from headstart.engine.runahead.cuts import Plan, Positions, plan
from headstart.engine.runahead.jobs import Job, Report
from headstart.engine.runahead.messages import Run
from headstart.engine.runahead.rank import Rank, RankConfig
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import Sequence as EngineSequence
from headstart.engine.work import LongChunk
from headstart.kernels.devices import instruction_sets

pytestmark = pytest.mark.covering

PAGE = 32
NEW = 4
SECRET = "a secret of the tests"
SECONDS = 300.0
"""A deadline, for what takes parts of a second."""
KV = 1e-4  # largest difference of a key or value; measured 0

References = Callable[[Path], Any]


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    spans: tuple[Span, ...] = ()
    salt: bytes = b""
    adapter: str | None = None
    new: int = NEW


_draw = random.Random(7)


def some(n: int) -> list[int]:
    """Tokens that no test has had before."""
    return [_draw.randrange(3, 320) for _ in range(n)]


def add(engine: Engine, id_: int, prompt: Prompt) -> None:
    engine.add(
        id_,
        array("i", prompt.tokens),
        SamplingParams(max_tokens=prompt.new, temperature=0.0, ignore_eos=True),
        salt=prompt.salt,
        segments=prompt.spans,
        adapter=prompt.adapter,
    )


def config(folder: Path, **options: Any) -> EngineConfig:
    fields = {"weights": "f32", "threads": 1, "kv_memory": 16 << 20, "relay": "off"}
    return EngineConfig(**{"model_path": str(folder), **fields, **options})


def kv_of(holder: Engine | Rank, engine: Engine, prompt: Prompt) -> Tensor:
    """The KV pages that the holder's cache has of a prompt, float32 ``[layers, pages, numbers]``.

    ``engine`` knows the prompt's adapter.
    """
    mask = Segments.of(prompt.spans, len(prompt.tokens))
    adapter = None if prompt.adapter is None else engine._adapters.get(prompt.adapter)
    namespace = engine_module._namespace(prompt.salt, mask, adapter)
    tokens = array("i", prompt.tokens)
    seq = EngineSequence(
        0, tokens, len(tokens), SamplingParams(max_tokens=1), namespace=namespace, segments=mask
    )
    cache, runner = holder._cache, holder._runner
    pages = []
    if namespace in cache._roots:
        pages = cache.match(cache.root(namespace), seq.cache_keys(PAGE), len(tokens)).pages
    return runner.backend.kv_pages(runner.kv)[:, pages].view(torch.float32)


class Alone:
    """An engine without a chain: what is to be expected of one with it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.engine = Engine(config(folder, **options))
        self._known: dict[str, tuple[list[int], Tensor]] = {}

    def __call__(self, prompt: Prompt) -> tuple[list[int], Tensor]:
        """Its output, and the KV of its whole pages."""
        key = repr(prompt)
        if key not in self._known:
            add(self.engine, 0, prompt)
            output: list[int] = []
            while self.engine.has_work:
                for step in self.engine.step():
                    output += step.token_ids
            self._known[key] = output, kv_of(self.engine, self.engine, prompt).clone()
        return self._known[key]


def at_layer(layer: int) -> Callable[[Rank], bool]:
    """For ``hold``: the rank's first job has come to this layer."""

    def hold(rank: Rank) -> bool:
        jobs = list(rank._jobs.values())
        chunk = None if not jobs or jobs[0].part is None else jobs[0].part.chunk
        return chunk is not None and chunk.layer >= layer

    return hold


def always(rank: Rank) -> bool:
    return True


def never(rank: Rank) -> bool:
    return False


class RankThread:
    """A prefill rank. ``hold``: it stands still for as long as this is true of it."""

    def __init__(self, options: RankConfig) -> None:
        self.config = options
        self.rank = Rank(options)
        self.hold: Callable[[Rank], bool] = lambda rank: False
        self.held = threading.Event()
        self.lock = threading.Lock()
        self.slowness = 0.0
        self.error: BaseException | None = None
        self._ending = False
        # A rank may find a job's Run right behind its Prepare, in one turn of its loop.
        self._begin, self.rank._run = self.rank._run, self._held_run  # type: ignore[method-assign]
        self.computed: list[int] = []  # tokens of its chunks that were not cached
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.rank.serve(self._ended)
        except BaseException as error:
            self.error = error
        finally:
            self.rank.close()

    def _ended(self) -> bool:
        """Asked at each turn of the rank's loop."""
        with self.lock:
            self.rank.check()
        self._stand_still()
        if self.slowness and self.rank._jobs:
            time.sleep(self.slowness)
        return self._ending

    def _held_run(self, message: Run) -> None:
        self._stand_still()
        if message.job in self.rank._jobs:
            held = self.rank._jobs[message.job].held
            self.computed.append(message.end - max(message.start, held))
        self._begin(message)

    def _stand_still(self) -> None:
        while self.hold(self.rank) and not self._ending:
            self.held.set()
            time.sleep(0.001)

    def end(self) -> None:
        self._ending = True

    def join(self) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error

    @property
    def idle(self) -> bool:
        return not self.rank._jobs and not self.rank._leaving


@dataclass
class Options:
    """Of a cluster: the engine's, and the ranks'."""

    ranks: int = 2
    engine: dict[str, Any] = field(default_factory=dict)
    rank: dict[str, Any] = field(default_factory=dict)


class Cluster:
    """An engine, its ranks, and what they have answered. Books are checked at every step."""

    def __init__(
        self, folder: Path, sockets: Path, transport: str = "auto", options: Options | None = None
    ) -> None:
        options = options or Options()
        kept = {"cache_dir": str(folder.parent / "kept")}
        self.options = options
        self.ranks = [
            RankThread(
                RankConfig(
                    engine=config(folder, **{**kept, **options.rank}),
                    listen=f"ipc://{sockets}/{i}",
                    secret=SECRET,
                    transport=transport,
                )
            )
            for i in range(options.ranks)
        ]
        fields = {
            "runahead_hosts": [rank.config.listen for rank in self.ranks],
            "runahead_secret": SECRET,
            "runahead_min": 1,
            "runahead_cuts": "even",
            "runahead_timeout": 20.0,
            "runahead_transport": transport,
        }
        self.config = config(folder, **{**kept, **fields, **options.engine})
        self.engine = Engine(self.config)
        assert self.engine.runahead is not None
        self.chain = self.engine.runahead
        self.outputs: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self._ids = itertools.count()

    def wait_for(self, holds: Callable[[], Any]) -> None:
        """While the engine has nothing to do."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, "does not come about"
            self.engine.attend_chain()
            self.check()
            time.sleep(0.002)

    def check(self) -> None:
        self.engine.check()
        for rank in self.ranks:
            if rank.error is not None:
                raise rank.error

    def add(self, prompt: Prompt) -> int:
        id_ = next(self._ids)
        self.outputs[id_] = []
        add(self.engine, id_, prompt)
        return id_

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs[output.id] += output.token_ids
            self.cached[output.id] = output.cached_tokens
        self.check()

    def step_until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, "does not come about"
            self.step()

    def finish(self) -> None:
        self.step_until(lambda: not self.engine.has_work)

    def run_here(self, prompt: Prompt) -> None:
        """Have the engine alone compute it."""
        formation = self.chain._formation
        least, formation.least = formation.least, 1 << 30
        self.run(prompt)
        formation.least = least

    def run(self, *prompts: Prompt) -> list[list[int]]:
        """Computed together; their outputs."""
        ids = [self.add(prompt) for prompt in prompts]
        self.finish()
        return [self.outputs[id_] for id_ in ids]

    @property
    def num_ahead(self) -> int:
        """Prompts that ran ahead to their end."""
        return self.chain.stats.prompts

    @property
    def last(self) -> Report:
        assert self.chain.last is not None
        return self.chain.last

    def paces(self) -> list[float]:
        """What a chunk takes each rank, the engine last, as prompts are planned by it."""
        costs = self.chain._formation.costs
        assert costs is not None
        return [rank.seconds(0, 100) for rank in costs.ranks]

    @property
    def num_failed(self) -> int:
        return self.chain.stats.failed

    def reset(self) -> None:
        """As good as new, whatever a test did."""
        for rank in self.ranks:
            rank.hold, rank.slowness = never, 0.0
            rank.held.clear()
        self.engine.abort(list(self.outputs))
        self.chain.forced_bounds = None
        self.wait_for(lambda: self.chain.whole)

    def settle(self) -> None:
        """Until nothing is under way any more."""
        self.wait_for(lambda: all(r.idle for r in self.ranks) and not self.chain.pages_lent())

    def keep(self, *pages: int) -> None:
        """Evict all but so many pages from the caches of the ranks and, last, the engine's."""
        self.settle()
        for rank, kept in zip(self.ranks, pages, strict=False):
            with rank.lock:
                rank.rank._cache.evict(max(rank.rank._cache.num_pages - kept, 0))
        self.engine._cache.evict(max(self.engine._cache.num_pages - pages[-1], 0))
        assert self.engine._cache.num_pages <= pages[-1]

    def forget(self) -> None:
        """Empty the engine's cache."""
        self.settle()
        self.engine._cache.clear()

    def spoil(self) -> None:
        """Overwrite all KV of the ranks: whoever uses what they have cached gets it wrong."""
        self.settle()
        for rank in self.ranks:
            with rank.lock:
                rank.rank._memory.pages.view(torch.float32).fill_(3.0)

    def kv(self, holder: Engine | RankThread, prompt: Prompt) -> Tensor:
        if isinstance(holder, Engine):
            return kv_of(holder, self.engine, prompt)
        with holder.lock:
            return kv_of(holder.rank, self.engine, prompt)

    def prove(self, alone: Alone, *prompts: Prompt, outputs: list[list[int]] | None = None) -> None:
        """Outputs and all KV that any cache has of these prompts are as if computed alone."""
        self.settle()
        for i, prompt in enumerate(prompts):
            expected, kv = alone(prompt)
            if outputs is not None:
                assert outputs[i] == expected
            holders: list[Engine | RankThread] = [self.engine, *self.ranks]
            for holder in holders:
                found = self.kv(holder, prompt)
                assert_same_kv(found, kv[:, : found.shape[1]])

    def close(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.engine.close()
        for rank in self.ranks:
            rank.join()


def assert_same_kv(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    if found.numel():
        assert float((found - expected).abs().max()) <= KV


@pytest.fixture(params=["auto", "gloo"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def alone(llama: Path) -> Alone:
    return Alone(llama)


MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_cluster(llama: Path, tmp_path: Path) -> Iterator[MakeCluster]:
    made: list[Cluster] = []

    def make(
        ranks: int = 2, transport: str = "auto", folder: Path = llama, **options: Any
    ) -> Cluster:
        sockets = tmp_path / str(len(made))
        sockets.mkdir()
        made.append(Cluster(folder, sockets, transport, Options(ranks, **options)))
        made[-1].wait_for(lambda: made[-1].chain.whole)
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture(scope="module")
def lasting(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """``lasting(ranks, transport)``: a cluster for tests that leave it as good as new."""
    made: dict[tuple[int, str], Cluster] = {}

    def get(ranks: int, transport: str = "auto") -> Cluster:
        key = (ranks, transport)
        if key not in made:
            made[key] = Cluster(llama, tmp_path_factory.mktemp("ranks"), transport, Options(ranks))
        made[key].reset()
        return made[key]

    yield get
    for cluster in made.values():
        cluster.close()


# ----------------------------------------------------------------------------- parity


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_and_kv_are_those_of_one_engine(
    lasting: Any, alone: Alone, references: References, llama: Path, ranks: int, transport: str
) -> None:
    cluster = lasting(ranks, transport)
    before = cluster.num_ahead
    prompts = [Prompt(some(n)) for n in (449, 32 * ranks + 32, 32 * ranks + 33, 200)]
    outputs = [cluster.run(prompt)[0] for prompt in prompts]
    assert cluster.num_ahead == before + len(prompts)
    assert len(cluster.last.bounds) == ranks + 2
    references(llama).check([p.tokens for p in prompts], outputs, NEW)
    cluster.prove(alone, *prompts, outputs=outputs)
    for prompt in prompts:
        held = cluster.kv(cluster.engine, prompt)
        assert held.shape[1] == len(prompt.tokens) // PAGE
        assert torch.equal(held, alone(prompt)[1])  # bit for bit


@pytest.mark.parametrize("arch", ["llama3", "mistral", "qwen2", "qwen3"])
def test_all_architectures(
    make_cluster: MakeCluster, tiny_model: Callable[..., Path], references: References, arch: str
) -> None:
    folder = tiny_model(arch)
    cluster, prompts = make_cluster(2, folder=folder), [Prompt(some(n)) for n in (300, 97)]
    outputs = cluster.run(*prompts)
    assert cluster.num_ahead == 2
    references(folder).check([p.tokens for p in prompts], outputs, NEW)
    cluster.prove(Alone(folder), *prompts, outputs=outputs)


FORMATS = [{"isa": isa} for isa in instruction_sets()] + [{"backend": "reference"}]
if "avx512_bf16" in instruction_sets():
    FORMATS += [{"weights": "bf16"}]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_all_kernels(make_cluster: MakeCluster, llama: Path, options: dict[str, Any]) -> None:
    cluster, prompt = make_cluster(2, engine=options, rank=options), Prompt(some(300))
    outputs = cluster.run(prompt)
    assert cluster.num_ahead == 1
    expected, kv = Alone(llama, **options)(prompt)
    assert outputs == [expected]
    found = cluster.kv(cluster.engine, prompt)
    if "backend" in options:  # torch adds in another order where there are fewer rows
        assert_same_kv(found, kv)
    else:
        assert torch.equal(found.view(torch.uint8), kv.view(torch.uint8))


def test_measured_and_modelled_cuts(make_cluster: MakeCluster, alone: Alone) -> None:
    for cuts in ("auto", "predicted", "modelled"):
        cluster = make_cluster(3, engine={"runahead_cuts": cuts})
        prompts = [Prompt(some(n)) for n in (400, 130)]
        cluster.prove(alone, *prompts, outputs=cluster.run(*prompts))
        # A longer one with a prefix that is cached to different depths.
        longer = Prompt(prompts[1].tokens + some(200))
        cluster.prove(alone, longer, outputs=cluster.run(longer))


@given(data=st.data(), length=st.integers(34, 300))
@settings(
    max_examples=settings.default.max_examples // 4,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_any_cuts(lasting: Any, alone: Alone, data: st.DataObject, length: int) -> None:
    """Of a prompt of which the engine knows the beginning, or nothing."""
    cluster: Cluster = lasting(3, data.draw(st.sampled_from(["auto", "gloo"])))
    prompt = Prompt(some(length))
    known = data.draw(st.sampled_from([0, 0, 1, 2, 3]))
    known = min(known, (length - 1) // PAGE - 1) * PAGE
    if known:
        cluster.run_here(Prompt(prompt.tokens[:known], new=1))
    begin = data.draw(st.sampled_from([0, known]))
    ends = list(range(begin + PAGE, length, PAGE))
    cuts = data.draw(st.lists(st.sampled_from(ends), min_size=1, max_size=3, unique=True))
    cluster.chain.forced_bounds = [begin, *sorted(cuts), length]
    before = cluster.num_ahead
    outputs = cluster.run(prompt)
    assert cluster.num_ahead == before + 1
    assert cluster.last.bounds == (begin, *sorted(cuts), length)
    cluster.prove(alone, prompt, outputs=outputs)


# ------------------------------------------------------------------------- prefix hits


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64])
def test_prompts_too_short_to_be_cut(lasting: Any, alone: Alone, length: int) -> None:
    cluster, prompt = lasting(2), Prompt(some(length))
    failed, ahead = cluster.num_failed, cluster.num_ahead
    cluster.prove(alone, prompt, outputs=cluster.run(prompt))
    assert cluster.num_failed == failed
    assert cluster.num_ahead == ahead + (length > PAGE)


def test_a_repeated_prompt_hits_the_engine_s_cache(lasting: Any, alone: Alone) -> None:
    cluster = lasting(2)
    for length in (160, 161, 191):
        prompt = Prompt(some(length))
        ahead = cluster.num_ahead
        outputs = [cluster.run(prompt)[0] for _ in range(3)]
        cluster.prove(alone, prompt, outputs=outputs[:1])
        assert outputs[1:] == outputs[:1] * 2
        assert cluster.num_ahead == ahead + 1
        assert cluster.cached[max(cluster.cached)] == (length - 1) // PAGE * PAGE


def test_the_first_rank_is_sent_what_it_lacks_of_the_engine_s(
    lasting: Any, alone: Alone, transport: str
) -> None:
    cluster, prompt = lasting(2, transport), Prompt(some(400))
    cluster.run_here(Prompt(prompt.tokens[:160], new=1))
    outputs = cluster.run(prompt)
    assert cluster.last.bounds[0] == 160
    assert cluster.last.sent_bytes[-1] == 5 * PAGE_BYTES
    cluster.prove(alone, prompt, outputs=outputs)
    ends = cluster.last.bounds
    for rank, end in zip(cluster.ranks, ends[1:], strict=False):
        assert cluster.kv(rank, prompt).shape[1] == end // PAGE  # kept for the next time
    # Another with that beginning: the ranks have it now.
    other = Prompt(prompt.tokens[:192] + some(200))
    cluster.prove(alone, other, outputs=cluster.run(other))
    assert cluster.last.sent_bytes[-1] == 0


def test_what_only_the_ranks_know_is_not_computed_again(
    lasting: Any, alone: Alone, transport: str
) -> None:
    cluster, prompt = lasting(2, transport), Prompt(some(400))
    cluster.run(prompt)
    cluster.forget()
    for rank in cluster.ranks:
        rank.computed.clear()
    outputs = cluster.run(prompt)
    # Each has all of its chunk, or all but the beginning of a page.
    computed = [count for rank in cluster.ranks for count in rank.computed]
    assert len(computed) == 2
    assert all(count < PAGE for count in computed)
    cluster.prove(alone, prompt, outputs=outputs)


@given(data=st.data(), length=st.sampled_from([255, 256, 257, 288, 289, 300]))
@settings(
    max_examples=3 * settings.default.max_examples // 10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_all_know_the_beginning_to_different_depths(
    lasting: Any, alone: Alone, data: st.DataObject, length: int
) -> None:
    cluster: Cluster = lasting(2, data.draw(st.sampled_from(["auto", "gloo"])))
    first = Prompt(some(length))
    cluster.keep(0, 0, 0)
    cluster.chain.forced_bounds = [0, 192, 224, length]  # so both ranks know much
    cluster.run(first)
    depths = [data.draw(st.integers(0, 8)) for _ in range(3)]
    cluster.keep(*depths)
    cluster.chain.forced_bounds = None
    same = data.draw(st.sampled_from([length, 31, 32, 33, 95, 96, 97, 200]))
    tokens = first.tokens[:same]
    prompt = Prompt(tokens + some(data.draw(st.sampled_from([1, 33, 64, 128]))))
    cluster.prove(alone, first, prompt, outputs=[alone(first)[0], cluster.run(prompt)[0]])


def test_the_engine_does_not_compute_what_it_has(lasting: Any) -> None:
    """Others may be reading it."""
    cluster, prompt = lasting(1), Prompt(some(300))
    cluster.run_here(Prompt(prompt.tokens[:128], new=1))
    cluster.chain.forced_bounds = [0, 64, 300]
    mark = 2.0  # as a sign that nobody has written there since
    seq_pages = kv_of(cluster.engine, cluster.engine, prompt).shape[1]
    assert seq_pages == 4
    cache, keys = cluster.engine._cache, array("i", prompt.tokens)
    pages = cache.match(cache.root(b"\0\0"), keys, 128).pages
    runner = cluster.engine._runner
    kv = runner.backend.kv_pages(runner.kv).view(torch.float32)
    kv[:, pages] = mark
    cluster.run(prompt)
    assert bool((kv[:, pages] == mark).all())
    cluster.forget()


def test_without_prefix_caching(make_cluster: MakeCluster, alone: Alone) -> None:
    off = {"prefix_caching": False}
    cluster = make_cluster(2, engine=off, rank=off)
    prompt = Prompt(some(300))
    assert cluster.run(prompt) + cluster.run(prompt) == [alone(prompt)[0]] * 2
    assert cluster.num_ahead == 2
    cluster.settle()
    assert [rank.rank._pool.num_used for rank in cluster.ranks] == [0, 0]


# ---------------------------------------------------------- segments, adapters and salts


def with_segments(*lengths: int, causal: int = 0) -> Prompt:
    """A token, segments of these lengths one behind the other, and more tokens."""
    ends = [1, *itertools.accumulate(lengths, initial=1)]
    spans = tuple(itertools.pairwise(ends[1:]))
    return Prompt(some(ends[-1] + causal), spans)


@pytest.mark.parametrize(
    "prompt",
    [
        with_segments(63, 64, 100, 60, causal=9),  # on pages' ends
        with_segments(50, 50, 50, 50, 50, causal=3),
        with_segments(250, 60, causal=5),  # one that is most of the prompt
        with_segments(40, 260),
        with_segments(5, 7, 9, 11, 70, causal=190),
    ],
    ids=["pages", "even", "large first", "large last", "mostly causal"],
)
def test_segments(
    lasting: Any,
    alone: Alone,
    references: References,
    llama: Path,
    transport: str,
    prompt: Prompt,
) -> None:
    cluster = lasting(2, transport)
    # Fresh tokens: the other transport's ranks may share nothing, but ``alone`` would.
    prompt = Prompt(some(len(prompt.tokens)), prompt.spans)
    causal = Prompt(prompt.tokens)
    ahead = cluster.num_ahead
    outputs = cluster.run(prompt, causal)
    assert cluster.num_ahead == ahead + 2
    references(llama).check([prompt.tokens, causal.tokens], outputs, NEW, [list(prompt.spans), []])
    cluster.prove(alone, prompt, causal, outputs=outputs)
    # The same beginning again, with hits inside of segments.
    for kept in (2, 4, 5):
        cluster.settle()
        cluster.engine._cache.clear()
        longer = Prompt(prompt.tokens + some(70), prompt.spans)
        cluster.run_here(Prompt(prompt.tokens, prompt.spans, new=1))
        cluster.engine._cache.evict(cluster.engine._cache.num_pages - kept)
        cluster.prove(alone, longer, outputs=cluster.run(longer))


@given(
    data=st.data(),
    layout=st.lists(st.tuples(st.integers(0, 50), st.integers(2, 120)), min_size=1, max_size=6),
)
@settings(
    max_examples=settings.default.max_examples // 4,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_any_cuts_between_any_segments(
    lasting: Any, alone: Alone, data: st.DataObject, layout: list[Span]
) -> None:
    spans, end = [], 0
    for gap, length in layout:
        if end + gap + length <= 400:
            spans.append((end + gap, end + gap + length))
            end = spans[-1][1]
    length = end + data.draw(st.integers(1, 60))
    prompt = Prompt(some(length), tuple(spans))
    allowed = list(Positions(0, length, PAGE, Segments.of(spans, length)).allowed)
    cluster: Cluster = lasting(3, data.draw(st.sampled_from(["auto", "gloo"])))
    if allowed:
        # Next to each other as a rule, where pages are shared.
        first = data.draw(st.integers(0, len(allowed) - 1))
        count = data.draw(st.integers(1, 3))
        step = data.draw(st.integers(1, 2))
        cuts = allowed[first::step][:count]
        cluster.chain.forced_bounds = [0, *cuts, length]
    cluster.prove(alone, prompt, outputs=cluster.run(prompt))
    cluster.chain.forced_bounds = None
    cluster.forget()  # the ranks know it, to different depths and inside of segments
    longer = Prompt(prompt.tokens + some(40), prompt.spans)
    cluster.prove(alone, longer, outputs=cluster.run(longer))


def test_kv_of_another_namespace_is_not_used(lasting: Any, alone: Alone, transport: str) -> None:
    cluster, tokens = lasting(2, transport), some(300)
    cluster.run(Prompt(tokens, salt=b"a"))
    cluster.spoil()
    for prompt in (
        Prompt(tokens, salt=b"b"),
        Prompt(tokens),
        Prompt(tokens, spans=((290, 300),)),
        Prompt(tokens, spans=((290, 300),), salt=b"a"),
    ):
        outputs = cluster.run(prompt)
        cluster.prove(alone, prompt, outputs=outputs)
    cluster.spoil()
    cluster.keep(0, 0, 0)


def test_adapters(
    make_cluster: MakeCluster, lora: Any, references: References, llama: Path, transport: str
) -> None:
    paths = {name: str(lora.write(llama, seed=i)) for i, name in enumerate("abc")}
    cluster = make_cluster(2, transport, engine={"adapters": paths}, rank={"max_adapters": 2})
    alone = Alone(llama, adapters=paths)
    tokens = some(300)
    prompts = [Prompt(tokens, adapter=name) for name in (*paths, None)]
    prompts += [Prompt(tokens[:200] + some(50), adapter=name) for name in paths]
    outputs = [cluster.run(prompt)[0] for prompt in prompts]
    assert (cluster.num_ahead, cluster.num_failed) == (len(prompts), 0)
    for prompt, output in zip(prompts, outputs, strict=True):
        path = None if prompt.adapter is None else Path(paths[prompt.adapter])
        references(lora.merged(llama, path)).check([prompt.tokens], [output], NEW)
    cluster.prove(alone, *prompts, outputs=outputs)


def test_a_rank_with_another_adapter_under_that_name_declines(
    make_cluster: MakeCluster, lora: Any, llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(lora.write(llama, seed=1), path)
    cluster = make_cluster(2, engine={"adapters": {"a": str(path)}})
    alone = Alone(llama, adapters={"a": str(path)})
    shutil.copytree(lora.write(llama, seed=2), path, dirs_exist_ok=True)
    prompt, plain = Prompt(some(300), adapter="a"), Prompt(some(300))
    outputs = cluster.run(prompt, plain)
    assert (cluster.num_ahead, cluster.num_failed) == (1, 1)
    assert cluster.chain.whole
    cluster.prove(alone, prompt, plain, outputs=outputs)
    # With the right file it takes part.
    shutil.copytree(lora.write(llama, seed=1), path, dirs_exist_ok=True)
    other = Prompt(some(300), adapter="a")
    cluster.prove(alone, other, outputs=cluster.run(other))
    assert (cluster.num_ahead, cluster.num_failed) == (2, 1)


# --------------------------------------------------------------------- beside each other


def test_others_decode_in_every_step_and_short_prompts_do_not_wait(
    lasting: Any, alone: Alone
) -> None:
    cluster = lasting(2)
    decoding = [Prompt(some(20), new=400), Prompt(some(40), new=400)]
    ids = [cluster.add(prompt) for prompt in decoding]
    cluster.step_until(lambda: all(cluster.outputs[i] for i in ids))
    cluster.ranks[1].hold = at_layer(1)
    long, ahead = Prompt(some(400)), cluster.num_ahead
    long_id = cluster.add(long)

    def steps(n: int) -> None:
        for _ in range(n):
            before = [len(cluster.outputs[i]) for i in ids]
            cluster.step()
            assert [len(cluster.outputs[i]) for i in ids] == [n + 1 for n in before]

    while not cluster.ranks[1].held.is_set():
        steps(1)
    steps(5)
    short = Prompt(some(25), new=2)
    short_id = cluster.add(short)
    steps(10)
    assert len(cluster.outputs[short_id]) == 2
    assert not cluster.outputs[long_id]
    cluster.ranks[1].hold = never
    cluster.finish()
    assert cluster.num_ahead == ahead + 1
    prompts = [*decoding, long, short]
    outputs = [cluster.outputs[i] for i in (*ids, long_id, short_id)]
    cluster.prove(alone, *prompts, outputs=outputs)


class HeldPlanner:
    """Searches for cuts begin, and go on once ``go`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(planner_module, "plan", self._plan)

    def _plan(self, *args: Any, **more: Any) -> Plan:
        assert threading.current_thread() is not threading.main_thread(), "the engine waits"
        self.begun.set()
        assert self.go.wait(SECONDS)
        return plan(*args, **more)


@pytest.fixture
def held_planner(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldPlanner]:
    held = HeldPlanner(monkeypatch)
    yield held
    held.go.set()


def test_others_go_on_while_a_prompt_is_planned(
    lasting: Any, alone: Alone, held_planner: HeldPlanner
) -> None:
    cluster = lasting(2)
    decoding = [Prompt(some(20), new=100), Prompt(some(30), new=100)]
    ids = [cluster.add(prompt) for prompt in decoding]
    cluster.step_until(lambda: all(cluster.outputs[i] for i in ids))
    long, short, ahead = Prompt(some(400)), Prompt(some(25), new=2), cluster.num_ahead
    long_id = cluster.add(long)
    cluster.step_until(held_planner.begun.is_set)
    short_id = cluster.add(short)
    for _ in range(20):
        before = [len(cluster.outputs[i]) for i in ids]
        cluster.step()
        assert [len(cluster.outputs[i]) for i in ids] == [n + 1 for n in before]
    assert len(cluster.outputs[short_id]) == 2
    assert not cluster.outputs[long_id]
    held_planner.go.set()
    cluster.finish()
    assert cluster.num_ahead == ahead + 1
    prompts = [*decoding, long, short]
    outputs = [cluster.outputs[i] for i in (*ids, long_id, short_id)]
    cluster.prove(alone, *prompts, outputs=outputs)


def test_aborts_while_prompts_are_planned(
    lasting: Any, alone: Alone, held_planner: HeldPlanner
) -> None:
    """The one that is, and one that waits for its turn; a third goes on."""
    cluster = lasting(2)
    prompts = [Prompt(some(n)) for n in (300, 310, 320)]
    ids = [cluster.add(prompt) for prompt in prompts]
    cluster.step_until(lambda: [bool(job.planning) for job in jobs(cluster)] == [True] * 3)
    ahead = cluster.num_ahead
    cluster.engine.abort(ids[:2])
    cluster.check()
    assert len(jobs(cluster)) == 1
    held_planner.go.set()
    cluster.finish()
    assert [bool(cluster.outputs[i]) for i in ids] == [False, False, True]
    assert cluster.num_ahead == ahead + 1
    cluster.prove(alone, prompts[2], outputs=[cluster.outputs[ids[2]]])
    cluster.settle()
    cluster.prove(alone, *prompts, outputs=cluster.run(*prompts))
    assert cluster.chain.whole


def test_a_rank_that_goes_while_a_prompt_is_planned(
    make_cluster: MakeCluster,
    alone: Alone,
    held_planner: HeldPlanner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "OUT_SECONDS", 0.1)
    cluster = make_cluster(2)
    prompt = Prompt(some(300))
    id_ = cluster.add(prompt)
    cluster.step_until(held_planner.begun.is_set)
    cluster.ranks[1].end()
    cluster.ranks.pop().join()
    cluster.step_until(lambda: cluster.num_failed)
    held_planner.go.set()
    cluster.finish()
    assert cluster.num_ahead == 0
    cluster.prove(alone, prompt, outputs=[cluster.outputs[id_]])
    cluster.wait_for(lambda: cluster.chain.num_ranks == 2)
    again = Prompt(some(300))
    cluster.prove(alone, again, outputs=cluster.run(again))
    assert cluster.num_ahead == 1


def test_nobody_waits_until_it_is_known_what_pays(
    llama: Path, tmp_path: Path, alone: Alone, held_planner: HeldPlanner
) -> None:
    cluster = Cluster(llama, tmp_path, options=Options(1, engine={"runahead_min": None}))
    try:
        cluster.wait_for(lambda: cluster.chain.num_ranks == 2 and held_planner.begun.is_set())
        assert not cluster.chain.whole
        prompt = Prompt(some(300))
        assert cluster.run(prompt) == [alone(prompt)[0]]
        assert cluster.num_ahead == cluster.num_failed == 0
        held_planner.go.set()
        cluster.wait_for(lambda: cluster.chain.whole)
    finally:
        cluster.close()


def test_a_chain_forms_though_its_engine_was_busy(llama: Path, tmp_path: Path) -> None:
    """Its rank has opened its links in time, and was heard late."""
    cluster = Cluster(llama, tmp_path, options=Options(1))
    rank = cluster.ranks[0].rank
    try:
        cluster.wait_for(lambda: cluster.chain._formation.ranks)
        deadline = time.monotonic() + SECONDS
        while rank._ends.get("origin") is None or rank._form is not None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        cluster.chain._formation._late_at = 0.0
        cluster.wait_for(lambda: cluster.chain.whole)
        assert cluster.chain.stats.left_out == 0
    finally:
        cluster.close()


def test_long_prompts_are_pipelined(lasting: Any, alone: Alone, transport: str) -> None:
    cluster = lasting(2, transport)
    cluster.ranks[1].hold = at_layer(1)
    prompts, ahead = [Prompt(some(n)) for n in (300, 200, 400, 310)], cluster.num_ahead
    ids = [cluster.add(prompt) for prompt in prompts]
    cluster.step_until(lambda: len(cluster.ranks[0].rank._jobs) == 0 and cluster.chain._jobs)
    cluster.step_until(lambda: not any(has_finished(job, 1) for job in jobs(cluster)))
    assert len(cluster.chain._jobs) == cluster.chain.num_ranks == 3
    cluster.ranks[1].hold = never
    cluster.finish()
    assert cluster.num_ahead >= ahead + 3
    cluster.prove(alone, *prompts, outputs=[cluster.outputs[i] for i in ids])


def test_the_second_of_two_equal_prompts_hits_the_cache(lasting: Any, alone: Alone) -> None:
    cluster = lasting(2)
    prompt, ahead = Prompt(some(321)), cluster.num_ahead
    outputs = cluster.run(prompt, prompt)
    assert cluster.num_ahead == ahead + 1
    assert cluster.cached[max(cluster.cached)] == 320
    cluster.prove(alone, prompt, prompt, outputs=outputs)


def test_no_rank_is_too_slow_for_having_others_before_it(
    make_cluster: MakeCluster, alone: Alone
) -> None:
    cluster = make_cluster(3, engine={"runahead_timeout": 1.0})
    for rank in cluster.ranks:
        rank.slowness = 0.15
    prompts = [Prompt(some(n)) for n in (300, 250, 400, 310)]
    outputs = cluster.run(*prompts)
    assert (cluster.num_ahead, cluster.chain.stats.left_out) == (4, 0)
    for rank in cluster.ranks:
        rank.slowness = 0.0
    cluster.prove(alone, *prompts, outputs=outputs)


def test_a_rank_that_goes_as_its_prompt_ends(
    make_cluster: MakeCluster, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make_cluster(2)
    finish = Chain.finish

    def gone(chain: Chain, job: Any) -> None:
        chain._membership.leave_out(job.ranks[0], "it went", 0.0)
        finish(chain, job)

    monkeypatch.setattr(Chain, "finish", gone)
    prompt = Prompt(some(300))
    assert cluster.run(prompt) == [alone(prompt)[0]]


def test_a_rank_that_became_slow_is_known_to_be(
    make_cluster: MakeCluster, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its chunks take, and not by what it waits: rank 1 waits for rank 0, and is quick."""
    monkeypatch.setattr(membership, "MOST_PACE", 1e6)
    cluster = make_cluster(2)
    before = cluster.paces()
    advance = LongChunk.advance

    def slow(chunk: LongChunk, pieces: int) -> Tensor | None:
        if threading.current_thread() is cluster.ranks[0].thread:
            time.sleep(0.2)
        return advance(chunk, pieces)

    monkeypatch.setattr(LongChunk, "advance", slow)
    prompts = [Prompt(some(400)) for _ in range(3)]
    outputs = cluster.run(*prompts)
    first, *others = (now / then for now, then in zip(cluster.paces(), before, strict=True))
    assert first > 5 * max(others)
    cluster.prove(alone, *prompts, outputs=outputs)


# -------------------------------------------------------------------------------- aborts


def stalled(cluster: Cluster, stage: str) -> list[Any]:
    """Has the ranks stop at this stage of the next prompts; what ``abort`` waits for."""
    first, second = cluster.ranks
    for rank in cluster.ranks:
        rank.held.clear()
    if stage == "not prepared":
        first.hold = second.hold = always
        assert first.held.wait(SECONDS)
        assert second.held.wait(SECONDS)
    elif stage == "prepared by one":
        second.hold = always
        assert second.held.wait(SECONDS)
    elif stage == "chunk not begun":
        first.hold = lambda rank: bool(rank._jobs)
    elif stage == "first half-way":
        first.hold = at_layer(1)
    elif stage == "second half-way":
        second.hold = at_layer(1)
    return [rank for rank in cluster.ranks if rank.hold is not never]


STAGES = [
    "not prepared",
    "prepared by one",
    "chunk not begun",
    "first half-way",
    "second half-way",
    "computed",
]


@pytest.mark.parametrize("idle", [False, True], ids=["busy", "idle"])
@pytest.mark.parametrize("stage", STAGES)
def test_aborts(lasting: Any, alone: Alone, transport: str, stage: str, idle: bool) -> None:
    """Nothing of the aborted prompt is left, and nothing of it is wrong in any cache."""
    cluster = lasting(2, transport)
    prompt, other = Prompt(some(300)), Prompt(some(280))
    id_ = cluster.add(prompt)
    used, left_out = cluster.engine._pool.num_used, cluster.chain.stats.left_out
    try:
        held = stalled(cluster, stage)
        cluster.step()
        if stage == "computed":
            cluster.step_until(lambda: all(len(j.finished) == 2 for j in jobs(cluster)))
        elif held[0].hold is not always:
            cluster.step_until(held[0].held.is_set)
        for _ in range(3):
            if not cluster.outputs[id_]:
                cluster.step()
        assert not cluster.outputs[id_] or stage == "computed"
        cluster.engine.abort([id_])
        cluster.check()
        output_id = None if idle else cluster.add(other)
        if not idle:
            cluster.step()
    finally:
        for rank in cluster.ranks:
            rank.hold = never
    if idle:
        cluster.wait_for(lambda: not cluster.chain._jobs)
        cluster.settle()
        assert cluster.engine._pool.num_used - cluster.engine._cache.num_pages == 0
    else:
        cluster.finish()
        assert output_id is not None
        cluster.prove(alone, other, outputs=[cluster.outputs[output_id]])
    assert cluster.chain.stats.left_out == left_out
    assert used is not None
    cluster.prove(alone, prompt)
    cluster.prove(alone, prompt, outputs=cluster.run(prompt))
    assert cluster.chain.whole


def jobs(cluster: Cluster) -> list[Job]:
    return list(cluster.chain._jobs.values())


def has_finished(job: Job, place: int) -> bool:
    """Whether the rank at this place of the chain has said that it has."""
    return job.ranks[place] in job.finished


def test_an_aborted_prompt_behind_others(lasting: Any, alone: Alone, transport: str) -> None:
    cluster = lasting(2, transport)
    cluster.ranks[0].hold = at_layer(0)
    prompts = [Prompt(some(n)) for n in (300, 310, 320)]
    ids = [cluster.add(prompt) for prompt in prompts]
    cluster.step_until(lambda: len(jobs(cluster)) == 3 and cluster.ranks[0].held.is_set())
    cluster.engine.abort([ids[1]])
    cluster.step()
    cluster.ranks[0].hold = never
    cluster.finish()
    cluster.prove(alone, *prompts)
    for i in (0, 2):
        assert cluster.outputs[ids[i]] == alone(prompts[i])[0]
    cluster.prove(alone, prompts[1], outputs=cluster.run(prompts[1]))


# --------------------------------------------------------------------------- little memory


PAGE_BYTES = 3 * 2 * 2 * 16 * PAGE * 4
"""Layers, keys and values, heads, their size, tokens, float32."""


def test_a_rank_with_too_little_memory(
    make_cluster: MakeCluster, alone: Alone, transport: str
) -> None:
    """It says so; that prompt is computed by the engine, shorter ones run ahead still."""
    cluster = make_cluster(2, transport, rank={"kv_memory": 16 * PAGE_BYTES})
    for rank in cluster.ranks:
        with rank.lock:  # as if it were all it had
            rank.rank._pool.allocate(10)
            rank.rank.check = lambda: None  # type: ignore[method-assign]
    long, short = Prompt(some(400)), Prompt(some(150))
    formation = cluster.chain._formation
    cluster.prove(alone, long, outputs=cluster.run(long))
    assert (cluster.num_ahead, cluster.num_failed) == (0, 1)
    cluster.wait_for(lambda: cluster.chain.whole)
    assert cluster.chain._formation is formation  # others' prompts go on over the same links
    cluster.prove(alone, short, outputs=cluster.run(short))
    assert cluster.num_ahead == 1
    assert cluster.chain.stats.left_out == 0


def test_ranks_evict(make_cluster: MakeCluster, alone: Alone, transport: str) -> None:
    small = {"kv_memory": 24 * PAGE_BYTES}
    cluster = make_cluster(2, transport, rank=small)
    prompts = [Prompt(some(n)) for n in (500, 400, 300, 450, 350)]
    prompts += [Prompt(p.tokens[:200] + some(100)) for p in prompts]
    for prompt in prompts:
        cluster.forget()
        cluster.prove(alone, prompt, outputs=cluster.run(prompt))
    assert cluster.num_ahead == len(prompts)
    cluster.prove(alone, *prompts)


def test_a_full_rank_frees_what_an_aborted_prompt_was_sent(
    make_cluster: MakeCluster, alone: Alone, transport: str
) -> None:
    """It was aborted before the rank could say that it has no room for it."""
    cluster = make_cluster(2, transport)
    with cluster.ranks[1].lock:
        pool = cluster.ranks[1].rank._pool
        taken = pool.allocate(pool.num_free)
        cluster.ranks[1].rank.check = lambda: None  # type: ignore[method-assign]
    cluster.ranks[1].hold = lambda rank: bool(rank._jobs)
    prompt = Prompt(some(300))
    id_ = cluster.add(prompt)
    cluster.step_until(lambda: any(has_finished(job, 0) for job in jobs(cluster)))
    cluster.engine.abort([id_])
    cluster.wait_for(lambda: not jobs(cluster))
    cluster.ranks[1].hold = never
    cluster.settle()
    assert cluster.chain.whole
    with cluster.ranks[1].lock:
        pool.release(taken)
    cluster.prove(alone, prompt, outputs=cluster.run(prompt))


def test_a_rank_keeps_pages_until_the_next_one_has_them(
    make_cluster: MakeCluster, alone: Alone
) -> None:
    """Nothing is cached: a page given back too early is written to for the next prompt."""
    cluster = make_cluster(2, rank={"prefix_caching": False})
    first, second = cluster.ranks
    link = second.rank._ends.get("upstream")
    link.arrived = lambda job, layer: False  # the second takes nothing for now
    prompts = [Prompt(some(300)), Prompt(some(310))]
    ids = [cluster.add(prompts[0])]
    cluster.step_until(lambda: sum(has_finished(job, 0) for job in jobs(cluster)) == 1)
    ids.append(cluster.add(prompts[1]))
    cluster.step_until(lambda: sum(has_finished(job, 0) for job in jobs(cluster)) == 2)
    del link.arrived
    cluster.finish()
    assert cluster.num_ahead == 2
    cluster.prove(alone, *prompts, outputs=[cluster.outputs[i] for i in ids])
    assert first.rank._pool.num_used == 0


def test_the_engine_keeps_pages_until_the_first_rank_has_them(lasting: Any) -> None:
    cluster, prompt = lasting(2), Prompt(some(300))
    cluster.forget()
    cluster.run_here(Prompt(prompt.tokens[:160], new=1))
    cluster.ranks[0].hold = lambda rank: bool(rank._jobs)
    id_ = cluster.add(prompt)
    cluster.step_until(lambda: jobs(cluster) and jobs(cluster)[0].plan is not None)
    cluster.engine.abort([id_])
    cluster.engine._cache.clear()
    for _ in range(10):
        cluster.engine.attend_chain()
        cluster.check()
    assert cluster.engine._pool.num_used == 5
    cluster.ranks[0].hold = never
    cluster.settle()
    assert cluster.engine._pool.num_used == 0


# --------------------------------------------------------------------------------- faults


def closes(name: str) -> Callable[[Rank], bool]:
    """For ``hold``, in the rank's thread: close one of its links."""

    def hold(rank: Rank) -> bool:
        end = rank._ends.get(name)
        if end is not None:
            end.close()
        return False

    return hold


FAULTS = ["upstream", "downstream", "origin", "gone"]


@pytest.mark.parametrize("stage", ["before", "during", "after"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_link_or_rank_that_goes_costs_no_request(
    make_cluster: MakeCluster, alone: Alone, transport: str, place: int, fault: str, stage: str
) -> None:
    cluster = make_cluster(2, transport)
    broken = cluster.ranks[place]
    prompts = [Prompt(some(300)), Prompt(some(200))]
    beside = Prompt(some(10), new=60)
    ids = [cluster.add(beside)]
    struck = threading.Event()

    def strike(rank: Rank) -> bool:
        if not struck.is_set():
            struck.set()
            if fault == "gone":
                broken.end()
            else:
                closes(fault)(rank)
        return False

    def during(rank: Rank) -> bool:
        return strike(rank) if at_layer(0)(rank) else False

    if stage == "before":
        broken.hold = strike
        cluster.wait_for(struck.is_set)
    elif stage == "during":
        broken.hold = during
    ids += [cluster.add(prompt) for prompt in prompts]
    if stage == "after":
        cluster.step()
        cluster.step_until(lambda: not jobs(cluster) or has_finished(jobs(cluster)[0], place))
        broken.hold = strike
    cluster.finish()
    broken.hold = strike
    cluster.wait_for(struck.is_set)
    for id_, prompt in zip(ids, [beside, *prompts], strict=True):
        assert cluster.outputs[id_] == alone(prompt)[0]
    if fault == "gone":
        broken.join()
        cluster.ranks[place] = RankThread(broken.config)
        cluster.wait_for(lambda: not cluster.chain.whole)
    # The chain is whole again, at the latest once another prompt has met a closed link.
    for _ in range(2):
        cluster.wait_for(lambda: cluster.chain.whole)
        last = Prompt(some(300))
        ahead = cluster.num_ahead
        cluster.prove(
            alone, last, *prompts, outputs=[*cluster.run(last), *[alone(p)[0] for p in prompts]]
        )
    assert cluster.num_ahead == ahead + 1


def test_steps_that_are_a_time(make_cluster: MakeCluster, alone: Alone, transport: str) -> None:
    """The engine's own rows are computed in what is left of each."""
    cluster = make_cluster(2, transport, engine={"step_time": 0.001})
    prompts = [Prompt(some(20), new=60), Prompt(some(400)), Prompt(some(300))]
    cluster.prove(alone, *prompts, outputs=cluster.run(*prompts))
    assert (cluster.num_ahead, cluster.num_failed) == (2, 0)


def test_a_slow_rank_is_waited_for(lasting: Any, alone: Alone, transport: str) -> None:
    cluster, prompt = lasting(2, transport), Prompt(some(400))
    cluster.ranks[0].slowness = 0.1
    ahead, left_out = cluster.num_ahead, cluster.chain.stats.left_out
    outputs = cluster.run(prompt)
    cluster.ranks[0].slowness = 0.0
    assert (cluster.num_ahead, cluster.chain.stats.left_out) == (ahead + 1, left_out)
    cluster.prove(alone, prompt, outputs=outputs)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("stage", ["not prepared", "half-way"])
def test_a_rank_that_stands_still_is_left_out_and_comes_back(
    make_cluster: MakeCluster,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    stage: str,
) -> None:
    monkeypatch.setattr(membership, "OUT_SECONDS", 0.5)
    cluster = make_cluster(2, engine={"runahead_timeout": 0.7})
    rank, prompt = cluster.ranks[place], Prompt(some(300))
    rank.hold = at_layer(0) if stage == "half-way" else always
    id_ = cluster.add(prompt)
    cluster.finish()
    assert cluster.outputs[id_] == alone(prompt)[0]
    assert cluster.num_failed == 1
    assert cluster.chain.stats.left_out == 1
    rank.hold = never
    cluster.wait_for(lambda: cluster.chain.whole)
    other = Prompt(some(300))
    cluster.prove(alone, prompt, other, outputs=[alone(prompt)[0], *cluster.run(other)])
    assert cluster.num_ahead == 1


@pytest.mark.parametrize("seed", range(4))
def test_random_use(make_cluster: MakeCluster, alone: Alone, transport: str, seed: int) -> None:
    """Prompts that share beginnings, aborts, evictions, slow and closed links, all at once."""
    draw = random.Random(seed)
    cluster = make_cluster(3, transport, rank={"kv_memory": 40 * PAGE_BYTES})
    begin = some(300)
    prompts: dict[int, Prompt] = {}
    for _ in range(150):
        deed = draw.random()
        if deed < 0.2 and len(prompts) < 30:
            tokens = begin[: draw.randrange(300)] + some(draw.randrange(1, 200))
            cut = sorted(draw.sample(range(len(tokens) + 1), 2)) if len(tokens) > 2 else [0, 1]
            spans = ((cut[0], cut[1]),) if draw.random() < 0.3 else ()
            prompt = Prompt(tokens, spans, draw.choice([b"", b"a"]), new=draw.randrange(1, 9))
            prompts[cluster.add(prompt)] = prompt
        elif deed < 0.25 and prompts:
            cluster.engine.abort([draw.choice(list(prompts))])
        elif deed < 0.3:
            draw.choice(cluster.ranks).slowness = draw.choice([0.0, 0.002])
        elif deed < 0.33:
            cluster.engine._cache.evict(draw.randrange(30))
        elif deed < 0.34:
            name = draw.choice(["upstream", "downstream", "origin"])
            draw.choice(cluster.ranks).hold = closes(name)
        else:
            for rank in cluster.ranks:
                rank.hold = never
            cluster.step()
    for rank in cluster.ranks:
        rank.hold, rank.slowness = never, 0.0
    cluster.finish()
    for id_, prompt in prompts.items():
        expected = alone(prompt)[0]
        assert cluster.outputs[id_] == expected[: len(cluster.outputs[id_])]
    cluster.wait_for(lambda: cluster.chain.whole)
    cluster.prove(alone, *prompts.values())
    cluster.engine._cache.clear()
    assert cluster.engine._pool.num_used == 0


# ------------------------------------------------------------------------------ handshake


@pytest.fixture
def refused(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., str]]:
    """``refused(folder, options)``: what is logged of a rank that must not take part, though
    another one does."""
    made: list[Cluster] = []

    def get(folder: Path = llama, secret: str = SECRET, said: bool = True, **options: Any) -> str:
        good = RankConfig(engine=config(llama), listen=f"ipc://{tmp_path}/a", secret=SECRET)
        other = RankConfig(
            engine=config(folder, **options), listen=f"ipc://{tmp_path}/b", secret=secret
        )
        fields = {"runahead_hosts": [good.listen, other.listen], "runahead_timeout": 20.0}
        cluster = Cluster(llama, tmp_path, options=Options(0, engine=fields))
        made.append(cluster)
        cluster.ranks = [RankThread(good)]
        cluster.wait_for(lambda: cluster.chain.num_ranks == 2)
        cluster.ranks.append(RankThread(other))
        if said:
            cluster.wait_for(lambda: any(r.levelno == logging.ERROR for r in caplog.records))
        end = time.monotonic() + 0.5  # in which it might be said again
        while time.monotonic() < end:
            cluster.engine.attend_chain()
            time.sleep(0.01)
        assert cluster.chain.num_ranks == 2
        assert not cluster.chain.whole
        prompt = Prompt(some(300))
        assert cluster.run(prompt) == [Alone(llama)(prompt)[0]]
        assert cluster.num_ahead == 1
        messages = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert len(messages) == said, "said more than once"
        return "".join(messages)

    yield get
    for cluster in made:
        cluster.close()


def test_a_rank_with_another_model_is_refused(
    refused: Callable[..., str], tiny_model: Callable[..., Path]
) -> None:
    said = refused(tiny_model("llama", num_hidden_layers=3, seed=5))
    assert "rank 1 " in said
    assert "its model is" in said


def test_a_rank_with_other_weights_is_refused(refused: Callable[..., str]) -> None:
    said = refused(weights="bf16", isa=instruction_sets()[-1])
    assert "rank 1 " in said
    assert "its weights is bf16" in said


def test_a_rank_for_shorter_prompts_is_refused(refused: Callable[..., str]) -> None:
    """Its table of rotations ends before this engine's prompts do."""
    said = refused(max_model_len=128)
    assert "rank 1 " in said
    assert "its max model len is 128, the engine's is 512" in said


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"rope_theta": 5e5}, "its rope theta is 500000.0, the engine's is 10000.0"),
        (
            {"rope_type": "linear", "factor": 2.0},
            "its rope type is linear, the engine's is default",
        ),
        ({"rms_norm_eps": 1e-6}, "its rms norm eps is 1e-06, the engine's is 1e-05"),
    ],
)
def test_a_rank_that_reads_the_same_weights_in_another_way_is_refused(
    refused: Callable[..., str],
    llama: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    difference: str,
) -> None:
    folder = with_config(llama, tmp_path / "other", changes)
    assert difference in refused(folder)


def with_config(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of ``model``; ``changes`` of RoPE's settings go where the config has those."""
    shutil.copytree(model, folder)
    told = json.loads((folder / "config.json").read_text())
    rope = told["rope_parameters"]
    for name, value in changes.items():
        (told if name in told else rope)[name] = value
    (folder / "config.json").write_text(json.dumps(told, sort_keys=True))
    return folder


def test_what_a_config_says_of_answers_keeps_no_rank_out(
    make_cluster: MakeCluster, llama: Path, tmp_path: Path, alone: Alone
) -> None:
    folder = with_config(llama, tmp_path / "other", {"eos_token_id": [2, 9], "bos_token_id": 1})
    cluster = make_cluster(1, rank={"model_path": str(folder)})
    prompt = Prompt(some(300))
    cluster.prove(alone, prompt, outputs=cluster.run(prompt))
    assert cluster.num_ahead == 1


@pytest.mark.parametrize(
    ("name", "value"), [("version", "0.0"), ("page_size", 16), ("kv_layout", "another")]
)
def test_a_rank_that_differs_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    def identity(loaded: Any) -> Any:
        found = measure.identity(loaded)
        if threading.current_thread() is not threading.main_thread():
            return found
        identities.append(found)
        return msgspec.structs.replace(found, **{name: value}) if len(identities) == 2 else found

    identities: list[Any] = []
    monkeypatch.setattr(rank_module, "identity", identity)  # of the second rank
    said = refused()
    assert "rank 1 " in said
    assert f"its {name.replace('_', ' ')} is {value}, the engine's is" in said


def test_a_rank_with_another_secret_never_joins(refused: Callable[..., str]) -> None:
    assert refused(secret="another secret of the tests", said=False) == ""


def test_a_short_secret_is_refused(llama: Path, tmp_path: Path) -> None:
    listen = f"ipc://{tmp_path}/a"
    with pytest.raises(ConfigError, match="16 characters"):
        Rank(RankConfig(engine=config(llama), listen=listen, secret="short"))
    with pytest.raises(ConfigError, match="16 characters"):
        Engine(config(llama, runahead_hosts=[listen], runahead_secret="short"))
    with pytest.raises(ConfigError, match="needs the secret"):
        Engine(config(llama, runahead_hosts=[listen]))


def test_another_engine_takes_a_rank_over(
    make_cluster: MakeCluster,
    alone: Alone,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one's jobs end there; it computes them itself."""
    monkeypatch.setattr(membership, "OUT_SECONDS", 0.1)
    monkeypatch.setattr(forming, "OPENING_SECONDS", 0.1)
    cluster = make_cluster(2, transport, engine={"runahead_timeout": 1.0})
    first, second = cluster.ranks
    second.hold = at_layer(1)
    prompt = Prompt(some(300))
    id_ = cluster.add(prompt)
    cluster.step_until(second.held.is_set)
    other = Engine(msgspec.structs.replace(cluster.config, kv_memory=8 << 20))
    second.hold = never
    deadline = time.monotonic() + SECONDS
    assert other.runahead is not None
    while not other.runahead.whole:
        assert time.monotonic() < deadline
        other.attend_chain()
        time.sleep(0.002)
    assert not first.rank._jobs
    assert not second.rank._jobs
    cluster.finish()
    assert cluster.outputs[id_] == alone(prompt)[0]
    other.close()
    cluster.wait_for(lambda: cluster.chain.whole)
    again = Prompt(some(300))
    outputs = cluster.run(again, prompt)
    cluster.prove(alone, again, prompt, outputs=outputs)


def test_garbage_does_a_rank_no_harm(llama: Path, alone: Alone) -> None:
    """From strangers, and from those who know the secret."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listen = f"127.0.0.1:{port}"
    rank = RankThread(RankConfig(engine=config(llama), listen=listen, secret=SECRET))
    fields = {"runahead_hosts": [listen], "runahead_timeout": 20.0}
    cluster = Cluster(llama, llama.parent, options=Options(0, engine=fields))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        cluster.ranks = [rank]
        cluster.wait_for(lambda: cluster.chain.whole)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(random.Random(1).randbytes(10_000))
        knows = control.connect(context, listen, SECRET, 10.0)
        knows.immediate = False
        for message in (b"", b"\xc1", b"\x93\x01", bytes(range(256)), b"\x92\xa3Run\x01"):
            knows.send(message)
            knows.send_multipart([message, message])
        plain = context.socket(zmq.DEALER)
        plain.connect(f"tcp://{listen}")
        plain.send(b"Hello")
        time.sleep(0.2)
        for _ in range(2):
            prompt = Prompt(some(300))
            cluster.prove(alone, prompt, outputs=cluster.run(prompt))
        assert cluster.num_ahead == 2
    finally:
        # With what was never delivered, a context would be waited for when it is collected.
        context.destroy(linger=0)
        cluster.close()
