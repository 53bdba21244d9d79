"""Ranged attention of the gpu backend against the float32 oracle.

Pages are packed here, from the layout's description in kernels/gpu/kv.py, so that a kernel that
reads and a kernel that writes cannot agree on the same mistake.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from headstart.kernels import reference
from headstart.kernels.backend import AttentionShape
from headstart.kernels.gpu.backend import GpuBackend
from headstart.kernels.gpu.device import Config
from headstart.kernels.gpu.tuning import Tuner
from headstart.kernels.ranges import KVRanges, Range

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WEIGHTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
EIGHT_BITS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


ROW, TILE = Config(16, 32), Config(32, 32)


class SmallTiles(Tuner):
    """Tiles small enough for a test to have several of each."""

    def __init__(self, device, row, tile):
        super().__init__(device)
        self._by_kernel = {"row": row, "tile": tile}

    def choose(self, kernel, *rest, **more):
        return self._by_kernel[kernel]


class Scene:
    """Random keys, values and queries, in pages of the backend and as plain tensors."""

    def __init__(
        self, device, dtype, shape, tokens, rows, *, format="auto", page=32, seed=0,
        row=ROW, tile=TILE,
    ):  # fmt: skip
        self.backend = GpuBackend(
            device,
            SmallTiles(device, row, tile),
            weights=WEIGHTS[dtype],
            kv_format=format,
            page_size=page,
        )
        self.shape, self.rows, self.page = shape, rows, page
        random_ = torch.Generator().manual_seed(seed * 1000 + tokens * 31 + rows)
        pages = -(-tokens // page)
        # Pages in random order: whoever forgets the page table gets other keys.
        self.pages = torch.randperm(pages + 3, generator=random_)[:pages].tolist()
        size = (tokens, shape.kv_heads, shape.head_dim)
        self.keys = torch.randn(size, generator=random_).to(dtype).float()
        self.values = torch.randn(size, generator=random_).to(dtype).float()
        self.query = (torch.randn(rows, shape.heads, shape.head_dim, generator=random_) * 2).to(
            dtype
        )
        self.pool = self.backend.allocate_kv(shape, 2, pages + 3)
        self._fill()

    def _fill(self):
        """Write keys and values into layer 1's pages, and read them back as they are stored."""
        layout, shape, page = self.pool.layout, self.shape, self.page
        halves = torch.stack([self.keys, self.values])  # [2, tokens, kv_heads, head_dim]
        scales = None
        if layout.format != "same":
            dtype, most = EIGHT_BITS[layout.format]
            scales = halves.abs().amax(-1) / most
            codes = halves / scales[..., None]
            codes = codes.round().to(dtype) if dtype is torch.int8 else codes.to(dtype)
            self.keys, self.values = (codes.float() * scales[..., None]).unbind()
            halves = codes.view(torch.uint8)
        else:
            halves = halves.to(layout.dtype)
        data = self.pool.data[1].cpu()
        for token in range(len(self.keys)):
            number, at = self.pages[token // page], token % page
            content = data[number]
            values = content[: layout.values * layout.element.itemsize]
            values = values.view(halves.dtype).view(2, shape.kv_heads, page, shape.head_dim)
            values[:, :, at] = halves[:, token]
            if scales is not None:
                tail = content[layout.values :].view(torch.float32)
                tail.view(2, shape.kv_heads, page)[:, :, at] = scales[:, token]
        self.pool.data[1].copy_(data)

    def attend(self, ranges, query=None):
        """(out, lse) of the backend and of the oracle, float32 on the CPU."""
        query = self.query if query is None else query
        plan = self.backend.plan_attention(self.rows, kv_ranges(ranges), self.shape)
        on_device = query.to(self.backend.on.torch_device)
        found = self.backend.attend_with_lse(on_device, self.pool, 1, plan)
        out, lse = (tensor.cpu().float() for tensor in found)
        return (out.view(self.rows, self.shape.heads, -1), lse), self.expected(ranges, query)

    def expected(self, ranges, query):
        out = torch.zeros(self.rows, self.shape.heads, self.shape.head_dim)
        lse = torch.full((self.rows, self.shape.heads), -math.inf)
        for pages, rows, visible, _ in ranges:
            tokens = [
                self.pages.index(p) * self.page + i
                for p in pages
                for i in range(self.page)
                if self.pages.index(p) * self.page + i < len(self.keys)
            ]
            part = reference.attend(
                query[rows], self.keys[tokens], self.values[tokens], torch.tensor(visible),
                1 / math.sqrt(self.shape.head_dim),
            )  # fmt: skip
            out[rows], lse[rows] = reference.merge([(out[rows], lse[rows]), part])
        return out, lse


def kv_ranges(ranges):
    return KVRanges.of([Range(*each) for each in ranges])


def staircase(scene, keys):
    rows = list(range(scene.rows))
    return [(scene.pages, rows, [keys - scene.rows + i + 1 for i in rows], 0)]


def close(dtype, result, expected):
    for got, want in zip(result, expected, strict=True):
        assert not got.isnan().any()
        assert torch.equal(got.isinf(), want.isinf())
        finite = ~want.isinf()
        error = (got[finite] - want[finite]).abs().max() if finite.any() else 0.0
        assert error < TOLERANCE[dtype] * max(1, want[finite].abs().max() if finite.any() else 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 32), (8, 1, 128), (7, 1, 16), (2, 2, 256), (6, 3, 80), (4, 2, 96)],
)
@pytest.mark.parametrize(("keys", "rows"), [(1, 1), (33, 5), (100, 37), (160, 1)])
@pytest.mark.smoke
def test_staircase(device, dtype, heads, kv_heads, head_dim, keys, rows):
    scene = Scene(device, dtype, AttentionShape(heads, kv_heads, head_dim), keys, rows)
    close(dtype, *scene.attend(staircase(scene, keys)))


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (6, 3, 80), (4, 1, 128)])
@pytest.mark.parametrize(("keys", "rows"), [(33, 5), (150, 30)])
@pytest.mark.smoke
def test_eight_bit_keys_and_values(device, dtype, format, heads, kv_heads, head_dim, keys, rows):
    shape = AttentionShape(heads, kv_heads, head_dim)
    scene = Scene(device, dtype, shape, keys, rows, format=format)
    close(dtype, *scene.attend(staircase(scene, keys)))


