"""Scale and offset of groups inside Triton kernels: `quantization/metadata.py` in float32, value for value.

    16-bit floats    value = float(stored)                                      one 2-byte load a group
    8-bit codes      value = step * (code - zero), step = stored / 256          one 1-byte load a group, and of the
                     offset = middle - scale * qmax / 2                         block of 128 groups 4 bytes (of 8)

All functions take pointers and tiles of `entry` = row * groups + group of any shape (int32, or int64 where there are
2^31 groups), and give float32 tiles of that shape, 0 where `mask` is False (`mask` may be None). `HAS_BLOCKS` is a
constant of the compilation: without blocks nothing but the plain load is left, and `maps_ptr` may be any pointer.

With codes of at most 4 bits each step but the last subtraction is exact (11-bit step x 9-bit difference x 4-bit
qmax / 2 fit into 24 bits), so that a fused multiply-add gives the same bits; at 8 bits the product may be rounded or
not, as the compiler likes.
"""

# mypy: disable-error-code="no-untyped-def, assignment, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from hqqplus.quantization.metadata import _STORED_STEPS
from hqqplus.quantization.spec import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_ONE_STEP = tl.constexpr(1.0 / _STORED_STEPS)


@triton.jit
def load_scale(scale_ptr, maps_ptr, entry, mask, HAS_BLOCKS: tl.constexpr):
    """The scales of `entry`; `maps_ptr` points to [blocks, 4] 16-bit floats."""
    if HAS_BLOCKS:
        scale = _decode(scale_ptr, maps_ptr, entry, mask, 0)
    else:
        scale = _load(scale_ptr + entry, mask).to(tl.float32)
    return scale


@triton.jit
def load_middle(offset_ptr, maps_ptr, entry, mask):
    """The middles of `entry`, m = offset + scale * qmax / 2; only 8-bit metadata have them."""
    return _decode(offset_ptr, maps_ptr, entry, mask, 2)


@triton.jit
def load_offset(offset_ptr, maps_ptr, entry, scale, mask, QMAX: tl.constexpr, HAS_BLOCKS: tl.constexpr):
    """The offsets of `entry`, whose scales are `scale` (float32, of the same shape; unused without blocks)."""
    if HAS_BLOCKS:
        offset = load_middle(offset_ptr, maps_ptr, entry, mask) - scale * (QMAX / 2)
    else:
        offset = _load(offset_ptr + entry, mask).to(tl.float32)
    return offset


@triton.jit
def _decode(codes_ptr, maps_ptr, entry, mask, FIRST: tl.constexpr):
    """Codes to values by the map (256 step, zero) that begins at place FIRST of each block's four numbers."""
    code = _load(codes_ptr + entry, mask).to(tl.float32)
    map_ptr = maps_ptr + (entry // _BLOCK) * 4 + FIRST
    step = _load(map_ptr, mask).to(tl.float32) * _ONE_STEP
    return (code - _load(map_ptr + 1, mask).to(tl.float32)) * step


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@triton.jit
def load_words(ptr, entry, mask, COUNT: tl.constexpr, RUN: tl.constexpr):
    """What is stored for `entry` ... `entry + COUNT - 1`: a tuple of COUNT / RUN integer tiles, RUN numbers in each.

    One load for RUN numbers: 8, 16, 32 or 64 bits. `entry` has to be a multiple of RUN, and `ptr` aligned to as much.
    """
    BITS: tl.constexpr = RUN * ptr.dtype.element_ty.primitive_bitwidth
    words = ()
    for i in tl.static_range(COUNT // RUN):
        places = ptr + (entry + i * RUN)
        if BITS == 64:
            words += (_load(places.to(tl.pointer_type(tl.int64), bitcast=True), mask),)
        elif BITS == 32:
            words += (_load(places.to(tl.pointer_type(tl.int32), bitcast=True), mask),)
        elif BITS == 16:
            words += (_load(places.to(tl.pointer_type(tl.int16), bitcast=True), mask),)
        else:
            words += (_load(places.to(tl.pointer_type(tl.int8), bitcast=True), mask),)
    return words


@triton.jit
def load_maps(maps_ptr, entry, mask, COUNT: tl.constexpr, RUN: tl.constexpr, HAS_BLOCKS: tl.constexpr):
    """The maps of `entry` ... `entry + COUNT - 1`: COUNT / RUN tiles of the four 16-bit floats in 64 bits, or nothing.

    RUN entries from a multiple of RUN (a power of two up to 128) on lie in one block.
    """
    words = ()
    if HAS_BLOCKS:
        for i in tl.static_range(COUNT // RUN):
            places = maps_ptr + (entry + i * RUN) // _BLOCK * 4
            words += (_load(places.to(tl.pointer_type(tl.int64), bitcast=True), mask),)
    return words


@triton.jit
def load_step(maps_ptr, entry):
    """256 step and zero of the scales of `entry` in 32 bits: the first half of what `load_maps` loads."""
    return tl.load((maps_ptr + entry // _BLOCK * 4).to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def decoded(code, word, FIRST: tl.constexpr, dtype: tl.constexpr):
    """The values of codes (float32) by the map (256 step, zero) that begins at place FIRST of a word of maps."""
    return (code - half(word, FIRST + 1, dtype)) * (half(word, FIRST, dtype) * _ONE_STEP)


@triton.jit
def from_words(
    scales, offsets, maps, scale_ptr, maps_ptr,
    INDEX: tl.constexpr, RUN: tl.constexpr, QMAX: tl.constexpr, HAS_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scale and offset of the entry at place INDEX in the tuples that `load_words` and `load_maps` gave."""
    SHIFT: tl.constexpr = INDEX % RUN
    scale, offset = scales[INDEX // RUN], offsets[INDEX // RUN]
    if HAS_BLOCKS:
        word = maps[INDEX // RUN]
        dtype: tl.constexpr = maps_ptr.dtype.element_ty
        scale = decoded(byte(scale, SHIFT), word, 0, dtype)
        middle = decoded(byte(offset, SHIFT), word, 2, dtype)
        offset = middle - scale * (QMAX / 2)
    else:
        dtype: tl.constexpr = scale_ptr.dtype.element_ty
        scale, offset = half(scale, SHIFT, dtype), half(offset, SHIFT, dtype)
    return scale, offset


@triton.jit
def half(word, index, dtype: tl.constexpr):
    """The 16-bit float at place `index` of a word, in float32."""
    return (word >> (16 * index)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def byte(word, index):
    """The byte at place `index` of a word, in float32."""
    return ((word >> (8 * index)).to(tl.int32) & 255).to(tl.float32)
