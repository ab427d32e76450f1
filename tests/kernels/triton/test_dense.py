"""Products with a weight that is dequantized in slices: interpreted, between guard bands, against the float64 product;
on a GPU."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from hqqplus.quantization import QuantSpec
from tests.kernels.triton.harness import Guards, interpreted, needs_triton, print_outcomes, random_packed
from tests.kernels.triton.test_product import METADATA, errors, exact_weight

LONG, SHORT, ROWS = 600, 64, 5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes of a slice: of the whole weight at once, of as little as there can be (so that several slices are made, and
# the last is shorter), of two such.
SLICES = {"whole": 0, "thin": 1, "double": 512 * SHORT * 4}


def _slices(axis: int, backward: bool, nbits: int, group: int, slice_bytes: int, itemsize: int) -> int:
    """How many slices there must be of a side of LONG features, each SHORT times `itemsize` bytes."""
    # A slice along the packed direction is made of whole blocks (of 8 planes with 3 bits).
    along = axis == int(backward)
    plane = group if group > 0 else 128
    block = plane * (8 if nbits == 3 else 8 // nbits) if along else 1
    step = -(-256 // block) * block
    wanted = slice_bytes // (SHORT * itemsize) // step * step
    return -(-LONG // max(wanted, step)) if slice_bytes else 1


def check(
    spec: QuantSpec,
    dtype: torch.dtype,
    slices: str,
    backward: bool,
    bias: bool = False,
    rows: int = ROWS,
    device: str = "cpu",
    seed: int = 0,
) -> list[str]:
    """y = x W^T + bias, or dx = dy W, cut along a side of LONG features."""
    from hqqplus.kernels.triton import dense

    guards = Guards()
    shape = (SHORT, LONG) if backward else (LONG, SHORT)
    packed = guards.packed(random_packed(spec, shape, seed, device))
    generator = torch.Generator(device).manual_seed(seed)
    around = torch.randn(rows, 2 * SHORT + 5, generator=generator, device=device).to(dtype)
    x = guards.input(around[:, 5 : 5 + SHORT] if seed % 2 else around[:, ::2][:, :SHORT], "x")
    added = torch.randn(LONG, generator=generator, device=device) if bias else None
    with guards.allocations(), mock.patch.object(dense, "dequantize_into", wraps=dense.dequantize_into) as made:
        cut = SLICES[slices]
        y = dense.matmul_dx(x, packed, cut) if backward else dense.matmul(x, packed, added, cut)
    expected = _slices(spec.axis, backward, spec.nbits, spec.group_size, SLICES[slices], dtype.itemsize)
    wrong = [] if made.call_count == expected else [f"{made.call_count} slices, not {expected}"]
    workspaces = {call.args[1].untyped_storage().data_ptr() for call in made.call_args_list}
    wrong += [] if len(workspaces) == 1 else ["more than one workspace"]
    wrong += errors_dx(y, x, exact_weight(packed)[0]) if backward else errors(y, "dense", x, packed, added)
    return wrong + guards.complaints()


def errors_dx(dx: Tensor, dy: Tensor, weight: Tensor) -> list[str]:
    """What is wrong with dx = dy W: the weight and the result are rounded once each, and the sum is in float32.

    `weight` is W [out_features, in_features], float64.
    """
    exact, size = dy.double() @ weight, dy.double().abs() @ weight.abs()
    if dx.shape != exact.shape or dx.dtype != dy.dtype or not dx.is_contiguous():
        return [f"{dx.dtype} of shape {tuple(dx.shape)} and strides {dx.stride()}"]
    half = torch.finfo(dx.dtype).eps / 2
    # Float16 has no more digits below 6e-5.
    last = 2.0**-25 * (1 + dy.double().abs().sum(1, keepdim=True)) if dx.dtype == torch.float16 else 0.0
    bound = half * exact.abs() + (half + 2.0**-21) * size + last
    wrong = ~((dx.double() - exact).abs() <= bound)
    return [f"{int(wrong.sum())} of {wrong.numel()} elements of dx are wrong"] if wrong.any() else []


def _cases() -> dict[str, Callable[..., list[str]]]:
    cases: dict[str, Callable[..., list[str]]] = {}
    choices = itertools.product((False, True), (1, 0), (1, 2, 3, 4, 8))
    for n, (backward, axis, nbits) in enumerate(choices):
        dtype, slices = DTYPES[(n + n // 3) % 3], [*SLICES][1 + (n + n // 2) % 2]
        group = (64, 16, -1, 32)[n % 4]
        if axis == 1 and not backward:
            group = 64 * nbits // 8 if nbits != 3 else 8  # one block a row, which is fast under the interpreter
        name, bits = METADATA[(n + n // 4) % 4]
        spec, what = QuantSpec(nbits, group, axis, name, bits), "dx" if backward else "y"
        text = f"{what} of {nbits} bits g{group} axis {axis} {bits}-bit {name} {str(dtype)[6:]}, slices {slices}"
        cases[text] = partial(check, spec, dtype, slices, backward, n % 2 == 0 and not backward, seed=n)
    for backward, axis in itertools.product((False, True), (1, 0)):
        what = f"{'dx' if backward else 'y'} axis {axis}"
        spec = QuantSpec(2, 16, axis)
        cases[f"{what} in one slice"] = partial(check, spec, torch.bfloat16, "whole", backward, not backward)
        cases[f"{what} of no rows"] = partial(check, spec, torch.bfloat16, "thin", backward, rows=0)
        cases[f"{what} of many rows"] = partial(check, spec, torch.float16, "thin", backward, not backward, rows=300)
    return cases


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_dense")


@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_interpreted_slices_make_the_whole_product(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


@needs_triton
def test_the_slices_of_a_large_weight_fit_into_their_bytes() -> None:
    from hqqplus.kernels.triton import dense

    x = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    for mib, step in ((16, 1), (8, 1), (16, 512), (32, 1024)):
        size = dense._size(14336, 4096, step, x, mib << 20)
        assert size * 4096 * 2 <= mib << 20 < (size + max(step, 256)) * 4096 * 2
        assert size % max(step, 256) == 0
        slices = [*dense._slices(14336, size)]
        assert [s.start for s in slices] == [*range(0, 14336, size)]
        assert slices[-1].stop == 14336
        assert max(s.stop - s.start for s in slices) == size


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_on_a_gpu_slices_make_the_whole_product(name: str) -> None:
    seed = torch.seed() % 2**31
    assert _cases()[name](device="cuda", seed=seed) == [], seed


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_matrices_of_real_sizes(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqqplus.kernels.triton import dense

    # cuBLAS may add up partial sums in 16 bits, which the bound does not allow for.
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    seed = torch.seed() % 2**31
    generator = torch.Generator("cuda").manual_seed(seed)
    for nbits, axis, mib in itertools.product((1, 2, 3, 4, 8), (1, 0), (0, 4, 16)):
        packed = random_packed(QuantSpec(nbits, 64, axis), shape, seed, "cuda")
        x = torch.randn(1100, shape[1], generator=generator, device="cuda").to(dtype)
        dy = torch.randn(1100, shape[0], generator=generator, device="cuda").to(dtype)
        bias = torch.randn(shape[0], generator=generator, device="cuda")
        y, dx = dense.matmul(x, packed, bias, mib << 20), dense.matmul_dx(dy, packed, mib << 20)
        assert errors(y, "dense", x, packed, bias) == [], (nbits, axis, mib, seed)
        assert errors_dx(dx, dy, exact_weight(packed)[0]) == [], (nbits, axis, mib, seed)


if __name__ == "__main__":
    print_outcomes(_cases())
