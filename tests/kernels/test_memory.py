"""Memory in huge pages, and memory that processes share."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from headstart.kernels.backend import AttentionShape
from headstart.kernels.devices import load_backend
from headstart.kernels.memory import BLOCK, HUGE_PAGE, Arena, PrivateMemory, SharedMemory, attach
from headstart.kernels.packing import pack_int8


def test_an_arena_keeps_copies():
    arena = Arena()
    tensors = [
        torch.randint(-127, 128, (3, 5), dtype=torch.int8),
        torch.randn(7),
        torch.randn(2, 3, 4).bfloat16(),
        torch.empty(0),
        torch.randn(6, 4).T,
    ]
    copies = [arena.place(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype is tensor.dtype
        assert copy.data_ptr() % 64 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, tensor)
    before = copies[1].clone()
    tensors[1].zero_()
    copies[2].zero_()
    assert torch.equal(copies[1], before)


def test_an_arena_takes_more_memory_when_it_is_full():
    arena = Arena()
    large = torch.ones(BLOCK // 4 + 1)
    small = [arena.place(torch.full((BLOCK // 3,), i, dtype=torch.int8)) for i in range(4)]
    copy = arena.place(large)
    del arena
    gc.collect()
    assert torch.equal(copy, large)
    assert [int(tensor.min()) for tensor in small] == [0, 1, 2, 3]


def test_private_memory_is_zero_and_may_be_huge():
    memory = PrivateMemory(HUGE_PAGE + 1)
    assert len(memory.buffer) == 2 * HUGE_PAGE
    assert not torch.frombuffer(memory.buffer, dtype=torch.int64).any()


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8"])
def test_the_pool_can_be_mapped_by_others_where_that_is_asked_for(weights):
    shape = AttentionShape(4, 2, 64)
    alone = load_backend("cpu", isa="auto", weights=weights, threads=1)
    assert alone.kv_memory(alone.allocate_kv(shape, 2, 3)) is None
    backend = load_backend("cpu", isa="auto", weights=weights, threads=1, shared=True)
    pool = backend.allocate_kv(shape, 2, 3)
    memory = backend.kv_memory(pool)
    assert isinstance(memory, SharedMemory)
    assert memory.descriptor is not None
    pool.data.fill_(1.5)
    seen = torch.frombuffer(
        mmap.mmap(memory.descriptor, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        dtype=pool.data.dtype,
    )
    assert (seen == 1.5).all()
    assert len(attach(memory.descriptor)) == seen.numel() * seen.element_size()


def test_weights_are_copied_unless_processes_share_them():
    panels = pack_int8(torch.ones(32, 8, dtype=torch.int8), torch.ones(32), None)
    for shared in (False, True):
        backend = load_backend("cpu", isa="auto", weights="int8", threads=1, shared=shared)
        layer = backend.packed_weight(panels)
        assert torch.equal(layer.panels.data, panels.data)
        assert (layer.panels.data.data_ptr() == panels.data.data_ptr()) is shared
        assert layer.weight_ptr == layer.panels.data.data_ptr()
