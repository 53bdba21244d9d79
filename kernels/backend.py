"""Backend: the operations a device must supply. The only place that asks about devices.

A model is written against this protocol (engine/models/decoder.py) and never learns which device,
number format or attention method is active. Attention is a list of **KV ranges**: a run of pages,
the rows that read it, and per row how many of its keys that row sees. Each range yields
``(out, lse)`` per row; partial results of one row are merged (reference.py has the algebra).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.kernels.shared_memory import SharedMemory

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, key/value heads (a divisor of them) and head size of one model."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class KVRanges:
    """The KV ranges of one batch, as flat arrays (int32).

        page_start  [ 0       3    4 ]        range i reads pages[page_start[i] : page_start[i+1]]
        pages       [ 7  3  9 | 4 ]
        first_key   [ 0        | 96 ]         and its first key is key first_key[i] of a sequence
        row_start   [ 0   2          5 ]      and is read by rows[row_start[i] : row_start[i+1]]
        rows        [ 0   1 | 2   3   4 ]
        visible     [ 64 65 | 8   9  10 ]     row sees keys [0, visible) of its range

    Key k of a range lies in page k // page_size of its run, at offset k % page_size. A range
    begins with a page, and the ranges of one row come in the order of their keys.
    """

    page_start: IntArray
    pages: IntArray
    first_key: IntArray
    row_start: IntArray
    rows: IntArray
    visible: IntArray

    def __len__(self) -> int:
        return len(self.page_start) - 1

    def __getitem__(self, i: int) -> Range:
        pages = slice(self.page_start[i], self.page_start[i + 1])
        entries = slice(self.row_start[i], self.row_start[i + 1])
        return Range(
            self.pages[pages], self.rows[entries], self.visible[entries], int(self.first_key[i])
        )

    @classmethod
    def of(cls, ranges: Sequence[Range]) -> KVRanges:
        """The ranges of a list, in its order."""

        def joined(parts: Iterable[Sequence[int] | IntArray]) -> IntArray:
            return np.concatenate([np.zeros(0), *parts]).astype(np.int32)

        return cls(
            page_start=starts([len(each.pages) for each in ranges]),
            pages=joined(each.pages for each in ranges),
            first_key=np.array([each.first_key for each in ranges], dtype=np.int32),
            row_start=starts([len(each.rows) for each in ranges]),
            rows=joined(each.rows for each in ranges),
            visible=joined(each.visible for each in ranges),
        )

    @classmethod
    def of_sequences(cls, count: int, keys: int, rows: int, page_size: int) -> KVRanges:
        """``count`` sequences of ``keys`` keys in pages of their own: of each the last ``rows``
        rows, which are a staircase."""
        pages = -(-keys // page_size)
        visible = np.arange(keys - rows + 1, keys + 1, dtype=np.int32)
        return cls.of(
            [
                Range(
                    np.arange(i * pages, (i + 1) * pages, dtype=np.int32),
                    np.arange(i * rows, (i + 1) * rows, dtype=np.int32),
                    visible,
                )
                for i in range(count)
            ]
        )

    def chosen(self, which: Iterable[int]) -> KVRanges:
        """These ranges alone."""
        return KVRanges.of([self[i] for i in which])


class Range(NamedTuple):
    """One of KVRanges: the pages, who reads them, how far, and the key they begin with."""

    pages: Sequence[int] | IntArray
    rows: Sequence[int] | IntArray
    visible: Sequence[int] | IntArray
    first_key: int = 0


def starts(counts: npt.ArrayLike) -> IntArray:
    """Where runs of these lengths begin, one after the other, and where the last one ends."""
    return np.cumsum(np.append(np.zeros(1, np.int32), counts), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin by position, float32 ``[positions, head_dim / 2]``, scaling included."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class LoraPart:
    """A low-rank term of some outputs of a dense layer: outputs ``[first, first + n)`` get
    ``up @ (down @ x)``. down: float32 ``[rank, in]``; up: float32 ``[n, rank]``, scaling included.
    """

    first: int
    down: Tensor
    up: Tensor


class KernelChoices(Protocol):
    """Where a backend keeps which configuration of a kernel was the fastest on this machine."""

    def load(self, device: str) -> dict[str, dict[str, int]]: ...

    def keep(self, device: str, chosen: dict[str, dict[str, int]]) -> None: ...


class FixedBatch(Protocol):
    """A decoding step's tensors at places that stay, for up to ``rows`` rows of one token each.

    token_ids, positions, slots: int32 ``[rows]``, on the device; spare rows have slot -1.
    ``plan``: as of ``plan_attention``.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    plan: Any

    def fill(self, token_ids: Tensor, positions: Tensor, slots: Tensor, ranges: KVRanges) -> bool:
        """Write a batch into them; False, and nothing is written, if it does not fit."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """``work``'s result, and what computes it again, in place, from what is filled in then."""
        ...


