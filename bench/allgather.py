"""The baseline of KV-Runahead (arXiv 2405.05329, there "TSP"): all ranks gather each layer's KV.

Every rank owns an equal run of the prompt's pages. In each layer it computes queries, keys and
values of its rows; then all ranks gather all keys and values, and go on when they have them:

    rank 0    q k v of 0 │ gather │ attention, MLP of 0; q k v of 1 │ gather │ ...
    rank 1    q k v of 0 │   KV   │ attention, MLP of 0; q k v of 1 │   KV   │ ...

Rows and kernels are the engine's own (``Decoder.forward_beside``). Two kinds of attention:
"causal" computes what the engine does; "dense" has every row see all keys of the prompt, which is
no result of the model's, but what the paper's baseline spent its time on.

This module is both the parent's side (``Gathering``) and, as a command, a rank.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from headstart.bench.line_process import LineProcess, answer_lines
from headstart.bench.links import Place, free_port
from headstart.bench.prefill_run import PrefillRun, kv_room
from headstart.engine.batch import Batch, build_batch
from headstart.engine.config import EngineConfig
from headstart.engine.models.loading import load_model
from headstart.engine.models.runner import warm_up
from headstart.engine.process.groups import gloo_group, meeting
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence
from headstart.engine.sequence import Sequence as Prompt

CAUSAL, DENSE = "causal", "dense"


class GatherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank of ``ranks``.

    model_path:  a converted model
    weights:     "auto", "f32", "bf16" or "int8"
    threads:     of the kernels
    max_tokens:  of the longest prompt
    address:     IP address of this rank's link
    store:       IP:PORT at which rank 0 introduces the ranks to one another
    timeout:     seconds a rank waits for the others
    """

    model_path: str
    rank: int
    ranks: int
    max_tokens: int
    address: str
    store: str
    weights: str = "auto"
    threads: int = 1
    timeout: float = 120.0


