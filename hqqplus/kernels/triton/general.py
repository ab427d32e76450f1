"""y = x W^T + bias for any packed weight: both axes, 3 bits, small groups, float32. What has no faster kernel.

Formula. W[n, k] = s q + o, rounded to the type of x as the reference does, in tiles [BK, BN]; y = x W^T on tensor
cores (in float32 for float32 x).

Layout. Byte and shift of a code come from index arithmetic (`codes.place`), each code is loaded by itself, from L1 but
for the first of a byte; its scale and offset likewise. Ten times the instructions of `matmul.py`, and still one pass
over the packed bytes in memory.

Bytes. For each weight and tile of BM rows of x, bpw / 8 from memory.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import codes, dot
from hqqplus.kernels.triton.convert import round_to
from hqqplus.kernels.triton.metadata import load_offset, load_scale
from hqqplus.kernels.triton.product import Cut, Launch, finish, maps_of, multiply, tiles_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BK = 32
_PROGRAMS = 2  # for each SM


def shipped(rows: int) -> Cut:
    """The cut for `rows` rows of x. Tiles twice as wide for twice the warps are as many instructions, and spill."""
    return Cut(16 if rows <= 16 else 32, 32, 1, 2)


@triton.jit
def general_kernel(
    x, W_q, scale, offset, maps, bias, y, partial, counters,
    M, N, K, padded, groups, stride_x, stride_w,
    AXIS: tl.constexpr, QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr,
    HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y, or a share of its sum."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    each = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    first = tl.program_id(1) * each
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, tl.minimum(first + each, K), BK):
        k = start + tl.arange(0, BK)
        mask = (k < K)[:, None] & (n < N)[None, :]
        if AXIS == 1:
            rows = W_q + n.to(tl.int64)[None, :] * stride_w
            q = codes(rows, k[:, None], mask, padded, PLANE, NBITS)
            entries = n[None, :] * groups + (k // GROUP)[:, None]
        else:
            rows = W_q + k.to(tl.int64)[:, None] * stride_w
            q = codes(rows, n[None, :], mask, padded, PLANE, NBITS)
            entries = k[:, None] * groups + (n // GROUP)[None, :]
        s = load_scale(scale, maps, entries, mask, HAS_MAPS)
        o = load_offset(offset, maps, entries, s, mask, QMAX, HAS_MAPS)
        weight = round_to(tl.math.fma(q, s, o), DTYPE)
        inside = (m < M)[:, None] & (k < K)[None, :]
        operand = tl.load(x + m.to(tl.int64)[:, None] * stride_x + k[None, :], mask=inside, other=0.0)
        if DTYPE == tl.float32:
            acc = tl.dot(operand, weight, acc, input_precision="ieee")
        else:
            acc = dot(operand, weight, acc)
    added = acc
    if HAS_BIAS:
        added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    cells = y + m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    finish(acc, cells, mask, added, partial, counters, HAS_BIAS, SPLIT, BM, BN)


def supports(packed: Packed, dtype: torch.dtype) -> bool:
    """Any packed weight of fewer than 2^31 groups, any 16- or 32-bit float."""
    layout = packed.layout
    return dtype in DTYPES and layout.groups * layout.rows < 2**31


def launches(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, processors: int, cut: Cut | None = None, shares: int = 0
) -> list[Launch]:
    """What is to be started for y [M, out_features] = x [M, in_features] W^T + bias; as `matmul.launches`."""
    spec, layout, (N, K) = packed.spec, packed.layout, packed.shape
    cut = cut or shipped(x.shape[0])
    tiles = tiles_of(x, N, cut, triton.cdiv(K, 4 * _BK), _PROGRAMS * processors, shares)
    if tiles.used:
        tiles.counters.zero_()
    bias_or_any = x if bias is None else bias.contiguous()
    tensors = [x, packed.W_q, packed.scale, packed.offset, maps_of(packed), bias_or_any, y]
    sizes = [x.shape[0], N, K, layout.padded, layout.groups, x.stride(0), packed.W_q.stride(0)]
    constants = {
        "AXIS": spec.axis,
        "QMAX": spec.qmax,
        "NBITS": spec.nbits,
        "PLANE": layout.plane,
        "GROUP": layout.group,
        "HAS_MAPS": packed.blocks is not None,
        "HAS_BIAS": bias is not None,
        "SPLIT": tiles.shares,
        "BM": cut.BM,
        "BN": cut.BN,
        "BK": _BK,
    }
    arguments = [*tensors, tiles.partial, tiles.counters, *sizes]
    return [
        Launch(general_kernel, tiles.grid, arguments, constants, {"num_warps": cut.warps, "enable_fp_fusion": True})
    ]


def matmul(x: Tensor, packed: Packed, bias: Tensor | None, processors: int, **cut: Any) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features]; arguments as in `launches`."""
    return multiply(launches, x, packed, bias, processors, **cut)
