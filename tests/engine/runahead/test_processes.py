"""Prefill ranks as the processes that they are: killed, stopped, started again by the engine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from headstart.engine.config import EngineConfig
from headstart.engine.engine import Engine
from headstart.engine.runahead import membership
from headstart.engine.sampling.params import SamplingParams

pytestmark = pytest.mark.process

SECONDS = 300.0
"""A deadline, for what takes some seconds."""
NEW = 4

Alone = Callable[[list[int]], list[int]]


def some(seed: int, n: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 320) for _ in range(n)]


def settings(folder: Path, tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model_path=str(folder),
        weights="f32",
        threads=1,
        kv_memory=16 << 20,
        relay="off",
        runahead_min=1,
        runahead_cuts="even",
        cache_dir=str(tmp_path),
    )


class Server:
    """An engine with two ranks, and the one prompt at a time that it is asked for."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        assert self.engine.runahead is not None
        self.chain = self.engine.runahead
        self.outputs: dict[int, list[int]] = {}

    def wait_until_whole(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.chain.whole:
            assert time.monotonic() < deadline
            self.engine.attend_chain()
            time.sleep(0.005)

    def add(self, tokens: list[int], new: int = NEW) -> int:
        id_ = len(self.outputs)
        self.outputs[id_] = []
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        self.engine.add(id_, array("i", tokens), params)
        return id_

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs[output.id] += output.token_ids
        self.engine.check()

    def finish(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.engine.has_work:
            assert time.monotonic() < deadline
            self.step()

    def pids(self) -> list[int]:
        local = [rank.local for rank in self.chain._membership.ranks if rank.local is not None]
        return [rank.process.pid for rank in local if rank.process is not None]


@pytest.fixture(scope="module", params=["auto", "gloo"])
def server(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    base = settings(tiny_model("llama"), tmp_path_factory.mktemp("kept"))
    server = Server(
        msgspec.structs.replace(
            base, runahead=3, runahead_transport=request.param, runahead_timeout=2.0
        )
    )
    server.wait_until_whole()
    yield server
    pids = server.pids()
    server.engine.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    engine = Engine(settings(tiny_model("llama"), tmp_path_factory.mktemp("kept")))
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    return lambda tokens: engine.generate([tokens], params)[0]


def test_processes_compute_as_one_engine_does(server: Server, alone: Alone) -> None:
    server.wait_until_whole()
    ahead = server.chain.stats.prompts
    prompts = [some(1, 450), some(2, 300), some(1, 500), some(3, 65)]
    ids = []
    for prompt in prompts:
        ids.append(server.add(prompt))
        server.finish()
    assert server.chain.stats.prompts == ahead + len(prompts)
    assert [server.outputs[i] for i in ids] == [alone(prompt) for prompt in prompts]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("name", "steps"), [("SIGKILL", None), ("SIGKILL", 2), ("SIGSTOP", 1)])
def test_a_rank_that_dies_or_stops_costs_no_request(
    server: Server,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    steps: int | None,
    place: int,
) -> None:
    """At some moment, before its prompts (None) or a few steps after they came."""
    monkeypatch.setattr(membership, "OUT_SECONDS", 0.1)
    server.wait_until_whole()
    pid = server.pids()[place]
    prompts = [some(100 * place + 10 * (steps or 0) + i, 300 + i) for i in range(2)]
    beside = server.add(some(5, 20), new=30)
    if steps is None:
        os.kill(pid, getattr(signal, name))
    ids = [server.add(prompt) for prompt in prompts]
    for _ in range(steps or 0):
        server.step()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, name))
    server.finish()
    assert len(server.outputs[beside]) == 30
    assert [server.outputs[i] for i in ids] == [alone(prompt) for prompt in prompts]
    # If nobody has noticed yet, the next prompt does, or the chain by itself.
    ids = [server.add(some(7, 200))]
    server.finish()
    assert server.outputs[ids[0]] == alone(some(7, 200))
    deadline = time.monotonic() + SECONDS
    while server.pids()[place : place + 1] in ([], [pid]):
        assert time.monotonic() < deadline
        server.engine.attend_chain()
        time.sleep(0.005)
    server.wait_until_whole()
    ahead = server.chain.stats.prompts
    last = some(1000 + ahead, 310)
    ids = [server.add(last)]
    server.finish()
    assert server.chain.stats.prompts == ahead + 1
    assert server.outputs[ids[0]] == alone(last)
