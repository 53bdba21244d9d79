"""The flash-attn adapter, with a stand-in that does what the package's documentation says.

The stand-in has the signature of flash-attn 2.8.3 (flash_attn/flash_attn_interface.py) and refuses
what its C++ does (csrc/flash_attn/flash_api.cpp, mha_varlen_fwd). Where the package is installed,
the signatures are compared.
"""

from __future__ import annotations

import importlib.util
import inspect
import math

import pytest
import torch

from headstart.kernels.backend import AttentionShape
from headstart.kernels.gpu import flash
from headstart.kernels.gpu.backend import GpuBackend

from .test_attention import ROW, TILE, Scene, SmallTiles, close, kv_ranges


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert dropout_p == 0.0
    assert return_attn_probs
    for cu in (cu_seqlens_q, cu_seqlens_k):
        assert cu.dtype is torch.int32
        assert cu.is_contiguous()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.dtype is v.dtype is q.dtype
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert max_seqlen_q == lengths_q.max()
    assert max_seqlen_k == lengths_k.max()
    if block_table is not None:
        assert k.dim() == 4
        assert k.shape[1] % 256 == 0
        assert block_table.dtype is torch.int32
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], len(q)), math.inf)
    for i, (rows, keys) in enumerate(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True)):
        at = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i]) + rows)
        if block_table is None:
            own = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i]) + keys)
            ks, vs = k[own], v[own]
        else:
            pages = block_table[i].long()
            ks, vs = (t[pages].flatten(0, 1)[:keys] for t in (k, v))
        group = q.shape[1] // ks.shape[1]
        ks, vs = (t.float().repeat_interleave(group, dim=1) for t in (ks, vs))
        scores = torch.einsum("rhd,khd->hrk", q[at].float(), ks) * softmax_scale
        if causal:  # aligned to the last row and key
            hidden = torch.arange(keys)[None] > torch.arange(rows)[:, None] + keys - rows
            scores = scores.masked_fill(hidden, -math.inf)
        lse[:, at] = scores.logsumexp(-1)
        out[at] = torch.einsum("hrk,khd->rhd", scores.softmax(-1), vs).to(q.dtype)
    return out, lse, None


@pytest.fixture
def flash_scene(device, dtype, monkeypatch):
    """A Scene whose backend has flash-attn, for ranges of any number of rows."""

    def make(*args, page=32, format="auto", **more):
        scene = Scene(device, dtype, *args, page=page, format=format, **more)
        scene.backend = GpuBackend(
            device, SmallTiles(device, ROW, TILE), page_size=page, kv_format=format,
            weights={torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype],
            flash_attn=flash_attn_varlen_func,
        )  # fmt: skip
        return scene

    # A device compares the package itself in `make gpu-check`; this is the adapter's own logic.
    monkeypatch.setattr(GpuBackend, "_flash_is_faster", lambda *_: True)
    monkeypatch.setattr("headstart.kernels.gpu.backend.FLASH_ROWS", 3)
    return make


@pytest.mark.parametrize("page", [32, 256])
@pytest.mark.parametrize("format", ["auto", "int8", "fp8"])
def test_staircases_full_ranges_and_others(flash_scene, dtype, page, format):
    """Rows that are in several ranges, computed by different ones, are merged."""
    scene = flash_scene(AttentionShape(6, 2, 64), 600, 20, page=page, format=format)
    cut = 512
    shared = (scene.pages[: cut // page], list(range(20)), [cut] * 20, 0)
    rest = scene.pages[cut // page :]
    ranges = [
        shared,
        (rest, list(range(8)), [40 + i for i in range(8)], cut),
        (rest, [12, 9, 10], [7, 8, 9], cut),  # rows in any order
        (rest, [13, 14], [1, 2], cut),  # too few rows for flash-attn
        (rest, [15, 16, 17], [5, 4, 9], cut),  # neither full nor a staircase
    ]
    calls, others = flash.split(kv_ranges(ranges), 3)
    assert [causal for causal, _ in calls] == [False, True]
    assert len(others) == 2
    close(dtype, *scene.attend(ranges))


@pytest.mark.smoke
def test_a_whole_prompt(flash_scene, dtype):
    """Row 0 sees one key: the first row of a causal prompt."""
    scene = flash_scene(AttentionShape(4, 1, 80), 50, 50)
    ranges = [(scene.pages, list(range(50)), [i + 1 for i in range(50)], 0)]
    calls, others = flash.split(kv_ranges(ranges), 3)
    assert len(calls) == 1
    assert len(others) == 0
    close(dtype, *scene.attend(ranges))


def test_ranges_with_rows_that_see_nothing_stay_with_triton():
    ranges = [([0], [0, 1, 2], [0, 1, 2], 0), ([0], [0, 1, 2], [0, 0, 0], 0)]
    calls, others = flash.split(kv_ranges(ranges), 3)
    assert calls == []
    assert len(others) == 2


def test_plus_infinity_becomes_minus_infinity(device):
    """flash-attn marks rows that saw nothing with +inf: merged as it is, it would win."""
    scene = Scene(device, torch.float32, AttentionShape(2, 1, 32), 40, 4)
    ranges = [(scene.pages[:1], [0, 1, 2, 3], [5, 5, 5, 5], 0)]
    (found,), _ = flash.split(kv_ranges(ranges), 1)
    call = flash.place(*found, scene.pool.layout, device.upload)

    def nothing_seen(q, *args, **kwargs):
        return torch.zeros_like(q), torch.full((2, len(q)), math.inf, device=q.device), None

    where = device.torch_device
    out, lse = flash.attend(nothing_seen, scene.query.to(where), scene.pool, 1, call)
    assert (lse == -math.inf).all()
    assert lse.shape == (4, 2)
    known, known_lse = torch.ones_like(out), torch.zeros(4, 2, device=where)
    flash.merge_into(known, known_lse, call.rows, out, lse)
    assert (known == 1).all()
    assert (known_lse == 0).all()


def test_the_signature_is_the_package_s():
    """Names, order and defaults; of the package itself where it is installed."""
    if importlib.util.find_spec("flash_attn") is not None:
        real = flash.find_flash()
        assert real is not None
        assert inspect.signature(real) == inspect.signature(flash_attn_varlen_func)
    else:
        assert flash.find_flash() is None
