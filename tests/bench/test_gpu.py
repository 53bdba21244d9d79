"""bench.gpu: what it counts, and its report with another clock."""

from __future__ import annotations

import pytest

from headstart.bench.gpu import (
    AUTHORS,
    BATCHES,
    GROUPED,
    H100,
    MULTI_HEAD,
    Case,
    least_seconds,
    main,
    relay_cases,
    report,
    sharing,
    work_in,
)
from headstart.bench.gpu_layer import LayerCase, Sizes, layer_cases
from headstart.kernels.backend import AttentionShape
from headstart.kernels.gpu.backend import GpuBackend
from headstart.kernels.gpu.device import find_device
from headstart.kernels.gpu.tuning import Tuner
from headstart.kernels.ranges import KVRanges


def test_bytes_and_flops_of_decoding():
    """64 sequences of 4,096 keys, 8 KV heads of 128 in bf16: every key and value once."""
    work = work_in(Case("", GROUPED, KVRanges.of_sequences(64, 4096, 1, 32), "auto"), 32)
    assert work.bytes == 64 * 4096 * 2 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert work.flops == 4 * 64 * 4096 * 32 * 128
    assert least_seconds(work, H100) == work.bytes / H100.bytes


def test_flops_of_a_causal_prompt_are_half_a_square():
    work = work_in(Case("", GROUPED, KVRanges.of_sequences(1, 1000, 1000, 32), "auto"), 32)
    assert work.flops == 4 * (1000 * 1001 // 2) * 32 * 128


def test_eight_bits_and_scales():
    """A byte an element, and 4 bytes of scale for a head's key and for its value."""
    case = Case("", GROUPED, KVRanges.of_sequences(1, 32, 1, 32), "fp8")
    assert work_in(case, 32).bytes == 32 * 8 * 2 * (128 + 4) + 2 * 32 * 128 * 2


def test_a_shared_prefix_is_counted_once():
    plain = work_in(Case("", MULTI_HEAD, KVRanges.of_sequences(8, 2048 + 128, 1, 32), "auto"), 32)
    shared = work_in(Case("", MULTI_HEAD, sharing(8, 2048, 128, 32), "auto"), 32)
    assert plain.flops == shared.flops
    rows = 2 * 8 * 32 * 128 * 2
    token = 2 * 32 * 128 * 2
    assert (plain.bytes - rows) == 8 * (2048 + 128) * token
    assert (shared.bytes - rows) == (2048 + 8 * 128) * token


def test_the_limit_is_above_what_the_authors_measured():
    """(s + c) / (s / b + c), arXiv 2402.14808: theirs come close to it and never pass it."""
    for batch, prefix, plain, shared in relay_cases(32):
        limit = least_seconds(work_in(plain, 32), H100) / least_seconds(work_in(shared, 32), H100)
        assert limit == pytest.approx((prefix + 128) / (prefix / batch + 128), rel=0.02)
        measured = AUTHORS[batch][(64, 512, 2048, 16384).index(prefix)]
        assert 0.7 * limit < measured <= limit


def test_report_of_a_card_half_as_fast():
    def seconds(case: Case | LayerCase) -> float:
        work = case.work if isinstance(case, LayerCase) else work_in(case, 32)
        return 2 * least_seconds(work, H100)

    text = report(H100, seconds)
    assert text.count("| 50% |") == 16
    assert all(f"\n| {batch} | " in text for batch in BATCHES)
    assert "13.52 (11.6)" in text


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the gpu backend needs an NVIDIA GPU")

    monkeypatch.setattr("headstart.kernels.devices.load_backend", refuse)
    assert main([]) == 1
    assert "needs an NVIDIA GPU (--roofline needs none)" in capsys.readouterr().err
    assert main(["--roofline"]) == 0
    assert "H100" in capsys.readouterr().out


SMALL = Sizes(hidden=64, inner=96, shape=AttentionShape(4, 2, 16), rank=8, adapters=2, parts=3)


@pytest.mark.parametrize("kv_format", ["auto", "fp8"])
def test_every_kernel_of_a_layer_runs(kv_format: str) -> None:
    backend = GpuBackend(find_device(), Tuner(find_device()), weights="f32", kv_format=kv_format)
    cases = list(layer_cases(40, 4, SMALL, kv_format))
    assert len(cases) == 5
    for case in cases:
        assert case.ready(backend)().isfinite().all()


def test_bytes_and_flops_of_a_layer_s_kernels() -> None:
    """By hand, for two rows."""
    norm, rope, silu, merge, lora = (case.work for case in layer_cases(2, 2, SMALL))
    assert norm.bytes == 2 * 64 * (4 + 4 + 2 + 2) + 64 * 4
    # q k v read, q written; key and value written; cosines and sines; position and slot
    assert rope.bytes == 2 * (2 * 128 + 2 * 64 + 2 * 2 * 2 * 16 + 2 * 8 * 4 + 8)
    assert silu.bytes == 2 * 3 * 96 * 2
    assert merge.bytes == 2 * 4 * (3 * (16 + 1) * 4 + 16 * 2 + 4)
    # two adapters of a row each: their matrices; x for q, k, v; what is between; y twice
    assert lora.bytes == 2 * 8 * (3 * 64 + 128) * 2 + 2 * (3 * 64 * 2 + 2 * 3 * 8 * 4 + 2 * 128 * 2)
    assert lora.flops == 2 * 2 * 8 * (3 * 64 + 128)
    assert norm.flops == 5 * 2 * 64
    eight = next(c.work for c in layer_cases(2, 2, SMALL, "int8") if "KV write" in c.name)
    assert rope.bytes - eight.bytes == 2 * 2 * 2 * (2 * 16 - (16 + 4))
