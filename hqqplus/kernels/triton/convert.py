"""Bytes to codes as floats, and floats to the output's type, in Triton kernels.

Four bytes are one register: shift and mask take the codes out of all four, PRMT puts each under the exponent of 2^23,
which makes the float 2^23 + code of it, and a subtraction leaves the code, exactly. That is 2.5 instructions a code,
where Triton's own conversion, a byte at a time, takes about 7. It is inline PTX, which the interpreter does not know:
what is interpreted converts by arithmetic instead. The interpreter also cuts a float32 off to make a bfloat16 of it,
where a GPU rounds to the nearest, halves to even: `round_to` rounds there by the bits.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl

from hqqplus.kernels.triton import interpreted

_PTX = tl.constexpr(not interpreted())


@triton.jit
def codes_at(word, SHIFT: tl.constexpr, QMAX: tl.constexpr):
    """The codes 0 ... QMAX at bit SHIFT of bytes [...], in float32. The last dimension is a multiple of 4."""
    if _PTX:
        numbers = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $4, {SHIFT}; and.b32 t, t, {QMAX * 0x01010101};"
            "prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;"
            "prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443;"
            "sub.f32 $0, $0, 0f4B000000; sub.f32 $1, $1, 0f4B000000;"
            "sub.f32 $2, $2, 0f4B000000; sub.f32 $3, $3, 0f4B000000; }",
            "=r,=r,=r,=r,r",
            [word],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        numbers = ((word >> SHIFT) & QMAX).to(tl.float32)
    return numbers


@triton.jit
def codes_of_3_at(low, high, LOW_SHIFT: tl.constexpr, HIGH_SHIFT: tl.constexpr):
    """Codes of 3 bits in float32: two bits at LOW_SHIFT of bytes `low`, one at HIGH_SHIFT of bytes `high`, [...]."""
    if _PTX:
        numbers = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, u; shr.b32 t, $4, {LOW_SHIFT}; and.b32 t, t, 0x03030303;"
            f"shr.b32 u, $5, {HIGH_SHIFT}; and.b32 u, u, 0x01010101; shl.b32 u, u, 2; or.b32 t, t, u;"
            "prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;"
            "prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443;"
            "sub.f32 $0, $0, 0f4B000000; sub.f32 $1, $1, 0f4B000000;"
            "sub.f32 $2, $2, 0f4B000000; sub.f32 $3, $3, 0f4B000000; }",
            "=r,=r,=r,=r,r,r",
            [low, high],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        numbers = (((low >> LOW_SHIFT) & 3) | (((high >> HIGH_SHIFT) & 1) << 2)).to(tl.float32)
    return numbers


@triton.jit
def round_to(values, dtype: tl.constexpr):
    """float32 `values` in `dtype`, to the nearest, halves to even; NaN stays NaN."""
    if _PTX or dtype != tl.bfloat16:
        rounded = values.to(dtype)
    else:
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(values == values, bits, 0x7FC00000)
        rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded
