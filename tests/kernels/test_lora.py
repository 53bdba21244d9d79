"""add_lora: low-rank terms of rows that belong to different adapters, on every instruction set."""

from __future__ import annotations

import random as randoms
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from headstart.kernels.backend import LoraPart
from headstart.kernels.cpu.tensors import Rows
from headstart.kernels.devices import load_backend

pytestmark = pytest.mark.covering(2)

RANKS = (1, 2, 7, 8, 16, 33, 256)
# A word is 1 or 2 elements, a panel 16 outputs: below, on and between.
INPUTS = (1, 2, 3, 16, 37, 64, 100, 576)
OUTPUTS = (1, 5, 15, 16, 17, 31, 48, 90)
ROW_TYPES = (torch.float32, torch.bfloat16, torch.uint8)
SUMS = {"f32": 2e-5, "bf16": 1e-4}  # of the order of adding up, relative to the sum of magnitudes


@pytest.fixture(params=["f32", "bf16"])
def form(request):
    """What adapters are packed as."""
    return request.param


@pytest.fixture
def backend(isa, form):
    return load_backend("cpu", isa=isa, weights=form, threads=2)


@dataclass
class Scene:
    """Rows x of a dense layer, what the layer made of them, and adapters of some of them.

    adapters[i][layer] are parts; owner[row] is the number of the row's adapter, or None.
    """

    x: torch.Tensor
    scales: torch.Tensor
    y: torch.Tensor
    adapters: list[list[list[LoraPart]]]
    owner: list[int | None]

    def rows(self) -> Rows:
        x, scales = self.x.contiguous(), self.scales.contiguous()
        return Rows(x, scales, x.data_ptr(), scales.data_ptr(), len(x))

    def values(self) -> torch.Tensor:
        if self.x.dtype is torch.uint8:
            return (self.x.float() - 128) * self.scales
        return self.x.float()

    def of(self, rows: list[int]) -> Scene:
        return Scene(
            self.x[rows],
            self.scales[rows],
            self.y[rows],
            self.adapters,
            [self.owner[row] for row in rows],
        )

    def packed(self, backend):
        return [backend.lora_adapter(adapter) for adapter in self.adapters]

    def plan(self, backend, packed):
        groups = [
            np.array([row for row, owner in enumerate(self.owner) if owner == i], dtype=np.int32)
            for i in range(len(self.adapters))
        ]
        return backend.plan_lora(packed, groups)


def some_part(generator, first, outputs, rank, inputs):
    down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    up = torch.randn(outputs, rank, generator=generator) / rank**0.5
    return LoraPart(first, down, up)


def make_scene(seed, row_type, y_type, rows=None, ranks=RANKS) -> Scene:
    """One to three parts with gaps between them in layer 0, none in layer 1, others in layer 2."""
    draw, generator = randoms.Random(seed), torch.Generator().manual_seed(seed)
    inputs, rows = draw.choice(INPUTS), rows or draw.randint(1, 60)
    places, out = [], 0
    for _ in range(draw.randint(1, 3)):
        first, size = out + draw.choice((0, 0, 3)), draw.choice(OUTPUTS)
        places.append((first, size))
        out = first + size
    out += draw.choice((0, 2))
    adapters = []
    for _ in range(draw.randint(1, 4)):
        layers = [
            [
                some_part(generator, first, size, draw.choice(ranks), inputs)
                for first, size in places
                if not layer or draw.random() < 0.7
            ]
            for layer in range(3)
        ]
        layers[1] = []
        adapters.append(layers)
    owner = [draw.choice([None, *range(len(adapters))]) for _ in range(rows)]
    x = torch.randn(rows, inputs, generator=generator)
    scales = torch.rand(rows, 1, generator=generator) / 64
    if row_type is torch.uint8:
        x = torch.randint(1, 256, (rows, inputs), generator=generator)
    y = torch.randn(rows, out, generator=generator)
    return Scene(x.to(row_type), scales, y.to(y_type), adapters, owner)


def result_of(backend, scene, layer=0, packed=None) -> torch.Tensor:
    y = scene.y.clone()
    plan = scene.plan(backend, packed or scene.packed(backend))
    backend.add_lora(scene.rows(), y, plan, layer)
    return y


