"""Every backend this machine can run, by number format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from headstart.kernels.backend import AttentionShape, Backend, RopeTable
from headstart.kernels.devices import instruction_sets, load_backend
from headstart.kernels.ranges import KVRanges, Range


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ranges_of(ranges: Sequence[tuple[Any, ...]]) -> KVRanges:
    """KVRanges from (pages, rows, visible) or (pages, rows, visible, first key)."""
    return KVRanges.of([Range(*each) for each in ranges])


class Scene:
    """The same random keys, values and queries in the pools of two backends."""

    def __init__(self, backend: Backend, shape: AttentionShape, tokens: int, rows: int) -> None:
        self.reference = load_backend("reference", isa="auto", weights="f32", threads=2)
        self.backend, self.shape, self.rows = backend, shape, rows
        generator = torch.Generator().manual_seed(tokens * 31 + rows)
        pages = -(-tokens // 32)
        # Pages in random order: whoever forgets the page table gets other keys.
        self.pages = torch.randperm(pages + 3, generator=generator)[:pages].tolist()
        self.pools = {b.name: b.allocate_kv(shape, 2, pages + 3) for b in (backend, self.reference)}
        heads = shape.heads + 2 * shape.kv_heads
        kv = torch.randn(tokens, heads * shape.head_dim, generator=generator)
        self.query = torch.randn(rows, heads * shape.head_dim, generator=generator) * 2
        angle = torch.rand(max(tokens, rows) + 1, shape.head_dim // 2, generator=generator) * 6
        self.rope = RopeTable(angle.cos(), angle.sin())
        slots = [self.pages[t // 32] * 32 + t % 32 for t in range(tokens)]
        self.scratch = [self.spare_slot(pages, i) for i in range(rows)]
        for b in (backend, self.reference):
            self.store(b, kv, list(range(tokens)), slots, layer=1)

    def spare_slot(self, pages: int, row: int) -> int:
        used = set(self.pages)
        spare = next(p for p in range(pages + 3) if p not in used)
        return spare * 32 + row % 32

    def store(
        self, b: Backend, qkv: torch.Tensor, positions: list[int], slots: list[int], layer: int
    ):
        return b.rope_and_store(
            qkv, None, None, 1e-5, self.rope,
            torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32),
            self.shape, self.pools[b.name], layer,
        )  # fmt: skip

    def attend(self, ranges: Sequence[tuple[Any, ...]]):
        """(result, expected) of layer 1 under ``ranges``, float32."""
        results = []
        for b in (self.backend, self.reference):
            q = self.store(b, self.query, list(range(self.rows)), self.scratch, layer=0)
            plan = b.plan_attention(self.rows, ranges_of(ranges), self.shape)
            out = b.attend(q, self.pools[b.name], 1, plan)
            data = out if isinstance(out, torch.Tensor) else out.data
            results.append(data.float().clone())
        return results[0], results[1]


@pytest.fixture
def oracle() -> Backend:
    return load_backend("reference", isa="auto", weights="f32", threads=2)


@pytest.fixture
def scene() -> type[Scene]:
    return Scene


@pytest.fixture
def make_ranges() -> Callable[..., KVRanges]:
    return ranges_of
