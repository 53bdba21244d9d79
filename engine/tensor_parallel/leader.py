"""Leader: rank 0's hold on the other ranks. It starts them and has them compute what it does.

    rank 0    Run ─▶ computes ───╮   Advance ─▶ a piece ─╮
    others           computes ───┴─ sums ─     a piece ──┴─ sums ─

A rank that ends or hangs is the end of all: RankError says which, and the process goes.
"""

from __future__ import annotations

import itertools
import logging
import select
import socket
import subprocess
import sys
import time
import weakref
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import torch

from headstart.engine.batch import Batch
from headstart.engine.config import EngineConfig
from headstart.engine.errors import ModelError, RankError
from headstart.engine.models.share import Share
from headstart.engine.process.cores import kernel_environment
from headstart.engine.process.groups import Store
from headstart.engine.sequence import Adapter
from headstart.engine.tensor_parallel import collective
from headstart.engine.tensor_parallel.collective import HOST, Collective
from headstart.engine.tensor_parallel.messages import (
    AdapterRead,
    Advance,
    Allocate,
    Allocated,
    Begin,
    Beside,
    Channel,
    Drop,
    Failed,
    Forget,
    FromRank,
    Load,
    Loaded,
    Prepare,
    Run,
    ToRank,
    WireBatch,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=FromRank)

_GOING_SECONDS = 2.0  # in which a process whose connection broke has surely ended


class Process(Protocol):
    """What of subprocess.Popen is used."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def start_process(connection: socket.socket) -> Process:
    """A follower at the far end of ``connection``, its standard input: when this process ends,
    whatever way, the follower reads the end of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "headstart.engine.tensor_parallel.follower"],
        stdin=connection.fileno(),
        env=kernel_environment(),
    )


class _Follower(NamedTuple):
    rank: int
    channel: Channel
    process: Process


class Leader:
    """Starts ranks 1 to N-1, which load their shares at once. See model_runner.Followers."""

    def __init__(self, config: EngineConfig, vocab_size: int) -> None:
        self.share = Share(0, config.tensor_parallel)
        self.ranks = Collective(self.share, vocab_size, self._explain)
        self._store = Store(HOST)
        self._numbers: weakref.WeakKeyDictionary[Adapter, int] = weakref.WeakKeyDictionary()
        self._next_number = itertools.count()
        self._queued: list[ToRank] = []  # what can wait for the next message
        self._followers: list[_Follower] = []
        for rank in range(1, config.tensor_parallel):
            near, far = socket.socketpair()
            with far:
                process = start_process(far)
            self._followers.append(_Follower(rank, Channel(near, FromRank), process))
        self._send(Begin(config, 0, self._store.port))

    def wait_until_loaded(self) -> None:
        """Raises RankError, which says what a rank lacks."""
        self._expect(Loaded)

    def allocate(self, num_pages: int) -> None:
        """Have the others make their KV memory; ``connect`` comes next."""
        self._send(Allocate(num_pages))

    def connect(self, device: torch.device) -> None:
        """Meet the others, whose tensors live on such devices, too."""
        self._expect(Allocated)
        carrier = self.ranks.connect(self._store.store, device)
        for follower in self._followers:
            follower.channel.connection.settimeout(collective.HANG_SECONDS)
        logger.info("tensor parallel: %d ranks, %s", self.share.ranks, carrier)

    # ------------------------------------------------------------ as the model's runner sees it

    def run(self, batch: Batch) -> None:
        self._send(Run(WireBatch.of(batch, self._numbers.__getitem__)))

    def begin_beside(self, batch: Batch, tile_rows: int, place: int) -> None:
        self._send(Beside(WireBatch.of(batch, self._numbers.__getitem__), tile_rows, place))

    def advance_beside(self, place: int) -> None:
        self._send(Advance(place))

    def drop_beside(self, place: int) -> None:
        self._queued.append(Drop(place))

    def prepare_pages(self, first: int, last: int) -> None:
        self._send(Prepare(first, last))

    def load_adapter(self, adapter: Adapter) -> None:
        number = next(self._next_number)
        self._send(Load(number, adapter.info.path, adapter.digest))
        answers = self._expect(AdapterRead)
        for follower, answer in zip(self._followers, answers, strict=True):
            if answer.error is not None:
                self._queued.append(Forget(number))
                raise ModelError(f"rank {follower.rank}: {answer.error}")
        self._numbers[adapter] = number
        # Sequences may use it long after it was unloaded.
        weakref.finalize(adapter, self._queued.append, Forget(number))

    # ------------------------------------------------------------------------- life and death

    def descriptors(self) -> list[int]:
        """Readable between two messages if a rank has ended: nothing comes unasked."""
        return [follower.channel.connection.fileno() for follower in self._followers]

    def check(self) -> None:
        """Raises RankError if a rank has ended."""
        if select.select(self.descriptors(), [], [], 0)[0]:
            raise RankError(self._explain("its connection is closed"))

    def close(self) -> None:
        """End the other ranks; once is enough."""
        for follower in self._followers:
            follower.channel.close()
        for follower in self._followers:
            try:
                follower.process.wait(5)
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()

    def _send(self, message: ToRank) -> None:
        """To all of them, after what was queued; Begin tells each its own rank."""
        queued = self._queued[:]
        del self._queued[: len(queued)]
        for follower in self._followers:
            if isinstance(message, Begin):
                message = msgspec.structs.replace(message, rank=follower.rank)
            try:
                for each in (*queued, message):
                    follower.channel.send(each)
            except OSError as error:
                raise RankError(self._explain(str(error))) from error

    def _expect(self, kind: type[Answer]) -> list[Answer]:
        """The next message of each, of this kind."""
        answers = []
        for follower in self._followers:
            try:
                answer = follower.channel.receive()
            except OSError as error:
                raise RankError(self._explain(str(error))) from error
            if isinstance(answer, Failed):
                raise RankError(f"tensor parallel: rank {follower.rank}: {answer.message}")
            assert isinstance(answer, kind)
            answers.append(answer)
        return answers

    def _explain(self, error: str) -> str:
        """Which rank is to blame: one that was killed before one that ended for its sake."""
        deadline = time.monotonic() + _GOING_SECONDS
        while time.monotonic() < deadline:
            ended = {f.rank: f.process.poll() for f in self._followers}
            found = {rank: status for rank, status in ended.items() if status is not None}
            if found:
                rank = min(found, key=lambda rank: found[rank])  # signals are negative
                status = found[rank]
                how = f"signal {-status}" if status < 0 else f"exit status {status}"
                return f"tensor parallel: rank {rank} ended ({how})"
            time.sleep(0.02)
        return f"tensor parallel: a rank does not answer ({error})"