def check(backend, oracle, form, scene, layer=0) -> torch.Tensor:
    """The result is the oracle's for weights, x and A x rounded as the unit does."""
    result = result_of(backend, scene, layer)
    assert result.isfinite().all()
    rounded = torch.Tensor.float if form == "f32" else (lambda t: t.bfloat16().float())
    x, expected = rounded(scene.values()), scene.y.float().clone()
    sizes, flips = expected.abs(), torch.zeros_like(expected)
    for i, layers in enumerate(scene.adapters):
        rows = [row for row, owner in enumerate(scene.owner) if owner == i]
        if not rows:
            continue
        for part in layers[layer]:
            down, up = rounded(part.down), rounded(part.up)
            columns = slice(part.first, part.first + len(up))
            inner = rounded(x[rows] @ down.T)
            if form == "f32":  # the oracle's own operation, where nothing is rounded on the way
                expected_rows = expected[rows].clone()
                everything = np.arange(len(rows), dtype=np.int32)
                plan = oracle.plan_lora([oracle.lora_adapter([[part]])], [everything])
                oracle.add_lora(x[rows], expected_rows, plan, 0)
                expected[rows] = expected_rows
            else:
                expected[rows, columns] += inner @ up.T
            sizes[rows, columns] += (x[rows].abs() @ down.abs().T) @ up.abs().T
            # A sum in another order may fall on the other side of a border between two bf16.
            flips[rows, columns] += (inner.square() @ up.square().T).sqrt() / 128
    most = sizes * SUMS[form] + 1e-6
    if form == "bf16":
        most += flips
    if scene.y.dtype is torch.bfloat16:
        most += expected.abs() / 256
    wrong = (result.float() - expected).abs() > most
    assert not wrong.any(), (int(wrong.sum()), scene.x.shape, scene.y.shape)
    return result


def untouched(scene, layer=0) -> torch.Tensor:
    """The elements of y that no adapter writes, bool."""
    free = torch.ones(scene.y.shape, dtype=torch.bool)
    for row, owner in enumerate(scene.owner):
        for part in scene.adapters[owner][layer] if owner is not None else ():
            free[row, part.first : part.first + len(part.up)] = False
    return free


@pytest.mark.parametrize("y_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_random_scenes(backend, oracle, form, row_type, y_type):
    for seed in range(12):
        # Many rows take all parts of a layer at once, few rows one at a time.
        scene = make_scene(seed, row_type, y_type, rows=250 if seed % 4 == 0 else None)
        for layer in range(3):
            result = check(backend, oracle, form, scene, layer)
            free = untouched(scene, layer)
            assert torch.equal(result[free], scene.y[free])
            assert free.all() or (result != scene.y)[~free].float().mean() > 0.9


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("inputs", [1, 37, 576])
def test_every_rank(backend, oracle, form, rank, inputs):
    generator = torch.Generator().manual_seed(rank)
    parts = [some_part(generator, 0, 16, rank, inputs), some_part(generator, 16, 41, rank, inputs)]
    x, y = torch.randn(9, inputs, generator=generator), torch.randn(9, 57, generator=generator)
    for row_type in ROW_TYPES:
        rows = (x * 40 + 128).clamp(1, 255) if row_type is torch.uint8 else x
        scales = torch.full((9, 1), 1 / 40)
        check(backend, oracle, form, Scene(rows.to(row_type), scales, y, [[parts]], [0] * 9))


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_a_row_alone_and_beside_others_is_the_same_bits(isa, form, row_type):
    """Whatever the number of rows, their adapters, and the threads."""
    backends = [load_backend("cpu", isa=isa, weights=form, threads=n) for n in (1, 2)]
    for seed, rows in ((100, 60), (101, 250)):
        for y_type in (torch.float32, torch.bfloat16):
            scene = make_scene(seed, row_type, y_type, rows=rows)
            packed = scene.packed(backends[0])
            whole = [result_of(backend, scene, packed=packed) for backend in backends]
            assert torch.equal(*whole)
            alone = [result_of(backends[0], scene.of([row]), packed=packed) for row in range(rows)]
            assert torch.equal(torch.cat(alone), whole[0])
            draw = randoms.Random(seed)
            for count in range(2, rows, 7):
                some = draw.sample(range(rows), count)
                found = result_of(backends[1], scene.of(some), packed=packed)
                assert torch.equal(found, whole[0][some])


def test_nothing_to_add(backend):
    scene = make_scene(3, torch.float32, torch.float32, rows=5)
    y = scene.y.clone()
    packed = scene.packed(backend)
    no_rows = [np.zeros(0, dtype=np.int32) for _ in packed]
    for plan in (backend.plan_lora([], []), backend.plan_lora(packed, no_rows)):
        backend.add_lora(scene.rows(), y, plan, 0)
    assert torch.equal(y, scene.y)
    scene.owner = [0] * 5
    assert torch.equal(result_of(backend, scene, layer=1), scene.y)  # a layer without parts


def test_a_row_that_overflowed_stays_so_and_harms_no_other(backend):
    scene = make_scene(5, torch.float32, torch.float32, rows=20)
    scene.owner = [0] * 20
    clean = result_of(backend, scene)
    for bad in (float("nan"), float("inf")):
        scene.x[11, 0] = bad
        result = result_of(backend, scene)
        others = [row for row in range(20) if row != 11]
        assert torch.equal(result[others], clean[others])
        changed = ~untouched(scene)[11]
        assert not result[11][changed].isfinite().any()


def test_a_plan_keeps_its_adapters(backend):
    """They may be unloaded while the step runs that was planned with them."""
    scene = make_scene(9, torch.float32, torch.float32, rows=12)
    scene.owner = [0] * 12
    expected = result_of(backend, scene)
    plan = scene.plan(
        backend, scene.packed(backend)
    )  # the packed adapters it was made from are gone
    y = scene.y.clone()
    backend.add_lora(scene.rows(), y, plan, 0)
    assert torch.equal(y, expected)
