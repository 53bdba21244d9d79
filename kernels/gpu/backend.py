"""GpuBackend: the operations of Backend in Triton, matrix products by torch (cuBLAS).

Operations are launched and not waited for. Rows are tensors on the device in the activations'
type; the residual is float32. Their results are new tensors of torch's caching allocator, which
gives memory out again in stream order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.kernels.backend import (
    AttentionShape,
    DenseLinear,
    Draws,
    LayerWeights,
    LoraPart,
    RopeTable,
    Top,
)
from headstart.kernels.gpu import attention, flash, kv, lora, rows
from headstart.kernels.gpu.device import Config, Device
from headstart.kernels.gpu.plan import ITEMS_PER_PROCESSOR, Capacity, Cut, cut, most_splits
from headstart.kernels.gpu.tuning import Tuner
from headstart.kernels.packing import Int8Panels
from headstart.kernels.ranges import IntArray, KVRanges, in_pieces
from headstart.kernels.reference import sample, top

logger = logging.getLogger(__name__)

_LOG2E = 1.4426950408889634
SCRATCH_RANGES = 2
"""Of a row, on average: batches whose parts take more memory than that are attended to in runs of
rows."""
FLASH_ROWS = 64
"""Rows of the shortest range that goes to flash-attn: a tile of its kernels."""
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class AttentionPlan(NamedTuple):
    """A plan on the device: its sections (plan.py), what they hold at most, and its kernels."""

    sections: list[Tensor]
    capacity: Capacity
    num_rows: int
    shape: AttentionShape
    row_config: Config
    tile_config: Config
    flash_calls: list[flash.FlashCall]


class LongPlan(NamedTuple):
    """Runs of rows, each the first row and its plan, that are attended to one after the other."""

    num_rows: int
    shape: AttentionShape
    pieces: list[tuple[int, AttentionPlan]]
    flash_calls: list[flash.FlashCall]


KV_FORMATS = ("auto", "fp8", "int8")


class GpuBackend:
    """See Backend. ``weights``: "f32", "f16" or "bf16", of weights, activations and, where
    ``kv_format`` is "auto", keys and values; "fp8" and "int8" are those of keys and values."""

    name = "gpu"
    tile_rows = 8192
    asynchronous = True

    def __init__(
        self,
        device: Device,
        tuner: Tuner,
        *,
        weights: str,
        kv_format: str = "auto",
        page_size: int = 32,
        flash_attn: Callable[..., Any] | None = None,
    ) -> None:
        if page_size < 16 or page_size & (page_size - 1):
            raise ValueError(
                f"page_size must be a power of two of at least 16 on this backend, got {page_size}"
            )
        if weights not in DTYPES:
            raise ValueError(
                f"the gpu backend has weights in {', '.join(DTYPES)}, not in {weights}"
            )
        if kv_format not in KV_FORMATS:
            raise ValueError(
                f"the gpu backend has KV in {', '.join(KV_FORMATS)}, not in {kv_format}"
            )
        self.page_size = self.range_step = page_size
        self.dtype = DTYPES[weights]
        self.on = device
        self.tuner = tuner
        self._format = "same" if kv_format == "auto" else kv_format
        self._read_as = self._format
        if self._format == "fp8" and device.arch >= 89:
            self._read_as = "fp8_native"
        self._precision = "tf32x3" if weights == "f32" else "tf32"
        self._configs: dict[AttentionShape, tuple[Config, Config]] = {}
        self._flash = None if weights == "f32" and device.measures else flash_attn
        self._flash_wins: dict[AttentionShape, bool] = {}
        kv_name = weights if kv_format == "auto" else kv_format
        self.device = f"{device.name}, {weights} weights, {kv_name} KV"

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.on.torch_device)

    def upload(self, tensor: Tensor) -> Tensor:
        return self.on.upload(tensor)

    def synchronize(self) -> None:
        self.on.synchronize()

    def free_memory(self) -> int | None:
        return self.on.free_memory()

    def peak_memory(self, work: Callable[[], None]) -> int | None:
        return self.on.peak_memory(work)

    def linear_weight(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        def placed(tensor: Tensor) -> Tensor:
            return tensor.to(self.on.torch_device, self.dtype).contiguous()

        return DenseLinear(placed(weight), None if bias is None else placed(bias))

    def packed_weight(self, panels: Int8Panels) -> DenseLinear:
        raise ValueError("int8 weights are for CPUs: the gpu backend has f32, f16 and bf16")

    def _layout(self, shape: AttentionShape) -> kv.PageLayout:
        return kv.PageLayout(shape, self.page_size, self.dtype, self._format)

    def kv_bytes_per_page(self, shape: AttentionShape, layers: int) -> int:
        return layers * self._layout(shape).num_bytes

    def allocate_kv(self, shape: AttentionShape, layers: int, num_pages: int) -> kv.KVPool:
        attention.head_parts(shape.head_dim)
        return kv.allocate(self._layout(shape), layers, num_pages, self.on.torch_device)

    def kv_layout(self, shape: AttentionShape) -> str:
        return str(self._layout(shape))

    def kv_pages(self, kv: kv.KVPool) -> Tensor:
        return kv.data

    def kv_memory(self, kv: kv.KVPool) -> None:
        """The device's own, which other processes cannot map."""

    def prepare_pages(self, kv: kv.KVPool, first: int, last: int) -> None:
        """Nothing to do: torch has written the zeros."""

    def plan_attention(
        self, num_rows: int, ranges: KVRanges, shape: AttentionShape
    ) -> AttentionPlan | LongPlan:
        calls: list[flash.FlashCall] = []
        if self._flash is not None and self._flash_is_faster(shape):
            calls, ranges = self._flash_calls(ranges, shape)
        plan = self._plan(num_rows, ranges, shape, *self._kernels(shape), calls)
        if self._has_few_slots(plan):
            return plan
        pieces = in_pieces(
            num_rows,
            1,
            lambda first, last: self._plan(
                last - first, ranges.of_rows(first, last), shape, *self._kernels(shape), []
            ),
            self._has_few_slots,
        )
        return LongPlan(num_rows, shape, pieces, calls)

    def attention_scratch(self, rows: int, keys: int, shape: AttentionShape) -> int:
        # A single row may be in as many ranges as it sees pages.
        slots = max(
            self._few_slots(rows, shape), self._few_slots(1, shape) + keys // self.page_size
        )
        return slots * shape.heads * (shape.head_dim + 1) * 4

    def _few_slots(self, rows: int, shape: AttentionShape) -> int:
        """Those of a batch whose rows are in SCRATCH_RANGES ranges each: one an entry, and one
        more where an item's keys are split."""
        target = most_splits(self.on.processors, shape.kv_heads)
        of_items = sum(max(c.block_m // shape.group, 1) for c in self._kernels(shape))
        return SCRATCH_RANGES * rows + of_items * target

    def _has_few_slots(self, plan: AttentionPlan) -> bool:
        return plan.capacity.slots <= self._few_slots(plan.num_rows, plan.shape)

    def _flash_calls(
        self, ranges: KVRanges, shape: AttentionShape
    ) -> tuple[list[flash.FlashCall], KVRanges]:
        """What flash-attn computes, and the rest."""
        found, rest = flash.split(ranges, FLASH_ROWS)
        layout = self._layout(shape)
        return [flash.place(*call, layout, self.on.upload) for call in found], rest

    def _flash_is_faster(self, shape: AttentionShape) -> bool:
        """By measured time of a long chunk; without a device that measures, taken to be so."""
        if shape not in self._flash_wins:
            pool, q, ranges = self._chunk(shape, sequences=1, rows=1024, keys=2048)
            kernels = self._kernels(shape)
            plain = self._plan(len(q), ranges, shape, *kernels, [])
            calls, rest = self._flash_calls(ranges, shape)
            other = self._plan(len(q), rest, shape, *kernels, calls)
            seconds = [0.0, 1.0]
            if self.on.measures:
                seconds = [
                    self.on.seconds(partial(self.attend, q, pool, 0, plan))
                    for plan in (other, plain)
                ]
                logger.info("flash-attn %.1f us, Triton %.1f us", *(1e6 * s for s in seconds))
            self._flash_wins[shape] = seconds[0] < seconds[1]
        return self._flash_wins[shape]

    def _kernels(self, shape: AttentionShape) -> tuple[Config, Config]:
        """Configurations for few and for many vectors, chosen when a shape is first met."""
        if shape not in self._configs:
            self._configs[shape] = self._choose(shape)
        return self._configs[shape]

    def _choose(self, shape: AttentionShape) -> tuple[Config, Config]:
        """Of the kernels for few and for many vectors; a tile holds a whole group."""
        width = self.dtype.itemsize
        least = max(16, rows.power_of_two(shape.group))
        row, tile = (
            self.tuner.choose(name, shape.head_dim, width, self._read_as, work)
            for name, work in (
                ("row", self._work(shape, least, sequences=32, rows=1, keys=2048)),
                ("tile", self._work(shape, least, sequences=1, rows=1024, keys=2048)),
            )
        )
        return row.at_least(least), tile.at_least(least)

    def _work(
        self, shape: AttentionShape, least: int, *, sequences: int, rows: int, keys: int
    ) -> Callable[[Config], None]:
        """Attention of a batch like those to come, to be timed: staircases of ``rows``."""

        inputs = cache(lambda: self._chunk(shape, sequences=sequences, rows=rows, keys=keys))

        @cache
        def plan(config: Config) -> AttentionPlan:
            return self._plan(sequences * rows, inputs()[2], shape, config, config, [])

        def work(config: Config) -> None:
            pool, q, _ = inputs()
            self.attend(q, pool, 0, plan(config.at_least(least)))

        return work

    def _chunk(
        self, shape: AttentionShape, *, sequences: int, rows: int, keys: int
    ) -> tuple[kv.KVPool, Tensor, KVRanges]:
        """Pages, queries and ranges of sequences with ``keys`` keys, their last ``rows`` rows."""
        pool = self.allocate_kv(shape, 1, sequences * -(-keys // self.page_size))
        size = (sequences * rows, shape.heads, shape.head_dim)
        q = torch.randn(size, device=self.on.torch_device).to(self.dtype)
        return pool, q, KVRanges.of_sequences(sequences, keys, rows, self.page_size)

    def cut(
        self,
        num_rows: int,
        ranges: KVRanges,
        shape: AttentionShape,
        row_config: Config,
        tile_config: Config,
        most_items: int | None = None,
    ) -> Cut:
        """The ranges as items of these kernels (plan.py)."""
        return cut(
            num_rows,
            ranges,
            group=shape.group,
            kv_heads=shape.kv_heads,
            page_size=self.page_size,
            row_block=row_config.block_m,
            tile_block=tile_config.block_m,
            processors=self.on.processors,
            most_items=most_items,
        )

    def _plan(
        self,
        num_rows: int,
        ranges: KVRanges,
        shape: AttentionShape,
        row_config: Config,
        tile_config: Config,
        calls: list[flash.FlashCall],
    ) -> AttentionPlan:
        found = self.cut(num_rows, ranges, shape, row_config, tile_config)
        capacity = found.capacity
        sections = capacity.sections(self.on.upload(found.write(capacity)))
        return AttentionPlan(sections, capacity, num_rows, shape, row_config, tile_config, calls)

    def fixed_batch(self, rows: int, pages: int, shape: AttentionShape) -> GpuFixedBatch:
        return GpuFixedBatch(self, rows, pages, shape, *self._kernels(shape))

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        return table.index_select(0, token_ids).float()

    def norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return rows.norm(self.on, residual, delta, weight, eps, self.dtype)

    def linear(self, x: Tensor, weight: DenseLinear) -> Tensor:
        return torch.nn.functional.linear(x, weight.weight, weight.bias)

    def lora_adapter(self, layers: Sequence[Sequence[LoraPart]]) -> lora.GpuAdapter:
        return lora.GpuAdapter(layers, self.dtype, self.on.torch_device)

    def plan_lora(
        self, adapters: Sequence[lora.GpuAdapter], rows: Sequence[IntArray]
    ) -> lora.LoraPlan:
        return lora.plan_lora(self.on, adapters, rows)

    def add_lora(self, x: Tensor, y: Tensor, plan: lora.LoraPlan, layer: int) -> None:
        lora.add_lora(self.on, x, y, plan, layer)

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
        kv: kv.KVPool,
        layer: int,
        tile: int = 0,
    ) -> Tensor:
        return rows.rope_and_store(
            self.on, qkv, q_norm, k_norm, eps, rope, positions, slots, shape,
            kv.layers[layer], kv.layout,
        )  # fmt: skip

    def attend(
        self, q: Tensor, kv: kv.KVPool, layer: int, plan: AttentionPlan | LongPlan
    ) -> Tensor:
        out, _ = self.attend_with_lse(q, kv, layer, plan)
        return out

    def attend_with_lse(
        self, q: Tensor, kv: kv.KVPool, layer: int, plan: AttentionPlan | LongPlan
    ) -> tuple[Tensor, Tensor]:
        """As ``attend``, and the merged lse, float32 natural logarithm ``[rows, heads]``."""
        rows, shape, where = plan.num_rows, plan.shape, self.on.torch_device
        out = torch.empty(rows, shape.heads * shape.head_dim, dtype=q.dtype, device=where)
        lse = torch.empty(rows, shape.heads, device=where)
        pieces = plan.pieces if isinstance(plan, LongPlan) else [(0, plan)]
        for first, piece in pieces:
            here = slice(first, first + piece.num_rows)
            self._attend_ranges(q[here], kv, layer, piece, out[here], lse[here])
        for call in plan.flash_calls:
            assert self._flash is not None
            part = flash.attend(self._flash, q, kv, layer, call)
            whole = out.view(rows, shape.heads, shape.head_dim)
            flash.merge_into(whole, lse, call.rows, *part)
        return out, lse

    def _attend_ranges(
        self, q: Tensor, kv: kv.KVPool, layer: int, plan: AttentionPlan, out: Tensor, lse: Tensor
    ) -> None:
        """Attention without what flash-attn computes, into ``out`` and ``lse``."""
        shape, capacity = plan.shape, plan.capacity
        row_items, tile_items, entries, visible, merge_rows, starts, slots, pages = plan.sections
        pool = kv.layers[layer]
        where = self.on.torch_device
        parts = torch.empty(capacity.slots, shape.heads, shape.head_dim, device=where)
        part_lse = torch.empty(capacity.slots, shape.heads, device=where)
        main, tail = attention.head_parts(shape.head_dim)
        for config, items, count in (
            (plan.row_config, row_items, capacity.row_items),
            (plan.tile_config, tile_items, capacity.tile_items),
        ):
            if not count:
                continue
            self.on.launch(
                attention.attend_items,
                (count, shape.kv_heads),
                config,
                q, pool.elements, pool.scales, items, pages, entries, visible,
                out, lse, parts, part_lse,
                q.stride(0), pool.page_stride, pool.scale_stride,
                _LOG2E / math.sqrt(shape.head_dim),
                GROUP=shape.group, KV_HEADS=shape.kv_heads, MAIN=main, TAIL=tail,
                PAGE=self.page_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                FORMAT=self._read_as, PRECISION=self._precision,
            )  # fmt: skip
        if capacity.merge_rows:
            attention.merge_parts(self.on, parts, part_lse, merge_rows, starts, slots, out, lse)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return rows.silu_mul(self.on, gate_up)

    def fuse(
        self, layers: Sequence[LayerWeights], rope: RopeTable, shape: AttentionShape, eps: float
    ) -> None:
        """A graph is what spares launches here."""

    def argmax(self, logits: Tensor) -> list[int]:
        best: list[int] = logits.argmax(dim=-1).tolist()
        return best

    def sample(self, logits: Tensor, draws: Draws) -> list[int]:
        """On the host. Where nothing waits for the device, engine/sampling/device.py draws."""
        return sample(logits, draws)

    def top(self, logits: Tensor, rows: Sequence[int], count: int) -> Top:
        return top(logits, rows, count)


RANGES_PER_ROW = 4
"""Of a captured step, on average at most: a sequence's own, and shared ones it is in."""

PARTS_PER_ROW = 16
"""The same of parts to be merged."""


class GpuFixedBatch:
    """See FixedBatch. Sections of the plan have fixed places (plan.py), items beyond a batch's are
    empty, so that one captured step serves all batches that fit, with shared ranges or without."""

    def __init__(
        self,
        backend: GpuBackend,
        rows: int,
        pages: int,
        shape: AttentionShape,
        row_config: Config,
        tile_config: Config,
    ) -> None:
        self._backend = backend
        self._rows = rows
        wanted = -(-ITEMS_PER_PROCESSOR * backend.on.processors // shape.kv_heads)
        self._most_items = RANGES_PER_ROW * rows + wanted
        entries = RANGES_PER_ROW * rows
        slots = PARTS_PER_ROW * rows + self._most_items
        self._capacity = capacity = Capacity(
            self._most_items, self._most_items, pages, entries, rows, slots
        )
        where = backend.on.torch_device
        self._inputs = torch.zeros(3, rows, dtype=torch.int32, device=where)
        self.token_ids, self.positions, self.slots = self._inputs.unbind()
        self._buffer = torch.zeros(capacity.total, dtype=torch.int32, device=where)
        sections = capacity.sections(self._buffer)
        self.plan = AttentionPlan(sections, capacity, rows, shape, row_config, tile_config, [])

    def fill(self, token_ids: Tensor, positions: Tensor, slots: Tensor, ranges: KVRanges) -> bool:
        plan, on = self.plan, self._backend.on
        found = self._backend.cut(
            len(token_ids), ranges, plan.shape, plan.row_config, plan.tile_config, self._most_items
        )
        if len(token_ids) > self._rows or not self._capacity.holds(found.capacity):
            return False
        inputs = torch.zeros(3, self._rows, dtype=torch.int32)
        inputs[2] = -1
        for line, values in zip(inputs, (token_ids, positions, slots), strict=True):
            line[: len(values)] = values
        on.upload_into(inputs, self._inputs)
        content = found.write(self._capacity)
        on.upload_into(content, self._buffer[: len(content)])
        return True

    def capture(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        return self._backend.on.capture(work)
