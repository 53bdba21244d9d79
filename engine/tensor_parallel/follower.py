"""A rank beside rank 0: has its share of the model, and computes what rank 0 says, in its order.

    python -m headstart.engine.tensor_parallel.follower      (standard input: a socket to rank 0)

It knows nothing of sequences, caches or sampling: page ids come with the batches. The end of its
input is its own end.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Generator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from headstart.engine.errors import HeadstartError, ModelError, RankError
from headstart.engine.models.adapters import Adapter, load_adapter
from headstart.engine.models.loading import set_up
from headstart.engine.models.runner import ModelRunner
from headstart.engine.models.share import Share
from headstart.engine.process.groups import meeting, use_gpu
from headstart.engine.tensor_parallel.collective import HANG_SECONDS, HOST, Collective
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
    Load,
    Loaded,
    Prepare,
    Run,
    ToRank,
)


class Follower:
    """Made from ``begin``: loads, then follows. Raises HeadstartError where it cannot start, and
    RankError or OSError when another rank is gone."""

    def __init__(self, begin: Begin, channel: Channel) -> None:
        self._channel = channel
        self._share = Share(begin.rank, begin.config.tensor_parallel)
        use_gpu(begin.rank)
        self._setup = set_up(begin.config)
        vocab_size = self._setup.model.vocab_size
        ranks = Collective(self._share, vocab_size, lambda error: f"a rank is gone: {error}")
        decoder = self._setup.decoder(self._share, ranks)
        channel.send(Loaded())
        backend = self._setup.backend
        allocate = channel.receive()
        assert isinstance(allocate, Allocate)
        self._runner = ModelRunner(decoder, backend, allocate.num_pages)
        channel.send(Allocated())
        store = meeting(HOST, begin.store_port, False, timedelta(seconds=HANG_SECONDS))
        ranks.connect(store, backend.kv_pages(self._runner.kv).device)
        self._adapters: dict[int, Adapter] = {}
        self._smoothing = cache(self._setup.smoothing)
        self._beside: dict[int, Generator[int, None, Tensor]] = {}  # by place

    def follow(self) -> NoReturn:
        """Do what rank 0 says, until it is gone: then OSError."""
        while True:
            match self._channel.receive():
                case Run(batch):
                    self._runner.run(batch.batch(self._adapters))
                case Beside(batch, tile_rows, place):
                    here = batch.batch(self._adapters)
                    self._beside[place] = self._runner.run_beside(here, tile_rows, place)
                case Advance(place):
                    if next(self._beside[place], None) is None:
                        del self._beside[place]
                case Drop(place):
                    self._beside.pop(place, None)
                case Prepare(first, last):
                    self._runner.prepare_pages(first, last)
                case Load(number, path, digest):
                    self._channel.send(AdapterRead(self._load(number, path, digest)))
                case Forget(number):
                    self._adapters.pop(number, None)

    def _load(self, number: int, path: str, digest: bytes) -> str | None:
        """Read an adapter; why not, if it cannot be."""
        setup = self._setup
        try:
            adapter = load_adapter(
                str(number), Path(path), setup.model, setup.backend, self._smoothing(), self._share
            )
        except ModelError as error:
            return str(error)
        if adapter.digest != digest:
            return f"the adapter in {path} is another one now"
        self._adapters[number] = adapter
        return None


def serve(begin: Begin, channel: Channel) -> int:
    """Start as told, and follow; returns the exit status."""
    try:
        try:
            follower = Follower(begin, channel)
        except (HeadstartError, RuntimeError, MemoryError) as error:
            lines = str(error).splitlines()
            channel.send(Failed(lines[0] if lines else type(error).__name__))
            return 1
        follower.follow()
    except RankError:  # rank 0 notices as well, and says it
        return 1
    except OSError:  # rank 0 has ended
        return 0


def main() -> None:
    # They reach the whole process group; rank 0 decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()), ToRank)
    try:
        begin = channel.receive()
    except OSError:
        sys.exit(0)
    assert isinstance(begin, Begin)
    # What the ranks agree on, rank 0 has said.
    level = max(logging.getLevelNamesMapping()[begin.config.log_level.upper()], logging.WARNING)
    logging.basicConfig(level=level, format=f"%(levelname)s: rank {begin.rank}: %(message)s")
    sys.exit(serve(begin, channel))


if __name__ == "__main__":
    main()
