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
    main,
    relay_cases,
    report,
    sharing,
    work_in,
)
from headstart.kernels.backend import KVRanges


def test_bytes_and_flops_of_decoding():
    """64 sequences of 4,096 keys, 8 KV heads of 128 in bf16: every key and value once."""
    work = work_in(Case("", GROUPED, KVRanges.of_sequences(64, 4096, 1, 32), "auto"), 32)
    assert work.bytes == 64 * 4096 * 2 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert work.flops == 4 * 64 * 4096 * 32 * 128
    assert work.least_seconds(H100) == work.bytes / H100.bytes


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
        limit = work_in(plain, 32).least_seconds(H100) / work_in(shared, 32).least_seconds(H100)
        assert limit == pytest.approx((prefix + 128) / (prefix / batch + 128), rel=0.02)
        measured = AUTHORS[batch][(64, 512, 2048, 16384).index(prefix)]
        assert 0.7 * limit < measured <= limit


def test_report_of_a_card_half_as_fast():
    text = report(H100, lambda case: 2 * work_in(case, 32).least_seconds(H100))
    assert text.count("| 50% |") == 5
    assert all(f"\n| {batch} | " in text for batch in BATCHES)
    assert "13.52 (11.6)" in text


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("the gpu backend needs an NVIDIA GPU")

    monkeypatch.setattr("headstart.kernels.backend.load_backend", refuse)
    assert main([]) == 1
    assert "needs an NVIDIA GPU (--roofline needs none)" in capsys.readouterr().err
    assert main(["--roofline"]) == 0
    assert "H100" in capsys.readouterr().out
