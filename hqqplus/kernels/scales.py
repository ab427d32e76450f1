"""Training the metadata of a packed weight, its codes frozen.

    forward     W = s q + o            s = s0 (1 + a),    o = o0 (1 + a) + u b          group by group
    backward    dW = dy^T x            ds = sum of dW q,  do = sum of dW                over the weights of a group
                da = ds s0 + do o0     db = do u

a and b are what is trained, [rows, groups] float32, zero at the start: a is a gain of the whole group, scale and
offset alike, as if the zero point were kept; b shifts it, in units u of its scale. Scale and offset are stored in 8
or 16 bits, and the forward pass computes with what is stored: the rounding is passed straight through (Bengio, Leonard
and Courville 2013, arXiv:1308.3432).

dW [out, in] is a dense product, made a slice of rows at a time: a slice has 64 MiB in float32, beside it the same in
the dtype of x and its codes. The padding of a row's last group is no weight and adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqqplus.kernels import ops  # noqa: F401  # importing it registers torch.ops.hqqplus
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.spec import QuantSpec

SLICE_BYTES = 2**26

Metadata = tuple[Tensor, Tensor, Tensor | None]
"""scale, offset and blocks as the ops take them (`quantization.metadata.metadata_views`)."""


class TrainedScales(NamedTuple):
    """What is trained of a weight's metadata.

    Attributes:
        scale_delta: a, [rows, groups].
        offset_delta: b, [rows, groups]; None: only the gain is trained.
        start: the metadata where both are zero.
    """

    scale_delta: Tensor
    offset_delta: Tensor | None
    start: Metadata


def current_scales(trained: TrainedScales, qmax: int) -> tuple[Tensor, Tensor]:
    """s and o of each group, float32 [rows, groups] both, not yet rounded to what is stored."""
    scale, offset = decode(*trained.start, qmax)
    gain = 1 + trained.scale_delta.float()
    current = offset * gain
    if trained.offset_delta is not None:
        current = torch.addcmul(current, offset_unit(scale), trained.offset_delta.float())
    return scale * gain, current


def delta_gradients(ds: Tensor, do: Tensor, start: Metadata, qmax: int) -> tuple[Tensor, Tensor]:
    """da and db [rows, groups] from ds and do of the same shape."""
    scale, offset = decode(*start, qmax)
    return torch.addcmul(ds * scale, do, offset), do * offset_unit(scale)


def offset_unit(scale: Tensor) -> Tensor:
    """u: the size of a group's scale; where that is 0 (a constant group), the mean size in its row."""
    size = scale.abs()
    return torch.where(size > 0, size, size.mean(1, keepdim=True))


@torch.no_grad()
def metadata_gradients(dy: Tensor, x: Tensor, W_q: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ds and do [rows, groups] for `dy` [tokens, out_features] and `x` [tokens, in_features], at least float32.

    Args:
        sizes: nbits, group_size, axis (1), out_features and in_features, as the ops take them.
    """
    nbits, group_size, axis, out_features, in_features = sizes
    spec = QuantSpec(nbits, group_size, axis)
    layout = spec.layout(out_features, in_features)
    wide = torch.promote_types(x.dtype, torch.float32)
    ds, do = (torch.empty(out_features, layout.groups, dtype=wide, device=x.device) for _ in range(2))
    count = max(1, SLICE_BYTES // (4 * layout.padded))
    for first in range(0, out_features, count):
        here = slice(first, min(first + count, out_features))
        dW = (dy[:, here].t() @ x).to(wide)  # [n, in]
        if layout.padded > layout.width:
            dW = torch.nn.functional.pad(dW, (0, layout.padded - layout.width))
        groups = dW.view(-1, layout.groups, layout.group)
        do[here] = groups.sum(2)
        dW[:, : layout.width].mul_(_codes(W_q[here], spec, in_features, x.dtype))
        ds[here] = groups.sum(2)
    return ds, do


def _codes(W_q: Tensor, spec: QuantSpec, width: int, dtype: torch.dtype) -> Tensor:
    """q [n, width] of some rows in `dtype`, which holds them exactly: what they stand for with s = 1 and o = 0."""
    rows = W_q.shape[0]
    shape = rows, spec.layout(rows, width).groups
    one = torch.ones(shape, dtype=torch.float16, device=W_q.device)
    sizes = spec.nbits, spec.group_size, spec.axis, rows, width
    return torch.ops.hqqplus.dequantize(W_q, one, torch.zeros_like(one), None, *sizes, dtype)