class Linear(Protocol):
    """A weight as the backend keeps it."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A weight ``[out, in]`` and bias ``[out]`` for torch's matrix product."""

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


class Backend(Protocol):
    """Operations on rows (tokens). Results of an operation are valid until its next call.

    ``Rows`` (typed Any) is whatever this backend hands to its own ``linear``: float32, bf16, or
    uint8 with a scale per row. A pool, a plan and a Linear are the backend's own, too.
    """

    @property
    def name(self) -> str: ...

    @property
    def page_size(self) -> int: ...

    @property
    def device(self) -> str:
        """What computes, and how: times measured under another name do not hold here."""
        ...

    @property
    def range_step(self) -> int:
        """Keys: at multiples of it a sequence may be cut into ranges at the least cost.

        Where a backend promises equal bits however keys are divided among ranges, this is where.
        """
        ...

    @property
    def tile_rows(self) -> int:
        """Rows that go through a layer at a time at the best speed."""
        ...

    def constant(self, tensor: Tensor) -> Tensor:
        """``tensor`` where operations can read it: norm weights, tables."""
        ...

    def upload(self, tensor: Tensor) -> Tensor:
        """The same for a batch's small tensors, without waiting; ``tensor`` may change at once."""
        ...

    def synchronize(self) -> None:
        """Wait for every operation: they may go on when they have returned."""
        ...

    def free_memory(self) -> int | None:
        """Bytes left of the device's own memory; None: it computes in the host's."""
        ...

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        """Bytes of the device that running ``work`` takes at most; None: unknown, and not run."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether operations return before they are computed, which they are in order."""
        ...

    def linear_weight(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A dense layer from ``weight [out, in]`` and ``bias [out]``."""
        ...

    def quantized_weight(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Linear:
        """A dense layer from int8 ``weight [out, in]`` and float32 ``scale [out]``."""
        ...

    def kv_bytes_per_page(self, shape: AttentionShape, layers: int) -> int: ...

    def allocate_kv(self, shape: AttentionShape, layers: int, num_pages: int) -> Any:
        """A pool of ``num_pages`` pages in every layer. Memory is touched on first use only."""
        ...

    def kv_layout(self, shape: AttentionShape) -> str:
        """What the bytes of a page mean. Pools of equal layout and page size can swap pages."""
        ...

    def kv_pages(self, kv: Any) -> Tensor:
        """The pool's memory, uint8 ``[layers, num_pages, bytes]``: to copy whole pages."""
        ...

    def kv_memory(self, kv: Any) -> SharedMemory | None:
        """The same memory, byte for byte, for other processes to map; None: they cannot."""
        ...

    def prepare_pages(self, kv: Any, first: int, last: int) -> None:
        """Have the system supply the memory of pages ``[first, last)`` now, not on first use."""
        ...

    def plan_attention(self, num_rows: int, ranges: KVRanges, shape: AttentionShape) -> Any:
        """What ``attend`` needs of a batch, made once and used by every layer."""
        ...

    def fixed_batch(self, rows: int, pages: int, shape: AttentionShape) -> FixedBatch | None:
        """Places for decoding steps whose ranges have up to ``pages`` pages; None: launching is
        no cost worth capturing here."""
        ...

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        """Rows of ``table``, float32 ``[rows, hidden]``; the caller owns them."""
        ...

    def norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Any:
        """RMSNorm of ``residual += delta`` (updated in place), as Rows."""
        ...

    def linear(self, x: Any, weight: Any) -> Tensor:
        """``x W^T + bias``, ``[rows, out]``."""
        ...

    def lora_adapter(self, layers: Sequence[Sequence[LoraPart]]) -> Any:
        """An adapter: the low-rank terms of each dense layer, numbered as the caller will."""
        ...

    def plan_lora(self, adapters: Sequence[Any], rows: Sequence[IntArray]) -> Any:
        """Made once a batch: ``rows[i]`` get the terms of ``adapters[i]``; a row is in one."""
        ...

    def add_lora(self, x: Any, y: Tensor, plan: Any, layer: int) -> None:
        """Add the terms of dense layer ``layer`` to ``y``, which is what ``linear`` made of x."""
        ...

    def rope_and_store(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope: RopeTable,
        positions: Tensor,
        slots: Tensor,
        shape: AttentionShape,
        kv: Any,
        layer: int,
        tile: int = 0,
    ) -> Any:
        """Norm (where given) and rotate q and k; write k and v into their slots; return q.

        What it returns is valid until its next call for the same ``tile``.

        ``positions``, ``slots``: int32 ``[rows]``; slot = page * page_size + offset.
        Rotation acts on halves of a head. Softmax scale is 1/sqrt(head_dim).
        """
        ...

    def attend(self, q: Any, kv: Any, layer: int, plan: Any) -> Any:
        """Attention of every row over its ranges, merged, as Rows ``[rows, heads * head_dim]``."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Any:
        """``silu(gate) * up`` of ``[rows, 2 * size]``, as Rows ``[rows, size]``."""
        ...

    def argmax(self, logits: Tensor) -> list[int]:
        """Index of each row's largest value, the first of equals; or of a NaN."""
        ...


class HostMemory:
    """What a backend is that computes in the host's memory and is done when it returns."""

    tile_rows = 512
    """Their activations stay in the cores' caches."""

    asynchronous = False

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def free_memory(self) -> None:
        """There is none but the host's."""

    def peak_memory(self, work: Callable[[], None]) -> None:
        """Not counted."""

    def fixed_batch(self, rows: int, pages: int, shape: AttentionShape) -> None:
        """Operations are called, not launched."""


WEIGHT_FORMATS = ("f32", "f16", "bf16", "int8")
KV_FORMATS = ("auto", "fp8", "int8")


AUTO_ISA = "HEADSTART_AUTO_ISA"
"""Variable: the best instruction set that may be chosen unasked, as if the machine had no other."""


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


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in itertools.takewhile(str.strip, lines):
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    known = ("model name", "cpu family", "model", "stepping")
    return " ".join(fields[name] for name in known if name in fields) or platform.machine()


def default_weights(isa: str) -> str:
    """The weight format that suits an instruction set, quality aside."""
    if isa in ("avx512_bf16", "avx512_vnni"):
        return "int8"
    return "f32"


def load_backend(
    name: str,
    *,
    isa: str,
    weights: str,
    threads: int,
    page_size: int = 32,
    kv_format: str = "auto",
    choices: KernelChoices | None = None,
) -> Backend:
    """The backend called ``name`` ("gpu", "cpu" or "reference") for one weight format.

    ``kv_format``: of keys and values, "auto" for as wide as activations. ``choices``: where
    the gpu backend keeps what it measures of its kernels; None: nowhere.
    Raises ValueError, saying what there is, for a name or instruction set this machine lacks.
    """
    torch.set_num_threads(threads)
    if name == "gpu":
        return _load_gpu(weights, page_size, kv_format, choices)
    if kv_format != "auto":
        raise ValueError(
            f"the {name} backend has no {kv_format} KV: --kv-format is for the gpu one"
        )
    if name == "reference":
        if weights != "f32":
            raise ValueError(f"the reference backend computes in f32 only, not {weights}")
        from headstart.kernels.reference import ReferenceBackend

        return ReferenceBackend(page_size=page_size)
    if name == "cpu":
        from headstart.kernels import _cpu
        from headstart.kernels.cpu.backend import CpuBackend

        if isa == "auto":
            isa = instruction_sets()[0]
        available = list(_cpu.supported())
        if isa not in available:
            raise ValueError(f"this machine has no {isa} kernels; it has {', '.join(available)}")
        if weights == "f16":
            raise ValueError("the cpu backend has no f16 weights; it has f32, bf16 and int8")
        return CpuBackend(isa=isa, weights=weights, threads=threads, page_size=page_size)
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
