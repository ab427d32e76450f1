"""y = x W^T + bias for few rows of x: one pass over the packed bytes, whose codes go to the tensor cores as they are.

Formula. With the bit-plane i of a block as one tile of codes q [n, k] of one group g (so one scale s, one offset o a
row n), and numbers base + f q instead of codes (`codes.py`; base and f are powers of two, f depends on the plane):

    y[n, m] = sum_g  (s / f) D_g[n, m] + (o + s Q / 2) X_g[m] + bias[n],        Q = 2^nbits - 1
    D_g     = sum_k (base + f q) x[m, k]  -  (base + f Q / 2) X_g[m],           X_g[m] = sum of x[m, k] over the group

X_g is computed once, by a kernel of its own, and D_g starts from -(base + f Q / 2) X_g: it is the product with codes
about their middle, so that nothing large is left to cancel outside of a group. The middles o + s Q / 2 meet the X_g in
a second, short loop over the groups. A scale touches an accumulator once a group: no weight is multiplied by anything
but x.

Layout. The planar bytes of the checkpoint (`quantization/packing.py`): a tile [BN, PLANE] of bytes holds the 8 / nbits
planes of a block; one load, 8 / nbits products. W is the left operand even for one row of x, whose tile is padded to 8
columns, the narrowest that tensor cores have. All loads of the loop, scales included, are asynchronous copies, STAGES
blocks deep. K is split so that all SMs have work (`product.finish`).

Bytes. For each weight nbits / 8 of codes and 4 / group (or 2 / group) of metadata, read once by each tile of BM rows;
the metadata a second time, from L2, for the middles. x is read N / BN times, from L2.

Instructions: `benchmarks/sass.py` counts those of a compiled loop.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import dot, factor_of, ordered, plane, shifted
from hqqplus.kernels.triton.metadata import byte, decoded, half, load_scale, load_step, load_words
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

# For each SM: their loads in flight are what covers the latency of memory.
_PROGRAMS = 4


def shipped(rows: int, plane: int) -> Cut:
    """The cut for `rows` rows of x and planes of `plane` codes."""
    bm = 8 if rows <= 8 else 16
    if plane <= 64:
        return Cut(bm, 64, 3, 2)
    if plane == 128:
        return Cut(bm, 32, 3, 2)
    return Cut(bm, 32, 2, 2)


@triton.jit
def matmul_kernel(
    x, W_q, scale, offset, maps, sums, starts, bias, y, partial, counters,
    M, N, K, padded, groups, blocks, columns, stride_x, stride_w,
    QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr,
    GROUP: tl.constexpr, ONE_GROUP: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, TAIL: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y, or a share of its sum."""
    PER: tl.constexpr = 8 // NBITS
    BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, PLANE)
    # Rows beyond the last are the last again: nothing of them is stored.
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
    if ONE_GROUP:
        whole_scale = load_scale(scale, maps, entry, None, HAS_MAPS)
    for b in tl.range(first, last, num_stages=STAGES):
        w = tl.load(tile + b * PLANE)
        # Codes that are converted one by one stay in their order.
        w_shifted = w
        if NBITS < 8 or not BF16:
            w = ordered(w)
            w_shifted = shifted(w)
        if not ONE_GROUP:
            words = load_words(scale, entry + b * PER, None, PER, RUN)
            if HAS_MAPS:
                # Entries of one word are in one block of metadata: 256 step and zero of its scales.
                steps = ()
                for i in tl.static_range(PER // RUN):
                    steps += (load_step(maps, entry + b * PER + i * RUN),)  # type: ignore[assignment]
        for i in tl.static_range(PER):
            k = (b * PER + i) * PLANE
            mask = inside if EVEN_K else inside & (k + j < K)[:, None]
            operand = tl.load(x_tile + k, mask=mask, other=0.0)
            start = tl.load(starts + (b * PER + i) * columns + m)
            numbers = plane(w, w_shifted, i, NBITS, BF16)
            product = dot(numbers, operand, tl.broadcast_to(start[None, :], (BN, BM)))
            if ONE_GROUP:
                s = whole_scale
            else:
                if HAS_MAPS:
                    s = decoded(byte(words[i // RUN], i % RUN), steps[i // RUN], 0, maps.dtype.element_ty)
                else:
                    s = half(words[i // RUN], i % RUN, scale.dtype.element_ty)
            if factor_of(i, NBITS, BF16) != 1:
                s = s * (1 / factor_of(i, NBITS, BF16))
            acc = tl.math.fma(product, s[:, None], acc)
    complete(
        acc, x, rows, scale, offset, maps, sums, bias, y, partial, counters,
        row, n, m, M, N, K, padded, groups, blocks, columns, stride_x, first, last,
        QMAX, NBITS, PLANE, GROUP, ONE_GROUP, HAS_MAPS, HAS_BIAS, TAIL, SPLIT, BM, BN,
    )  # fmt: skip


def launches(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, processors: int, cut: Cut | None = None, shares: int = 0
) -> list[Launch]:
    """What is to be started, one after the other, for y [M, out_features] = x [M, in_features] W^T + bias.

    Args:
        processors: SMs of the card, for how far K is split.
        cut: another than the shipped one.
        shares: into how many K is split; 0 leaves that to `split`.
    """
    cut = cut or shipped(x.shape[0], packed.layout.plane)
    tiles = tiles_of(x, packed.shape[0], cut, whole_blocks(packed), _PROGRAMS * processors, shares)
    sums = sums_of(x, packed, True, cut, tiles)
    constants = {
        **layer_constants(packed),
        "RUN": run(packed, min(8 // packed.spec.nbits, 8 // packed.scale.element_size())),
        "HAS_BIAS": bias is not None,
        "SPLIT": tiles.shares,
        "BM": cut.BM,
        "BN": cut.BN,
        "STAGES": cut.stages,
    }
    arguments = product_arguments(x, packed, bias, y, sums, tiles)
    options = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    return [sums.launch, Launch(matmul_kernel, tiles.grid, arguments, constants, options)]


def matmul(x: Tensor, packed: Packed, bias: Tensor | None, processors: int, **cut: Any) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features]; arguments as in `launches`."""
    return multiply(launches, x, packed, bias, processors, **cut)
