"""y = x W^T + bias and dx = dy W for many rows: the weight is dequantized a slice at a time, the product is cuBLAS's.

Formula. With W[r] a slice of rows and W[:, c] a slice of columns, both row-major in one workspace:

    y[:, r] = x W[r]^T + bias[r]           dx[:, c] = dy W[:, c]

No slice needs another's result, so nothing is added up in 16 bits, and the slices are as exact as the whole. Both
products read the same packed bytes in the same order: there is no second packing for the backward pass.

Bytes. bpw / 8 a weight read and 2 written; the product reads them again. A slice that fits into the L2 cache is
consumed from there, and what a write to memory costs is paid only by cards on which the slice is the whole weight. The
workspace is one slice, allocated for the call: the caching allocator hands out the same memory each time, in CUDA
graphs as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.dequantize import block_columns, dequantize_into

# Rows and columns of a slice are multiples of this: of the tiles of a large product.
_STEP = 256


def matmul(x: Tensor, packed: Packed, bias: Tensor | None, slice_bytes: int) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features].

    Args:
        slice_bytes: how large a slice of the dequantized weight may be; 0: the weight is one slice.
    """
    out_features, in_features = packed.shape
    y = x.new_empty((x.shape[0], out_features))
    bias = None if bias is None else bias.to(x.dtype)
    step = block_columns(packed) if packed.spec.axis == 0 else 1
    size = _size(out_features, in_features, step, x, slice_bytes)
    workspace = x.new_empty((size, in_features))
    for rows in _slices(out_features, size):
        weight = dequantize_into(packed, workspace[: rows.stop - rows.start], rows=rows)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
    return y


def matmul_dx(dy: Tensor, packed: Packed, slice_bytes: int) -> Tensor:
    """`dy` [M, out_features] times the weight: [M, in_features]; `slice_bytes` as in `matmul`."""
    out_features, in_features = packed.shape
    dx = dy.new_empty((dy.shape[0], in_features))
    step = block_columns(packed) if packed.spec.axis == 1 else 1
    size = _size(in_features, out_features, step, dy, slice_bytes)
    workspace = dy.new_empty(size * out_features)
    for columns in _slices(in_features, size):
        count = columns.stop - columns.start
        weight = workspace[: out_features * count].view(out_features, count)
        torch.mm(dy, dequantize_into(packed, weight, columns=columns), out=dx[:, columns])
    return dx


def _size(length: int, width: int, step: int, x: Tensor, slice_bytes: int) -> int:
    """Rows (or columns) of a slice of a side `length`, each of `width` numbers; whole blocks of `step` codes."""
    if not slice_bytes:
        return length
    step = -(-_STEP // step) * step
    return min(length, max(1, slice_bytes // (width * x.element_size()) // step) * step)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size or 1))
