"""What the kernels of the product share: the sums of x, the middles, the end of a row, and the sum of the shares.

    y[n, m] = sum_g  s_g (sum_k (q - Q / 2) x[m, k])  +  sum_g (o_g + s_g Q / 2) X_g[m]  +  bias[n]

The first sum is what each kernel is about (`matmul.py`, `gemm.py`); the second is `add_middles`, with the X_g of
`sums_kernel`. Where K is split over several programs, `finish` adds up their shares.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import base, codes, converted, dot, factor_of
from hqqplus.kernels.triton.convert import round_to
from hqqplus.kernels.triton.metadata import load_middle, load_offset, load_scale

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Planes below are narrower than the K of a tensor core's product.
NARROWEST_PLANE = 16
_SUMMED = 16


@triton.jit
def sums_kernel(
    x, sums, starts, counters, M, K, stride_x, tiles, columns, count,
    FACTORED: tl.constexpr, BASE: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, TILES: tl.constexpr,
    CLEARED: tl.constexpr,
):  # fmt: skip
    """X of each plane and the starts of its products, both [tiles, columns] float32; 0 where there is no row of x.

    A start is -(base + factor Q / 2) X, with all factors 1 unless FACTORED. Also sets the `count` counters of the
    split to zero, each program some of them.
    """
    m = tl.program_id(1)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    k = tile[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    mask = (k < K) & (m + k * 0 < M)
    total = tl.sum(tl.load(x + m.to(tl.int64) * stride_x + k, mask=mask, other=0.0).to(tl.float32), axis=1)
    PER: tl.constexpr = 8 // NBITS
    QMAX: tl.constexpr = 2**NBITS - 1
    share = tl.full([TILES], BASE + QMAX / 2, tl.float32)
    if FACTORED:
        for i in tl.static_range(PER):
            factor = factor_of(i, NBITS, x.dtype.element_ty == tl.bfloat16)
            share = tl.where(tile % PER == i, BASE + factor * (QMAX / 2), share)
    tl.store(sums + tile * columns + m, total, mask=tile < tiles)
    tl.store(starts + tile * columns + m, -share * total, mask=tile < tiles)
    programs = tl.num_programs(0) * tl.num_programs(1)
    cleared = (m * tl.num_programs(0) + tl.program_id(0)) * CLEARED + tl.arange(0, CLEARED)
    for _ in range(0, tl.cdiv(count, programs * CLEARED)):
        tl.store(counters + cleared, 0, mask=cleared < count)
        cleared += programs * CLEARED


@triton.jit
def add_middles(
    acc, scale, offset, maps, sums, entry, m, columns, first, last,
    QMAX: tl.constexpr, ONE_GROUP: tl.constexpr, HAS_MAPS: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] plus the middles of planes first ... last - 1 of the rows whose metadata begin at `entry`, times X.

    A short product of float32 numbers in three terms of TF32; 16-bit middles need no more than two of them.
    """
    for t in range(first, last, 32):
        tile = t + tl.arange(0, 32)
        there = tile < last
        entries = entry[:, None] + (tile * 0 if ONE_GROUP else tile)[None, :]
        if HAS_MAPS:
            middle = load_middle(offset, maps, entries, there[None, :])
        else:
            middle = tl.math.fma(
                load_scale(scale, maps, entries, there[None, :], False), QMAX / 2,
                load_offset(offset, maps, entries, 0.0, there[None, :], QMAX, False),
            )  # fmt: skip
        total = tl.load(sums + tile[:, None] * columns + m[None, :], mask=there[:, None], other=0.0)
        acc = tl.dot(middle, total, acc, input_precision="tf32x3")
    return acc


