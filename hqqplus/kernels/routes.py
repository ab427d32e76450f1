"""Which backend serves a call: by its device, its number of rows and the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.kernels import reference
from hqqplus.kernels.packed import Packed


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(packed, dtype)


def matmul(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return reference.matmul(x, packed, bias)


def matmul_dx(dy: Tensor, packed: Packed) -> Tensor:
    return reference.matmul_dx(dy, packed)


def embedding(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    return reference.embedding(ids, packed, dtype)
