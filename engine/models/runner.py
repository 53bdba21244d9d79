"""ModelRunner: a model, its KV pool and its backend; ``run(batch)`` returns logits."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from headstart.engine.batch import Batch, build_batch
from headstart.engine.errors import ConfigError, ModelError
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decode_graphs import DecodeGraphs
from headstart.engine.models.decoder import PLACES, Decoder
from headstart.engine.models.formats.int8 import read_int8
from headstart.engine.models.parameters import read_float
from headstart.engine.models.ranks import OneRank, Ranks
from headstart.engine.models.rope import rope_tables
from headstart.engine.models.share import WHOLE, Share
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import Adapter, ScheduledSequence, Sequence
from headstart.kernels.backend import AttentionShape, Backend, RopeTable

logger = logging.getLogger(__name__)


def load_decoder(
    folder: Path,
    config: ModelConfig,
    backend: Backend,
    weights: str,
    max_len: int,
    share: Share = WHOLE,
    ranks: Ranks | None = None,
) -> Decoder:
    """The model of ``folder`` in the weight format ``weights``, for positions below ``max_len``.

    Or ``share`` of it, ``ranks`` having the rest. ``config`` is the whole model's.
    """
    read = read_int8 if weights == "int8" else read_float
    rope = RopeTable(*rope_tables(config, max_len))
    own = share.config(config)
    try:
        parameters = share.parameters(read(config, folder), config)
        return Decoder(own, backend, parameters, rope, ranks or OneRank())
    except ValueError as error:  # a shape this backend does not compute
        raise ModelError(f"{folder.name}: {error}") from error


class Followers(Protocol):
    """Processes that have to compute what this one does, in the same order."""

    def run(self, batch: Batch) -> None: ...

    def begin_beside(self, batch: Batch, tile_rows: int, place: int) -> None: ...

    def advance_beside(self, place: int) -> None:
        """Compute the next piece of what is there."""
        ...

    def drop_beside(self, place: int) -> None:
        """Compute no more of it. Never fails: it is called while generators are collected."""
        ...

    def prepare_pages(self, first: int, last: int) -> None: ...

    def load_adapter(self, adapter: Adapter) -> None:
        """Batches may name it from now on. Raises ModelError where it cannot be read there."""
        ...

    def descriptors(self) -> list[int]:
        """What becomes readable when one of them has ended, and nothing runs."""
        ...

    def check(self) -> None:
        """Raises RankError if one has ended."""
        ...

    def close(self) -> None: ...


class NoFollowers:
    """This process computes alone, or is told itself."""

    def run(self, batch: Batch) -> None: ...

    def begin_beside(self, batch: Batch, tile_rows: int, place: int) -> None: ...

    def advance_beside(self, place: int) -> None: ...

    def drop_beside(self, place: int) -> None: ...

    def prepare_pages(self, first: int, last: int) -> None: ...

    def load_adapter(self, adapter: Adapter) -> None: ...

    def descriptors(self) -> list[int]:
        return []

    def check(self) -> None: ...

    def close(self) -> None: ...


class ModelRunner:
    """Owns the decoder and the tensors of the KV pool, and has ``followers`` do the same."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        num_pages: int,
        followers: Followers | None = None,
    ) -> None:
        self.followers = followers or NoFollowers()
        self.decoder = decoder
        self.backend = backend
        self.num_pages = num_pages
        config = decoder.config
        try:
            self.kv = backend.allocate_kv(decoder.shape, config.num_layers, num_pages)
        except ValueError as error:
            raise ModelError(str(error)) from error
        except (RuntimeError, MemoryError, OSError) as error:
            raise ConfigError(
                f"cannot allocate {num_pages} KV pages: use a smaller --kv-memory"
            ) from error
        self._places: set[int] = set()  # taken beside the steps
        self.graphs = DecodeGraphs(decoder, backend, self.kv)

    def prepare_pages(self, first: int, last: int) -> None:
        """Have the memory of pages ``[first, last)`` ready, so that no request waits for it."""
        self.followers.prepare_pages(first, last)
        self.backend.prepare_pages(self.kv, first, last)

    def run(self, batch: Batch) -> Tensor:
        """Logits ``[logit rows, vocab]``, float32, valid until the next call."""
        self.followers.run(batch)
        replayed = self.graphs.run(batch)
        return self.decoder.forward(batch, self.kv) if replayed is None else replayed

    def timed(self, batch: Batch) -> tuple[float, float]:
        """Seconds that ``batch`` takes when it is not replayed, and those of them in attention."""
        decoder, begin = self.decoder, time.perf_counter()
        before, counted = decoder.attention_seconds, decoder.times_attention
        decoder.times_attention = True
        try:
            self.followers.run(batch)
            decoder.forward(batch, self.kv)
            self.backend.synchronize()
        finally:
            decoder.times_attention = counted
        return time.perf_counter() - begin, decoder.attention_seconds - before

    def run_beside(
        self, batch: Batch, tile_rows: int, place: int | None = None
    ) -> Generator[int, None, Tensor]:
        """The same in pieces of so many rows (``Decoder.forward_beside``): others may run between
        them. ``place``: by default one that is free."""
        if place is None:
            place = min(set(range(PLACES)) - self._places)
        self._places.add(place)
        try:
            self.followers.begin_beside(batch, tile_rows, place)
            pieces = self.decoder.forward_beside(batch, self.kv, tile_rows, place)
            while True:
                self.followers.advance_beside(place)
                try:
                    layer = next(pieces)
                except StopIteration as end:
                    logits: Tensor = end.value
                    return logits
                try:
                    yield layer
                except GeneratorExit:
                    self.followers.drop_beside(place)
                    raise
        finally:
            self._places.discard(place)


def attention_shape(config: ModelConfig) -> AttentionShape:
    return AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)


def warm_up(runner: ModelRunner) -> None:
    """Touch every weight and kernel once, so that the first request does not pay for it."""
    for rows in (1, min(16, runner.num_pages * runner.backend.page_size)):
        runner.run(_chunk(0, rows, runner.backend.page_size))
    runner.backend.synchronize()


def chunk_seconds(runner: ModelRunner, start: int, rows: int) -> float:
    """Seconds of a step with nothing but ``rows`` rows of a prompt from ``start`` on; overwrites
    the first KV pages, over and over which the tokens before it are those of."""
    batch = _chunk(start, rows, runner.backend.page_size)
    begin = time.perf_counter()
    runner.run(batch)
    runner.backend.synchronize()
    return time.perf_counter() - begin


def measured_activations(decoder: Decoder, backend: Backend, rows: int) -> int | None:
    """Bytes that the largest batch takes beside weights and KV, where the device can tell."""
    rows = min(rows, decoder.max_len)

    def work() -> None:
        runner = ModelRunner(decoder, backend, -(-rows // backend.page_size))
        runner.run(_chunk(0, rows, backend.page_size))

    return backend.peak_memory(work)


def _chunk(start: int, rows: int, page_size: int) -> Batch:
    """Rows ``[start, start + rows)`` of a sequence of tokens 0; those before them are in the first
    pages over and over."""
    pages = -(-rows // page_size)
    before = [page % pages for page in range(start // page_size)]
    length = start + rows
    seq = Sequence(0, array("i", bytes(4 * length)), length, SamplingParams(max_tokens=1))
    seq.pages = before + list(range(-(-length // page_size) - len(before)))
    return build_batch([ScheduledSequence(seq, start, rows, True)], page_size)
