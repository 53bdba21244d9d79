"""What computes on this machine: its instruction sets, its GPU, and the backend for either.

The only file that asks about devices, and the only one that knows all backends.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from headstart.kernels.backend import Backend, KernelChoices

logger = logging.getLogger(__name__)

AUTO_ISA = "HEADSTART_AUTO_ISA"
"""Variable: the best instruction set that may be chosen unasked, as if the machine had no better
one."""


def instruction_sets() -> list[str]:
    """CPU instruction sets of this machine that may be chosen unasked, best first.

    All the kernels can use, or those up to AUTO_ISA. Raises ValueError if that is none of them.
    """
    from headstart.kernels import _cpu

    sets = list(_cpu.supported())
    best = os.environ.get(AUTO_ISA) or sets[0]
    if best not in sets:
        raise ValueError(
            f"{AUTO_ISA}: this machine has no {best} kernels; it has {', '.join(sets)}"
        )
    return sets[sets.index(best) :]


def load_backend(
    name: str,
    *,
    isa: str,
    weights: str,
    threads: int,
    page_size: int = 32,
    kv_format: str = "auto",
    choices: KernelChoices | None = None,
    shared: bool = False,
) -> Backend:
    """The backend called ``name`` ("gpu", "cpu" or "reference") for one weight format.

    ``kv_format``: of keys and values, "auto" for the backend's choice. ``choices``: where
    the gpu backend keeps what it measures of its kernels; None: nowhere. ``shared``: whether other
    processes of this machine are to map the cpu backend's KV memory and weights.
    Raises ValueError, saying what there is, for a name or instruction set this machine lacks.
    """
    torch.set_num_threads(threads)
    if name == "gpu":
        return _load_gpu(weights, page_size, kv_format, choices)
    if name == "reference":
        if kv_format not in ("auto", "f32"):
            raise ValueError(f"the reference backend has KV in f32 only, not in {kv_format}")
        if weights != "f32":
            raise ValueError(f"the reference backend computes in f32 only, not {weights}")
        from headstart.kernels.reference import ReferenceBackend

        return ReferenceBackend(page_size=page_size)
    if name == "cpu":
        from headstart.kernels import _cpu
        from headstart.kernels.cpu.backend import CpuBackend

        if isa == "auto":
            isa = instruction_sets()[0]
            if AUTO_ISA not in os.environ and _cpu.missing():
                logger.warning(
                    "this machine has %s, for which no kernels were compiled: this installation "
                    "was made on another machine; `make clean install` makes it anew",
                    ", ".join(_cpu.missing()),
                )
        available = list(_cpu.supported())
        if isa not in available:
            raise ValueError(f"this machine has no {isa} kernels; it has {', '.join(available)}")
        return CpuBackend(
            isa=isa,
            weights=weights,
            threads=threads,
            page_size=page_size,
            kv_format=kv_format,
            shared=shared,
        )
    raise ValueError(f"there is no backend {name!r}; there are gpu, cpu and reference")


def gpu_is_there() -> bool:
    """Whether the gpu backend can run here: a CUDA device, and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def _load_gpu(
    weights: str, page_size: int, kv_format: str, choices: KernelChoices | None
) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "the gpu backend needs an NVIDIA GPU and Triton, which is not installed: use "
            "--backend cpu, or install headstart[cuda]"
        )
    from headstart.kernels.gpu.backend import GpuBackend
    from headstart.kernels.gpu.device import find_device
    from headstart.kernels.gpu.flash import find_flash
    from headstart.kernels.gpu.tuning import Tuner

    device = find_device()
    tuner = Tuner(device, choices)
    return GpuBackend(
        device,
        tuner,
        weights=weights,
        kv_format=kv_format,
        page_size=page_size,
        flash_attn=find_flash() if device.measures else None,
    )
