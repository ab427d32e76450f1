"""y = x W^T + bias for some dozens of rows of x: a product on tensor cores whose weights are unpacked in registers.

Formula. That of `matmul.py`, with one plane at a time and all factors 1:

    y[n, m] = sum_g  s D_g[n, m] + (o + s Q / 2) X_g[m] + bias[n]
    D_g     = sum_k (base + q) x[m, k]  -  (base + Q / 2) X_g[m]

Layout. The loop goes over planes: of a tile [BN, PLANE] of bytes one plane is unpacked and multiplied by a tile
[PLANE, BM] of x, so that what is in flight is one plane's share of x and not a whole block's. Each byte is loaded once
a plane, from L2 or L1 but for the first time: this is for as many rows of x as make the memory wait for the tensor
cores, not the other way round.

Bytes. For each weight and tile of BM rows nbits / 8 of codes from memory and 1 from L2, metadata as in `matmul.py`;
x is read N / BN times, from L2.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import any_assembly, any_plane, dot
from hqqplus.kernels.triton.metadata import load_scale
from hqqplus.kernels.triton.product import DTYPES, Cut, add_middles, add_tail, finish, prepare, split


def shipped(rows: int, plane: int) -> Cut:
    """The cut for `rows` rows of x and planes of `plane` codes."""
    if plane <= 64:
        return Cut(32, 64, 4, 4) if rows <= 32 else Cut(64, 128, 3, 4)
    if plane == 128:
        return Cut(32, 64, 3, 4) if rows <= 32 else Cut(64, 64, 3, 4)
    return Cut(32, 64, 2, 4)


@triton.jit
def gemm_kernel(
    x, W_q, scale, offset, maps, sums, starts, bias, y, partial, counters,
    M, N, K, padded, groups, blocks, columns, stride_x, stride_w,
    ASM: tl.constexpr, QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr,
    ONE_GROUP: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    TAIL: tl.constexpr, PAIRED: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
        start = tl.load(starts + t * columns + m)
        if ONE_GROUP:
            s = load_scale(scale, maps, entry, None, HAS_MAPS)
        elif PAIRED:
            # Two 16-bit scales to a load, which can then be an asynchronous copy.
            pair = tl.load((scale + entry + t // 2 * 2).to(tl.pointer_type(tl.int32), bitcast=True))
            half = (pair >> (t % 2 * 16)).to(tl.int16)
            s = half.to(scale.dtype.element_ty, bitcast=True).to(tl.float32)
        else:
            s = load_scale(scale, maps, entry + t, None, HAS_MAPS)
        numbers = any_plane(w, t - b * PER, NBITS, ASM, BF16)
        product = dot(numbers, operand, tl.broadcast_to(start[None, :], (BN, BM)))
        acc = tl.math.fma(product, s[:, None], acc)

    acc = add_middles(
        acc, scale, offset, maps, sums, entry, m, columns, first * PER, last * PER, QMAX, ONE_GROUP, HAS_MAPS
    )  # fmt: skip
    if TAIL:
        if tl.program_id(1) == SPLIT - 1:
            acc = add_tail(
                acc, x, rows, scale, offset, maps, entry, m, inside, blocks * PER * PLANE, padded, K, stride_x,
                QMAX, NBITS, PLANE, GROUP, HAS_MAPS,
            )  # fmt: skip
    added = acc
    if HAS_BIAS:
        added = tl.load(bias + row).to(tl.float32)[:, None]
    cells = y + m.to(tl.int64)[None, :] * N + n[:, None]
    finish(acc, cells, inside & (n < N)[:, None], added, partial, counters, HAS_BIAS, SPLIT, BN, BM)


def constants(packed: Packed, dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments of `gemm_kernel` that follow from the layer and the type of x."""
    layout, nbits = packed.layout, packed.spec.nbits
    whole = layout.padded * nbits // (8 * layout.plane) * (8 // nbits) * layout.plane
    return {
        "ASM": any_assembly(nbits, DTYPES[dtype]),
        "QMAX": packed.spec.qmax,
        "NBITS": nbits,
        "PLANE": layout.plane,
        "GROUP": layout.group,
        "ONE_GROUP": layout.groups == 1,
        "HAS_MAPS": packed.blocks is not None,
        "EVEN_K": whole <= packed.shape[1],
        "TAIL": whole < layout.padded,
        "PAIRED": packed.blocks is None and layout.groups % 2 == 0,
    }


def matmul(
    x: Tensor, packed: Packed, bias: Tensor | None, processors: int, cut: Cut | None = None, shares: int = 0
) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features]; as `matmul.matmul`."""
    M, N = x.shape[0], packed.shape[0]
    y = x.new_empty((M, N))
    if M == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    layout = packed.layout
    cut = cut or shipped(M, layout.plane)
    blocks = layout.padded * packed.spec.nbits // (8 * layout.plane)
    grid_n, grid_m = triton.cdiv(N, cut.BN), triton.cdiv(M, cut.BM)
    shares = shares or split(grid_n * grid_m, blocks, processors)
    scratch = prepare(x, packed, (1,) * (8 // packed.spec.nbits), cut, shares)
    gemm_kernel[(grid_n, shares, grid_m)](
        x, packed.W_q, packed.scale, packed.offset, packed.scale if packed.blocks is None else packed.blocks,
        scratch.sums, scratch.starts, x if bias is None else bias, y, scratch.partial, scratch.counters,
        M, packed.shape[0], packed.shape[1], layout.padded, layout.groups, blocks, scratch.sums.shape[1], x.stride(0),
        packed.W_q.stride(0), **constants(packed, x.dtype), HAS_BIAS=bias is not None, SPLIT=shares, BM=cut.BM,
        BN=cut.BN, STAGES=cut.stages, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return y
