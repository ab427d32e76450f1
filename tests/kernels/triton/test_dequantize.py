"""Dequantizing in Triton: interpreted, bit for bit against the reference and between guard bands; as machine code; on
a GPU."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from hqqplus.kernels import reference
from hqqplus.quantization import QuantSpec
from tests.conftest import load_benchmark
from tests.kernels.triton.harness import (
    Guards,
    differences,
    guarded,
    inline_ptx,
    interpreted,
    meta_packed,
    needs_triton,
    print_outcomes,
    random_packed,
    run_ptx,
)

BITS, GROUPS = (1, 2, 3, 4, 8), (8, 16, 32, 64, 128, 256, -1)
METADATA = (("float16", 16), ("bfloat16", 8), ("bfloat16", 16), ("float16", 8))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Along the packed direction: whole blocks only, a shorter one behind them, padding, and nothing but a shorter block.
WIDTHS = (512, 520, 172, 136, 72)
# Blocks are longer than the widths above, or groups are no power of two.
LONG = [(1, 128, 1160), (1, 256, 2312), (2, 256, 1288), (3, 128, 1160), (3, 256, 2312), (4, 200, 1000), (1, -1, 1280)]
LONG += [
    (2, -1, 1000),
    (3, -1, 1288),
    (8, -1, 300),
    (2, 24, 200),
    (1, 40, 400),
    (3, 72, 600),
    (1, 64, 1408),
    (2, 64, 640),
    (4, 32, 352),
]


def _matrices() -> list[tuple[QuantSpec, tuple[int, int], torch.dtype]]:
    """(spec, shape, type of the output): all bits, groups and axes, what else there is by turns."""
    found = []
    for n, ((nbits, group), axis) in enumerate(itertools.product(itertools.product(BITS, GROUPS), (1, 0))):
        name, bits = METADATA[(n + n // 8) % 4]
        width = WIDTHS[(n + n // 5) % 5]
        found.append((QuantSpec(nbits, group, axis, name, bits), _shape(axis, 37, width), DTYPES[(n + n // 3) % 3]))
    for n, ((nbits, group, width), axis) in enumerate(itertools.product(LONG, (1, 0))):
        name, bits = METADATA[(n + n // 4) % 4]
        found.append((QuantSpec(nbits, group, axis, name, bits), _shape(axis, 5, width), DTYPES[n % 3]))
    return found


def _shape(axis: int, rows: int, width: int) -> tuple[int, int]:
    return (rows, width) if axis == 1 else (width, rows)


# (spec, shape, rows, columns) of windows, first whole blocks, then any.
WINDOWS = [
    (QuantSpec(2, 32, 1), (37, 512), slice(5, 21), slice(None)),
    (QuantSpec(2, 32, 1), (37, 512), slice(None), slice(128, 384)),
    (QuantSpec(2, 32, 1), (37, 520), slice(3, 30), slice(77, 505)),
    (QuantSpec(2, 32, 1), (37, 520), slice(None), slice(520, None)),
    (QuantSpec(1, 64, 1, metadata_bits=16), (9, 1408), slice(1, 9), slice(512, None)),
    (QuantSpec(3, 16, 1), (9, 520), slice(None), slice(128, 256)),
    (QuantSpec(3, 16, 1), (9, 520), slice(2, 7), slice(100, 500)),
    (QuantSpec(8, 64, 1), (9, 520), slice(None), slice(64, 192)),
    (QuantSpec(4, -1, 1), (9, 520), slice(None), slice(256, 512)),
    (QuantSpec(2, 16, 0), (256, 70), slice(64, 192), slice(None)),
    (QuantSpec(2, 16, 0), (256, 70), slice(None), slice(5, 69)),
    (QuantSpec(1, 8, 0, metadata_bits=16), (200, 70), slice(30, 131), slice(0, 66)),
    (QuantSpec(3, 8, 0), (200, 70), slice(-100, -10), slice(-30, None)),
]


def _whole(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, shift: int = 0) -> list[str]:
    from hqqplus.kernels.triton import dequantize

    packed = random_packed(spec, shape)
    found, complaints = guarded(dequantize.dequantize, packed, dtype, shift=shift)
    return complaints + differences(found, reference.dequantize(packed, dtype), spec)


def _window(spec: QuantSpec, shape: tuple[int, int], rows: slice, columns: slice, gap: int = 5) -> list[str]:
    from hqqplus.kernels.triton import dequantize

    packed, guards = random_packed(spec, shape), Guards()
    expected = reference.dequantize(packed, torch.bfloat16)[rows, columns]
    height, width = expected.shape
    out = guards.output((height, width), torch.bfloat16, strides=(width + gap, 1))
    returned = dequantize.dequantize_into(guards.packed(packed), out, rows, columns)
    wrong = [] if returned is out else ["another tensor was returned"]
    return wrong + guards.complaints() + differences(out.contiguous(), expected.contiguous(), spec)


def _cases() -> dict[str, Callable[[], list[str]]]:
    cases: dict[str, Callable[[], list[str]]] = {}
    for spec, shape, dtype in _matrices():
        cases[f"{_name(spec, shape)} {str(dtype)[6:]}"] = partial(_whole, spec, shape, dtype)
    for spec, shape, rows, columns in WINDOWS:
        window = f"{rows.start}:{rows.stop}, {columns.start}:{columns.stop}"
        cases[f"{_name(spec, shape)} [{window}]"] = partial(_window, spec, shape, rows, columns)
    spec, shape = QuantSpec(2, 16), (9, 256)
    cases["rows of a wider buffer, aligned"] = partial(_window, spec, shape, slice(None), slice(None), 64)
    for bits in (8, 16):
        spec = QuantSpec(1, 16, metadata_bits=bits)
        cases[f"unaligned, {bits}-bit metadata"] = partial(_whole, spec, (9, 256), torch.float16, 1)
    cases["no rows"] = partial(_window, QuantSpec(2, 16), (9, 256), slice(4, 4), slice(None))
    return cases


def _name(spec: QuantSpec, shape: tuple[int, int]) -> str:
    metadata = f"{spec.metadata_bits}-bit {spec.metadata_dtype}"
    return f"{spec.nbits} bits g{spec.group_size} axis {spec.axis} {metadata} {shape[0]}x{shape[1]}"


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_dequantize")


@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_interpreted_it_gives_the_bits_of_the_reference(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


@needs_triton
def test_the_cases_reach_all_there_is() -> None:
    from hqqplus.kernels.triton import dequantize

    def reached(spec: QuantSpec, shape: tuple[int, int]) -> set[str]:
        packed = meta_packed(spec, shape)
        width = packed.layout.width
        runs = dequantize.block_runs(packed, 0, width)
        done = sum(run.number * run.columns for run in runs)
        shorter = {"shorter block"} if any(run.plane != packed.layout.plane for run in runs) else set()
        whole = {"whole blocks"} if any(run.plane == packed.layout.plane for run in runs) else set()
        return shorter | whole | ({"columns"} if done < width else set())

    found = {(s.nbits, s.axis, part) for s, shape, _ in _matrices() for part in reached(s, shape)}
    parts = ("whole blocks", "shorter block", "columns")
    expected = set(itertools.product(BITS, (0, 1), parts))
    # 8-bit codes have no shorter blocks, and those of 3 bits are two runs of bytes that end differently.
    expected -= set(itertools.product((3, 8), (0, 1), ("shorter block",)))
    assert found >= expected


@needs_triton
def test_what_is_no_window_is_refused() -> None:
    from hqqplus.kernels.triton import dequantize

    packed = meta_packed(QuantSpec(2, 16), (9, 256))
    out = torch.empty(9, 256, device="meta")
    with pytest.raises(ValueError, match="no steps"):
        dequantize.dequantize_into(packed, out, slice(0, 9, 2))
    with pytest.raises(ValueError, match=r"a window of 4 x 256 needs .* not one of shape \(9, 256\)"):
        dequantize.dequantize_into(packed, out, slice(0, 4))
    with pytest.raises(ValueError, match="consecutive columns"):
        dequantize.dequantize_into(packed, torch.empty(256, 9, device="meta").t())


# --- as machine code ------------------------------------------------------------------------------------------------

SHIPPED = {
    "2 bits g32": QuantSpec(2, 32, metadata_bits=16),
    "2 bits g64": QuantSpec(2, 64, metadata_bits=16),
    "2 bits g64, 8-bit metadata": QuantSpec(2, 64),
    "1 bit g32": QuantSpec(1, 32, metadata_bits=16),
    "1 bit g64": QuantSpec(1, 64, metadata_bits=16),
    "4 bits g64": QuantSpec(4, 64, metadata_bits=16),
    "8 bits g64": QuantSpec(8, 64, metadata_bits=16),
}
OTHERS = {
    "2 bits g64, axis 0": QuantSpec(2, 64, 0, metadata_bits=16),
    "3 bits g64": QuantSpec(3, 64, metadata_bits=16),
    "1 bit, a group a row": QuantSpec(1, -1),
}
# Each capability, each configuration; all of both in the slow tests.
QUICK = [("2 bits g64", capability) for capability in (75, 80, 86, 89, 90, 100, 120)]
QUICK += [(name, 89) for name in (*SHIPPED, *OTHERS) if name != "2 bits g64"]


def _compiled(name: str, capability: int) -> tuple[Any, float]:
    """(the kernel of a layer of Llama-3-8B, compiled to bfloat16; weights that a lane of it writes)."""
    from hqqplus.kernels.triton import dequantize

    shape = (4096, 14336)
    packed = meta_packed({**SHIPPED, **OTHERS}[name], shape)
    (run,) = dequantize.block_runs(packed, 0, packed.layout.width)
    out = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    call = dequantize.blocks_call(packed, out, (0, packed.layout.rows), run)
    compiled = load_benchmark("sass_tools").compile_call(
        dequantize.blocks_kernel, call.arguments, call.constants, dequantize.OPTIONS, capability
    )
    weights = packed.layout.rows * packed.layout.width / call.grid[0]
    return compiled, weights / (32 * dequantize.OPTIONS["num_warps"])


def _check(name: str, capability: int) -> Any:
    compiled, weights = _compiled(name, capability)
    code = load_benchmark("sass_tools").inspect(compiled)
    print(
        f"sm_{capability} {name}: {code.executed / weights:.2f} instructions a weight, {code.registers} registers, "
        f"{code.spills} spills, {code.shared} bytes of shared memory, {code.counts('LDG', 'STG')}"
    )
    assert code.spills == 0
    # 32 warps or more on an SM; on Turing, which rounds to bfloat16 in several instructions, 28.
    assert code.registers <= (64 if capability >= 80 else 72)
    assert sum(code.counts("STG").values()) == sum(code.counts("STG.E.128").values()) > 0
    return code, weights


@needs_triton
@pytest.mark.parametrize(("name", "capability"), QUICK)
def test_compiles_without_spills_and_writes_16_bytes_at_once(name: str, capability: int) -> None:
    code, weights = _check(name, capability)
    if capability >= 80 and name in ("2 bits g32", "2 bits g64", "1 bit g32", "1 bit g64"):
        assert code.executed / weights < 6.5
        assert code.shared == 0


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("name", [*SHIPPED, *OTHERS])
def test_compiles_without_spills_everywhere(name: str, capability: int) -> None:
    _check(name, capability)


@needs_triton
@pytest.mark.parametrize(
    ("axis", "capability"),
    [(1, 90), *(pytest.param(a, c, marks=pytest.mark.slow) for a in (0, 1) for c in (75, 80, 86, 89, 100, 120))],
)
def test_the_kernel_for_any_columns_compiles_without_spills(axis: int, capability: int) -> None:
    from hqqplus.kernels.triton import dequantize

    packed = meta_packed(QuantSpec(2, 64, axis), _shape(axis, 4096, 4000))
    out = torch.empty(packed.shape, dtype=torch.bfloat16, device="meta")
    call = dequantize.columns_call(packed, out, (0, 4096), (3840, 4000))
    sass = load_benchmark("sass_tools")
    code = sass.inspect(
        sass.compile_call(dequantize.columns_kernel, call.arguments, call.constants, dequantize.OPTIONS, capability)
    )
    print(f"sm_{capability} axis {axis}: {code.registers} registers, {code.spills} spills, {code.shared} bytes shared")
    assert code.spills == 0


@needs_triton
def test_every_byte_of_codes_is_read_once() -> None:
    code, weights = _check("2 bits g64", 89)
    loaded = code.counts("LDG")
    # Of 8 bytes each: the codes (a quarter byte a weight), and four scales and four offsets of each block of a lane.
    assert loaded == {"LDG.E.64": 3 * weights / 32}


@needs_triton
@pytest.mark.parametrize("nbits", BITS)
def test_the_ptx_takes_the_codes_out_of_all_bytes(nbits: int) -> None:
    names = {1: "1 bit g32", 2: "2 bits g64", 3: "3 bits g64", 4: "4 bits g64", 8: "8 bits g64"}
    texts = inline_ptx(_compiled(names[nbits], 89)[0])
    # The two blocks of low bits are unpacked alike: 3 bits have 8 planes too.
    assert len(texts) == (8 if nbits == 3 else 8 // nbits)
    for plane, text in enumerate(texts):
        for byte in range(256):
            others = [byte, 255 - byte, 255, (byte * 7) % 256]
            word = int.from_bytes(bytes(others), "little")
            if nbits == 3:
                high = int.from_bytes(bytes(others[::-1]), "little")
                low_codes = [other >> (plane % 4 * 2) & 3 for other in others]
                expected = [
                    low | (other >> plane & 1) << 2 for low, other in zip(low_codes, others[::-1], strict=True)
                ]
                words = [word, high]
            else:
                expected = [other >> (plane * nbits) & (2**nbits - 1) for other in others]
                words = [word]
            found = torch.tensor(run_ptx(text, words, 4)).to(torch.int32).view(torch.float32)
            assert found.tolist() == expected


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [1, 0])
def test_a_gpu_gives_the_bits_of_the_reference(nbits: int, axis: int) -> None:
    from hqqplus.kernels.triton import dequantize

    seed = torch.seed() % 2**31
    for n, (group, (name, bits)) in enumerate(itertools.product((*GROUPS, 24, 200), METADATA)):
        for width in (1000 + 8 * (seed % 200), 4096):
            spec, shape = QuantSpec(nbits, group, axis, name, bits), _shape(axis, 257, width)
            packed, dtype = random_packed(spec, shape, seed + n, "cuda"), DTYPES[n % 3]
            found, complaints = guarded(dequantize.dequantize, packed, dtype)
            on_cpu = packed._replace(
                **{k: v.cpu() for k, v in packed._asdict().items() if isinstance(v, torch.Tensor)}
            )
            complaints += differences(found, reference.dequantize(on_cpu, dtype), spec)
            assert complaints == [], (spec, shape, dtype, seed)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("spec", "shape", "rows", "columns"), WINDOWS, ids=str)
def test_a_gpu_writes_windows(spec: QuantSpec, shape: tuple[int, int], rows: slice, columns: slice) -> None:
    from hqqplus.kernels.triton import dequantize

    packed = random_packed(spec, shape, torch.seed() % 2**31, "cuda")
    guards = Guards()
    expected = dequantize.dequantize(packed, torch.bfloat16)[rows, columns]
    out = guards.output(tuple(expected.shape), torch.bfloat16, "cuda", (expected.shape[1] + 5, 1))
    dequantize.dequantize_into(guards.packed(packed), out, rows, columns)
    assert guards.complaints() == []
    assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_triton
def test_a_gpu_writes_beyond_4_gib() -> None:
    from hqqplus.kernels.triton import dequantize

    spec, shape = QuantSpec(1, 64, metadata_bits=16), (2**17 + 3, 2**15)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    packed = random_packed(spec, shape, 0, "cuda")
    found = dequantize.dequantize(packed, torch.bfloat16)
    for first in (0, 2**16 - 2, 2**17 - 2):
        rows = slice(first, first + 5)
        part = packed._replace(
            W_q=packed.W_q[rows], scale=packed.scale[rows], offset=packed.offset[rows], shape=(5, shape[1])
        )
        assert torch.equal(found[rows], reference.dequantize(part, torch.bfloat16))


if __name__ == "__main__":
    print_outcomes(_cases())
