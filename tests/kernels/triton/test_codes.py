"""From bytes to numbers: the PTX on emulated registers and in compiled kernels, the arithmetic in its place under the
interpreter, and single codes wherever they lie, all against `quantization.packing`."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from hqqplus.kernels import triton as backend
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.packing import pack, unpack
from tests.conftest import load_benchmark
from tests.kernels.triton import harness
from tests.kernels.triton.harness import Guards, inline_ptx, interpreted, needs_triton, print_outcomes, run_ptx

if backend.available():
    import triton
    import triton.language as tl

    from hqqplus.kernels.triton import codes

BITS, DTYPES = (1, 2, 4, 8), (torch.bfloat16, torch.float16)
# 8-bit codes do not fit into the mantissa of a bfloat16 and are converted without PTX.
MASKED = [(nbits, dtype) for nbits in BITS for dtype in DTYPES if (nbits, dtype) != (8, torch.bfloat16)]
ORDERED = "prmt.b32 $0, $1, 0, 0x3120;"


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def _words() -> list[int]:
    """Every byte in every place, beside all zeros, all ones and any others."""
    generator = random.Random(0)
    bytes_ = [[byte] * 4 for byte in (0, 255)]
    for byte in range(256):
        others = [0, 255, *generator.randbytes(1)]
        generator.shuffle(others)
        others.insert(byte % 4, byte)
        bytes_ += [others, [(byte * factor + 1) % 256 for factor in (1, 3, 5, 7)]]
    return [int.from_bytes(bytes(four), "little") for four in bytes_]


def _codes(word: int, plane: int, nbits: int) -> list[int]:
    """The definition: the codes of a plane of four bytes."""
    return [byte >> (plane * nbits) & (2**nbits - 1) for byte in word.to_bytes(4, "little")]


def _numbers(registers: list[int], dtype: torch.dtype) -> list[float]:
    """Two registers as four 16-bit floats."""
    halves = [register >> shift & 0xFFFF for register in registers for shift in (0, 16)]
    return torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(dtype).tolist()


# --- inline PTX -----------------------------------------------------------------------------------------------------


def _run(text: str, inputs: list[int], outputs: int) -> list[int]:
    """`run_ptx` that also knows `mov`, funnel shifts and the fused multiply-add of pairs of 16-bit floats."""
    others = harness._instruction

    def instruction(name: str, values: list[int]) -> int:
        if name == "mov.b32":
            return values[0]
        if name == "shf.r.wrap.b32":
            low, high, shift = values
            return (high << 32 | low) >> (shift & 31)
        if name not in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            return others(name, values)
        dtype = torch.bfloat16 if "bf16" in name else torch.float16
        pairs = [torch.tensor([v & 0xFFFF, v >> 16]).to(torch.int16).view(dtype).double() for v in values]
        low, high = torch.addcmul(pairs[2], pairs[0], pairs[1]).to(dtype).view(torch.int16).tolist()
        return (low & 0xFFFF) | (high & 0xFFFF) << 16

    with mock.patch.object(harness, "_instruction", instruction):
        return run_ptx(text, inputs, outputs)


@needs_triton
@pytest.mark.parametrize(("nbits", "dtype"), MASKED, ids=str)
def test_a_plane_is_masked_and_put_below_an_exponent(nbits: int, dtype: torch.dtype) -> None:
    base, name = codes.base(_name(dtype)), _name(dtype)
    assert base == 1 / torch.finfo(dtype).eps  # from here on the numbers lie one apart
    for word in _words():
        (ordered,) = run_ptx(ORDERED, [word], 1)
        for plane in range(8 // nbits):
            text = codes.assembly(plane, nbits, name)
            found = _numbers(run_ptx(text, [ordered, ordered >> 8], 2), dtype)
            factor = codes.factor(plane, nbits, name)
            assert found == [base + factor * code for code in _codes(word, plane, nbits)], (hex(word), plane)


@needs_triton
@pytest.mark.parametrize(("nbits", "dtype"), MASKED, ids=str)
def test_a_plane_known_at_run_time_comes_about_its_middle(nbits: int, dtype: torch.dtype) -> None:
    text = codes.centred_assembly(nbits, _name(dtype))
    for word in _words():
        for plane in range(8 // nbits):
            found = _numbers(_run(text, [word, plane * nbits + 7, 0, 0, 0], 2), dtype)
            assert found == [code - (2**nbits - 1) / 2 for code in _codes(word, plane, nbits)], (hex(word), plane)


@needs_triton
def test_only_8_bits_in_bfloat16_are_converted_one_by_one() -> None:
    pairs = [(nbits, dtype) for nbits in BITS for dtype in DTYPES]
    converted = [(nbits, dtype) for nbits, dtype in pairs if codes.converted(nbits, _name(dtype))]
    assert converted == [(8, torch.bfloat16)]
    assert codes.factor(0, 8, "bfloat16") == 1


@needs_triton
@pytest.mark.parametrize(("nbits", "dtype"), [(2, torch.bfloat16), (1, torch.float16)], ids=str)
def test_a_compiled_product_has_this_ptx_in_this_order(nbits: int, dtype: torch.dtype) -> None:
    """What the interpreter cannot see: which words, and which plane's text, a product unpacks."""
    from hqqplus.kernels.triton import gemm, matmul

    packed = harness.meta_packed(QuantSpec(nbits, 32), (64, 512))
    x, y = (torch.empty(1, width, dtype=dtype, device="meta") for width in (512, 64))
    texts = []
    for module in (matmul, gemm):
        launch = module.launches(x, packed, None, y, 1)[1]
        compiled = load_benchmark("sass_tools").compile_call(
            launch.kernel, launch.arguments, launch.constants, launch.options, 80
        )
        texts.append(inline_ptx(compiled))
    words, centred = texts
    assert centred == [codes.centred_assembly(nbits, _name(dtype))]
    assert len(words) == 2 + 8 // nbits
    for word in _words()[:64]:
        (ordered,) = run_ptx(words[0], [word], 1)
        (shifted,) = run_ptx(words[1], [ordered], 1)
        for plane, text in enumerate(words[2:]):
            found = _numbers(run_ptx(text, [ordered, shifted], 2), dtype)
            factor = codes.factor(plane, nbits, _name(dtype))
            base = codes.base(_name(dtype))
            assert found == [base + factor * code for code in _codes(word, plane, nbits)]


