"""One-bit weights times 8-bit activations, bit by bit: AND and popcount.

Formula. The rounded activations xi (`kernels/int8.py`) are in two's complement, bits b = 0 ... 7 of value v_b = 2^b,
but v_7 = -2^7. For a row m of x, a row n of the weight and a group g

    P_mgn = sum_b v_b popcount(bits b of xi_mk, k in g  AND  codes q_nk, k in g)         an integer, exact
    X_mg  = sum_{k in g} xi_mk                                                           an integer, exact
    y_mn  = a_m sum_g (s_gn P_mgn + o_gn X_mg) + bias_n                                  float32, rounded to x's dtype

Layout. In the packed bytes (`quantization/packing.py`) bit i of byte j is code j of group i, so that a word holds four
codes of each of 8 groups; a popcount wants 32 of one. Eight consecutive words, an *octet*, hold 32 codes of each of 8
groups. They are turned in registers, as four matrices of 8 x 8 bits beside each other (a butterfly: three rounds of
four exchanges, 48 instructions for 256 weights): word i is then group i, with code 4 w + c in bit 8 c + w. An octet is
a lane's; neighbours read neighbouring octets. `slice_kernel` writes the activations in the same order, `lanes` octets
to a tile:

    slices [M, tiles, 8, 8, lanes] int32    the 32 bits b of an octet's part of a group: by row, tile, group, b, octet
    sums   [M, tiles, 8, lanes] int32       X of the octet's part of a group
    steps  [M] float32                      a

so that every load of them is of neighbours, at an offset that is a constant of the compilation. (With an offset
computed for each, the loads were all moved to the front, and took 200 registers; now it is 48.) Groups of 64, 128 and
256 weights are 2, 4 and 8 octets with the same scales.

Bytes. A weight 1/8, a group 4 (2 with 8-bit metadata, and 8 for 128 groups): 1.5 bits a weight in groups of 64 with
16-bit metadata, read once from memory, and from L2 once more for each 4 rows of x. An activation: 1 byte written as
slices, read by each program from L2.

The price. 64 popcounts for 256 weights and a row of x, and a multiprocessor does 16 in a cycle: where there is
bandwidth, this and not the memory is the limit, from the first row on. `benchmarks/int8.py` counts it.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton import interpreted
from hqqplus.kernels.triton.metadata import from_words, load_maps, load_words

OCTET_CODES, OCTET_GROUPS, BITS = 32, 8, 8
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
_LARGEST_TILE = 32
# Rows of the weight x octets of a program, two to a lane: each word of the activations then serves twice.
_PAIRS = 256
# Octets of a program of `slice_kernel`, and numbers of x that it reads at a time for their maximum.
_SLICED, _SCANNED = 4, 1024
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_SMALLEST = tl.constexpr(2.0**-126)
_ROUNDING = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds, halves to the even number


class Call(NamedTuple):
    """A launch: its programs, the arguments by place, the constants that a kernel is compiled with by name."""

    grid: tuple[int, ...]
    arguments: list[Any]
    constants: dict[str, Any]


class Slices(NamedTuple):
    """Rounded activations as the kernel reads them: see the module."""

    slices: Tensor
    sums: Tensor
    steps: Tensor

    @property
    def rows(self) -> int:
        return self.steps.shape[0]

    @property
    def lanes(self) -> int:
        return self.slices.shape[-1]


def supports(x: Tensor, packed: Packed) -> bool:
    """Whether `matmul` takes them: codes of 1 bit along the input in whole blocks of groups of 32, 64, 128 or 256, and
    activations of at most 32 bits, on a GPU (or interpreted). Raises nothing."""
    spec, layout = packed.spec, packed.layout
    words = (packed.W_q, packed.scale, packed.offset, *([] if packed.blocks is None else [packed.blocks]))
    return (
        (x.is_cuda or interpreted())
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (spec.nbits, spec.axis) == (1, 1)
        and layout.group in (32, 64, 128, 256)
        and layout.padded % (OCTET_GROUPS * layout.group) == 0
        # Read in words of 8 bytes. A row of each of them is a multiple of that.
        and all(tensor.data_ptr() % 8 == 0 for tensor in words)
    )


def matmul(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`int8.matmul` of x [..., in], any strides: [..., out], dtype of `x`. Only what `supports` takes."""
    out_features, in_features = packed.shape
    rows = x.reshape(-1, in_features)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    if y.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            sliced = slice_activations(rows, packed)
            call = product_call(sliced, packed, bias, y.view(-1, out_features))
            bitserial_kernel[call.grid](*call.arguments, **call.constants, **OPTIONS)
    return y


def slice_activations(x: Tensor, packed: Packed) -> Slices:
    """Round x [M, in] to 8 bits a row, and cut it into bits."""
    x = x if x.stride(1) == 1 else x.contiguous()
    sliced = empty_slices(x.shape[0], packed, x.device)
    call = slice_call(x, packed, sliced)
    slice_kernel[call.grid](*call.arguments, **call.constants, **OPTIONS)
    return sliced


