"""Packed codes to a matrix of floats, or to a window of it.

Formula. W = scale * code + offset, group by group, in float32 (a fused multiply-add: the product is exact) and rounded
once to float32, bfloat16 or float16. The same bits as `reference.dequantize`; only with 8-bit weights whose metadata
have 8 bits too do they hang on how the other side rounds.

Layout. A row of packed bytes is a row of blocks (`quantization/packing.py`): byte j of a block holds the codes of
columns j, j + p, j + 2p, ..., so a tile of bytes [blocks, p] becomes `per` tiles of floats [blocks, p], each
consecutive in memory and each with one scale and one offset a row, where p is the group size.

    blocks_kernel     whole blocks; and the shorter one at the end of a row, where its planes do not straddle groups. A
                      lane reads 8 bytes (4 for float32) and writes `per` times 16. Every byte is read once; scales and
                      offsets of a block are one or two words each.
    columns_kernel    any columns, a weight at a time: what is left of a row, and edges of a window that cut a block.

With axis 0 the stored matrix is the turned one. A tile is then [64 stored rows, up to 64 bytes of one block], and goes
through shared memory so that it is written along the stored rows, which are the columns of W.

Bytes. Each weight nbits / 8 read, and what `dtype` has written; each group 4 read (2 with 8-bit metadata, and 8 for
128 groups). At 2 bits in groups of 64, 16-bit metadata, to bfloat16: 2.31 bytes a weight.

Configuration, chosen from machine code (Triton 3.9, to bfloat16, 16-bit metadata; not timed). Writes are STG.E.128
throughout, nothing is spilled from sm_75 to sm_120, axis 1 uses no shared memory:

    instructions a weight, registers      sm_89        sm_90
    2 bits g64 (and g32, g128)            5.7, 40      5.8, 32
    2 bits g64, 8-bit metadata            6.7, 40      6.9, 34
    1 bit g64 (and g32)                   5.3, 40      5.5, 32
    4 bits g64                            6.4, 39      6.8, 32
    8 bits g64                            7.7, 44      7.8, 34

A read of 8 bytes, not 16: a lane that held 16 would write 32 of each plane, and each of its two stores would fill half
a sector only; handing them on to other lanes takes seven barriers. With two reads of codes by each of 2048 lanes of an
SM (sm_90; 1280 on sm_89) 32 KB (20 KB) of codes are under way, and eight times as much is being written.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton.codes import codes
from hqqplus.kernels.triton.convert import codes_at, codes_of_3_at, round_to
from hqqplus.kernels.triton.metadata import from_words, load_maps, load_offset, load_scale, load_words
from hqqplus.quantization.packing import packed_width

_WARPS = 4
# Bytes that a lane of blocks_kernel reads, in units of what it needs for 16 bytes of output: 32 to 64 weights a lane.
_UNITS = {1: 1, 2: 2, 3: 1, 4: 2, 8: 4}
_TURNED_TILE = 64
_COLUMNS, _TURNED_COLUMNS = (8, 128), (64, 16)
# Without it products and sums round as in torch. What is to be fused is written as tl.fma.
OPTIONS: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out_features, in_features] in `dtype` (float32, bfloat16 or float16)."""
    return dequantize_into(packed, torch.empty(packed.shape, dtype=dtype, device=packed.W_q.device))


