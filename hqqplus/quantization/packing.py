"""Codes of 1, 2, 3, 4 or 8 bits <-> bytes, in planar order.

With `per = 8 / nbits` codes to a byte and planes of `p` codes, a block is `per * p` consecutive codes of a row, and
byte `j` of the block holds codes `j, j + p, j + 2p, ...` from its low bits up. One bit-plane of a block is then `p`
consecutive codes, exactly one group where `p` is the group size, so a kernel applies one scale per plane.

What is left of a row after its last whole block (always a multiple of 8 codes) is one shorter block with planes of
`rest / per` codes: no row is padded for the sake of the packing. Codes of 3 bits are two runs of bytes: first the two
low bits of all codes, packed as 2-bit codes, then the high bits, packed as 1-bit codes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(width: int, nbits: int) -> int:
    """Bytes of a packed row of `width` codes (`width` a multiple of 8)."""
    return width * nbits // 8


def pack(codes: Tensor, nbits: int, plane: int) -> Tensor:
    """Pack `codes` [rows, width] (uint8, each below 2^nbits) into bytes [rows, width * nbits / 8].

    Raises:
        ValueError: if `width` or `plane` is not a multiple of 8.
    """
    _check(codes.shape[-1], plane)
    if nbits == 8:
        return codes.clone()
    if nbits == 3:
        return torch.cat([pack(codes & 3, 2, plane), pack(codes >> 2, 1, plane)], dim=-1)
    per = 8 // nbits
    return torch.cat([_pack_block(part, nbits) for part in _blocks(codes, per, plane)], dim=-1)


def unpack(packed: Tensor, nbits: int, plane: int) -> Tensor:
    """The inverse of `pack`: bytes [rows, width * nbits / 8] -> codes [rows, width], uint8."""
    if nbits == 8:
        return packed.clone()
    if nbits == 3:
        low, high = packed.split([packed.shape[-1] * 2 // 3, packed.shape[-1] // 3], dim=-1)
        return unpack(low, 2, plane) | (unpack(high, 1, plane) << 2)
    _check(packed.shape[-1] * 8 // nbits, plane)
    return torch.cat([_unpack_block(part, nbits) for part in _blocks(packed, 1, plane)], dim=-1)


def _blocks(row: Tensor, per: int, plane: int) -> list[Tensor]:
    """`row` [rows, n] cut into whole blocks [rows, blocks, per, plane] and, if any, the rest [rows, 1, per, rest/per].

    With `per` = 1 the same cut of the packed bytes, a plane of bytes to a block.
    """
    rows, width = row.shape
    whole = width // (per * plane)
    parts = []
    if whole:
        parts.append(row[:, : whole * per * plane].reshape(rows, whole, per, plane))
    rest = width - whole * per * plane
    if rest:
        parts.append(row[:, width - rest :].reshape(rows, 1, per, rest // per))
    return parts


def _pack_block(codes: Tensor, nbits: int) -> Tensor:
    """[rows, blocks, per, p] codes -> [rows, blocks * p] bytes."""
    packed = codes[:, :, 0].clone()
    for position in range(1, codes.shape[2]):
        packed |= codes[:, :, position] << (nbits * position)
    return packed.flatten(1)


def _unpack_block(packed: Tensor, nbits: int) -> Tensor:
    """[rows, blocks, 1, p] bytes -> [rows, blocks * per * p] codes."""
    shifts = torch.arange(0, 8, nbits, dtype=torch.uint8, device=packed.device)
    codes = (packed >> shifts[:, None]) & (2**nbits - 1)  # [rows, blocks, per, p]
    return codes.flatten(1)


def _check(width: int, plane: int) -> None:
    if width % 8 or plane % 8:
        raise ValueError(f"packing needs a width and a plane that are multiples of 8, not {width} and {plane}")
