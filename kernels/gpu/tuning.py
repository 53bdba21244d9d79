"""Tuner: how each kernel is cut, by device, measured on first use and kept.

``tuning.json`` holds one entry per (kernel, architecture, head size, number formats): the choice
until a device has been measured. ``python -m headstart.kernels.gpu.compile --choose`` makes it: the
first candidate that spills no register. On a device each kernel's candidates are timed
when a shape is first met, and the best is kept in the folder of the machine's measurements.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from triton import OutOfResources

from headstart.kernels.backend import KernelChoices
from headstart.kernels.gpu.device import Config, Device

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("tuning.json")

ARCHITECTURES = (80, 90, 100, 120)
"""Compute capabilities times ten that kernels are compiled for ahead of time."""

HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True, slots=True)
class Key:
    """What a choice depends on. width: bytes of an activation. format: of KV, as ``widen``
    in attention.py names it."""

    kernel: str
    arch: int
    head_dim: int
    width: int
    format: str

    def __str__(self) -> str:
        return f"{self.kernel}/{self.arch}/{self.head_dim}/{self.width}/{self.format}"


FLOAT32 = {128: Config(32, 64), 256: Config(16, 16)}
"""By the largest head size. float32 is for comparing: it is not tuned."""

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory one block may use, by architecture (CUDA C++ Programming Guide 13.0,
"Technical Specifications per Compute Capability")."""


def candidates(key: Key) -> list[Config]:
    """Configurations worth trying, the likely best first."""
    if key.kernel == "tile":
        # Tensor cores from 9.0 on take 64 rows per group of 4 warps.
        sizes = [(128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 32, 8), (64, 32, 4), (32, 32, 4)]
        if key.head_dim > 128:
            sizes = [(64, 64, 8), (64, 32, 8), (64, 32, 4), (32, 32, 4), (32, 16, 4), (16, 16, 4)]
        if key.format == "fp8":  # widened in software, which takes registers
            sizes = sizes[2:]
        stages = (3, 2, 1) if key.arch in (80, 90, 100) else (2, 1)
        return [Config(m, n, w, s) for (m, n, w), s in itertools.product(sizes, stages)]
    if key.kernel == "row":
        sizes = [(16, 128, 4), (16, 64, 4), (16, 64, 2), (16, 32, 2), (16, 32, 1), (16, 16, 1)]
        if key.head_dim > 128:
            sizes = [(16, 64, 8), (16, 64, 4), (16, 32, 4), (16, 16, 4)]
        return [Config(m, n, w, s) for (m, n, w), s in itertools.product(sizes, (3, 2, 1))]
    raise ValueError(f"there is no kernel {key.kernel!r} to tune")


@cache
def shipped() -> Mapping[str, Config]:
    """The table of choices made without a device, by str(Key)."""
    entries = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return {name: Config(**fields) for name, fields in entries.items()}


def nearest_architecture(arch: int) -> int:
    """The one in ARCHITECTURES whose choices suit ``arch``: 86 and 89 have the shared memory of
    120, not of 80."""
    if arch in SHARED_MEMORY and SHARED_MEMORY[arch] == SHARED_MEMORY[120]:
        return 120
    return max(known for known in ARCHITECTURES if known <= arch)


class Tuner:
    """Configurations by key. Where ``device`` can measure, each is the fastest of its candidates,
    found when first needed and kept in ``choices``; else the shipped one."""

    def __init__(self, device: Device, choices: KernelChoices | None = None) -> None:
        self._device = device
        self._choices = choices
        kept = {} if choices is None else choices.load(device.name)
        self._chosen = {name: Config(**fields) for name, fields in kept.items()}

    def shipped(self, kernel: str, head_dim: int, width: int, format: str) -> Config:
        """The choice made without a device; for other shapes, that of the next larger head."""
        arch = nearest_architecture(self._device.arch)
        if format.startswith("fp8"):
            format = "fp8" if arch == 80 else "fp8_native"
        size = next((size for size in HEAD_SIZES if size >= head_dim), HEAD_SIZES[-1])
        return shipped()[str(Key(kernel, arch, size, width, format))]

    def choose(
        self, kernel: str, head_dim: int, width: int, format: str, run: Callable[[Config], None]
    ) -> Config:
        """The configuration for this shape. ``run`` starts the kernel with one, to be timed."""
        if width == 4:
            return next(config for most, config in FLOAT32.items() if head_dim <= most)
        key = Key(kernel, self._device.arch, head_dim, width, format)
        chosen = self._chosen.get(str(key))
        if chosen is None:
            chosen = self.shipped(kernel, head_dim, width, format)
            if self._device.measures:
                chosen = self._fastest(key, [chosen, *candidates(key)], run)
            self._chosen[str(key)] = chosen
            if self._choices is not None and self._device.measures:
                entries = {name: asdict(config) for name, config in self._chosen.items()}
                self._choices.keep(self._device.name, entries)
        return chosen

    def _fastest(self, key: Key, configs: list[Config], run: Callable[[Config], None]) -> Config:
        best, chosen = float("inf"), configs[0]
        for config in dict.fromkeys(configs):
            try:
                seconds = self._device.seconds(partial(run, config))
            except OutOfResources as error:  # more shared memory or registers than there are
                logger.debug("%s: %s does not run: %s", key, config, error)
                continue
            if seconds < best:
                best, chosen = seconds, config
        logger.info("%s: %s, %.1f us", key, chosen, best * 1e6)
        return chosen