def chunk_pages(tokens: int, page_size: int, ranks: int) -> int:
    """Pages of each rank's chunk; the last may need fewer. Raises ValueError if it gets none."""
    pages = -(-tokens // page_size)
    each = -(-pages // ranks)
    if each * (ranks - 1) >= pages:
        raise ValueError(f"{tokens} tokens are too few for {ranks} equal chunks of whole pages")
    return each


class GatherRank:
    """A rank: the model, a KV pool, and the group of all ranks."""

    def __init__(self, config: GatherConfig) -> None:
        loaded = load_model(
            EngineConfig(
                model_path=config.model_path,
                backend="cpu",
                weights=config.weights,
                threads=config.threads,
                max_model_len=config.max_tokens,
                kv_memory=kv_room(config.model_path, config.max_tokens),
            )
        )
        self._runner = loaded.runner
        self._runner.prepare_pages(0, self._runner.num_pages)
        warm_up(self._runner)
        self._config = config
        self._pages = loaded.backend.kv_pages(self._runner.kv)
        self._page_size = loaded.backend.page_size
        self._page_bytes = self._pages.shape[2]
        self._group = _group(config)
        self._waited = 0.0
        self._tokens: list[int] = []
        self._attention = CAUSAL

    def prepare(self, tokens: list[int], attention: str) -> dict[str, Any]:
        """The prompt that will be started, the same on all ranks."""
        self._tokens, self._attention = tokens, attention
        return {}

    def start(self) -> dict[str, Any]:
        """Compute this rank's part of the prompt.

        ``token``: the greedy first one, of the last rank alone. ``end``: when it was there, by
        ``time.perf_counter()``. ``idle_s``: seconds in gathers. ``sent_bytes``: keys and values.
        """
        begin, self._waited = time.perf_counter(), 0.0
        config, tokens = self._config, self._tokens
        each = chunk_pages(len(tokens), self._page_size, config.ranks)
        start = config.rank * each * self._page_size
        end = min(start + each * self._page_size, len(tokens))
        last = config.rank == config.ranks - 1
        prompt = Prompt(
            0,
            array("i", tokens),
            len(tokens),
            SamplingParams(max_tokens=1, temperature=0.0),
            pages=list(range(-(-len(tokens) // self._page_size))),
        )
        entry = ScheduledSequence(prompt, start, end - start, samples=last)
        batch = build_batch([entry], self._page_size)
        if self._attention == DENSE:
            batch = _seeing_all(batch, prompt)
        logits = self._gathering(
            self._runner.run_beside(batch, self._runner.backend.tile_rows), each
        )
        token = self._runner.backend.argmax(logits)[0] if last else None
        now = time.perf_counter()
        layers = self._runner.decoder.config.num_layers
        return {
            "token": token,
            "end": now,
            "seconds": now - begin,
            "idle_s": self._waited,
            # Gloo's ring: a rank passes on every chunk but the one its neighbour began with.
            "sent_bytes": layers * (config.ranks - 1) * each * self._page_bytes,
        }

    def _gathering(self, layers: Generator[int, None, Tensor], each: int) -> Tensor:
        """The logits; before any row reads a layer's keys, all ranks' keys are in the pages."""
        gathered = -1
        while True:
            try:
                layer = next(layers)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
            if layer > gathered:
                self._gather(layer, each)
                gathered = layer

    def _gather(self, layer: int, each: int) -> None:
        """Chunk i is pages [i * each, (i + 1) * each) on every rank: one buffer, in its place."""
        begin = time.perf_counter()
        whole = self._pages[layer, : self._config.ranks * each]
        mine = whole[self._config.rank * each :][:each]
        self._group._allgather_base(whole.view(-1), mine.view(-1)).wait()
        self._waited += time.perf_counter() - begin


def _seeing_all(batch: Batch, prompt: Prompt) -> Batch:
    """The same rows, each of which sees all keys of the prompt."""
    pages = np.asarray(prompt.pages, dtype=np.int32)
    ranges = batch.kv_ranges
    ranges = replace(
        ranges,
        pages=pages,
        page_start=np.asarray([0, len(pages)], dtype=np.int32),
        visible=np.full_like(ranges.visible, len(prompt.token_ids)),
    )
    return replace(batch, kv_ranges=ranges)


def _group(config: GatherConfig) -> Any:
    """All ranks, over this rank's link; returns once they have met."""
    host, _, port = config.store.rpartition(":")
    timeout = timedelta(seconds=config.timeout)
    store = meeting(host, int(port), config.rank == 0, timeout)
    return gloo_group(store, config.rank, config.ranks, config.address, timeout)


# ------------------------------------------------------------------ the parent's side


@dataclass(frozen=True, slots=True)
class Gathering:
    """The ranks, ready, with one kind of attention: a Contestant."""

    ranks: list[LineProcess]
    attention: str

    def prepare(self, tokens: Sequence[int]) -> None:
        for rank in self.ranks:
            rank.send({"tokens": list(tokens), "attention": self.attention})
        for rank in self.ranks:
            rank.receive()

    def start(self) -> PrefillRun:
        for rank in self.ranks:
            rank.send({})
        answers = [rank.receive() for rank in self.ranks]
        return PrefillRun(
            end=answers[-1]["end"],
            token=answers[-1]["token"],
            idle_s=[answer["idle_s"] for answer in answers],
            sent_bytes=[answer["sent_bytes"] for answer in answers],
        )

    def with_attention(self, attention: str) -> Gathering:
        """The same ranks, asked for another kind of attention."""
        return replace(self, attention=attention)


@contextmanager
def start_gathering(
    places: Sequence[Place],
    model_path: str,
    *,
    max_tokens: int,
    weights: str = "auto",
    threads: int = 1,
    timeout: float = 120.0,
) -> Iterator[Gathering]:
    """A rank in each of ``places``; no answer may take longer than ``timeout`` seconds."""
    store = f"{places[0].address}:{free_port()}"
    with ExitStack() as stack:
        ranks = []
        for number, place in enumerate(places):
            command = [*place.prefix, sys.executable, "-m", "headstart.bench.allgather"]
            rank = stack.enter_context(LineProcess(f"all-gather rank {number}", command, timeout))
            config = GatherConfig(
                model_path=model_path,
                rank=number,
                ranks=len(places),
                max_tokens=max_tokens,
                address=place.address,
                store=store,
                weights=weights,
                threads=threads,
                timeout=timeout,
            )
            rank.send(msgspec.to_builtins(config))
            ranks.append(rank)
        for rank in ranks:
            rank.receive()
        yield Gathering(ranks, CAUSAL)


def main() -> None:
    """A rank: its configuration is the first line; then a prompt, and a line that starts it."""
    rank = GatherRank(msgspec.convert(msgspec.json.decode(sys.stdin.readline()), GatherConfig))
    print('{"ready": true}', flush=True)
    answer_lines(lambda request: rank.prepare(**request) if request else rank.start())


if __name__ == "__main__":
    main()
