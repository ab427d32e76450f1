"""The ops in plain torch, on any device: what every other backend is compared with.

    dequantize   W = scale * codes + offset, group by group          [out_features, in_features]
    matmul       y = x W^T                                           [..., in] -> [..., out]
    matmul_dx    dx = dy W                                           [..., out] -> [..., in]
    embedding    W[ids]                                              [...] -> [..., width]

The metadata come as the ops take them (`ops.py`) and are decoded here. The affine map is evaluated in float32 and
rounded once to the dtype of the activations; the product is then an ordinary matrix product in that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.quantization.metadata import decode
from hqqplus.quantization.spec import QuantSpec
from hqqplus.quantization.tensor import dequantize_matrix, dequantize_rows

dequantize = dequantize_matrix


def matmul(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
) -> Tensor:
    return torch.nn.functional.linear(x, dequantize(W_q, scale, offset, blocks, spec, shape, x.dtype))


def matmul_dx(
    dy: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
) -> Tensor:
    return dy @ dequantize(W_q, scale, offset, blocks, spec, shape, dy.dtype)


def embedding(
    ids: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    spec: QuantSpec,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = ids.reshape(-1)
    scales, offsets = decode(scale[rows], offset[rows], blocks, spec.qmax, rows)
    values = dequantize_rows(W_q[rows], scales, offsets, spec, width, dtype)
    return values.reshape(*ids.shape, width).contiguous()