def empty_slices(rows: int, packed: Packed, device: torch.device | str) -> Slices:
    octets = _octets(packed)
    lanes = min(_LARGEST_TILE, triton.next_power_of_2(octets))
    tiles = triton.cdiv(octets, lanes)
    slices = torch.empty((rows, tiles, OCTET_GROUPS, BITS, lanes), dtype=torch.int32, device=device)
    sums = torch.empty((rows, tiles, OCTET_GROUPS, lanes), dtype=torch.int32, device=device)
    return Slices(slices, sums, torch.empty((rows,), dtype=torch.float32, device=device))


def slice_call(x: Tensor, packed: Packed, sliced: Slices) -> Call:
    """Of `slice_kernel`, for x [M, in] with consecutive columns."""
    rows, tiles, lanes = sliced.rows, sliced.slices.shape[1], sliced.lanes
    sliced_at_once = min(_SLICED, lanes)
    constants = {"GROUP": packed.layout.group, "LANES": lanes, "OCTETS": sliced_at_once, "SCANNED": _SCANNED}
    grid = (rows, tiles * lanes // sliced_at_once)
    return Call(grid, [x, *sliced, x.stride(0), x.shape[1], tiles], constants)


def product_call(sliced: Slices, packed: Packed, bias: Tensor | None, y: Tensor) -> Call:
    """Of `bitserial_kernel`, which writes y [M, out], contiguous."""
    octets, lanes = _octets(packed), sliced.lanes
    rows_x = min(4, triton.next_power_of_2(sliced.rows))
    rows_w = _PAIRS // lanes
    constants = {
        "GROUP": packed.layout.group,
        "HAS_BLOCKS": packed.blocks is not None,
        "HAS_BIAS": bias is not None,
        "RUN": 8 if packed.blocks is not None else 4,
        "EVEN": y.shape[1] % rows_w == 0 and octets % lanes == 0,
        "ROWS_X": rows_x,
        "ROWS_W": rows_w,
        "LANES": lanes,
    }
    words, maps = packed.W_q.view(torch.int32), packed.scale if packed.blocks is None else packed.blocks
    tensors = [*sliced, words, packed.scale, packed.offset, maps, y if bias is None else bias, y]
    grid = (triton.cdiv(sliced.rows, rows_x), triton.cdiv(y.shape[1], rows_w))
    return Call(grid, [*tensors, *y.shape, octets, packed.layout.groups], constants)


def _octets(packed: Packed) -> int:
    return packed.layout.padded // (OCTET_GROUPS * OCTET_CODES)


# --- the activations ------------------------------------------------------------------------------------------------


@triton.jit
def slice_kernel(
    x_ptr, slices_ptr, sums_ptr, steps_ptr, stride, width, tiles,
    GROUP: tl.constexpr, LANES: tl.constexpr, OCTETS: tl.constexpr, SCANNED: tl.constexpr
):  # fmt: skip
    """OCTETS octets of one row of x. Each program finds the maximum of the whole row for itself: it is short."""
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride
    largest = tl.zeros((SCANNED,), tl.float32)
    for start in range(0, width, SCANNED):
        k = start + tl.arange(0, SCANNED)
        size = tl.abs(tl.load(x_ptr + k, mask=k < width, other=0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(size < _INFINITY, size, _INFINITY))  # NaN count as infinite
    size = tl.max(largest, 0)
    finite = size < _INFINITY
    step = tl.where(finite, tl.maximum(tl.math.div_rn(size, size * 0 + 127.0), _SMALLEST), _NAN)
    if tl.program_id(1) == 0:
        tl.store(steps_ptr + m, step)

    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)[:, None, None]
    group = tl.arange(0, 8)[None, :, None]
    bit = tl.arange(0, 32)[None, None, :]  # 8 c + w for code 4 w + c
    PER: tl.constexpr = GROUP // 32
    k = (octet // PER * 8 + group) * GROUP + octet % PER * 32 + bit % 8 * 4 + bit // 8
    value = tl.load(x_ptr + k, mask=k < width, other=0).to(tl.float32)  # [OCTETS, 8, 32]
    value = tl.math.div_rn(tl.where(finite, value, 0.0), value * 0 + tl.where(finite, step, 1.0))
    xi = ((value + _ROUNDING) - _ROUNDING).to(tl.int32)

    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)[:, None]
    place = ((m * tiles + octet // LANES) * 8 + tl.arange(0, 8)[None, :]) * LANES  # of (row, tile, group)
    tl.store(sums_ptr + place + octet % LANES, tl.sum(xi, 2))
    for b in tl.static_range(8):
        word = tl.sum(((xi >> b) & 1) << bit, 2)  # each of its bits once: a sum is an OR
        tl.store(slices_ptr + place * 8 + b * LANES + octet % LANES, word)


# --- the product ----------------------------------------------------------------------------------------------------


@triton.jit
def popcount_twin(w):
    """The number of ones in each word (int32), in arithmetic: those of pairs of bits, of nibbles, of bytes, of all."""
    w = w - ((w >> 1) & 0x55555555)
    w = (w & 0x33333333) + ((w >> 2) & 0x33333333)
    w = (w + (w >> 4)) & 0x0F0F0F0F
    w = w + (w >> 8)
    return (w + (w >> 16)) & 0x3F


if interpreted():
    popcount = popcount_twin
else:

    @triton.jit
    def popcount(w):
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _exchange(a, b, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """The bits of `a` outside MASK, which stand SHIFT higher than those in it, for the bits of `b` in MASK."""
    return (a & MASK) | ((b & MASK) << SHIFT), ((a >> SHIFT) & MASK) | (b & ~MASK)


@triton.jit
def turned(w0, w1, w2, w3, w4, w5, w6, w7):
    """Bit i of each byte of word w <-> bit w of that byte of word i."""
    w0, w1 = _exchange(w0, w1, 1, 0x55555555)
    w2, w3 = _exchange(w2, w3, 1, 0x55555555)
    w4, w5 = _exchange(w4, w5, 1, 0x55555555)
    w6, w7 = _exchange(w6, w7, 1, 0x55555555)
    w0, w2 = _exchange(w0, w2, 2, 0x33333333)
    w1, w3 = _exchange(w1, w3, 2, 0x33333333)
    w4, w6 = _exchange(w4, w6, 2, 0x33333333)
    w5, w7 = _exchange(w5, w7, 2, 0x33333333)
    w0, w4 = _exchange(w0, w4, 4, 0x0F0F0F0F)
    w1, w5 = _exchange(w1, w5, 4, 0x0F0F0F0F)
    w2, w6 = _exchange(w2, w6, 4, 0x0F0F0F0F)
    w3, w7 = _exchange(w3, w7, 4, 0x0F0F0F0F)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _four_words(ptr, mask):
    """Words 0 ... 3 behind each pointer of a tile: one load of 16 bytes a lane."""
    ROWS: tl.constexpr = ptr.shape[0]
    COLUMNS: tl.constexpr = ptr.shape[1]
    places = ptr[:, :, None] + tl.arange(0, 4)[None, None, :]
    words = tl.load(places) if mask is None else tl.load(places, mask=mask[:, :, None], other=0)
    even, odd = tl.split(tl.reshape(words, (ROWS, COLUMNS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def bitserial_kernel(
    slices_ptr, sums_ptr, steps_ptr, words_ptr, scale_ptr, offset_ptr, maps_ptr, bias_ptr, y_ptr,
    M, N, octets, groups,
    GROUP: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
    ROWS_X: tl.constexpr, ROWS_W: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """ROWS_X x ROWS_W results. Programs of the same rows of the weight follow each other, to find them in L2."""
    m = tl.program_id(0) * ROWS_X + tl.arange(0, ROWS_X)
    n = tl.program_id(1) * ROWS_W + tl.arange(0, ROWS_W)
    lane = tl.arange(0, LANES)
    tiles = tl.cdiv(octets, LANES)
    row = tl.minimum(m, M - 1)[:, None, None].to(tl.int64)  # rows beyond the last are computed, and not stored
    total = tl.zeros((ROWS_X, ROWS_W, LANES), tl.float32)
    for tile in range(0, tiles):
        octet = tile * LANES + lane
        mask = None if EVEN else (n < N)[:, None] & (octet < octets)[None, :]
        words = words_ptr + (n[:, None].to(tl.int64) * octets + octet[None, :]) * 8
        w0, w1, w2, w3 = _four_words(words, mask)
        w4, w5, w6, w7 = _four_words(words + 4, mask)
        codes = turned(w0, w1, w2, w3, w4, w5, w6, w7)
        entry = n[:, None] * groups + (octet // (GROUP // 32) * 8)[None, :]
        scales = load_words(scale_ptr, entry, mask, 8, RUN)
        offsets = load_words(offset_ptr, entry, mask, 8, RUN)
        maps = load_maps(maps_ptr, entry, mask, 8, RUN, HAS_BLOCKS)
        slices = slices_ptr + (row * tiles + tile) * (8 * 8 * LANES) + lane[None, None, :]
        sums = sums_ptr + (row * tiles + tile) * (8 * LANES) + lane[None, None, :]
        for i in tl.static_range(8):
            product = tl.zeros((ROWS_X, ROWS_W, LANES), tl.int32)
            for b in tl.static_range(8):
                ones = popcount(codes[i][None, :, :] & tl.load(slices + (i * 8 + b) * LANES))
                if b == 7:
                    product -= ones << b
                else:
                    product += ones << b
            scale, offset = from_words(scales, offsets, maps, scale_ptr, maps_ptr, i, RUN, 1, HAS_BLOCKS)
            zero_term = offset[None, :, :] * tl.load(sums + i * LANES).to(tl.float32)
            total += scale[None, :, :] * product.to(tl.float32) + zero_term
    y = tl.sum(total, 2) * tl.load(steps_ptr + m, mask=m < M, other=0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    places = y_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
