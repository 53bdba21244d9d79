"""Backend: the operations a device must supply.

A model is written against this protocol (engine/models/decoder.py) and never learns which device,
number format or attention method is active. What attention reads is in ranges.py, what there is on
this machine in devices.py, and what every operation means in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headstart.kernels.memory import SharedMemory
from headstart.kernels.packing import Int8Panels
from headstart.kernels.ranges import IntArray, KVRanges


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


class Draws(NamedTuple):
    """How rows of logits are drawn from, arrays of one length.

    ``rows``: which rows; ``temperature`` above 0; ``min_p``, 0 for none; ``top_k``, at least 1, the
    vocabulary's size or more for none; ``top_p``, 1 for none; ``uniform`` in [0, 1), float64.
    """

    rows: npt.NDArray[Any]
    temperature: npt.NDArray[Any]
    min_p: npt.NDArray[Any]
    top_k: npt.NDArray[Any]
    top_p: npt.NDArray[Any]
    uniform: npt.NDArray[Any]


class Top(NamedTuple):
    """The largest logits of rows, in order: int32 ``ids`` and float32 ``values`` ``[rows, count]``;
    float32 ``total [rows]``: log sum exp of all, so that ``value - total`` is a log-probability."""

    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    total: npt.NDArray[np.float32]


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


class LayerWeights(Protocol):
    """A decoder layer as the backend keeps it; norms float32."""

    @property
    def input_norm(self) -> Tensor: ...

    @property
    def qkv(self) -> Any: ...

    @property
    def q_norm(self) -> Tensor | None: ...

    @property
    def k_norm(self) -> Tensor | None: ...

    @property
    def o(self) -> Any: ...

    @property
    def post_norm(self) -> Tensor: ...

    @property
    def gate_up(self) -> Any: ...

    @property
    def down(self) -> Any: ...


class FusedLayers(Protocol):
    """Layers of a model as one operation, which gives the bits that theirs give one by one."""

    def takes(self, plan: Any) -> bool:
        """Whether it computes a batch with this attention plan."""
        ...

    def run(
        self, count: int, residual: Tensor, positions: Tensor, slots: Tensor, kv: Any, plan: Any
    ) -> tuple[Tensor, float]:
        """The first ``count`` layers, one at least: writes their keys and values, updates
        ``residual``, and returns what is still to be added to it, valid until the next ``linear``
        of this size; and the seconds spent in attention."""
        ...


class Chooser(Protocol):
    """From logits to tokens."""

    def argmax(self, logits: Tensor) -> list[int]:
        """Index of each row's largest value, the first of equals; or of a NaN."""
        ...

    def sample(self, logits: Tensor, draws: Draws) -> list[int]:
        """A token for each of ``draws``, from its row of float32 ``logits [.., vocab]``; -1 where
        that has a NaN or its largest value is infinite."""
        ...

    def top(self, logits: Tensor, rows: Sequence[int], count: int) -> Top:
        """The ``count`` largest of these rows of float32 ``logits [.., vocab]``, at most all; of
        equals those with the smaller id. No row as ``sample`` finds no token in."""
        ...


class Backend(Chooser, Protocol):
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

    def packed_weight(self, panels: Int8Panels) -> Linear:
        """A dense layer from an int8 matrix; where it can be, it is used as it lies."""
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

    def attention_scratch(self, rows: int, keys: int, shape: AttentionShape) -> int:
        """Bytes that ``attend`` takes beside its result, at most, for so many rows that see so many
        keys each, however these are divided among ranges."""
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

    def fuse(
        self, layers: Sequence[LayerWeights], rope: RopeTable, shape: AttentionShape, eps: float
    ) -> FusedLayers | None:
        """A model's layers as one operation; None: there is none for them."""
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

    def fuse(
        self, layers: Sequence[LayerWeights], rope: RopeTable, shape: AttentionShape, eps: float
    ) -> FusedLayers | None:
        """There is none."""
        return None


WEIGHT_FORMATS = ("f32", "f16", "bf16", "int8")
KV_FORMATS = ("auto", "f32", "bf16", "fp8", "int8")
