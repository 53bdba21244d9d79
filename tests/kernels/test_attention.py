"""Ranged attention on every instruction set against the float32 oracle."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from headstart.kernels import reference
from headstart.kernels.backend import AttentionShape, load_backend

TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}  # bf16 keys, values and probabilities: 8 bits of mantissa


@pytest.fixture(params=["f32", "bf16"])
def weights(request):
    return request.param


@pytest.fixture
def backend(isa, weights):
    return load_backend("cpu", isa=isa, weights=weights, threads=2)


def close(weights, result, expected):
    assert torch.isfinite(result).all()
    assert (result - expected).abs().max() < TOLERANCE[weights] * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 32), (8, 1, 128), (7, 1, 16), (2, 2, 256), (6, 3, 80), (4, 2, 96)],
)
@pytest.mark.parametrize(("keys", "rows"), [(1, 1), (33, 5), (200, 67), (160, 1)])
def test_staircase(backend, weights, scene, heads, kv_heads, head_dim, keys, rows):
    rows = min(rows, keys)
    s = scene(backend, AttentionShape(heads, kv_heads, head_dim), keys, rows)
    visible = [keys - rows + i + 1 for i in range(rows)]
    close(weights, *s.attend([(s.pages, list(range(rows)), visible)]))


def test_full_range_with_many_rows(backend, weights, scene):
    s = scene(backend, AttentionShape(9, 3, 64), 500, 70)
    close(weights, *s.attend([(s.pages, list(range(70)), [500] * 70)]))


@pytest.mark.parametrize("seed", range(8))
def test_cut_anywhere_and_merge_equals_the_whole(backend, weights, scene, seed):
    """Cut a staircase at random page boundaries, shuffle the parts: same result."""
    rng = random.Random(seed)
    keys, rows = rng.randint(2, 420), rng.randint(1, 40)
    rows = min(rows, keys)
    s = scene(backend, AttentionShape(6, 2, 64), keys, rows)
    visible = [keys - rows + i + 1 for i in range(rows)]
    whole, expected = s.attend([(s.pages, list(range(rows)), visible)])
    cuts = sorted({0, len(s.pages), *(rng.randrange(len(s.pages) + 1) for _ in range(3))})
    parts = []
    for a, b in itertools.pairwise(cuts):
        seen = [min(max(v - a * 32, 0), (b - a) * 32) for v in visible]
        parts.append((s.pages[a:b], list(range(rows)), seen))
    rng.shuffle(parts)
    cut, _ = s.attend(parts)
    close(weights, cut, expected)
    assert (cut - whole).abs().max() < TOLERANCE[weights]


def test_rows_in_any_order_and_rows_without_ranges(backend, weights, scene):
    s = scene(backend, AttentionShape(6, 2, 64), 96, 6)
    result, expected = s.attend(
        [(s.pages[:2], [4, 1], [64, 64]), (s.pages[2:], [1, 3, 4], [5, 32, 0])]
    )
    close(weights, result, expected)
    assert (result[[0, 2, 5]] == 0).all()


def test_many_sequences_of_unequal_length(backend, weights, scene):
    s = scene(backend, AttentionShape(9, 3, 64), 1000, 16)
    ranges = [(s.pages[: i + 1], [i], [i * 32 + 1 + i]) for i in range(16)]
    ranges[7] = (s.pages, [7], [999])
    close(weights, *s.attend(ranges))


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_what_else_is_in_the_batch_changes_no_bit(backend, scene, rows):
    """The same rows alone and among others, bit for bit."""
    s = scene(backend, AttentionShape(9, 3, 64), 1800, 30)
    mine = (s.pages, list(range(rows)), [1790 - rows + i + 1 for i in range(rows)])
    others = [(s.pages[: 3 * i + 1], [i], [96 * i + 7]) for i in range(rows, 18)]
    alone, _ = s.attend([mine])
    among, _ = s.attend([*others, mine])
    assert torch.equal(alone[:rows], among[:rows])


def test_how_a_prompt_is_cut_into_chunks_changes_no_bit(backend, scene):
    """The last row alone, as one of a few and as one of many: bit for bit."""
    s = scene(backend, AttentionShape(9, 3, 64), 1100, 60)
    results = []
    for rows in (60, 37, 2, 1):
        chosen = list(range(60 - rows, 60))
        results.append(s.attend([(s.pages, chosen, [1041 + i for i in chosen])])[0][59])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_lse_is_natural_log_and_minus_infinity_for_empty_rows(isa, scene):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=2)
    shape = AttentionShape(4, 2, 64)
    s = scene(backend, shape, 90, 3)
    ranges = s.attend.__globals__["ranges_of"]([(s.pages, [0, 2], [70, 0])])
    q = s.store(backend, s.query, [0, 1, 2], s.scratch, layer=0)
    plan = backend.plan_attention(3, ranges, shape)
    out, lse = backend.attend_with_lse(q, s.pools["cpu"], 1, plan)
    rq = s.store(s.reference, s.query, [0, 1, 2], s.scratch, layer=0)
    slots = torch.tensor([s.pages[t // 32] * 32 + t % 32 for t in range(90)])
    keys, values = s.pools["reference"][1, slots].unbind(dim=1)
    _, expected = reference.attend(rq[:1], keys, values, torch.tensor([70]), 1 / 8)
    assert torch.allclose(lse[0], expected[0], atol=1e-4)
    assert (lse[1:] == -math.inf).all()
    assert (out.data[1:] == 0).all()


def test_stale_pages_and_infinite_values_do_not_leak(backend, weights, scene):
    """A page that once held another sequence's overflow is masked, not multiplied by zero."""
    shape = AttentionShape(4, 2, 64)
    s = scene(backend, shape, 40, 2)
    bad = torch.full((1, 8 * 64), math.inf)
    bad[0, ::3] = math.nan
    slot = [s.pages[1] * 32 + 8 + i for i in range(24)]  # positions 40..63 of the last page
    s.store(backend, bad.repeat(24, 1), [0] * 24, slot, layer=1)
    result, expected = s.attend([(s.pages, [0, 1], [39, 40])])
    close(weights, result, expected)


def test_reference_merge_of_empty_parts_is_empty():
    empty = (torch.zeros(2, 3, 4), torch.full((2, 3), -math.inf))
    out, lse = reference.merge([empty, empty])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_row_outside_the_batch_is_refused(backend, make_ranges):
    shape = AttentionShape(4, 2, 64)
    with pytest.raises(ValueError, match="names row 3 of 2"):
        backend.plan_attention(2, make_ranges([([0], [3], [1])]), shape)
    with pytest.raises(ValueError, match="sees 33 keys of a range of 32"):
        backend.plan_attention(2, make_ranges([([0], [1], [33])]), shape)
