"""A packed product with LoRA beside it, as one autograd node.

    forward     y  = x W^T + bias;    for each adapter   h = x A^T,    y  += s h B^T
    backward    dx = dy W;            for each adapter   dh = dy B,    dx += s dh A,   dA = s dh^T x,   dB = s dy^T h

A is [r, in], B is [out, r], s a number. The sums go into the fresh y and dx of the packed product (`addmm_`), so
nothing of their size is made besides. Kept for the backward pass: x itself (nothing where A is frozen), h [tokens, r]
(nothing where B is frozen), the adapter as it is stored, the packed tensors. The adapter, not x, is cast where the
dtypes differ: it is r / tokens of x's size. A product of 16-bit tensors is accumulated in float32 by the device and
rounded once; the gradients of an adapter are returned in its own dtype.

One node, because two cannot share dx: autograd would add the gradients of two branches, a second tensor of x's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hqqplus.kernels import ops  # noqa: F401  # importing it registers torch.ops.hqqplus


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


def matmul_lora(x: Tensor, packed: tuple[Any, ...], bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """`x` [..., in_features] times the transposed weight, plus bias and adapters: [..., out_features], dtype of `x`.

    Args:
        packed: the arguments of `torch.ops.hqqplus.matmul` between x and bias.

    Differentiable once, for x, the bias, and a, b and x of each adapter.
    """
    if not torch.is_grad_enabled():  # a node that nobody needs costs as much as several operators
        return _product(x, packed, bias, adapters)[0]
    scalings = tuple(adapter.scaling for adapter in adapters)
    flat = [tensor for adapter in adapters for tensor in (adapter.a, adapter.b, adapter.x)]
    return _MatmulLora.apply(scalings, packed[4:], x, bias, *packed[:4], *flat)


def _product(
    x: Tensor, packed: tuple[Any, ...], bias: Tensor | None, adapters: Sequence[Adapter]
) -> tuple[Tensor, list[Tensor]]:
    """The result, and h [tokens, r] of each adapter."""
    y = torch.ops.hqqplus.matmul(x, *packed, bias)
    narrow = []  # y and dx are seen by `view`, which fails where a sum would go into a copy
    for adapter in adapters:
        h = _rows(x if adapter.x is None else adapter.x) @ adapter.a.to(x.dtype).t()
        y.view(-1, y.shape[-1]).addmm_(h, adapter.b.to(x.dtype).t(), alpha=adapter.scaling)
        narrow.append(h)
    return y, narrow


class _MatmulLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        sizes: tuple[int, ...],
        x: Tensor,
        bias: Tensor | None,
        W_q: Tensor,
        scale: Tensor,
        offset: Tensor,
        blocks: Tensor | None,
        *flat: Any,
    ) -> Tensor:
        parts = zip(flat[0::3], flat[1::3], scalings, flat[2::3], strict=True)
        adapters = [Adapter(*part) for part in parts]
        y, narrow = _product(x, (W_q, scale, offset, blocks, *sizes), bias, adapters)
        kept: list[Tensor | None] = [W_q, scale, offset, blocks]
        for index, (adapter, h) in enumerate(zip(adapters, narrow, strict=True)):
            needs_a, needs_b = ctx.needs_input_grad[_FLAT + 3 * index : _FLAT + 3 * index + 2]
            seen = x if adapter.x is None else adapter.x
            kept += [adapter.a, adapter.b, seen if needs_a else None, h if needs_b else None]
        ctx.scalings, ctx.sizes = scalings, sizes
        ctx.own_inputs = [adapter.x is not None for adapter in adapters]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # A product of the backward pass has the dtypes of the forward pass, wherever it is run.
        with _without_autocast(dy.device.type):
            return _gradients(ctx, dy.contiguous())


_FLAT = 8
"""Where a, b and x of the adapters begin among the arguments of `_MatmulLora.forward`, ctx not counted."""


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    W_q, scale, offset, blocks, *kept = ctx.saved_tensors
    _, _, needs_x, needs_bias, *_ = ctx.needs_input_grad
    dx = torch.ops.hqqplus.matmul_dx(dy, W_q, scale, offset, blocks, *ctx.sizes) if needs_x else None
    dbias = None
    rows = _rows(dy)  # [tokens, out]
    if needs_bias:
        dbias = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
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
            assert dx is not None
            dx.view(-1, dx.shape[-1]).addmm_(dh, a.to(dy.dtype), alpha=scaling)
        if needs_own:
            down = (dh @ a.to(dy.dtype)).mul_(scaling).view(*dy.shape[:-1], a.shape[1])
        of_adapters += [da, db, down]
    return (None, None, dx, dbias, None, None, None, None, *of_adapters)


def _rows(tensor: Tensor) -> Tensor:
    """[..., width] -> [tokens, width], a view where the strides allow it."""
    return tensor.reshape(-1, tensor.shape[-1])


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
