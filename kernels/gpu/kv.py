"""KVPool: the pages of all layers, and what their bytes mean.

A page of one layer, of ``page`` tokens; K and V are as wide as activations, or 8 bits:

    K       [kv_heads][page][head_dim]
    V       [kv_heads][page][head_dim]
    scales  [2 (K, V)][kv_heads][page]     float32, with int8 and fp8 only

A token's key is ``K * scale`` of its own head, ``scale`` = its largest magnitude / 127 (int8) or
/ 448 (fp8, e4m3). Pages are a multiple of 16 bytes, so that loads from them can be wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels.backend import AttentionShape

ELEMENT = {"int8": torch.int8, "fp8": torch.uint8}
"""What pages of 8 bits are seen as. fp8 goes as bytes: no device before 8.9 has the type."""


@dataclass(frozen=True, slots=True)
class PageLayout:
    """format: "same" (as activations of ``dtype``), "int8" or "fp8"."""

    shape: AttentionShape
    page_size: int
    dtype: torch.dtype
    format: str

    @property
    def element(self) -> torch.dtype:
        return self.dtype if self.format == "same" else ELEMENT[self.format]

    @property
    def values(self) -> int:
        """Elements of K and V."""
        return 2 * self.shape.kv_heads * self.page_size * self.shape.head_dim

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.format == "same" else 2 * self.shape.kv_heads * self.page_size * 4
        return self.values * self.element.itemsize + scales

    def __str__(self) -> str:
        name = str(self.element).removeprefix("torch.") if self.format == "same" else self.format
        return f"gpu {name} {self.shape.kv_heads}x{self.shape.head_dim}"


class KVLayer(NamedTuple):
    """One layer's pages as kernels take them; strides between pages in elements of each.

    Without scales, ``scales`` is any tensor: it is not read.
    """

    elements: Tensor
    scales: Tensor
    page_stride: int
    scale_stride: int


class KVPool(NamedTuple):
    """data: uint8 ``[layers, pages, bytes]``."""

    data: Tensor
    layers: list[KVLayer]
    layout: PageLayout


def allocate(layout: PageLayout, layers: int, num_pages: int, device: torch.device) -> KVPool:
    """A pool of zeros: stale memory could hold NaN, which a hidden key's value must not be."""
    data = torch.zeros(layers, num_pages, layout.num_bytes, dtype=torch.uint8, device=device)
    width = layout.element.itemsize
    found = []
    for layer in data:
        elements = layer.view(layout.element)
        scales = layer.view(torch.float32)
        if layout.format != "same":
            scales = scales[:, layout.values // 4 :]
        found.append(KVLayer(elements, scales, layout.num_bytes // width, layout.num_bytes // 4))
    return KVPool(data, found, layout)
