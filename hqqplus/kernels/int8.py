"""One-bit layers with activations of 8 bits: exact integer sums over the groups, scale and zero after them.

    a_m    = max_k |x_mk| / 127                          one step a token (a row of x), float32
    xi_mk  = round(x_mk / a_m)                           in -127 ... 127, halves to even
    P_mgn  = sum_{k in g} q_nk xi_mk                     integers, exact; q is 0 or 1
    X_mg   = sum_{k in g} xi_mk                          integers, exact
    y_mn   = a_m sum_g (s_gn P_mgn + o_gn X_mg) + bias_n float32, rounded once to the dtype of x

Inference only: rounding has no useful gradient. A row that is zero gives the bias; one that holds NaN or an infinity
gives NaN. Steps below the smallest normal float32 count as that.

    Triton    AND and popcount (`triton/bitserial.py`), on a GPU, for whole blocks of groups of 32 to 256
    torch     everything else; all three routes find the same integers:
      `_float_sums`     a product of floats a group, codes and xi as they are: below 2^24 float32 is exact. Any device.
      `_integer_sums`   torch's int8 product a group: on a CPU, for many rows
      `_table_sums`     on a CPU, for a few rows: byte j of a block has one code of each of 8 groups, so there is a
                        table of its 256 x 8 products with xi, and P of 8 groups is a sum of 8-vectors out of tables.
                        No code is ever unpacked: of each packed byte an index is made, and 32 bytes are read from L2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from hqqplus.kernels import routes
from hqqplus.kernels.ops import empty_product
from hqqplus.kernels.packed import Packed, shaped
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.spec import QuantSpec

LARGEST = 127
# From how many rows of x on which route is the faster one on a CPU (4096 x 4096, groups of 32 to 128, AVX-512).
_TABLE_ROWS, _FLOAT_ROWS = 4, 32
_FLOAT_SLICE, _INTEGER_SLICE = 64, 512
_GRADIENT_REFUSED = (
    'compute="int8" is for inference: 8-bit activations have no gradient. Use torch.no_grad(), or the 16-bit route'
)


def supports(spec: QuantSpec) -> bool:
    """Whether layers quantized like this have an 8-bit route: 1 bit, groups along the input."""
    return (spec.nbits, spec.axis) == (1, 1)


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integers xi (int8) of x [M, K], any float dtype, and the steps a [M] (float32)."""
    x = x.float()
    size = x.abs().amax(1)
    step = (size / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    step = torch.where(torch.isfinite(size), step, torch.nan)
    return (x / step[:, None]).round_().nan_to_num_(0.0).to(torch.int8), step


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The product as defined above in torch, on any device: x [..., in], any strides -> [..., out], dtype of `x`."""
    layout, (out_features, in_features) = packed.layout, packed.shape
    rows = x.reshape(-1, in_features)
    # The product must not become one of 16-bit floats: their sums are not exact.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        xi, step = round_activations(rows)
        xi = pad(xi, (0, layout.padded - layout.width))
        scale, offset = decode(packed.scale, packed.offset, packed.blocks, packed.spec.qmax)  # [out, groups]
        sums = xi.view(-1, layout.groups, layout.group).sum(2, dtype=torch.int32).float()
        y = _scaled_sums(xi, packed, scale).addmm_(sums, offset.t()).mul_(step[:, None])
        if bias is not None:
            y += bias
        return shaped(y.to(x.dtype), (*x.shape[:-1], out_features))


def _scaled_sums(xi: Tensor, packed: Packed, scale: Tensor) -> Tensor:
    """sum_g s_gn P_mgn, [M, out] in float32, of xi [M, padded] (int8) and scale [out, groups]."""
    layout = packed.layout
    if xi.device.type != "cpu" or xi.shape[0] == 0:
        return _float_sums(xi, packed, scale)
    planar = layout.plane == layout.group and layout.padded % (8 * layout.group) == 0
    if planar and xi.shape[0] <= _TABLE_ROWS:
        return _table_sums(xi, packed, scale)
    return (_float_sums if xi.shape[0] <= _FLOAT_ROWS else _integer_sums)(xi, packed, scale)


def _float_sums(xi: Tensor, packed: Packed, scale: Tensor) -> Tensor:
    layout = packed.layout
    left = xi.view(-1, layout.groups, layout.group).transpose(0, 1).float()  # [groups, M, group]
    y = scale.new_empty(xi.shape[0], layout.rows)
    for start in range(0, layout.rows, _FLOAT_SLICE):
        rows = slice(start, start + _FLOAT_SLICE)
        right = _codes(packed, rows).float().permute(1, 2, 0)  # [groups, group, rows]
        y[:, rows] = torch.bmm(left, right).mul_(scale[rows].t()[:, None]).sum(0)
    return y


def _integer_sums(xi: Tensor, packed: Packed, scale: Tensor) -> Tensor:
    layout = packed.layout
    left = xi.view(-1, layout.groups, layout.group).transpose(0, 1).contiguous()  # [groups, M, group]
    y = scale.new_empty(xi.shape[0], layout.rows)
    for start in range(0, layout.rows, _INTEGER_SLICE):
        rows = slice(start, start + _INTEGER_SLICE)
        right = _codes(packed, rows).view(torch.int8).permute(1, 2, 0)  # [groups, group, rows]
        part = scale.new_zeros(xi.shape[0], right.shape[2])
        for group in range(layout.groups):
            part.addcmul_(torch._int_mm(left[group], right[group]), scale[rows, group])
        y[:, rows] = part
    return y


def _codes(packed: Packed, rows: slice) -> Tensor:
    """Codes [rows, groups, group], uint8."""
    layout = packed.layout
    return unpack(packed.W_q[rows], 1, layout.plane).view(-1, layout.groups, layout.group)


def _table_sums(xi: Tensor, packed: Packed, scale: Tensor) -> Tensor:
    layout, tokens = packed.layout, xi.shape[0]
    blocks = layout.groups // 8
    left = xi.float().view(tokens, blocks, 8, layout.group).permute(1, 3, 0, 2).contiguous()  # [blocks, group, M, 8]
    bits = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()  # [256, 8]
    first = torch.arange(0, 256 * layout.group, 256, dtype=torch.int32)  # where the table of each byte begins
    y = scale.new_zeros(layout.rows, tokens)
    # One block at a time: its tables stay in the cache.
    for block in range(blocks):
        table = bits[:, None] * left[block, :, None]  # [group, 256, M, 8]
        columns = slice(block * layout.group, (block + 1) * layout.group)
        index = packed.W_q[:, columns].to(torch.int32).add_(first)  # [out, group]
        products = embedding_bag(index, table.view(-1, tokens * 8), mode="sum").view(-1, tokens, 8)
        y += products.mul_(scale[:, None, block * 8 : block * 8 + 8]).sum(2)
    return y.t().contiguous()


@torch.library.custom_op("hqqplus::matmul_int8", mutates_args=())
def matmul_int8(
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
    """As `hqqplus::matmul`, with `x` rounded to 8 bits a token.

    Raises:
        ValueError: for a layer that `supports` refuses, or where a gradient is asked for.
    """
    packed = Packed(W_q, scale, offset, blocks, QuantSpec(nbits, group_size, axis), (out_features, in_features))
    if not supports(packed.spec):
        raise ValueError(f"an 8-bit product needs weights of 1 bit with axis 1, not {nbits} bits with axis {axis}")
    if x.is_cuda and routes.has_triton(x.device):
        from hqqplus.kernels.triton import bitserial

        if bitserial.supports(x, packed):
            return routes.attempt(
                "bitserial", lambda: bitserial.matmul(x, packed, bias), lambda: matmul(x, packed, bias), x
            )
    return matmul(x, packed, bias)


matmul_int8.register_fake(empty_product)


def _refuse_gradient(*_: Any, **__: Any) -> None:
    raise ValueError(_GRADIENT_REFUSED)


matmul_int8.register_autograd(_refuse_gradient, setup_context=_refuse_gradient)
