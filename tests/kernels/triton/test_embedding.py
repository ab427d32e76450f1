"""Gathering rows of a packed embedding in Triton: interpreted, bit for bit against the reference and between guard
bands; as machine code; on a GPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.kernels import reference
from hqqplus.quantization import QuantSpec
from tests.conftest import load_benchmark
from tests.kernels.triton.harness import (
    differences,
    guarded,
    interpreted,
    meta_packed,
    needs_triton,
    print_outcomes,
    random_packed,
)

ROWS = 41
SPECS = [
    (QuantSpec(8, 64, metadata_bits=16), 256, torch.bfloat16),
    (QuantSpec(8, 64), 264, torch.float32),
    (QuantSpec(8, -1, metadata_dtype="bfloat16"), 172, torch.float16),
    (QuantSpec(4, 64, metadata_bits=16), 256, torch.bfloat16),
    (QuantSpec(4, 32), 172, torch.float16),
    (QuantSpec(4, -1), 520, torch.float32),
    (QuantSpec(3, 16), 520, torch.bfloat16),
    (QuantSpec(2, 32, metadata_bits=16, metadata_dtype="bfloat16"), 136, torch.bfloat16),
    (QuantSpec(2, 8), 256, torch.float32),
    (QuantSpec(1, 64), 1408, torch.bfloat16),
    (QuantSpec(1, 24, metadata_bits=16), 200, torch.float16),
]
IDS = {
    "a matrix of them, in no order": torch.tensor([[40, 0, 3], [3, 39, 17]]),
    "int32": torch.tensor([5, 5, 40], dtype=torch.int32),
    "one": torch.tensor(40),
    "none": torch.empty(3, 0, dtype=torch.int64),
    "every other": torch.arange(ROWS)[::2],
    "turned": torch.arange(40).view(8, 5).t(),
}


def _gather(spec: QuantSpec, width: int, dtype: torch.dtype, ids: Tensor) -> list[str]:
    from hqqplus.kernels.triton import embedding

    packed = random_packed(spec, (ROWS, width))
    found, complaints = guarded(embedding.embedding, ids, packed, dtype)
    return complaints + differences(found, reference.embedding(ids, packed, dtype), spec)


def _outside(spec: QuantSpec, width: int) -> list[str]:
    from hqqplus.kernels.triton import embedding

    packed = random_packed(spec, (ROWS, width))
    ids = torch.tensor([3, -1, ROWS, 40, 2**40, -(2**40)])
    found, complaints = guarded(embedding.embedding, ids, packed, torch.bfloat16)
    expected = torch.full((6, width), torch.nan, dtype=torch.bfloat16)
    expected[[0, 3]] = reference.embedding(ids[[0, 3]], packed, torch.bfloat16)
    return complaints + differences(found, expected, spec)


def _cases() -> dict[str, Callable[[], list[str]]]:
    cases: dict[str, Callable[[], list[str]]] = {}
    for n, (spec, width, dtype) in enumerate(SPECS):
        ids = [*IDS.values()][n % 2]
        name = f"{spec.nbits} bits g{spec.group_size} {spec.metadata_bits}-bit {spec.metadata_dtype} {width}"
        cases[name] = partial(_gather, spec, width, dtype, ids)
    for name, ids in IDS.items():
        cases[f"ids: {name}"] = partial(_gather, *SPECS[1], ids)
    for n in (0, 4):
        cases[f"ids of no row, {SPECS[n][0].nbits} bits"] = partial(_outside, *SPECS[n][:2])
    return cases


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_embedding")


@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_interpreted_it_gives_the_bits_of_the_reference(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


@needs_triton
def test_rows_of_a_turned_matrix_are_refused() -> None:
    from hqqplus.kernels.triton import embedding

    with pytest.raises(ValueError, match="needs axis 1"):
        embedding.embedding(torch.tensor([0]), meta_packed(QuantSpec(8, 64, 0), (16, 16)), torch.float32)


# --- as machine code ------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("nbits", "capability"),
    [(8, 75), (4, 90), *(pytest.param(n, c, marks=pytest.mark.slow) for n in (8, 4) for c in (80, 86, 89, 100, 120))],
)
def test_compiles_without_spills(nbits: int, capability: int) -> None:
    from hqqplus.kernels.triton import dequantize

    spec, shape = QuantSpec(nbits, 64, metadata_bits=16), (128256, 4096)
    packed, ids = meta_packed(spec, shape), torch.empty(8192, dtype=torch.int64, device="meta")
    (run,) = dequantize.block_runs(packed, 0, shape[1])
    out = torch.empty(len(ids), shape[1], dtype=torch.bfloat16, device="meta")
    call = dequantize.blocks_call(packed, out, (0, len(ids)), run, ids)
    sass: Any = load_benchmark("sass_tools")
    compiled = sass.compile_call(
        dequantize.blocks_kernel, call.arguments, call.constants, dequantize.OPTIONS, capability
    )
    code = sass.inspect(compiled)
    print(
        f"sm_{capability} {nbits} bits: {code.registers} registers, {code.spills} spills, {code.counts('LDG', 'STG')}"
    )
    assert code.spills == 0
    assert sum(code.counts("STG").values()) == sum(code.counts("STG.E.128").values()) > 0


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("spec", "width", "dtype"), SPECS, ids=str)
def test_a_gpu_gives_the_bits_of_the_reference(spec: QuantSpec, width: int, dtype: torch.dtype) -> None:
    from hqqplus.kernels.triton import embedding

    seed = torch.seed() % 2**31
    packed = random_packed(spec, (1000, width), seed)
    ids = torch.randint(0, 1000, (7, 300), generator=torch.Generator().manual_seed(seed))
    on_gpu = packed._replace(**{k: v.cuda() for k, v in packed._asdict().items() if isinstance(v, Tensor)})
    found, complaints = guarded(embedding.embedding, ids.cuda(), on_gpu, dtype)
    assert complaints + differences(found, reference.embedding(ids, packed, dtype), spec) == [], seed


@pytest.mark.gpu
@needs_triton
def test_a_gpu_reads_nothing_for_ids_of_no_row() -> None:
    from hqqplus.kernels.triton import embedding

    spec, width, dtype = SPECS[0]
    packed = random_packed(spec, (ROWS, width), 0, "cuda")
    found = embedding.embedding(torch.tensor([3, -1, ROWS, 2**40], device="cuda"), packed, dtype)
    assert found.isnan().all(1).tolist() == [False, True, True, True]


if __name__ == "__main__":
    print_outcomes(_cases())
