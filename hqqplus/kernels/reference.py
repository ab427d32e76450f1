"""The ops in plain torch, on any device: what every other backend is compared with.

    dequantize   W = scale * codes + offset, group by group          [out_features, in_features]
    matmul       y = x W^T + bias                                    [..., in] -> [..., out]
    matmul_dx    dx = dy W                                           [..., out] -> [..., in]
    embedding    W[ids]                                              [...] -> [..., width]

The metadata come as the ops take them (`ops.py`) and are decoded here. The affine map is evaluated in float32 and
rounded once to the dtype of the activations; the product is then an ordinary matrix product in that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.tensor import dequantize_matrix, dequantize_rows


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    return dequantize_matrix(*packed, dtype)


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, dequantize(packed, x.dtype), None if bias is None else bias.to(x.dtype))


def matmul_dx(dy: Tensor, packed: Packed) -> Tensor:
    return dy @ dequantize(packed, dy.dtype)


def embedding(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    rows = ids.reshape(-1)
    spec, (_, width) = packed.spec, packed.shape
    scales, offsets = decode(packed.scale[rows], packed.offset[rows], packed.blocks, spec.qmax, rows)
    values = dequantize_rows(packed.W_q[rows], scales, offsets, spec, width, dtype)
    return values.reshape(*ids.shape, width).contiguous()