@triton.jit
def add_tail(
    acc, x, rows, scale, offset, maps, entry, m, inside, first, padded, K, stride_x,
    QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, HAS_MAPS: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] plus the product over the last, shorter block, codes `first` to `padded`, as 16-bit weights."""
    for start in range(first, padded, 32):
        k = start + tl.arange(0, 32)
        there = (k < padded)[None, :]
        q = codes(rows[:, None], k[None, :], there, padded, PLANE, NBITS)
        entries = entry[:, None] + (k // GROUP)[None, :]
        s = load_scale(scale, maps, entries, there, HAS_MAPS)
        o = load_offset(offset, maps, entries, s, there, QMAX, HAS_MAPS)
        mask = inside & (k < K)[:, None]
        operand = tl.load(x + m.to(tl.int64)[None, :] * stride_x + k[:, None], mask=mask, other=0.0)
        acc = dot(round_to(tl.math.fma(q, s, o), x.dtype.element_ty), operand, acc)
    return acc


@triton.jit
def finish(
    acc, cells, mask, bias, partial, counters, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store acc [ROWS, COLUMNS] + bias (of a shape that broadcasts) to `cells`; if split, by whoever comes last.

    Programs (i, share, k) of all shares write their acc to `partial` [tile, share, ROWS, COLUMNS]; the last of a tile
    reads them again and adds them up, from the first share on: the sum does not depend on who is last.
    """
    mine = True
    if SPLIT > 1:
        at = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        shares = partial + at.to(tl.int64) * (SPLIT * ROWS * COLUMNS)
        cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(shares + tl.program_id(1) * (ROWS * COLUMNS) + cell, acc)
        # All threads' stores come before the one thread's atomic, which releases them.
        tl.debug_barrier()
        mine = tl.atomic_add(counters + at, 1, sem="acq_rel") == SPLIT - 1
        if mine:
            tl.debug_barrier()
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for share in range(SPLIT):
                acc += tl.load(shares + share * (ROWS * COLUMNS) + cell, cache_modifier=".cg")
    if mine:
        if HAS_BIAS:
            acc += bias
        tl.store(cells, round_to(acc, cells.dtype.element_ty), mask=mask)