# --- the interpreter ------------------------------------------------------------------------------------------------

if backend.available():

    @triton.jit
    def planes_kernel(
        bytes_, fixed, centred, NBITS: tl.constexpr, BF16: tl.constexpr, SIZE: tl.constexpr
    ):  # fmt: skip
        """Each plane of SIZE bytes, in both forms: `fixed` and `centred` [planes, SIZE]."""
        j = tl.arange(0, SIZE)
        w = tl.load(bytes_ + j)
        w_ordered = codes.ordered(w)
        w_shifted = codes.shifted(w_ordered)
        for i in tl.static_range(8 // NBITS):
            if NBITS == 8 and BF16:
                tl.store(fixed + i * SIZE + j, codes.plane(w, w, i, NBITS, BF16))
            else:
                tl.store(fixed + i * SIZE + j, codes.plane(w_ordered, w_shifted, i, NBITS, BF16))
        i = tl.program_id(0)
        tl.store(centred + i * SIZE + j, codes.centred_plane(w, i, NBITS, BF16))

    @triton.jit
    def codes_kernel(
        W_q, out, rows, width, padded, stride, PLANE: tl.constexpr, NBITS: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """The codes of a packed matrix, `out` [rows, width] float32."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (k < width)
        q = codes.codes(W_q + row * stride, k, mask, padded, PLANE, NBITS)
        tl.store(out + row * width + k, q, mask=mask)


def unpacked_planes(words: Tensor, nbits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both forms of the planes of bytes `words` [n] (n a power of two): [8 / nbits, n] each."""
    per, bf16 = 8 // nbits, dtype == torch.bfloat16
    fixed, centred = torch.empty((2, per, words.numel()), dtype=dtype, device=words.device)
    planes_kernel[(per,)](words, fixed, centred, NBITS=nbits, BF16=bf16, SIZE=words.numel(), num_warps=1)
    return fixed, centred


def _plane_case(nbits: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    bytes_ = torch.cat([torch.arange(256), torch.randint(0, 256, (256,), generator=generator)]).to(torch.uint8)
    q = torch.stack([bytes_ >> i & (2**nbits - 1) for i in range(0, 8, nbits)]).double()
    fixed, centred = (found.cpu().double() for found in unpacked_planes(bytes_.to(device), nbits, dtype))
    name = _name(dtype)
    factors = torch.tensor([codes.factor(i, nbits, name) for i in range(8 // nbits)])
    converted = codes.converted(nbits, name)
    wrong = []
    if not torch.equal(fixed, q if converted else codes.base(name) + factors[:, None] * q):
        wrong.append("base + factor q")
    if not torch.equal(centred, q if converted else q - (2**nbits - 1) / 2):
        wrong.append("q - Q / 2")
    return wrong


def _codes_case(nbits: int, plane: int, width: int, device: str = "cpu", seed: int = 0) -> list[str]:
    rows = 5
    q = torch.randint(0, 2**nbits, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    W_q = pack(q, nbits, plane)
    assert torch.equal(unpack(W_q, nbits, plane), q)
    guards = Guards()
    out = guards.output((rows, width), torch.float32, device)
    packed = guards.input(W_q.to(device))
    codes_kernel[(2, -(-width // 64))](
        packed, out, rows, width, width, packed.stride(0), PLANE=plane, NBITS=nbits, ROWS=4, COLUMNS=64
    )
    return guards.complaints() + ([] if torch.equal(out.cpu(), q.float()) else ["other codes"])


# (plane, width): whole blocks only, a shorter one behind them, nothing but a shorter one, a plane as long as a row.
PLANES = [(8, 128), (8, 72), (16, 264), (24, 200), (64, 640), (64, 40), (128, 1288), (256, 8)]


def _cases() -> dict[str, Callable[[], list[str]]]:
    cases: dict[str, Callable[[], list[str]]] = {
        f"{nbits} bits {_name(dtype)}": partial(_plane_case, nbits, dtype) for nbits in BITS for dtype in DTYPES
    }
    for nbits in (1, 2, 3, 4, 8):
        for plane, width in PLANES:
            cases[f"{nbits} bits, planes of {plane}, {width}"] = partial(_codes_case, nbits, plane, width)
    return cases


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_codes")


@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_interpreted_the_codes_are_those_that_were_packed(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_on_a_gpu_the_codes_are_those_that_were_packed(name: str) -> None:
    seed = torch.seed() % 2**31
    assert _cases()[name](device="cuda", seed=seed) == [], seed


if __name__ == "__main__":
    print_outcomes(_cases())
