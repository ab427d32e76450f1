"""From packed bytes to numbers that a tensor core takes, a few bits at a time.

Fast, on whole blocks. A bit-plane of a block is up to 256 consecutive codes (`quantization/packing.py`), and all of it
is unpacked at once from the bytes as they lie in registers, four to a word. A code q is never converted: its bits are
masked where they stand and put below the exponent of a power of two,

    base + factor q        base 128 in bfloat16 (7 bits of mantissa), 1024 in float16 (10 bits), factor = 2^(bit of q)

exactly, and the kernel takes `base` away again through the group sums of x and `factor` through the scale. For two
codes that is one LOP3. The word is first turned from bytes (0, 1, 2, 3) to (0, 2, 1, 3), so that a mask with two
windows, 16 bits apart, catches a pair of neighbours: bytes 0 and 1 in the word itself, bytes 2 and 3 in the word
shifted by 8. A plane whose bits do not fit into the mantissa is shifted down first (`_shift`). In bfloat16, at 2 bits:
12 instructions for 16 codes (PRMT, 3 shifts, 8 LOP3); at 1 bit 20 for 32 codes.

Codes of 8 bits fit below 1024 but not below 128: in bfloat16 they are converted (255 has 8 bits, so that is exact).

Inline PTX does not run under Triton's interpreter. There `plane` is arithmetic with the same result; that the PTX does
what the arithmetic says is tested on its own (`tests/kernels/triton/test_codes.py`).

Anywhere. `place` finds byte and shift of each code by index arithmetic, for the short last block of a row and for all
that has no fast kernel. Each byte is then read once a plane, from L1.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hqqplus.kernels.triton import interpreted

INTERPRETED = interpreted()
_MANTISSA = {"bfloat16": 7, "float16": 10}


def base(dtype: str) -> int:
    """What is added to every code in a number of type `dtype`."""
    return 2 ** _MANTISSA[dtype]


def converted(nbits: int, dtype: str) -> bool:
    """Whether codes are converted one by one (base 0, factor 1) because the mantissa cannot hold them."""
    return nbits > _MANTISSA[dtype]


def _shift(plane: int, nbits: int, dtype: str) -> int:
    """By how many bits the word is shifted down so that `plane` fits into the mantissa."""
    return 0 if (plane + 1) * nbits <= _MANTISSA[dtype] else plane * nbits


def factor(plane: int, nbits: int, dtype: str) -> int:
    """What the codes of `plane` come multiplied by."""
    return 1 if converted(nbits, dtype) else 2 ** (plane * nbits - _shift(plane, nbits, dtype))


def assembly(plane: int, nbits: int, dtype: str) -> str:
    """PTX: $2 a word of four bytes in the order (0, 2, 1, 3), $3 that word >> 8 -> $0, $1 the pairs (0, 1), (2, 3)."""
    shift = _shift(plane, nbits, dtype)
    window = (2**nbits - 1) << (plane * nbits - shift)
    exponent = 127 + 7 if dtype == "bfloat16" else 15 + 10
    one = exponent << _MANTISSA[dtype]
    mask, power = f"0x{window | window << 16:08x}", f"0x{one | one << 16:08x}"
    words = ("$2", "$3")
    lines = []
    if shift:
        lines += [f"shr.b32 {name}, {word}, {shift};" for name, word in zip("ab", words, strict=True)]
        words = ("a", "b")
    lines += [f"lop3.b32 ${i}, {word}, {mask}, {power}, 0xea;" for i, word in enumerate(words)]
    return "{ .reg .b32 a, b; " + " ".join(lines) + " }"


def centred_assembly(nbits: int, dtype: str) -> str:
    """PTX: $2 a word of four bytes, $3 where a code begins in its byte, plus 7 -> $0, $1 the codes q - Q / 2 of bytes
    (0, 1) and (2, 3).

    The middle lies between two codes. So they are put at bit 1 of the mantissa, below half the power, which has room
    for it: base / 2 + q, less base / 2 + Q / 2. Two rotations of the word bring them there, and 7 more bits than the
    code's own because none of the rotations may be to the left. The multiplication by one is there because a
    subtraction of bfloat16 came later than sm_80.
    """
    window = 2**nbits - 1
    one = (127 + 7 - 1 if dtype == "bfloat16" else 15 + 10 - 1) << _MANTISSA[dtype]
    mask, power = f"0x{window << 1 | window << 17:08x}", f"0x{one | one << 16:08x}"
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    unit, centre = (
        _pair(torch.tensor(value, dtype=getattr(torch, dtype))) for value in (1.0, -(base(dtype) + window) / 2)
    )
    return (
        "{ .reg .b32 a, b, c, d; prmt.b32 a, $2, 0, 0x3120; shf.r.wrap.b32 b, a, a, $3; prmt.b32 a, b, 0, 0x2103; "
        f"lop3.b32 a, a, {mask}, {power}, 0xea; lop3.b32 b, b, {mask}, {power}, 0xea; "
        f"mov.b32 c, {unit}; mov.b32 d, {centre}; "
        f"fma.rn.{short}x2 $0, a, c, d; fma.rn.{short}x2 $1, b, c, d; }}"
    )


def _pair(number: torch.Tensor) -> str:
    bits = int(number.view(torch.int16)) & 0xFFFF
    return f"0x{bits | bits << 16:08x}"


# Functions of compile time may use tables, but (in Triton 3.6) no other functions.
_NAMES = {True: "bfloat16", False: "float16"}
_CASES = [(i, nbits, bf16) for nbits in (1, 2, 4, 8) for i in range(8 // nbits) for bf16 in _NAMES]
_FACTORS = {(i, nbits, bf16): factor(i, nbits, _NAMES[bf16]) for i, nbits, bf16 in _CASES}
_ASSEMBLY = {(i, nbits, bf16): assembly(i, nbits, _NAMES[bf16]) for i, nbits, bf16 in _CASES}
_CENTRED = {(nbits, bf16): centred_assembly(nbits, _NAMES[bf16]) for _, nbits, bf16 in _CASES}


@triton.constexpr_function
def factor_of(plane, nbits, bf16):
    """`factor`, for kernels."""
    return _FACTORS[plane, nbits, bf16]


@triton.constexpr_function
def _assembly_of(plane, nbits, bf16):
    return _ASSEMBLY[plane, nbits, bf16]


@triton.constexpr_function
def _centred_assembly_of(nbits, bf16):
    return _CENTRED[nbits, bf16]


if INTERPRETED:

    @triton.jit
    def ordered(w):
        """Bytes as they are."""
        return w

    @triton.jit
    def shifted(w):
        """The same: what is shifted away are the first pairs, and here every byte stands for itself."""
        return w

    @triton.jit
    def _masked(w, shifted_w, i: tl.constexpr, NBITS: tl.constexpr, BF16: tl.constexpr):
        number = ((w >> (i * NBITS)) & ((1 << NBITS) - 1)).to(tl.float32) * factor_of(i, NBITS, BF16)
        if BF16:
            number = (number + 128).to(tl.bfloat16)
        else:
            number = (number + 1024).to(tl.float16)
        return number

    @triton.jit
    def _centred(w, shift, NBITS: tl.constexpr, BF16: tl.constexpr):
        number = ((w >> shift.to(tl.uint8)) & ((1 << NBITS) - 1)).to(tl.float32) - ((1 << NBITS) - 1) / 2
        return number.to(tl.bfloat16) if BF16 else number.to(tl.float16)

    @triton.jit
    def dot(a, b, acc):
        """a b + acc; the interpreter has no products of bfloat16."""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)

else:

    @triton.jit
    def ordered(w):
        """Each four bytes (0, 1, 2, 3) of a tile of them as (0, 2, 1, 3)."""
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [w], dtype=tl.uint8, is_pure=True, pack=4
        )

    @triton.jit
    def shifted(w):
        """Each word of four bytes shifted down by one of them."""
        return tl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [w], dtype=tl.uint8, is_pure=True, pack=4)

    @triton.jit
    def _masked(w, shifted_w, i: tl.constexpr, NBITS: tl.constexpr, BF16: tl.constexpr):
        PTX: tl.constexpr = _assembly_of(i, NBITS, BF16)
        if BF16:
            number = tl.inline_asm_elementwise(
                PTX, "=&r,=r,r,r", [w, shifted_w], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            number = tl.inline_asm_elementwise(
                PTX, "=&r,=r,r,r", [w, shifted_w], dtype=tl.float16, is_pure=True, pack=4
            )
        return number

    @triton.jit
    def _centred(w, shift, NBITS: tl.constexpr, BF16: tl.constexpr):
        PTX: tl.constexpr = _centred_assembly_of(NBITS, BF16)
        # The shift is the same for all elements: the first of the four registers it is given in.
        if BF16:
            number = tl.inline_asm_elementwise(
                PTX, "=&r,=r,r,r,r,r,r", [w, shift + 7], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            number = tl.inline_asm_elementwise(
                PTX, "=&r,=r,r,r,r,r,r", [w, shift + 7], dtype=tl.float16, is_pure=True, pack=4
            )
        return number

    @triton.jit
    def dot(a, b, acc):
        """a b + acc, of 16-bit floats into float32."""
        return tl.dot(a, b, acc)


@triton.jit
def plane(w, shifted_w, i: tl.constexpr, NBITS: tl.constexpr, BF16: tl.constexpr):
    """base + factor q (or q, where codes are converted) for the codes q of plane `i` of a tile of bytes, in 16 bits.

    `w` are the bytes as `ordered` has them, `shifted_w` what `shifted` makes of these.
    """
    if NBITS == 8 and BF16:
        number = w.to(tl.float32).to(tl.bfloat16)
    else:
        number = _masked(w, shifted_w, i, NBITS, BF16)
    return number


@triton.jit
def centred_plane(w, i, NBITS: tl.constexpr, BF16: tl.constexpr):
    """q - Q / 2 for the codes q of plane `i` of a tile of bytes as they were loaded, in 16 bits.

    For an `i` that is known at run time only. Codes of 8 bits are not centred in bfloat16, which has no 127.5.
    """
    if NBITS == 8 and BF16:
        number = w.to(tl.float32).to(tl.bfloat16)
    else:
        number = _centred(w, i * NBITS, NBITS, BF16)
    return number


@triton.jit
def place(k, PADDED, PLANE: tl.constexpr, NBITS: tl.constexpr):
    """(byte, shift) of the codes `k` of a row of `PADDED` codes of 1, 2, 4 or 8 bits."""
    PER: tl.constexpr = 8 // NBITS
    whole = PADDED // (PER * PLANE)
    block = k // (PER * PLANE)
    width = tl.where(block < whole, PLANE, (PADDED - whole * PER * PLANE) // PER)
    width = tl.maximum(width, 1)
    inside = k - block * PER * PLANE
    position = inside // width
    return block * PLANE + inside - position * width, position * NBITS


@triton.jit
def codes(rows, k, mask, PADDED, PLANE: tl.constexpr, NBITS: tl.constexpr):
    """The codes `k` of packed rows (pointers `rows` to their first bytes), as float32; both of one broadcast shape."""
    if NBITS == 3:
        byte, shift = place(k, PADDED, PLANE, 2)
        q = (tl.load(rows + byte, mask=mask, other=0) >> shift.to(tl.uint8)) & 3
        byte, shift = place(k, PADDED, PLANE, 1)
        high = (tl.load(rows + PADDED // 4 + byte, mask=mask, other=0) >> shift.to(tl.uint8)) & 1
        q = q | (high << 2)
    else:
        byte, shift = place(k, PADDED, PLANE, NBITS)
        q = tl.load(rows + byte, mask=mask, other=0)
        if NBITS != 8:
            q = (q >> shift.to(tl.uint8)) & ((1 << NBITS) - 1)
    return q.to(tl.float32)
