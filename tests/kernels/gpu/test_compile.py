"""Every kernel compiles ahead of time for the four architectures, and fits.

The compiler is the real one, for devices that are not here; a process of its own, since this one's
kernels are the interpreter's.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from headstart.kernels.gpu.compile import TENSOR_CORES, Compiled, fits, keys, table, wanted
from headstart.kernels.gpu.device import Config
from headstart.kernels.gpu.tuning import Key, Tuner, candidates, nearest_architecture, shipped


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seven minutes of two cores
def test_what_is_chosen_compiles_fits_and_is_in_the_table():
    """No spills, shared memory within the chip's, tensor cores in use; README.md is not stale."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "headstart.kernels.gpu.compile", "--check"],
        capture_output=True, text=True, timeout=1700, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_choice_among_its_candidates():
    assert {str(key) for key in keys()} == set(shipped())
    for key in keys():
        assert shipped()[str(key)] in candidates(key)


GOOD = Compiled(200, 0, 90 * 1024, ("mma.sync",))


@pytest.mark.parametrize(
    "bad",
    [
        Compiled(255, 8, 90 * 1024, ("mma.sync",)),
        Compiled(200, 0, 164 * 1024, ("mma.sync",)),
        Compiled(200, 0, 90 * 1024, ()),
        Compiled(200, 0, 90 * 1024, ("wgmma.mma_async",)),
    ],
)
def test_what_does_not_fit(bad):
    key = Key("tile", 80, 64, 2, "same")
    assert fits(key, GOOD)
    assert not fits(key, bad)


def test_each_architecture_has_its_own_matrix_instruction():
    assert [wanted(Key("tile", arch, 64, 2, "same")) for arch in TENSOR_CORES] == [
        "mma.sync", "wgmma", "tcgen05.mma", "mma.sync",
    ]  # fmt: skip
    assert {wanted(Key("row", arch, 64, 2, "same")) for arch in TENSOR_CORES} == {"mma.sync"}
    assert not fits(Key("tile", 90, 64, 2, "same"), GOOD)


def test_devices_in_between_take_the_choices_of_one_like_them():
    """8.6 and 8.9 have no more shared memory than 12.0; 10.3 is like 10.0."""
    near = {arch: nearest_architecture(arch) for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121)}
    assert near == {
        80: 80, 86: 120, 87: 80, 89: 120, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120,
    }  # fmt: skip


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("format", ["same", "int8", "fp8", "fp8_native"])
def test_every_device_and_head_size_has_a_choice(device, arch, format):
    class Other(type(device)):
        pass

    Other.arch = arch
    tuner = Tuner(Other.__new__(Other))
    for head_dim in (16, 64, 72, 96, 192, 256):
        for kernel in ("row", "tile"):
            assert tuner.shipped(kernel, head_dim, 2, format).block_m >= 16


def test_the_table_has_a_line_a_kernel():
    key = Key("tile", 90, 80, 2, "fp8_native")
    text = table({key: (Config(128, 64, 8, 3), GOOD)}, {})
    assert "| tile | 80 | fp8 | 90a | 128x64 | 8 | 3 | 200 | 0 | 90.0 (227) | mma.sync |" in text