@triton.jit
def complete(
    acc, x, rows, scale, offset, maps, sums, bias, y, partial, counters,
    row, n, m, M, N, K, padded, groups, blocks, columns, stride_x, first, last,
    QMAX: tl.constexpr, NBITS: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, ONE_GROUP: tl.constexpr,
    HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What follows the products of blocks `first` ... `last` - 1 in acc [BN, BM]: middles, tail, bias, the store."""
    PER: tl.constexpr = 8 // NBITS
    entry = row * groups
    inside = (m < M)[None, :]
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


class Cut(NamedTuple):
    """How a product is cut: rows of x and of W in a tile, pipeline stages, warps."""

    BM: int
    BN: int
    stages: int
    warps: int


class Launch(NamedTuple):
    """A kernel to be started: how many programs, arguments by place, constants by name, warps and stages."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def split(tiles: int, steps: int, programs: int) -> int:
    """Over how many programs a tile's K is split, so that there are `programs` in all, of two steps at least."""
    wanted = -(-programs // tiles)
    most = max(steps // 2, 1)
    return 1 << (max(1, min(wanted, most, 16)).bit_length() - 1)


def planar(packed: Packed) -> bool:
    """Whether a layer has planes that kernels take as tiles: axis 1, 1, 2, 4 or 8 bits, a power of two of codes."""
    layout = packed.layout
    return (
        packed.spec.axis == 1
        and packed.spec.nbits != 3
        and layout.plane & (layout.plane - 1) == 0
        and layout.groups * layout.rows < 2**31
    )


def supports(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether there are products on the codes of a layer: planes of 16 codes or more, at least one whole block in a
    row, and x in a 16-bit type."""
    wide = packed.layout.plane >= NARROWEST_PLANE and whole_blocks(packed) > 0
    return planar(packed) and wide and dtype in DTYPES


def run(packed: Packed, most: int) -> int:
    """How many scales, a power of two up to `most`, one load takes: rows and storage have to be aligned to as much."""
    size = packed.scale.element_size()
    places = [tensor.data_ptr() // size for tensor in (packed.scale, packed.offset)]
    return math.gcd(most, packed.layout.groups, *places)


def maps_of(packed: Packed, alignment: int = 4) -> Tensor:
    """The maps of 8-bit metadata, aligned to the bytes that are loaded at once; without them any tensor."""
    if packed.blocks is None:
        return packed.scale
    return packed.blocks.clone() if packed.blocks.data_ptr() % alignment else packed.blocks


class Tiles(NamedTuple):
    """The tiles of a product, and the buffers of its split: partial sums and counters (uninitialised)."""

    rows: int
    columns: int
    shares: int
    partial: Tensor
    counters: Tensor

    @property
    def used(self) -> int:
        """Counters that are in use."""
        return self.rows * self.columns if self.shares > 1 else 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.columns, self.shares, self.rows


def tiles_of(x: Tensor, out_features: int, cut: Cut, steps: int, programs: int, shares: int) -> Tiles:
    """How y [M, out_features] is cut into tiles, and K, of `steps` steps, into `shares` (0: as `split` says)."""
    rows, columns = triton.cdiv(x.shape[0], cut.BM), triton.cdiv(out_features, cut.BN)
    shares = shares or split(rows * columns, steps, programs)
    count = rows * columns if shares > 1 else 0
    partial = torch.empty(max(count * shares * cut.BM * cut.BN, 1), dtype=torch.float32, device=x.device)
    return Tiles(rows, columns, shares, partial, torch.empty(max(count, 1), dtype=torch.int32, device=x.device))


class Sums(NamedTuple):
    """X of each plane, the starts of the products (both [planes, columns] float32), and what computes them."""

    totals: Tensor
    starts: Tensor
    launch: Launch


def sums_of(x: Tensor, packed: Packed, factored: bool, cut: Cut, tiles: Tiles) -> Sums:
    """The sums of x [M, in_features] over the planes of whole blocks; also clears the counters of `tiles`.

    `factored`: whether the starts are for codes with the factors of their planes, or for codes as they are.
    """
    layout, nbits, name = packed.layout, packed.spec.nbits, DTYPES[x.dtype]
    count = whole_blocks(packed) * (8 // nbits)
    columns = tiles.rows * cut.BM
    sums, starts = torch.empty((2, count, columns), dtype=torch.float32, device=x.device)
    launch = Launch(
        sums_kernel,
        (triton.cdiv(count, _SUMMED), columns, 1),
        [x, sums, starts, tiles.counters, x.shape[0], packed.shape[1], x.stride(0), count, columns, tiles.used],
        {
            "FACTORED": factored,
            "BASE": 0 if converted(nbits, name) else base(name),
            "NBITS": nbits,
            "PLANE": layout.plane,
            "TILES": _SUMMED,
            "CLEARED": 64,
        },
        {"num_warps": 1 if layout.plane <= 64 else 2, "enable_fp_fusion": True},
    )
    return Sums(sums, starts, launch)


def whole_blocks(packed: Packed) -> int:
    """How many whole blocks of bytes a row has."""
    return packed.layout.padded * packed.spec.nbits // (8 * packed.layout.plane)


def layer_constants(packed: Packed) -> dict[str, Any]:
    """The compile-time arguments that say what layer it is."""
    layout, nbits = packed.layout, packed.spec.nbits
    whole = whole_blocks(packed) * (8 // nbits) * layout.plane
    return {
        "QMAX": packed.spec.qmax,
        "NBITS": nbits,
        "PLANE": layout.plane,
        "GROUP": layout.group,
        "ONE_GROUP": layout.groups == 1,
        "HAS_MAPS": packed.blocks is not None,
        "EVEN_K": whole <= packed.shape[1],
        "TAIL": whole < layout.padded,
    }


def product_arguments(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, sums: Sums, tiles: Tiles
) -> list[Any]:
    """The arguments by place of `matmul_kernel` and `gemm_kernel`."""
    tensors = [x, packed.W_q, packed.scale, packed.offset, maps_of(packed), sums.totals, sums.starts]
    tensors += [x if bias is None else bias.contiguous(), y, tiles.partial, tiles.counters]
    layout = packed.layout
    sizes = [x.shape[0], *packed.shape, layout.padded, layout.groups, whole_blocks(packed), sums.totals.shape[1]]
    return [*tensors, *sizes, x.stride(0), packed.W_q.stride(0)]


def multiply(
    launches: Callable[..., list[Launch]], x: Tensor, packed: Packed, bias: Tensor | None, processors: int, **cut: Any
) -> Tensor:
    """`x` [M, in_features] times the transposed weight, plus `bias`, by the `launches` of a module: [M, out_features].

    `cut` and `shares` may be given as to `launches`.
    """
    y = x.new_empty((x.shape[0], packed.shape[0]))
    if y.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        for launch in launches(x, packed, bias, y, processors, **cut):
            launch.run()
    return y
