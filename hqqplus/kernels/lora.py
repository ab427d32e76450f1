"""A packed product with what is trained on it, as one autograd node.

    forward     y  = x W^T + bias;    for each adapter   h = x A^T,    y  += s h B^T
    backward    dx = dy W;            for each adapter   dh = dy B,    dx += s dh A,   dA = s dh^T x,   dB = s dy^T h

    gains       y  = r (c x) W^T + bias + ...      c = 1 + gain.inner [in], r = 1 + gain.outer [out]
                dx = c (r dy) W + ...,             d inner = sum x (r dy) W,  d outer = sum dy (c x) W^T,  over tokens

A is [r, in], B is [out, r], s a number. The sums go into the fresh y and dx of the packed product (`addmm_`), so
nothing of their size is made besides. Kept for the backward pass: x itself (nothing where A is frozen), h [tokens, r]
(nothing where B is frozen), the adapter as it is stored, the packed tensors; with an outer gain the product before it.
The adapter, not x, is cast where the dtypes differ: it is r / tokens of x's size. A product of 16-bit tensors is
accumulated in float32 by the device and rounded once; the gradients of an adapter are returned in its own dtype.

Gains are given less 1: 1 + gain would lose most of a small one in 16 bits. The metadata of the weight itself may be
trained too (`scales.py`).

One node, because several cannot share dx: autograd would add the gradients of the branches, each a tensor of x's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqqplus.kernels import ops  # noqa: F401  # importing it registers torch.ops.hqqplus
from hqqplus.kernels.scales import Metadata, TrainedScales, delta_gradients, metadata_gradients
from hqqplus.quantization.spec import QuantSpec


class Adapter(NamedTuple):
    """One adapter of a layer.

    Attributes:
        a, b: [r, in_features] and [out_features, r], any float dtype.
        scaling: what the product of both is multiplied by.
        x: what the adapter sees in the place of the layer's input, of the same shape and dtype (its dropout); None for
            the input itself.
    """

    a: Tensor
    b: Tensor
    scaling: float
    x: Tensor | None = None


class Gains(NamedTuple):
    """Factors of a weight's columns [in_features] and of its rows [out_features], less 1; None stands for 0."""

    inner: Tensor | None = None
    outer: Tensor | None = None


NO_GAINS = Gains()


def matmul_lora(
    x: Tensor,
    packed: tuple[Any, ...],
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    gains: Gains = NO_GAINS,
    scales: TrainedScales | None = None,
) -> Tensor:
    """`x` [..., in_features] times the transposed weight, plus bias and adapters: [..., out_features], dtype of `x`.

    Args:
        packed: the arguments of `torch.ops.hqqplus.matmul` between x and bias.
        gains: of the weight, not of bias and adapters.
        scales: what of the metadata is trained; those in `packed` are what is computed with. Axis 1 only.

    Differentiable once, for x, the bias, a, b and x of each adapter, gains and scales.
    """
    if not torch.is_grad_enabled():  # a node that nobody needs costs as much as several operators
        return _product(x, packed, bias, adapters, gains)[0]
    scalings = tuple(adapter.scaling for adapter in adapters)
    flat = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b, adapter.x)]
    deltas = (None, None, (None, None, None)) if scales is None else scales
    return _MatmulLora.apply(scalings, packed[4:], deltas[2], x, bias, *packed[:4], *gains, *deltas[:2], *flat)


