"""The products in Triton as machine code, compiled for real GPUs without one: nothing is spilled, and the main loops
have few instructions a weight."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch

from hqqplus.quantization import QuantSpec
from tests.conftest import ROOT, load_benchmark
from tests.kernels.triton.harness import meta_packed, needs_triton

# Triton has no tensor cores on sm_75, which has a kernel of its own.
CAPABILITIES = (80, 86, 89, 90, 100, 120)
PRODUCTS = [("matmul", 1), ("matmul", 16), ("gemm", 32), ("gemm", 64)]
SHIPPED = {
    "2-bit g64": QuantSpec(2, 64, metadata_bits=16),
    "2-bit g32, 8-bit metadata": QuantSpec(2, 32),
    "1-bit g64": QuantSpec(1, 64, metadata_bits=16),
    "1-bit g32, 8-bit metadata": QuantSpec(1, 32),
    "4-bit g64": QuantSpec(4, 64, metadata_bits=16),
    "8-bit g64": QuantSpec(8, 64, metadata_bits=16),
    "2-bit g128": QuantSpec(2, 128, metadata_bits=16),
}
QUICK = [(name, "matmul", 1, capability) for name in ("2-bit g64", "1-bit g64") for capability in CAPABILITIES]
QUICK += [(name, kernel, m, c) for name in ("2-bit g64", "1-bit g64") for kernel, m in PRODUCTS[1:3] for c in (89, 90)]
QUICK += [("2-bit g32, 8-bit metadata", "matmul", 1, 89), ("1-bit g32, 8-bit metadata", "matmul", 1, 90)]
QUICK += [("2-bit g32, 8-bit metadata", "gemm", 64, 90), ("8-bit g64", "gemm", 64, 89), ("4-bit g64", "matmul", 1, 89)]
QUICK += [("2-bit g64", "simt", 1, 75), ("1-bit g64", "simt", 4, 75)]
ALL = [(name, kernel, m, c) for name in SHIPPED for kernel, m in PRODUCTS for c in CAPABILITIES]
ALL += [(name, "simt", m, 75) for name in SHIPPED for m in (1, 2, 4)]
# Float32 and layers without a whole block go there on other cards too.
ALL += [("2-bit g64", "simt", m, c) for m in (1, 4) for c in CAPABILITIES]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in QUICK]


@cache
def _sass() -> Any:
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        return load_benchmark("sass")


@needs_triton
@pytest.mark.parametrize(("name", "kernel", "rows", "capability"), [*QUICK, *SLOW])
def test_compiles_without_spills_and_in_few_instructions(name: str, kernel: str, rows: int, capability: int) -> None:
    found = _sass().count(kernel, rows, SHIPPED[name], capability)
    print(f"sm_{capability} {name} {kernel} of {rows}: {found}")
    assert found.spills == 0
    if kernel == "matmul" and capability in (89, 90) and name == "2-bit g64":
        assert found.a_weight <= 2.5
    if kernel == "matmul" and capability in (89, 90) and name == "1-bit g64":
        assert found.a_weight < 3


@needs_triton
def test_what_is_shipped_is_what_the_benchmark_counts() -> None:
    assert _sass().SPECS == SHIPPED
    assert {*PRODUCTS} <= {*_sass().PRODUCTS}


@needs_triton
@pytest.mark.parametrize(
    ("axis", "capability"),
    [(1, 75), (0, 90), *(pytest.param(a, c, marks=pytest.mark.slow) for a in (0, 1) for c in CAPABILITIES)],
)
def test_the_kernel_for_any_layer_compiles_without_spills(axis: int, capability: int) -> None:
    found = _sass().count("general", 16, QuantSpec(3, 64, axis), capability)
    print(f"sm_{capability} axis {axis}: {found}")
    assert found.spills == 0


@needs_triton
@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 86, 89, 100, 120))]
)
def test_the_sums_of_x_compile_without_spills(capability: int) -> None:
    from hqqplus.kernels.triton import matmul

    packed = meta_packed(SHIPPED["2-bit g64"], (4096, 4096))
    x, y = (torch.empty(16, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
    launch = matmul.launches(x, packed, None, y, 132)[0]
    sass: Any = load_benchmark("sass_tools")
    code = sass.inspect(
        sass.compile_call(launch.kernel, launch.arguments, launch.constants, launch.options, capability)
    )
    print(f"sm_{capability}: {code.registers} registers, {code.spills} spills, {code.shared} bytes of shared memory")
    assert code.spills == 0
