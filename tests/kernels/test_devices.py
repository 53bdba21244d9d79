"""load_backend: what there is, and what is refused."""

from __future__ import annotations

import pytest
import torch

from headstart.kernels import _cpu
from headstart.kernels.backend import WEIGHT_FORMATS, AttentionShape
from headstart.kernels.devices import instruction_sets, load_backend


def test_auto_takes_the_best_instruction_set():
    sets = instruction_sets()
    assert sets[-1] == "portable"
    assert len(set(sets)) == len(sets)
    assert load_backend("cpu", isa="auto", weights="f32", threads=1).isa == sets[0]


def test_an_installation_taken_to_a_better_machine_says_so(monkeypatch, caplog):
    monkeypatch.delenv("HEADSTART_AUTO_ISA", raising=False)
    assert _cpu.missing() == []  # of the machine it was made on
    load_backend("cpu", isa="auto", weights="f32", threads=1)
    assert not caplog.records
    monkeypatch.setattr(_cpu, "missing", lambda: ["avx999", "avx998"])
    load_backend("cpu", isa="portable", weights="f32", threads=1)
    assert not caplog.records
    load_backend("cpu", isa="auto", weights="f32", threads=1)
    (record,) = caplog.records
    assert "this machine has avx999, avx998, for which no kernels" in record.getMessage()
    assert "make clean install" in record.getMessage()


def test_what_auto_takes_can_be_held_to_less(monkeypatch):
    monkeypatch.delenv("HEADSTART_AUTO_ISA", raising=False)
    sets = instruction_sets()
    monkeypatch.setenv("HEADSTART_AUTO_ISA", "portable")
    assert instruction_sets() == ["portable"]
    assert load_backend("cpu", isa="auto", weights="f32", threads=1).isa == "portable"
    assert load_backend("cpu", isa=sets[0], weights="f32", threads=1).isa == sets[0]
    monkeypatch.setenv("HEADSTART_AUTO_ISA", "neon")
    with pytest.raises(ValueError, match="HEADSTART_AUTO_ISA: this machine has no neon kernels"):
        instruction_sets()


def test_each_instruction_set_can_be_asked_for(isa):
    backend = load_backend("cpu", isa=isa, weights="f32", threads=1)
    assert backend.isa == isa
    assert backend._kernels.name == isa


def test_what_there_is_not():
    with pytest.raises(ValueError, match="no backend 'tpu'; there are gpu, cpu and reference"):
        load_backend("tpu", isa="auto", weights="f32", threads=1)
    with pytest.raises(ValueError, match=r"no neon kernels; it has .*portable"):
        load_backend("cpu", isa="neon", weights="f32", threads=1)
    with pytest.raises(ValueError, match="f32 only, not int8"):
        load_backend("reference", isa="auto", weights="int8", threads=1)


@pytest.mark.parametrize("size", [0, 1, 16, 31, 48, -32])
def test_a_page_that_no_tile_fits_is_refused(size):
    with pytest.raises(ValueError, match=f"page_size must be .* got {size}"):
        load_backend("cpu", isa="auto", weights="f32", threads=1, page_size=size)


@pytest.mark.parametrize("head_dim", [8, 24, 72, 272, 512])
def test_a_head_size_without_kernels_is_refused(head_dim):
    backend = load_backend("cpu", isa="auto", weights="f32", threads=1)
    with pytest.raises(ValueError, match=f"head size {head_dim} .*--backend reference"):
        backend.allocate_kv(AttentionShape(4, 2, head_dim), 1, 1)
    reference = load_backend("reference", isa="auto", weights="f32", threads=1)
    assert reference.allocate_kv(AttentionShape(4, 2, head_dim), 1, 1).shape[-1] == head_dim


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8"])
def test_the_pool_has_the_size_that_was_planned(weights):
    backend = load_backend("cpu", isa="auto", weights=weights, threads=1)
    shape = AttentionShape(8, 2, 64)
    pool = backend.allocate_kv(shape, 3, 5)
    size = pool.data.numel() * pool.data.element_size()
    assert size == 5 * backend.kv_bytes_per_page(shape, 3)
    assert (pool.data == 0).all()
    assert [p - pool.layer_ptrs[0] for p in pool.layer_ptrs] == [i * size // 3 for i in range(3)]


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("cpu", ("f32", "bf16", "int8")),
        ("gpu", ("f32", "f16", "bf16")),
        ("reference", ("f32",)),
    ],
)
def test_a_backend_has_a_weight_format_or_says_so(name, formats, weights):
    if weights in formats:
        assert load_backend(name, isa="auto", weights=weights, threads=1).name == name
        return
    with pytest.raises(ValueError, match=f"not (in )?{weights}"):
        load_backend(name, isa="auto", weights=weights, threads=1)


def test_threads_are_torch_s_too():
    before = torch.get_num_threads()
    try:
        load_backend("cpu", isa="auto", weights="f32", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