def dequantize_into(packed: Packed, out: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """Write the window W[rows, columns] of the matrix into `out`, which is returned.

    Any window will do. Along the packed direction (columns for axis 1, rows for axis 0) one that begins and ends on
    block borders, multiples of `block_columns(packed)`, or at the matrix' end is the fast one.

    Args:
        out: [rows, columns] of the window, float32, bfloat16 or float16, columns consecutive, any stride of rows.

    Raises:
        ValueError: for a slice with a step, or an `out` of another shape or with columns that are not consecutive.
    """
    (top, height), (left, width) = (_span(s, size) for s, size in zip((rows, columns), packed.shape, strict=True))
    if out.shape != (height, width) or (width > 1 and out.stride(1) != 1):
        raise ValueError(
            f"a window of {height} x {width} needs a buffer of this shape with consecutive columns, not one of shape "
            f"{tuple(out.shape)} and strides {out.stride()}"
        )
    if packed.spec.axis == 1:
        launch(packed, out, (top, height), (left, left + width))
    else:
        launch(packed, out, (left, width), (top, top + height))
    return out


def block_columns(packed: Packed) -> int:
    """Weights of a whole block: of 8 / nbits planes, or with 3 bits of 8 planes."""
    return _planes(packed.spec.nbits) * packed.layout.plane


def launch(
    packed: Packed, out: Tensor, rows: tuple[int, int], columns: tuple[int, int], ids: Tensor | None = None
) -> None:
    """Write a window of the stored matrix into `out`.

    Args:
        out: [count, columns] for axis 1, [columns, count] for axis 0; its last dimension consecutive.
        rows: (first, count) of the stored rows.
        columns: (first, last + 1) of the stored columns.
        ids: [count] the stored rows instead (`rows` then counts them from 0); axis 1 only.
    """
    if out.numel() == 0:
        return
    first, end = columns
    done = first
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        for run in block_runs(packed, first, end):
            if done < run.column:
                _columns(packed, _from(packed, out, done - first), rows, (done, run.column), ids)
            call = blocks_call(packed, _from(packed, out, run.column - first), rows, run, ids)
            blocks_kernel[call.grid](*call.arguments, **call.constants, **OPTIONS)
            done = run.column + run.number * run.columns
        if done < end:
            _columns(packed, _from(packed, out, done - first), rows, (done, end), ids)


class Blocks(NamedTuple):
    """Blocks that lie side by side in each stored row.

    Attributes:
        column: the first one's first column.
        number: how many there are.
        plane: codes of a plane, as many as bytes of a block (of the high bits', with 3 bits).
        planes: planes of a block.
        groups: groups of a block: one a plane, or a plane is an equal part of a group; 0 where a row is one group.
    """

    column: int
    number: int
    plane: int
    planes: int
    groups: int

    @property
    def columns(self) -> int:
        return self.planes * self.plane


def block_runs(packed: Packed, first: int, end: int) -> list[Blocks]:
    """What `blocks_kernel` can do of the columns [first, end): the whole blocks, and often the shorter last one."""
    nbits, layout = packed.spec.nbits, packed.layout
    planes, size = _planes(nbits), block_columns(packed)
    border = layout.padded // size * size
    grouped = layout.groups > 1
    begin, count = -(-first // size), min(end, border) // size - -(-first // size)
    runs = [Blocks(begin * size, count, layout.plane, planes, planes if grouped else 0)] if count > 0 else []
    plane, groups = (layout.padded - border) // planes, (layout.padded - border) // layout.group
    fits = plane > 0 and plane % 8 == 0 and (not grouped or planes % groups == 0)
    if nbits != 3 and fits and first <= border and end == layout.padded:
        runs.append(Blocks(border, 1, plane, planes, groups if grouped else 0))
    return runs


class Call(NamedTuple):
    """A launch: how many programs, the arguments by place, the constants that a kernel is compiled with by name."""

    grid: tuple[int]
    arguments: list[Any]
    constants: dict[str, Any]


def blocks_call(packed: Packed, out: Tensor, rows: tuple[int, int], blocks: Blocks, ids: Tensor | None = None) -> Call:
    """Of `blocks_kernel`; `out` begins with the blocks' first column."""
    spec, layout = packed.spec, packed.layout
    (first_row, count), in_row = rows, blocks.number
    row_bytes, groups, out_stride = packed.W_q.shape[1], layout.groups, out.stride(0)
    # With 3 bits a block of 8 planes is two of the low bits, whose bytes come first in a row, and one of the high.
    first_byte = blocks.column // (4 if spec.nbits == 3 else blocks.planes)
    first_high = packed_width(layout.padded, 2) + blocks.column // 8 if spec.nbits == 3 else 0
    first_group = blocks.column // layout.group
    flat = spec.axis == 1 and spec.nbits != 3 and ids is None and blocks.groups == blocks.planes
    if flat and layout.padded == in_row * blocks.columns == out_stride:
        # Nothing lies between the rows: as many rows of one block each, and no division in the kernel.
        first_row, count, in_row = first_row * in_row, count * in_row, 1
        row_bytes, groups, out_stride = blocks.plane, blocks.planes, blocks.columns
    tile, block = _tile(packed, blocks.plane, out.dtype)
    parts = -(-blocks.plane // tile)
    programs = in_row * parts * -(-count // block) if spec.axis == 0 else -(-count * in_row // block)
    constants = {
        **_constants(packed, ids),
        "PLANE": blocks.plane,
        "GROUPS": blocks.groups,
        "TILE": tile,
        "BLOCK": block,
        "VECTOR": 0 if spec.axis == 0 else min(_vector(out.dtype), tile),
        "RUN": _run(packed, blocks.groups, groups, first_group),
        "ALIGN": math.gcd(row_bytes, first_byte, first_high, 16),
        "ONE_BLOCK": in_row == 1,
    }
    sizes = [first_row, count, in_row, packed.W_q.shape[0], row_bytes, first_byte, first_high, groups, first_group]
    return Call((programs,), [*_tensors(packed, out, ids), *sizes, out_stride], constants)


def columns_call(
    packed: Packed, out: Tensor, rows: tuple[int, int], columns: tuple[int, int], ids: Tensor | None = None
) -> Call:
    """Of `columns_kernel`, for columns (first, last + 1); `out` begins with the first of them."""
    layout = packed.layout
    first, end = columns
    height, width = _TURNED_COLUMNS if packed.spec.axis == 0 else _COLUMNS
    constants = {**_constants(packed, ids), "PLANE": layout.plane, "ROWS": height, "COLUMNS": width}
    constants["GROUP"] = layout.group if layout.groups > 1 else 0
    programs = -(-rows[1] // height) * -(-(end - first) // width)
    sizes = [*rows, first, end - first, packed.W_q.shape[0], packed.W_q.shape[1], layout.padded, layout.groups]
    return Call((programs,), [*_tensors(packed, out, ids), *sizes, out.stride(0)], constants)


def _columns(packed: Packed, out: Tensor, rows: tuple[int, int], columns: tuple[int, int], ids: Tensor | None) -> None:
    call = columns_call(packed, out, rows, columns, ids)
    columns_kernel[call.grid](*call.arguments, **call.constants, **OPTIONS)


def _from(packed: Packed, out: Tensor, column: int) -> Tensor:
    """`out` from a stored column of its window on."""
    return out[:, column:] if packed.spec.axis == 1 else out[column:]


def _tile(packed: Packed, plane: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a block and blocks that a program of `blocks_kernel` takes at once."""
    tile = triton.next_power_of_2(plane)
    if packed.spec.axis == 0:
        return min(tile, _TURNED_TILE), _TURNED_TILE
    return tile, max(1, 32 * _WARPS * _vector(dtype) * _UNITS[packed.spec.nbits] // tile)


def _constants(packed: Packed, ids: Tensor | None) -> dict[str, Any]:
    return {
        "NBITS": packed.spec.nbits,
        "TURNED": packed.spec.axis == 0,
        "HAS_IDS": ids is not None,
        "HAS_BLOCKS": packed.blocks is not None,
    }


def _tensors(packed: Packed, out: Tensor, ids: Tensor | None) -> list[Tensor]:
    maps = packed.scale if packed.blocks is None else packed.blocks
    if packed.blocks is not None and maps.data_ptr() % 8:
        maps = maps.clone()  # the four floats of a map are one load
    return [out, packed.W_q, packed.scale, packed.offset, maps, packed.W_q if ids is None else ids]


def _run(packed: Packed, *groups: int) -> int:
    """Scales that are loaded as one word: as many as divide all `groups` and fit into 64 bits."""
    size = packed.scale.element_size()
    places = [t.data_ptr() // size for t in (packed.scale, packed.offset)]
    return math.gcd(8 // size, *places, *groups)


def _planes(nbits: int) -> int:
    return 8 if nbits == 3 else 8 // nbits


def _vector(dtype: torch.dtype) -> int:
    """How many numbers 16 bytes hold."""
    return 16 // dtype.itemsize


def _span(window: slice, size: int) -> tuple[int, int]:
    """(first, count) of a slice."""
    first, last, step = window.indices(size)
    if step != 1:
        raise ValueError(f"a window has no steps: {window}")
    return first, max(0, last - first)


@triton.jit
def _source_rows(ids_ptr, row, inside, first_row, table_rows, HAS_IDS: tl.constexpr):
    """The stored rows [n] (int64) that output rows `row` [n] are read from, and whether there are such."""
    if HAS_IDS:
        source = tl.load(ids_ptr + row, mask=inside, other=0).to(tl.int64)
        known = (source >= 0) & (source < table_rows)
        source = tl.where(known, source, 0)
    else:
        source, known = (first_row + row).to(tl.int64), inside
    return source, known


@triton.jit(do_not_specialize=["first_row", "blocks", "table_rows", "first_byte", "first_high", "first_group"])
def blocks_kernel(
    out_ptr, codes_ptr, scale_ptr, offset_ptr, maps_ptr, ids_ptr,
    first_row, rows, blocks, table_rows, row_bytes, first_byte, first_high, groups, first_group, out_stride,
    NBITS: tl.constexpr, TURNED: tl.constexpr, HAS_IDS: tl.constexpr, HAS_BLOCKS: tl.constexpr, PLANE: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, RUN: tl.constexpr,
    ALIGN: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """`BLOCK` blocks (TURNED: TILE bytes of the same block of BLOCK rows): bytes [BLOCK, TILE] to floats."""
    PLANES: tl.constexpr = 8 if NBITS == 3 else 8 // NBITS
    QMAX: tl.constexpr = 2**NBITS - 1
    PARTS: tl.constexpr = (PLANE + TILE - 1) // TILE
    program = tl.program_id(0)
    byte = tl.arange(0, TILE)[None, :]
    if TURNED:
        # Neighbouring programs read neighbouring bytes.
        byte += program % PARTS * TILE
        block = tl.zeros([BLOCK], tl.int32) + program // PARTS % blocks
        row = program // PARTS // blocks * BLOCK + tl.arange(0, BLOCK)
    else:
        unit = program * BLOCK + tl.arange(0, BLOCK)
        block = tl.zeros([BLOCK], tl.int32) if ONE_BLOCK else unit % blocks
        row = unit if ONE_BLOCK else unit // blocks
    inside = row < rows
    source, known = _source_rows(ids_ptr, row, inside, first_row, table_rows, HAS_IDS)
    mask = inside[:, None]
    if PLANE % TILE != 0:
        mask = mask & (byte < PLANE)

    place = byte
    if VECTOR > 0:
        # Told that no more is consecutive, the compiler gives a lane no more bytes than it can write at once.
        place = tl.max_contiguous(byte, [1, VECTOR])
    if NBITS == 3:
        low = codes_ptr + tl.multiple_of(source * row_bytes + first_byte, ALIGN)[:, None]
        low += block[:, None] * (2 * PLANE) + place
        first = tl.load(low, mask=mask, other=0)
        second = tl.load(low + PLANE, mask=mask, other=0)
        high = codes_ptr + tl.multiple_of(source * row_bytes + first_high, ALIGN)[:, None]
        last = tl.load(high + (block[:, None] * PLANE + place), mask=mask, other=0)
    else:
        start = codes_ptr + tl.multiple_of(source * row_bytes + first_byte, ALIGN)[:, None]
        word = tl.load(start + (block[:, None] * PLANE + place), mask=mask, other=0)
    if GROUPS == 0:
        scale = load_scale(scale_ptr, maps_ptr, source, inside, HAS_BLOCKS)
        offset = load_offset(offset_ptr, maps_ptr, source, scale, inside, QMAX, HAS_BLOCKS)
    else:
        entry = source * groups + (first_group + block * GROUPS)
        scales = load_words(scale_ptr, entry, inside, GROUPS, RUN)
        offsets = load_words(offset_ptr, entry, inside, GROUPS, RUN)
        maps = load_maps(maps_ptr, entry, inside, GROUPS, RUN, HAS_BLOCKS)

    stride = tl.cast(out_stride, tl.int64)
    if TURNED:
        out = out_ptr + (block[:, None] * (PLANES * PLANE) + byte) * stride + row[:, None]
        step = stride * PLANE
    else:
        out = out_ptr + (row * stride)[:, None] + (block[:, None] * (PLANES * PLANE) + byte)
        step = PLANE
    for i in tl.static_range(PLANES):
        if NBITS == 3:
            numbers = codes_of_3_at(first if i < 4 else second, last, i % 4 * 2, i)
        else:
            numbers = codes_at(word, i * NBITS, QMAX)
        if GROUPS > 0:
            scale, offset = from_words(
                scales, offsets, maps, scale_ptr, maps_ptr, i * GROUPS // PLANES, RUN, QMAX, HAS_BLOCKS
            )
        if HAS_IDS:
            offset = tl.where(known, offset, float("nan"))
        values = tl.fma(numbers, scale[:, None], offset[:, None])
        tl.store(out + i * step, round_to(values, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "table_rows", "first_column", "padded"])
def columns_kernel(
    out_ptr, codes_ptr, scale_ptr, offset_ptr, maps_ptr, ids_ptr,
    first_row, rows, first_column, columns, table_rows, row_bytes, padded, groups, out_stride,
    NBITS: tl.constexpr, TURNED: tl.constexpr, HAS_IDS: tl.constexpr, HAS_BLOCKS: tl.constexpr, PLANE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Any columns [first_column, first_column + columns) of rows, a tile [ROWS, COLUMNS] of weights."""
    QMAX: tl.constexpr = 2**NBITS - 1
    tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    at = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    source, known = _source_rows(ids_ptr, row, inside, first_row, table_rows, HAS_IDS)
    mask = inside[:, None] & (at < columns)
    column = first_column + at
    numbers = codes(codes_ptr + (source * row_bytes)[:, None], column, mask, padded, PLANE, NBITS)
    entry = tl.broadcast_to(source[:, None], [ROWS, COLUMNS])
    if GROUP > 0:
        entry = source[:, None] * groups + column // GROUP
    scale = load_scale(scale_ptr, maps_ptr, entry, mask, HAS_BLOCKS)
    offset = load_offset(offset_ptr, maps_ptr, entry, scale, mask, QMAX, HAS_BLOCKS)
    if HAS_IDS:
        offset = tl.where(known[:, None], offset, float("nan"))
    stride = tl.cast(out_stride, tl.int64)
    out = out_ptr + at * stride + row[:, None] if TURNED else out_ptr + (row * stride)[:, None] + at
    tl.store(out, round_to(tl.fma(numbers, scale, offset), out_ptr.dtype.element_ty), mask=mask)