def _product(
    x: Tensor, packed: tuple[Any, ...], bias: Tensor | None, adapters: Sequence[Adapter], gains: Gains
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The result, h [tokens, r] of each adapter, and the packed product before an outer gain."""
    plain = None
    if gains.outer is None:
        y = torch.ops.hqqplus.matmul(gained(x, gains.inner), *packed, bias)
    else:
        plain = torch.ops.hqqplus.matmul(gained(x, gains.inner), *packed, None)
        y = gained(plain, gains.outer)
        if bias is not None:
            y.add_(bias.to(y.dtype))
    narrow = []  # y and dx are seen by `view`, which fails where a sum would go into a copy
    for adapter in adapters:
        h = _rows(x if adapter.x is None else adapter.x) @ adapter.a.to(x.dtype).t()
        y.view(-1, y.shape[-1]).addmm_(h, adapter.b.to(x.dtype).t(), alpha=adapter.scaling)
        narrow.append(h)
    return y, narrow, plain


def gained(x: Tensor, gain: Tensor | None) -> Tensor:
    """`x` [..., n] times 1 + `gain` [n], rounded once; `x` itself without one."""
    return x if gain is None else torch.addcmul(x, x, gain.to(x.dtype))


class _MatmulLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        sizes: tuple[int, ...],
        start: Metadata,
        x: Tensor,
        bias: Tensor | None,
        W_q: Tensor,
        scale: Tensor,
        offset: Tensor,
        blocks: Tensor | None,
        inner: Tensor | None,
        outer: Tensor | None,
        scale_delta: Tensor | None,
        offset_delta: Tensor | None,
        *flat: Any,
    ) -> Tensor:
        parts = zip(flat[0::3], flat[1::3], scalings, flat[2::3], strict=True)
        adapters, gains = [Adapter(*part) for part in parts], Gains(inner, outer)
        y, narrow, plain = _product(x, (W_q, scale, offset, blocks, *sizes), bias, adapters, gains)
        _, needs_inner, needs_outer, *needs_deltas = ctx.needs_input_grad[_BLOCKS : _BLOCKS + 5]
        kept = [W_q, scale, offset, blocks, inner, outer]
        kept += [x if needs_inner or any(needs_deltas) else None, plain if needs_outer else None]
        kept += start if any(needs_deltas) else (None, None, None)
        for index, (adapter, h) in enumerate(zip(adapters, narrow, strict=True)):
            needs_a, needs_b = ctx.needs_input_grad[_FLAT + 3 * index : _FLAT + 3 * index + 2]
            seen = x if adapter.x is None else adapter.x
            kept += [adapter.a, adapter.b, seen if needs_a else None, h if needs_b else None]
        ctx.scalings, ctx.sizes = scalings, sizes
        ctx.own_inputs = [adapter.x is not None for adapter in adapters]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, scale_delta, offset_delta)]
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # A product of the backward pass has the dtypes of the forward pass, wherever it is run.
        with _without_autocast(dy.device.type):
            return _gradients(ctx, dy.contiguous())


# Where blocks, and where a, b and x of the adapters, stand among the arguments of `_MatmulLora.forward` after ctx.
_BLOCKS, _FLAT = 8, 13


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    W_q, scale, offset, blocks, inner, outer, x, plain, *kept = ctx.saved_tensors
    start, kept = tuple(kept[:3]), kept[3:]
    needs_x, needs_bias = ctx.needs_input_grad[3:5]
    needs_inner, needs_outer, needs_scale, needs_offset = ctx.needs_input_grad[_BLOCKS + 1 : _FLAT]
    bias_dtype, *delta_dtypes = ctx.dtypes
    rows = _rows(dy)  # [tokens, out]
    of_weight = gained(dy, outer)  # [..., out], the gradient of (c x) W^T
    dx: Any = None
    dbias = d_inner = d_outer = d_scale = d_offset = None
    if needs_bias:
        dbias = _sum(rows, bias_dtype)
    if needs_outer:
        d_outer = _sum(rows * _rows(plain), outer.dtype)
    if needs_scale or needs_offset:
        ds, do = metadata_gradients(_rows(of_weight), _rows(gained(x, inner)), W_q, ctx.sizes)
        d_scale, d_offset = delta_gradients(ds, do, start, QuantSpec(*ctx.sizes[:3]).qmax)
        d_scale = d_scale.to(delta_dtypes[0]) if needs_scale else None
        d_offset = d_offset.to(delta_dtypes[1]) if needs_offset else None
    if needs_x or needs_inner:
        dx = torch.ops.hqqplus.matmul_dx(of_weight, W_q, scale, offset, blocks, *ctx.sizes)
    if needs_inner:
        d_inner = _sum(_rows(x) * _rows(dx), inner.dtype)
    if not needs_x:
        dx = None
    elif inner is not None:
        dx.addcmul_(dx, inner.to(dx.dtype))
    of_adapters: list[Tensor | None] = []
    for index, scaling in enumerate(ctx.scalings):
        a, b, seen, h = kept[4 * index : 4 * index + 4]
        needs_a, needs_b, needs_own = ctx.needs_input_grad[_FLAT + 3 * index : _FLAT + 3 * index + 3]
        to_dx = needs_x and not ctx.own_inputs[index]
        da = db = down = None
        if needs_b:
            db = (rows.t() @ h).to(b.dtype).mul_(scaling)
        if needs_a or needs_own or to_dx:
            dh = rows @ b.to(dy.dtype)  # [tokens, r]
        if needs_a:
            da = (dh.t() @ _rows(seen)).to(a.dtype).mul_(scaling)
        if to_dx:
            dx.view(-1, dx.shape[-1]).addmm_(dh, a.to(dy.dtype), alpha=scaling)
        if needs_own:
            down = (dh @ a.to(dy.dtype)).mul_(scaling).view(*dy.shape[:-1], a.shape[1])
        of_adapters += [da, db, down]
    packed = None, None, None, None
    return (None, None, None, dx, dbias, *packed, d_inner, d_outer, d_scale, d_offset, *of_adapters)


def _rows(tensor: Tensor) -> Tensor:
    """[..., width] -> [tokens, width], a view where the strides allow it."""
    return tensor.reshape(-1, tensor.shape[-1])


def _sum(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum [width] over the rows of [tokens, width], in float32 at least, as `dtype`."""
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(dtype)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
