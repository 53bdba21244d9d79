"""Ranged attention on every instruction set against the float32 oracle."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from headstart.kernels import reference
from headstart.kernels.backend import AttentionShape
from headstart.kernels.devices import load_backend

pytestmark = pytest.mark.covering(2)

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
    """Cut a staircase at random page boundaries, in order or shuffled: same result."""
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
        parts.append((s.pages[a:b], list(range(rows)), seen, a * 32))
    for order in (parts, rng.sample(parts, len(parts))):
        cut, _ = s.attend(order)
        close(weights, cut, expected)
        assert (cut - whole).abs().max() < TOLERANCE[weights]


def shared_and_own(rng, pages, visible, step):
    """The same attention as a tree of shared ranges: random levels, each of some of the rows."""
    rows = list(range(len(visible)))
    ranges, own = [], dict.fromkeys(rows, 0)
    groups = [rows]
    for _ in range(rng.randint(1, 3)):
        deeper = []
        for group in groups:
            first = own[group[0]]
            last = (min(visible[r] for r in group) - 1) // step * step
            if last <= first:
                continue
            end = rng.randrange(first // step, last // step) * step + step
            ranges.append(
                (pages[first // 32 : end // 32], group, [end - first] * len(group), first)
            )
            own.update(dict.fromkeys(group, end))
            at = rng.randint(1, len(group))
            deeper += [part for part in (group[:at], group[at:]) if part]
        groups = deeper
    for r in rng.sample(rows, len(rows)):
        used = pages[own[r] // 32 : -(-visible[r] // 32)]
        ranges.append((used, [r], [visible[r] - own[r]], own[r]))
    return ranges


@pytest.mark.parametrize("seed", range(12))
def test_sharing_changes_no_bit(backend, scene, seed):
    """RelayAttention, one to three levels deep, against each row alone: bit for bit."""
    rng = random.Random(seed)
    rows = rng.choice([2, 5, 40, 70])
    shape = rng.choice(
        [AttentionShape(9, 3, 64), AttentionShape(4, 4, 32), AttentionShape(8, 1, 128)]
    )
    s = scene(backend, shape, rng.choice([300, 1100, 2100]), rows)
    keys = len(s.pages) * 32 - 31
    visible = [rng.randint(keys // 2, keys) for _ in range(rows)]
    plain, expected = s.attend([(s.pages, [r], [v]) for r, v in enumerate(visible)])
    shared, _ = s.attend(shared_and_own(rng, s.pages, visible, backend.range_step))
    assert torch.equal(shared, plain)
    assert (plain - expected).abs().max() < 0.1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_open_slot_is_waited_for(weights, scene, threads):
    """Many short items that go on from what others leave, again and again, on any team."""
    backend = load_backend("cpu", isa="auto", weights=weights, threads=threads)
    s = scene(backend, AttentionShape(6, 2, 64), 600, 64)
    step = backend.range_step
    levels = [
        (s.pages[i * 4 : i * 4 + 4], list(range(64)), [step] * 64, i * step) for i in range(4)
    ]
    own = [(s.pages[16:], [r], [1 + r], 4 * step) for r in range(64)]
    plain, _ = s.attend([(s.pages, [r], [4 * step + 1 + r]) for r in range(64)])
    for _ in range(30):
        assert torch.equal(s.attend([*levels, *own])[0], plain)


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
    with pytest.raises(ValueError, match="begins at key 33, which is not the start of a page"):
        backend.plan_attention(2, make_ranges([([0], [1], [3], 33)]), shape)
    with pytest.raises(ValueError, match="names row 1 twice"):
        backend.plan_attention(2, make_ranges([([0], [1, 1], [3, 4])]), shape)
