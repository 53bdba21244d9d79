"""The C++ module (cpu/module.cpp). Addresses are integers; types: 0 float32, 1 bf16, 2 uint8."""

from collections.abc import Sequence

from headstart.kernels.ranges import IntArray

Addresses = tuple[int, int, int, int]

BLOCK_PAGES: int
DOWN_PANEL: int
UP_PANEL: int
SUM_LANES: int

def supported() -> list[str]:
    """Instruction sets this machine can run, best first."""

def missing() -> list[str]:
    """Instruction sets this machine has and this build has no kernels for."""

class AttentionPlan:
    """A batch's ranges, cut into work items (cpu/plan.h)."""

    num_rows: int
    num_partials: int
    num_items: int
    def __init__(
        self,
        num_rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        page_start: IntArray,
        pages: IntArray,
        first_key: IntArray,
        row_start: IntArray,
        rows: IntArray,
        visible: IntArray,
    ) -> None: ...

class LoraAdapter:
    """One adapter's packed low-rank terms (cpu/lora_plan.h); tensors are the caller's to keep."""

    def __init__(self) -> None: ...
    def add_layer(self) -> None:
        """The next dense layer; parts added now are its."""

    def add_part(self, first: int, outputs: int, rank: int, down: int, up: int, /) -> None: ...

class LoraPlan:
    """Which rows of a batch get the terms of which adapter (cpu/lora_plan.h)."""

    def __init__(self) -> None: ...
    def add(self, adapter: LoraAdapter, rows: IntArray, /) -> None:
        """These rows get the terms of this adapter; a row is in one group only."""

class Layers:
    """The layers of a model (cpu/operations.h); weights are the caller's to keep."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        eps: float,
        q_scale: float,
        kv_type: int,
        cos: int,
        sin: int,
        /,
    ) -> None: ...
    def add(
        self,
        hidden: int,
        inner: int,
        input_norm: int,
        qkv: Addresses,
        q_norm: int,
        k_norm: int,
        o: Addresses,
        post_norm: int,
        gate_up: Addresses,
        down: Addresses,
        /,
    ) -> None:
        """The next layer. Of a matrix: the addresses of its weight, scales, sums and bias."""

class Kernels:
    """The kernels of one instruction set on a fixed number of threads (cpu/kernels.h)."""

    name: str
    def __init__(self, name: str, threads: int) -> None: ...
    def norm(
        self,
        rows: int,
        size: int,
        residual: int,
        delta: int,
        delta_type: int,
        weight: int,
        eps: float,
        out_type: int,
        out: int,
        scales: int,
        /,
    ) -> None: ...
    def silu(
        self,
        rows: int,
        size: int,
        gate_up: int,
        in_type: int,
        out_type: int,
        out: int,
        scales: int,
        /,
    ) -> None: ...
    def rope(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        qkv: int,
        in_type: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        cos: int,
        sin: int,
        positions: int,
        slots: int,
        q_scale: float,
        kv_type: int,
        q: int,
        pool: int,
        /,
    ) -> None: ...
    def attend(
        self,
        plan: AttentionPlan,
        kv_type: int,
        q: int,
        pool: int,
        partial: int,
        partial_lse: int,
        partial_sum: int,
        out_type: int,
        out: int,
        scales: int,
        lse: int,
        /,
    ) -> None: ...
    def linear(
        self,
        rows: int,
        in_features: int,
        out_features: int,
        x: int,
        x_scales: int,
        weight: int,
        weight_scales: int,
        weight_sums: int,
        bias: int,
        out: int,
        /,
    ) -> None: ...
    def layers(
        self,
        layers: Layers,
        count: int,
        rows: int,
        residual: int,
        positions: int,
        slots: int,
        pool: int,
        layer_bytes: int,
        plan: AttentionPlan,
        scratch: Sequence[int],
        q: int,
        qkv: int,
        gate_up: int,
        partials: tuple[int, int, int],
        delta: int,
        /,
    ) -> float:
        """The first ``count`` layers; returns the seconds spent in attention. ``scratch``: of the
        rows that are normed, attended and activated, data and scales."""

    def lora(
        self,
        plan: LoraPlan,
        layer: int,
        weight_type: int,
        in_features: int,
        out_features: int,
        x_type: int,
        x: int,
        x_scales: int,
        y_type: int,
        y: int,
        /,
    ) -> None: ...
    def argmax(self, logits: int, rows: int, size: int, out: int, /) -> None: ...
    def sample(
        self,
        rows: int,
        size: int,
        logits: int,
        row: int,
        temperature: int,
        min_p: int,
        top_k: int,
        top_p: int,
        uniform: int,
        out: int,
        /,
    ) -> None: ...
    def top(
        self,
        rows: int,
        size: int,
        count: int,
        logits: int,
        row: int,
        ids: int,
        values: int,
        total: int,
        /,
    ) -> None: ...
