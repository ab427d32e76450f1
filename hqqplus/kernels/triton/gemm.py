"""y = x W^T + bias for some dozens of rows of x: a product on tensor cores whose weights are unpacked in registers.

Formula. That of `matmul.py`, with one plane at a time and codes about their middle, which 16 bits hold exactly (but
not those of 8 bits in bfloat16, whose products start from -Q / 2 X):

    y[n, m] = sum_g  s sum_k (q - Q / 2) x[m, k]  +  (o + s Q / 2) X_g[m]  +  bias[n]

Layout. The loop goes over planes: of a tile [BN, PLANE] of bytes one plane is unpacked and multiplied by a tile
[PLANE, BM] of x, so that what is in flight is one plane's share of x and not a whole block's. Each byte is loaded once
a plane, from L2 or L1 but for the first time: this is for as many rows of x as make the memory wait for the tensor
cores, not the other way round.

Bytes. For each weight and tile of BM rows nbits / 8 of codes from memory and 1 from L2, metadata as in `matmul.py`;
x is read N / BN times, from L2.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import centred_plane, dot
from hqqplus.kernels.triton.metadata import byte, decoded, half, load_scale, load_step
from hqqplus.kernels.triton.product import (
    Cut,
    Launch,
    complete,
    layer_constants,
    multiply,
    product_arguments,
    run,
    sums_of,
    tiles_of,
    whole_blocks,
)


def shipped(rows: int, plane: int) -> Cut:
    """The cut for `rows` rows of x and planes of `plane` codes."""
    if plane <= 64:
        return Cut(32, 64, 3, 4) if rows <= 32 else Cut(64, 128, 3, 8)
    if plane == 128:
        return Cut(32, 64, 3, 4) if rows <= 32 else Cut(64, 64, 2, 4)
    return Cut(32, 64, 2, 4)


@triton.jit
def gemm_kernel(
    x, W_q, scale, offset, maps, sums, starts, bias, y, partial, counters,
    M, N, K, padded, groups, blocks, columns, stride_x, stride_w,
    QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr,
    ONE_GROUP: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y, or a share of its sum."""
    PER: tl.constexpr = 8 // NBITS
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, PLANE)
    row = tl.minimum(n, N - 1)
    each = tl.cdiv(blocks, SPLIT)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, blocks)
    inside = (m < M)[None, :]

    rows = W_q + row.to(tl.int64) * stride_w
    tile = rows[:, None] + j[None, :]
    entry = row * groups
    x_tile = x + m.to(tl.int64)[None, :] * stride_x + j[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for t in tl.range(first * PER, last * PER, num_stages=STAGES):
        b = t // PER
        w = tl.load(tile + b * PLANE)
        k = t * PLANE
        mask = inside if EVEN_K else inside & (k + j < K)[:, None]
        operand = tl.load(x_tile + k, mask=mask, other=0.0)
        if ONE_GROUP:
            s = load_scale(scale, maps, entry, None, HAS_MAPS)
        elif WIDE == 0:
            s = load_scale(scale, maps, entry + t, None, HAS_MAPS)
        else:
            # Several scales to a load, which can then be an asynchronous copy.
            word = tl.load((scale + entry + t // WIDE * WIDE).to(tl.pointer_type(tl.int32), bitcast=True))
            if HAS_MAPS:
                s = decoded(byte(word, t % WIDE), load_step(maps, entry + t), 0, maps.dtype.element_ty)
            else:
                s = half(word, t % WIDE, scale.dtype.element_ty)
        numbers = centred_plane(w, t - b * PER, NBITS, BF16)
        if NBITS == 8 and BF16:
            start = tl.load(starts + t * columns + m)
            product = dot(numbers, operand, tl.broadcast_to(start[None, :], (BN, BM)))
        else:
            product = dot(numbers, operand, tl.zeros((BN, BM), tl.float32))
        acc = tl.math.fma(product, s[:, None], acc)
    complete(
        acc, x, rows, scale, offset, maps, sums, bias, y, partial, counters,
        row, n, m, M, N, K, padded, groups, blocks, columns, stride_x, first, last,
        QMAX, NBITS, PLANE, GROUP, ONE_GROUP, HAS_MAPS, HAS_BIAS, TAIL, SPLIT, BM, BN,
    )  # fmt: skip


def launches(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, processors: int, cut: Cut | None = None, shares: int = 0
) -> list[Launch]:
    """What is to be started for y [M, out_features] = x [M, in_features] W^T + bias; as `matmul.launches`."""
    cut = cut or shipped(x.shape[0], packed.layout.plane)
    tiles = tiles_of(x, packed.shape[0], cut, whole_blocks(packed), processors, shares)
    sums = sums_of(x, packed, False, cut, tiles)
    wide = 4 // packed.scale.element_size()
    constants = {
        **layer_constants(packed),
        "WIDE": wide if run(packed, wide) == wide else 0,
        "HAS_BIAS": bias is not None,
        "SPLIT": tiles.shares,
        "BM": cut.BM,
        "BN": cut.BN,
        "STAGES": cut.stages,
    }
    arguments = product_arguments(x, packed, bias, y, sums, tiles)
    options = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    return [sums.launch, Launch(gemm_kernel, tiles.grid, arguments, constants, options)]


def matmul(x: Tensor, packed: Packed, bias: Tensor | None, processors: int, **cut: Any) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features]; arguments as in `launches`."""
    return multiply(launches, x, packed, bias, processors, **cut)