@pytest.mark.parametrize("page", [16, 64, 256])
def test_page_sizes(device, dtype, page):
    """Tiles longer and shorter than a page, and keys that end inside one."""
    scene = Scene(device, dtype, AttentionShape(6, 2, 64), 301, 20, page=page)
    close(dtype, *scene.attend(staircase(scene, 301)))


@pytest.mark.parametrize("seed", range(6))
def test_cut_anywhere_and_merge_equals_the_whole(device, dtype, seed):
    rng = random.Random(seed)
    keys = rng.randint(2, 420)
    rows = min(rng.randint(1, 40), keys)
    group = rng.randint(1, 8)
    scene = Scene(device, dtype, AttentionShape(2 * group, 2, 32), keys, rows, seed=seed)
    (pages, all_rows, visible, _), *_ = staircase(scene, keys)
    whole, expected = scene.attend(staircase(scene, keys))
    close(dtype, whole, expected)
    cuts = sorted({0, len(pages), *(rng.randrange(len(pages) + 1) for _ in range(3))})
    parts = []
    for a, b in itertools.pairwise(cuts):
        seen = [min(max(v - a * 32, 0), (b - a) * 32) for v in visible]
        parts.append((pages[a:b], all_rows, seen, a * 32))
    for order in (parts, rng.sample(parts, len(parts))):
        close(dtype, scene.attend(order)[0], expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.smoke
def test_shared_ranges_and_own_ones(device, dtype, seed):
    """RelayAttention (arXiv 2402.14808): rows of several sequences read one full range."""
    rng = random.Random(seed)
    rows, group = rng.choice([2, 9, 40]), rng.choice([1, 3, 4])
    keys = rng.choice([200, 700])
    scene = Scene(device, dtype, AttentionShape(group, 1, 64), keys, rows, seed=seed)
    shared = rng.randrange(1, keys // 32)
    ranges = [(scene.pages[:shared], list(range(rows)), [shared * 32] * rows, 0)]
    for row in rng.sample(range(rows), rows):
        seen = rng.randint(0, keys - shared * 32)
        own = scene.pages[shared : shared + -(-seen // 32)]
        ranges.append((own, [row], [seen], shared * 32))
    close(dtype, *scene.attend(ranges))


def test_rows_in_any_order_and_rows_without_keys(device, dtype):
    scene = Scene(device, dtype, AttentionShape(6, 2, 64), 96, 6)
    ranges = [(scene.pages[:2], [4, 1], [64, 64], 0), (scene.pages[2:], [1, 3, 4], [5, 32, 0], 64)]
    result, expected = scene.attend(ranges)
    close(dtype, result, expected)
    assert (result[0][[0, 2, 5]] == 0).all()
    assert (result[1][[0, 2, 5]] == -math.inf).all()


def test_a_batch_of_no_ranges(device, dtype):
    scene = Scene(device, dtype, AttentionShape(2, 1, 32), 32, 3)
    (out, lse), _ = scene.attend([])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_one_sequence_is_split_among_the_processors(device, dtype):
    """Split-KV decoding: 2,000 keys of one row are several items, and a merge."""
    scene = Scene(device, dtype, AttentionShape(4, 1, 64), 2000, 1)
    plan = scene.backend.plan_attention(1, kv_ranges(staircase(scene, 2000)), scene.shape)
    assert plan.capacity.row_items > 4
    assert plan.capacity.merge_rows == 1
    close(dtype, *scene.attend(staircase(scene, 2000)))


def test_strided_queries(device, dtype):
    scene = Scene(device, dtype, AttentionShape(4, 2, 64), 70, 8)
    wide = torch.full((8, 9, 64), math.nan, dtype=dtype)
    wide[:, 2:6] = scene.query
    result, expected = scene.attend(staircase(scene, 70), wide[:, 2:6])
    close(dtype, result, expected)


def test_what_lies_behind_the_last_key_does_not_leak(device, dtype):
    """A page that once held another sequence's overflow is masked, not multiplied by zero."""
    scene = Scene(device, dtype, AttentionShape(4, 2, 64), 64, 2)
    scene.keys[40:], scene.values[40:] = math.nan, math.inf
    scene._fill()
    ranges = [(scene.pages, [0, 1], [39, 40], 0)]
    result, _ = scene.attend(ranges)
    scene.keys[40:], scene.values[40:] = 0, 0
    close(dtype, result, scene.expected(ranges, scene.query))


@pytest.mark.parametrize(("keys", "rows"), [(100, 37), (300, 1)])
def test_bfloat16_through_float32(device, keys, rows):
    """The interpreter computes bfloat16 wrongly, so its path is the float32 one on values that
    bfloat16 holds: what is rounded on the way in is the same, and the kernels are one source."""
    shape = AttentionShape(9, 3, 64)
    scene = Scene(device, torch.float32, shape, keys, rows)
    scene.keys, scene.values = (t.bfloat16().float() for t in (scene.keys, scene.values))
    scene.query = scene.query.bfloat16().float()
    scene._fill()
    result, expected = scene.attend(staircase(scene, keys))
    close(torch.bfloat16, [t.bfloat16().float() for t in result], expected)


def test_ranges_that_contradict_themselves(device):
    backend = Scene(device, torch.float32, AttentionShape(4, 2, 64), 1, 1).backend
    shape = AttentionShape(4, 2, 64)
    for ranges, message in (
        (([0], [3], [1], 0), "names row 3 of 2"),
        (([0], [1], [33], 0), "sees 33 keys of a range of 32"),
        (([0], [1], [3], 33), "begins at key 33, which is not the start of a page"),
        (([0], [1, 1], [3, 4], 0), "names row 1 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.plan_attention(2, kv_ranges([ranges]), shape)


@pytest.mark.parametrize("head_dim", [8, 24, 72, 112, 272, 512])
def test_a_head_size_without_kernels_is_refused(device, head_dim):
    backend = Scene(device, torch.float32, AttentionShape(4, 2, 64), 1, 1).backend
    with pytest.raises(ValueError, match=f"head size {head_dim} is not supported"):
        backend.allocate_kv(AttentionShape(4, 2, head_dim), 1, 1)


def test_the_pool_has_the_size_that_was_planned(device):
    for format in ("auto", "int8", "fp8"):
        scene = Scene(device, torch.float16, AttentionShape(6, 3, 80), 1, 1, format=format)
        pool = scene.backend.allocate_kv(scene.shape, 3, 5)
        assert pool.data.numel() == 5 * scene.backend.kv_bytes_per_page(scene.shape, 3)
        assert pool.data.shape[2] % 16 == 0
