"""The bit-serial product in Triton: interpreted, against the definition and between guard bands; as machine code; on a
GPU."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from hqqplus.kernels import int8
from hqqplus.kernels.packed import Packed
from hqqplus.kernels.triton import bitserial
from hqqplus.quantization import QuantSpec
from tests.conftest import load_benchmark
from tests.kernels.bit_serial import differences, integer_case, product, rounded
from tests.kernels.triton.harness import (
    guarded,
    inline_ptx,
    interpreted,
    meta_packed,
    print_outcomes,
    random_packed,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (group, out, in, tokens): one tile and several, of octets, of rows of the weight and of x; whole ones and rests. 8192
# inputs fill a tile of 32 octets, 8448 are one more; 8 outputs are then a tile.
SHAPES = [
    (32, 5, 256, 1),
    (32, 16, 4096, 2),
    (32, 8, 8192, 1),
    (32, 9, 8448, 2),
    (32, 8, 16384, 1),
    (64, 128, 512, 1),
    (64, 37, 1536, 5),
    (64, 8, 5120, 2),
    (128, 66, 1024, 9),
    (128, 9, 3072, 4),
    (256, 33, 2048, 1),
    (256, 3, 6144, 5),
]
METADATA = (("float16", 16), ("bfloat16", 8), ("bfloat16", 16), ("float16", 8))


def _specs() -> list[tuple[QuantSpec, tuple[int, int], int, torch.dtype]]:
    found = []
    for n, (group, rows, width, tokens) in enumerate(SHAPES):
        name, bits = METADATA[n % 4]
        found.append((QuantSpec(1, group, 1, name, bits), (rows, width), tokens, DTYPES[n % 3]))
    # Padding within the last group, and nearly a whole block of it.
    found.append((QuantSpec(1, 32, metadata_bits=16), (19, 500), 3, torch.float32))
    found.append((QuantSpec(1, 64), (19, 1024 - 60), 3, torch.bfloat16))
    return found


def _on_cpu(packed: Packed) -> Packed:
    return packed._replace(**{k: v.cpu() for k, v in packed._asdict().items() if isinstance(v, Tensor)})


def _defined(x: Tensor, packed: Packed, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.cpu()
    return product(*rounded(x.cpu()), _on_cpu(packed), bias)


def _exact(spec: QuantSpec, shape: tuple[int, int], tokens: int, device: str = "cpu", seed: int = 0) -> list[str]:
    """Whole numbers throughout: every bit of every integer shows in the result."""
    x, packed, bias, expected = integer_case(spec, shape, tokens, seed)
    packed = packed._replace(**{k: v.to(device) for k, v in packed._asdict().items() if isinstance(v, Tensor)})
    assert bitserial.supports(x.to(device), packed)
    found, complaints = guarded(bitserial.matmul, x.to(device), packed, bias.to(device))
    wrong = int((found.cpu().double() != expected).sum()) if found.shape == expected.shape else expected.numel()
    return complaints + ([f"{wrong} of {expected.numel()} whole numbers are others"] if wrong else [])


def _close(
    spec: QuantSpec, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[str]:
    torch.manual_seed(seed)
    packed = random_packed(spec, shape, seed, device)
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    bias = torch.randn(shape[0], device=device).to(dtype) if tokens % 2 else None
    found, complaints = guarded(bitserial.matmul, x, packed, bias)
    wrong = [] if found.dtype == dtype else [f"{found.dtype}, not {dtype}"]
    return complaints + wrong + differences(found.cpu(), *_defined(x, packed, bias))


def _slices(spec: QuantSpec, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> list[str]:
    """The steps, the sums and each bit of the activations, where the module says that they are."""
    packed = random_packed(spec, shape)
    x = torch.randn(tokens, shape[1]).to(dtype)
    sliced = bitserial.slice_activations(x, packed)
    layout, lanes = packed.layout, sliced.lanes
    xi, step = int8.round_activations(x)
    xi = torch.nn.functional.pad(xi, (0, layout.padded - layout.width)).int()
    # [M, blocks, 8 groups, octets of a block, code of an octet] -> [M, octets, 8, code]
    octets = xi.view(tokens, -1, 8, layout.group // 32, 32).transpose(2, 3).reshape(tokens, -1, 8, 32)
    octets = torch.nn.functional.pad(octets, (0, 0, 0, 0, 0, -octets.shape[1] % lanes))
    places = torch.tensor([8 * (code % 4) + code // 4 for code in range(32)])
    words = torch.stack([(((octets >> b) & 1).long() << places).sum(3) for b in range(8)], 3)  # [M, octets, 8, bit]
    words = words.to(torch.int32).view(tokens, -1, lanes, 8, 8).permute(0, 1, 3, 4, 2)
    sums = octets.sum(3, dtype=torch.int32).view(tokens, -1, lanes, 8).transpose(2, 3)
    found = {"slices": (sliced.slices, words), "sums": (sliced.sums, sums), "steps": (sliced.steps, step)}
    return [f"{name} differ" for name, (ours, expected) in found.items() if not torch.equal(ours, expected)]


def _strides() -> list[str]:
    packed = random_packed(QuantSpec(1, 32), (9, 512))
    views = {
        "turned": torch.randn(512, 3).t(),
        "every other row": torch.randn(6, 512)[::2],
        "every other column": torch.randn(3, 1024)[:, ::2],
        "part of a row": torch.randn(3, 600)[:, 77:589],
        "three dimensions": torch.randn(512, 2, 3).permute(2, 1, 0),
        "one": torch.randn(512),
    }
    wrong = []
    for name, x in views.items():
        found, complaints = guarded(bitserial.matmul, x, packed)
        expected = _defined(x.reshape(-1, 512), packed, None)
        wrong += complaints + differences(found.view(-1, 9), *expected)
        wrong += [] if found.shape == (*x.shape[:-1], 9) else [f"{name}: {tuple(found.shape)}"]
    return wrong


def _without_numbers() -> list[str]:
    packed, bias = random_packed(QuantSpec(1, 32), (9, 512)), torch.randn(9)
    x = torch.randn(7, 512)
    x[0], x[5] = 0, 0
    x[1, 3], x[2, 4], x[3, 511], x[5, 6] = torch.nan, torch.inf, -torch.inf, 1e-45
    found, wrong = guarded(bitserial.matmul, x, packed, bias)
    expected = int8.matmul(x, packed, bias)
    wrong += [] if torch.equal(found[[0, 5]], bias.expand(2, 9)) else ["a row of zeros is not the bias"]
    wrong += [] if found[1:4].isnan().all() else ["a row with NaN or infinity is not NaN"]
    return wrong + ([] if torch.allclose(found[[4, 6]], expected[[4, 6]], rtol=1e-5, atol=1e-5) else ["other rows"])


def _no_rows() -> list[str]:
    packed = random_packed(QuantSpec(1, 32), (9, 512))
    found = bitserial.matmul(torch.empty(2, 0, 512), packed, torch.ones(9))
    return [] if found.shape == (2, 0, 9) else [str(found.shape)]


@triton.jit
def _bits_kernel(words_ptr, ones_ptr, turned_ptr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 64)[:, None]
    one = tl.arange(0, 1)[None, :]
    for i in range(8):
        tl.store(ones_ptr + at * 8 + i + one, bitserial.popcount_twin(tl.load(words_ptr + at * 8 + i + one)))
    w0, w1, w2, w3 = bitserial._four_words(words_ptr + at * 8 + one, None)
    w4, w5, w6, w7 = bitserial._four_words(words_ptr + at * 8 + 4 + one, None)
    words = bitserial.turned(w0, w1, w2, w3, w4, w5, w6, w7)
    for i in tl.static_range(8):
        tl.store(turned_ptr + at * 8 + i + one, words[i])


def _bits() -> list[str]:
    """The arithmetic popcount, and the turning of bits, word by word."""
    words = torch.randint(-(2**31), 2**31, (64, 8)).to(torch.int32)
    words[0] = torch.tensor([0, -1, 1, -(2**31), 2**31 - 1, 0x55555555, 0x0F0F0F0F, -2])
    ones, turned = torch.empty_like(words), torch.empty_like(words)
    _bits_kernel[(1,)](words, ones, turned)
    counts = torch.tensor([[(word & 0xFFFFFFFF).bit_count() for word in row] for row in words.tolist()])
    bits = (words.view(torch.uint8).view(64, 8, 4, 1) >> torch.arange(8)) & 1  # [64, word, byte, bit]
    back = (turned.view(torch.uint8).view(64, 8, 4, 1) >> torch.arange(8)) & 1
    wrong = [] if torch.equal(ones.long(), counts) else ["popcounts"]
    return wrong + ([] if torch.equal(back.transpose(1, 3), bits) else ["turned words"])


def _refusals() -> list[str]:
    x = torch.randn(2, 512)

    def supported(spec: QuantSpec, width: int = 512, dtype: torch.dtype = torch.float32) -> bool:
        return bitserial.supports(x.to(dtype), random_packed(spec, (16, width)))

    unaligned = random_packed(QuantSpec(1, 32), (16, 512))
    unaligned = unaligned._replace(W_q=torch.empty(16 * 64 + 1, dtype=torch.uint8)[1:].view(16, 64))
    found = {
        "fine": supported(QuantSpec(1, 32)),
        "2 bits": supported(QuantSpec(2, 32)),
        "axis 0": supported(QuantSpec(1, 32, 0)),
        "groups of 16": supported(QuantSpec(1, 16)),
        "groups of 96": supported(QuantSpec(1, 96), 768),
        "a group a row": supported(QuantSpec(1, -1)),
        "a shorter block": supported(QuantSpec(1, 32), 288),
        "float64": supported(QuantSpec(1, 32), dtype=torch.float64),
        "unaligned": bitserial.supports(x, unaligned),
    }
    return [f"{name}: {value}" for name, value in found.items() if value != (name == "fine")]


def _cases() -> dict[str, Callable[[], list[str]]]:
    cases: dict[str, Callable[[], list[str]]] = {
        "bits": _bits,
        "strides": _strides,
        "rows without numbers": _without_numbers,
        "no rows": _no_rows,
        "refusals": _refusals,
    }
    for spec, shape, tokens, dtype in _specs():
        name = f"g{spec.group_size} {spec.metadata_bits}-bit {spec.metadata_dtype} {shape[0]}x{shape[1]} M={tokens}"
        cases[f"whole numbers, {name}"] = partial(_exact, spec, shape, tokens)
        cases[f"any numbers, {name} {str(dtype)[6:]}"] = partial(_close, spec, shape, tokens, dtype)
        cases[f"slices, {name} {str(dtype)[6:]}"] = partial(_slices, spec, shape, tokens, dtype)
    return cases


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_bitserial")


@pytest.mark.slow
@pytest.mark.parametrize("name", _cases())
def test_interpreted_it_is_the_product_as_defined(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


def test_the_cases_reach_all_there_is() -> None:
    reached = set()
    for spec, shape, tokens, _ in _specs():
        packed = meta_packed(spec, shape)
        sliced = bitserial.empty_slices(tokens, packed, "meta")
        y = torch.empty(tokens, shape[0], device="meta")
        constants = bitserial.product_call(sliced, packed, None, y).constants
        tiles = "one tile" if sliced.slices.shape[1] == 1 else "tiles"
        reached |= {(constants["EVEN"], tiles), constants["ROWS_X"], (constants["HAS_BLOCKS"], "blocks")}
    assert reached >= {*itertools.product((True, False), ("one tile", "tiles")), 1, 2, 4}
    assert reached >= {(True, "blocks"), (False, "blocks")}


def test_without_a_gpu_and_the_interpreter_nothing_is_supported() -> None:
    assert not bitserial.supports(torch.randn(1, 512), random_packed(QuantSpec(1, 32), (16, 512)))


# --- as machine code ------------------------------------------------------------------------------------------------

SHIPPED = {
    "g32": (QuantSpec(1, 32, metadata_bits=16), (4096, 4096)),
    "g64": (QuantSpec(1, 64, metadata_bits=16), (4096, 4096)),
    "g64, 8-bit metadata": (QuantSpec(1, 64), (4096, 4096)),
    "g128": (QuantSpec(1, 128, metadata_bits=16), (4096, 4096)),
    "g64, long rows": (QuantSpec(1, 64, metadata_bits=16), (4096, 14336)),
}
# Instructions of the loop for a weight and a row of x, at most.
BUDGET = {1: 1.9, 2: 1.5, 4: 1.3}
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
QUICK = [("g64", tokens, capability) for tokens, capability in ((1, 89), (4, 90), (2, 75), (1, 120))]
QUICK += [("g64, 8-bit metadata", 1, 89), ("g64, long rows", 4, 89)]


def _check(name: str, tokens: int, capability: int) -> tuple[Any, Any]:
    tools = load_benchmark("sass_tools")
    spec, shape = SHIPPED[name]
    packed = meta_packed(spec, shape)
    sliced = bitserial.empty_slices(tokens, packed, "meta")
    y = torch.empty(tokens, shape[0], dtype=torch.bfloat16, device="meta")
    call = bitserial.product_call(sliced, packed, None, y)
    compiled = tools.compile_call(
        bitserial.bitserial_kernel, call.arguments, call.constants, bitserial.OPTIONS, capability
    )
    code, pairs = tools.inspect(compiled), call.constants["ROWS_W"] * call.constants["LANES"]
    (loop,) = [last + 1 - first for first, last in code.loops if last - first > 100]
    weights = pairs * 256 / (32 * bitserial.OPTIONS["num_warps"]) * call.constants["ROWS_X"]
    print(
        f"sm_{capability} {name} M={tokens}: {loop / weights:.2f} instructions a weight and row, {code.registers} "
        f"registers, {code.spills} spills, {code.shared} bytes of shared memory"
    )
    assert code.spills == 0
    assert code.registers <= 128  # 16 warps or more on an SM
    assert loop / weights < BUDGET[tokens]
    assert code.counts("POPC") == {"POPC": weights / 4}  # 8 bits of 32 weights at a time: not one is wasted
    return compiled, sliced


@pytest.mark.parametrize(("name", "tokens", "capability"), QUICK)
def test_compiles_without_spills_to_popcounts(name: str, tokens: int, capability: int) -> None:
    compiled, _ = _check(name, tokens, capability)
    assert inline_ptx(compiled) == ["popc.b32 $0, $1;"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("name", SHIPPED)
def test_compiles_without_spills_everywhere(name: str, tokens: int, capability: int) -> None:
    _check(name, tokens, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_slicing_compiles_without_spills(capability: int) -> None:
    tools = load_benchmark("sass_tools")
    packed = meta_packed(*SHIPPED["g64"])
    x = torch.empty(4, 4096, dtype=torch.float16, device="meta")
    call = bitserial.slice_call(x, packed, bitserial.empty_slices(4, packed, "meta"))
    code = tools.inspect(
        tools.compile_call(bitserial.slice_kernel, call.arguments, call.constants, bitserial.OPTIONS, capability)
    )
    print(f"sm_{capability}: {code.registers} registers, {code.spills} spills")
    assert code.spills == 0


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "rows", "width", "tokens"), [*SHAPES, (64, 1000, 14336, 16), (128, 513, 4096, 70)])
def test_a_gpu_finds_the_integers(group: int, rows: int, width: int, tokens: int) -> None:
    seed = torch.seed() % 2**31
    for n, (name, bits) in enumerate(METADATA):
        spec = QuantSpec(1, group, 1, name, bits)
        assert _exact(spec, (rows, width), tokens, "cuda", seed) == [], (spec, seed)
        assert _close(spec, (rows, width), tokens, DTYPES[n % 3], "cuda", seed) == [], (spec, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("group", [16, 32, -1])
def test_a_gpu_takes_either_route(group: int, tokens: int) -> None:
    """The op, in Triton or (groups of 16 and whole rows) in torch."""
    x, packed, bias, expected = integer_case(QuantSpec(1, group), (64, 1024), tokens, torch.seed() % 2**31)
    packed = packed._replace(**{k: v.cuda() for k, v in packed._asdict().items() if isinstance(v, Tensor)})
    found = int8.matmul_int8(x.cuda(), *packed[:4], 1, group, 1, 64, 1024, bias.cuda())
    assert torch.equal(found.cpu().double(), expected)


@pytest.mark.gpu
def test_a_gpu_captures_it_in_a_graph() -> None:
    packed = random_packed(QuantSpec(1, 64), (512, 4096), 0, "cuda")
    x = torch.randn(2, 4096, device="cuda", dtype=torch.float16)
    expected = bitserial.matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bitserial.matmul(x, packed)
    x.mul_(-1)
    graph.replay()
    assert torch.equal(y, -expected) or differences(y.cpu(), *_defined(x, packed, None)) == []


if __name__ == "__main__":
    print_outcomes(_cases())
