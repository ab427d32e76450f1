"""`Packed`: a packed matrix as the backends take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqqplus.quantization.spec import Layout, QuantSpec


class Packed(NamedTuple):
    """The packed tensors of a weight `shape` = (out_features, in_features), and what they mean.

    Attributes:
        W_q: [rows, bytes] uint8, contiguous: the codes (`quantization/packing.py`). `rows` is out_features for axis 1
            and in_features for axis 0, whose matrix is stored turned.
        scale, offset: [rows, groups], contiguous: 16-bit floats, or uint8 codes where `blocks` is there.
        blocks: [blocks, 4] 16-bit floats, the maps of 8-bit metadata (`quantization/metadata.py`), or None.
    """

    W_q: Tensor
    scale: Tensor
    offset: Tensor
    blocks: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]

    @property
    def layout(self) -> Layout:
        return self.spec.layout(*self.shape)


def shaped(fresh: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh contiguous tensor in another shape, not as a view: what an op returns may be added to in place."""
    return torch.ops.aten._unsafe_view(fresh, list(shape))
