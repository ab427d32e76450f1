"""y = x W^T + bias for one to four rows of x without tensor cores: float32, groups of 8, GPUs of before sm_80.

Formula. W[n, k] = s q + o in float32, not rounded; y[m, n] = sum_k W[n, k] x[m, k] + bias[n], in float32.

Layout. A program has BN rows of W and goes along K a block at a time: one load of bytes [BN, PLANE], of which each
plane is unpacked four codes to a word (`convert.py`), made a weight by one fused multiply-add and added to BM sums by
one more each. Each lane keeps its own sums until the end of the row. K is split as in `product.finish`.

Bytes. For each weight nbits / 8 of codes and 4 / group (or 2 / group) of metadata, read once. At 2 bits in groups of
64 the loop has 5.8 instructions a weight for one row of x, 8.2 for two, 13.5 for four (`benchmarks/sass.py`); a T4 at
full bandwidth has room for 4.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import codes
from hqqplus.kernels.triton.convert import codes_at
from hqqplus.kernels.triton.metadata import from_words, load_maps, load_offset, load_scale, load_words
from hqqplus.kernels.triton.product import (
    Cut,
    Launch,
    finish,
    layer_constants,
    maps_of,
    multiply,
    planar,
    run,
    tiles_of,
    whole_blocks,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes of a tile: 16 to a lane of four warps.
_TILE = 2048
_PROGRAMS = 4


def shipped(rows: int, plane: int) -> Cut:
    """The cut for `rows` rows of x and planes of `plane` codes."""
    bm = 1 if rows == 1 else 2 if rows == 2 else 4
    return Cut(bm, max(1, _TILE // (plane * bm)), 1, 4)


def supports(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether the layer has planes that are tiles (`product.planar`)."""
    return dtype in DTYPES and planar(packed)


@triton.jit
def simt_kernel(
    x, W_q, scale, offset, maps, bias, y, partial, counters,
    M, N, K, padded, groups, blocks, stride_x, stride_w,
    QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, ONE_GROUP: tl.constexpr,
    HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, TAIL: tl.constexpr, RUN: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of y, or a share of its sum."""
    PER: tl.constexpr = 8 // NBITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, PLANE)
    # Rows beyond the last are the last again: nothing of them is stored.
    row = tl.minimum(n, N - 1)
    each = tl.cdiv(blocks, SPLIT)
    first = tl.program_id(1) * each
    rows = W_q + row.to(tl.int64) * stride_w
    entry = row * groups
    x_rows = x + m.to(tl.int64)[:, None] * stride_x
    inside = (m < M)[:, None]
    lanes = tl.zeros((BM, BN, PLANE), tl.float32)
    for b in range(first, tl.minimum(first + each, blocks)):
        w = tl.load(rows[:, None] + (b * PLANE + j)[None, :])
        if ONE_GROUP:
            s = load_scale(scale, maps, entry, None, HAS_MAPS)
            o = load_offset(offset, maps, entry, s, None, QMAX, HAS_MAPS)
        else:
            scales = load_words(scale, entry + b * PER, None, PER, RUN)
            offsets = load_words(offset, entry + b * PER, None, PER, RUN)
            words = load_maps(maps, entry + b * PER, None, PER, RUN, HAS_MAPS)
        for i in tl.static_range(PER):
            k = (b * PER + i) * PLANE + j
            mask = inside if EVEN_K else inside & (k < K)[None, :]
            operand = tl.load(x_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
            if not ONE_GROUP:
                s, o = from_words(scales, offsets, words, scale, maps, i, RUN, QMAX, HAS_MAPS)
            weight = tl.math.fma(codes_at(w, i * NBITS, QMAX), s[:, None], o[:, None])
            lanes = tl.math.fma(
                tl.broadcast_to(weight[None, :, :], (BM, BN, PLANE)),
                tl.broadcast_to(operand[:, None, :], (BM, BN, PLANE)), lanes,
            )  # fmt: skip
    acc = tl.sum(lanes, axis=2)

    if TAIL:
        if tl.program_id(1) == SPLIT - 1:
            for start in range(blocks * PER * PLANE, padded, 16):
                k = start + tl.arange(0, 16)
                there = (k < padded)[None, :]
                q = codes(rows[:, None], k[None, :], there, padded, PLANE, NBITS)
                entries = entry[:, None] + (k // GROUP)[None, :]
                s = load_scale(scale, maps, entries, there, HAS_MAPS)
                o = load_offset(offset, maps, entries, s, there, QMAX, HAS_MAPS)
                operand = tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(tl.math.fma(q, s, o)[None, :, :] * operand[:, None, :], axis=2)
    added = acc
    if HAS_BIAS:
        added = tl.load(bias + row).to(tl.float32)[None, :]
    cells = y + m.to(tl.int64)[:, None] * N + n[None, :]
    finish(acc, cells, inside & (n < N)[None, :], added, partial, counters, HAS_BIAS, SPLIT, BM, BN)


def launches(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, processors: int, cut: Cut | None = None, shares: int = 0
) -> list[Launch]:
    """What is to be started for y [M, out_features] = x [M, in_features] W^T + bias; as `matmul.launches`."""
    layout = packed.layout
    cut = cut or shipped(x.shape[0], layout.plane)
    tiles = tiles_of(x, packed.shape[0], cut, whole_blocks(packed), _PROGRAMS * processors, shares)
    if tiles.used:
        tiles.counters.zero_()
    bias_or_any = x if bias is None else bias.contiguous()
    tensors = [x, packed.W_q, packed.scale, packed.offset, maps_of(packed, 8), bias_or_any, y]
    sizes = [x.shape[0], *packed.shape, layout.padded, layout.groups, whole_blocks(packed), x.stride(0)]
    arguments = [*tensors, tiles.partial, tiles.counters, *sizes, packed.W_q.stride(0)]
    constants = {
        **layer_constants(packed),
        "RUN": run(packed, min(8 // packed.spec.nbits, 8 // packed.scale.element_size())),
        "HAS_BIAS": bias is not None,
        "SPLIT": tiles.shares,
        "BM": cut.BM,
        "BN": cut.BN,
    }
    return [Launch(simt_kernel, tiles.grid, arguments, constants, {"num_warps": cut.warps, "enable_fp_fusion": True})]


def matmul(x: Tensor, packed: Packed, bias: Tensor | None, processors: int, **cut: Any) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`: [M, out_features]; arguments as in `launches`."""
    return multiply(launches, x, packed, bias, processors, **cut)
