"""Captured decoding steps: what is replayed is what would be computed.

Without a GPU a captured step is a list of launches and torch operations with the tensors they were
given (InterpretedDevice.capture): a number that python baked in at capture is wrong here as well.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headstart.engine.batch import Batch, Pending, SharedRange, build_batch
from headstart.engine.models.config import ModelConfig
from headstart.engine.models.decode_graphs import DecodeGraphs
from headstart.engine.models.runner import ModelRunner, load_decoder
from headstart.engine.sampling.params import SamplingParams
from headstart.engine.sequence import ScheduledSequence, Sequence
from headstart.kernels.devices import load_backend

# Spare rows compute whatever memory held, and the interpreter is numpy, which mentions infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

PAGE = 32
NUM_PAGES = 40


@pytest.fixture(scope="module")
def runner(tiny_model: Callable[..., Path]) -> ModelRunner:
    """A model with a full pool, whose pages hold the keys of one long sequence each way."""
    folder = tiny_model("llama")
    backend = load_backend("gpu", isa="auto", weights="f32", threads=2)
    decoder = load_decoder(folder, ModelConfig.from_folder(folder), backend, "f32", 512)
    made = ModelRunner(decoder, backend, NUM_PAGES)
    generator = torch.Generator().manual_seed(3)
    for layer in made.kv.layers:
        layer.elements.copy_(torch.randn(layer.elements.shape, generator=generator))
    return made


def decoding(lengths: list[int], seed: int, shared_pages: int = 0) -> list[ScheduledSequence]:
    """Sequences that compute their last token, in random pages; the first ones may be common."""
    rng = random.Random(seed)
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    common, pages = pages[:shared_pages], pages[shared_pages:]
    found = []
    for index, length in enumerate(lengths):
        tokens = array("i", [rng.randrange(320) for _ in range(length)])
        seq = Sequence(index, tokens, length, SamplingParams(max_tokens=1))
        needed = -(-length // PAGE) - shared_pages
        seq.pages = [*common, *pages[:needed]]
        pages = pages[needed:]
        found.append(ScheduledSequence(seq, length - 1, 1, True))
    return found


def compare(runner: ModelRunner, graphs: DecodeGraphs, batch: Batch) -> None:
    """The replayed step's logits, and the KV it writes, are those of the plain one."""
    before = runner.kv.data.clone()
    expected = runner.decoder.forward(batch, runner.kv).clone()
    written = runner.kv.data.clone()
    runner.kv.data.copy_(before)
    replayed = graphs.replayed
    found = graphs.run(batch)
    assert found is not None
    assert graphs.replayed == replayed + 1
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    # What a step before has left in places that this one does not use is not written again.
    keys = runner.kv.data.view(torch.float32)
    assert torch.allclose(keys, written.view(torch.float32), atol=1e-4, rtol=1e-4)


def test_other_batches_than_the_captured_one(runner: ModelRunner) -> None:
    """Shorter and longer ones, fewer rows, other pages; captured with the first."""
    graphs = DecodeGraphs(runner.decoder, runner.backend, runner.kv)
    for seed, lengths in enumerate(([5, 40, 64], [33, 1, 200, 90], [400, 2, 65], [32, 31, 33, 96])):
        compare(runner, graphs, build_batch(decoding(lengths, seed), PAGE))
    assert list(graphs._captured) == [4]


def test_shared_ranges_replay(runner: ModelRunner) -> None:
    """Captured without, replayed with prefixes read once (RelayAttention), and without again."""
    graphs = DecodeGraphs(runner.decoder, runner.backend, runner.kv)
    plain = build_batch(decoding([70, 80, 90, 100, 75], 1), PAGE)
    compare(runner, graphs, plain)
    some = decoding([130, 140, 129, 150, 131, 133, 160], 2, shared_pages=4)
    nested = [SharedRange(0, 64, list(range(7))), SharedRange(64, 128, [0, 2, 3, 6])]
    compare(runner, graphs, build_batch(some, PAGE, nested))
    compare(runner, graphs, plain)


def test_tokens_that_only_the_device_knows(runner: ModelRunner) -> None:
    graphs = DecodeGraphs(runner.decoder, runner.backend, runner.kv)
    batch = build_batch(decoding([10, 50, 20], 3), PAGE)
    expected = runner.decoder.forward(batch, runner.kv).clone()
    known = batch.token_ids.clone()
    sampled = torch.tensor([7, int(known[2]), int(known[0])], dtype=torch.int32)
    blank = known.clone()
    blank[[0, 2]] = 0
    pending = Pending(torch.tensor([0, 2]), torch.tensor([2, 1]), sampled)
    hidden = Batch(blank, batch.positions, batch.slots, batch.kv_ranges, None, [], pending)
    for _ in range(2):  # captured, then replayed
        found = graphs.run(hidden)
        assert found is not None
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_replayed(runner: ModelRunner) -> None:
    """Rows whose logits nobody wants; more shared ranges than there are places."""
    graphs = DecodeGraphs(runner.decoder, runner.backend, runner.kv)
    chunk = decoding([10], 4)[0]._replace(start=0, num_tokens=10)
    assert graphs.run(build_batch([chunk], PAGE)) is None
    some = decoding([220], 5)
    many = [SharedRange(PAGE * i, PAGE * (i + 1), [0]) for i in range(6)]
    batch = build_batch(some, PAGE, many)
    assert graphs.run(batch) is None
    assert graphs.replayed == 0


def test_a_backend_without_graphs(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    backend = load_backend("reference", isa="auto", weights="f32", threads=2)
    decoder = load_decoder(folder, ModelConfig.from_folder(folder), backend, "f32", 512)
    runner = ModelRunner(decoder, backend, 4)
    batch = build_batch(decoding([10], 6), PAGE)
    batch.slots[:] = 9
    batch.kv_ranges.pages[:] = 0
    assert runner.graphs.run(batch) is None
    assert len(runner.run(batch)) == 1


def test_a_value_read_while_capturing_is_an_error(runner: ModelRunner) -> None:
    """On a GPU it is one, and it has to be found where there is none."""
    values = torch.ones(3)
    with pytest.raises(RuntimeError, match="a value was read while a graph was captured"):
        runner.backend.on.capture(lambda: values * float(values.sum()))
