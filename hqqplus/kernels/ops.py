"""`torch.ops.hqqplus.*`: the schemas, the shapes for tracing (fake) and the autograd formulas.

Every op takes the packed tensors `W_q` (uint8), `scale`, `offset` and `blocks`, followed by what a `QuantSpec` and a
shape say, spelt out as integers because an op's schema knows no Python objects. With 16-bit metadata `blocks` is None
and scale and offset [rows, groups] are 16-bit floats; with 8-bit metadata they are uint8 codes of the same shape and
`blocks` [blocks, 4] holds the 16-bit floats of their maps (`quantization/metadata.py`). The packed weight is frozen:
the gradients are those of the activations and of the bias, and only packed tensors are kept for them.

Which backend computes is a matter of the device and the shape: `routes.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hqqplus.kernels import routes
from hqqplus.kernels.packed import Packed
from hqqplus.quantization.spec import QuantSpec

# A custom op must not return a view or alias of its inputs; the backends return fresh contiguous tensors.


@torch.library.custom_op("hqqplus::dequantize", mutates_args=())
def dequantize(
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    nbits: int,
    group_size: int,
    axis: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out_features, in_features] in `dtype`."""
    packed = Packed(W_q, scale, offset, blocks, QuantSpec(nbits, group_size, axis), (out_features, in_features))
    return routes.dequantize(packed, dtype)


@dequantize.register_fake
def _(W_q: Tensor, *arguments: Any) -> Tensor:
    *_, out_features, in_features, dtype = arguments
    return W_q.new_empty((out_features, in_features), dtype=dtype)


@torch.library.custom_op("hqqplus::matmul", mutates_args=())
def matmul(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    nbits: int,
    group_size: int,
    axis: int,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`x` [..., in_features] times the transposed weight, plus `bias` [out_features]: [..., out_features] as `x`."""
    packed = Packed(W_q, scale, offset, blocks, QuantSpec(nbits, group_size, axis), (out_features, in_features))
    return routes.matmul(x, packed, bias)


@matmul.register_fake
def empty_product(x: Tensor, W_q: Tensor, *arguments: Any) -> Tensor:
    """What `matmul` (and `matmul_int8`) would return, uninitialised."""
    out_features = arguments[6]
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("hqqplus::matmul_dx", mutates_args=())
def matmul_dx(
    dy: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    nbits: int,
    group_size: int,
    axis: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`dy` [..., out_features] times the weight: [..., in_features], dtype of `dy`. The backward of `matmul`."""
    packed = Packed(W_q, scale, offset, blocks, QuantSpec(nbits, group_size, axis), (out_features, in_features))
    return routes.matmul_dx(dy, packed)


@matmul_dx.register_fake
def _(dy: Tensor, *arguments: Any) -> Tensor:
    *_, in_features = arguments
    return dy.new_empty((*dy.shape[:-1], in_features))


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, W_q, scale, offset, blocks, *sizes = inputs
    ctx.save_for_backward(W_q, scale, offset, blocks)
    ctx.sizes = sizes[:5]
    ctx.bias_dtype = sizes[5].dtype if len(sizes) > 5 and sizes[5] is not None else None


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = matmul_dx(dy.contiguous(), *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    dbias = None
    given = len(ctx.needs_input_grad)  # an op that is called without its bias has one input less
    if given == 11 and ctx.needs_input_grad[10]:
        dbias = dy.flatten(0, -2).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return (dx, *([None] * 9), dbias)[:given]


def _matmul_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = matmul(ddx.contiguous(), *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
    return ddy, *([None] * 9)


matmul.register_autograd(_matmul_backward, setup_context=_keep_packed)
matmul_dx.register_autograd(_matmul_dx_backward, setup_context=_keep_packed)


@torch.library.custom_op("hqqplus::embedding", mutates_args=())
def embedding(
    ids: Tensor,
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    nbits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` [...] of a packed embedding (axis 1): [..., width] in `dtype`."""
    packed = Packed(W_q, scale, offset, blocks, QuantSpec(nbits, group_size), (W_q.shape[0], width))
    return routes.embedding(ids, packed, dtype)


@embedding.register_fake
def _(ids: Tensor, *arguments: Any) -> Tensor:
    *_, width, dtype = arguments
    return ids.new_empty((*ids.shape, width), dtype=dtype)
