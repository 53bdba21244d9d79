"""int8 weights in the panels that kernels/cpu/linear.h reads, and back.

    [out, in]  ->  [out / 32][in / 4][32][4]        zeros where out or in is no multiple

A panel holds 32 outputs; each of its words holds 4 inputs of one output, so that one vector of
words meets 4 inputs of a row at once. ``sums`` takes out the zero point 128 of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 32
"""Outputs of a panel."""
WORD = 4
"""Inputs of a word."""


@dataclass(frozen=True, slots=True)
class Int8Panels:
    """A packed int8 matrix ``[out_features, in_features]``.

    ``data [out / 32, in / 4, 32, 4]`` int8, none less than -127; ``scale`` float32 and ``sums``
    int32 (128 times the sum of an output's weights) ``[out]``, padded as the panels are; ``bias``
    float32 ``[out_features]`` or None.
    """

    data: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int

    def weight(self) -> Tensor:
        """int8 ``[out_features, in_features]``."""
        rows = self.data.permute(0, 2, 1, 3).reshape(len(self.scale), -1)
        return rows[: self.out_features, : self.in_features].contiguous()


def panels_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    return (-(-out_features // PANEL), -(-in_features // WORD), PANEL, WORD)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The panels and the sums of int8 ``weight [out, in]``."""
    out_features, in_features = weight.shape
    rows, columns, _, _ = shape = panels_shape(out_features, in_features)
    missing = (columns * WORD - in_features, rows * PANEL - out_features)
    if any(missing):
        weight = pad(weight, (0, missing[0], 0, missing[1]))
    # Moved a word at a time.
    words = weight.contiguous().view(torch.int32).view(rows, PANEL, columns)
    panels = words.transpose(1, 2).contiguous().view(torch.int8).view(shape)
    return panels, weight.sum(dim=1, dtype=torch.int32) * 128


def pack_int8(weight: Tensor, scale: Tensor, bias: Tensor | None) -> Int8Panels:
    """Raises ValueError for a shape or a value that the kernels do not compute with."""
    out_features, in_features = weight.shape
    check_int8_shape(in_features)
    if weight.numel() and int(weight.min()) < -127:
        raise ValueError("int8 weights must not be less than -127, and there is a -128")
    panels, sums = pack(weight)
    scale = pad(scale.float(), (0, len(sums) - out_features))
    bias = None if bias is None else bias.float().contiguous()
    return Int8Panels(panels, scale, sums, bias, out_features, in_features)


def check_int8_shape(in_features: int) -> None:
    if in_features % WORD:
        raise ValueError(f"int8 weights need an input size divisible by {WORD}, got {in_features}")
