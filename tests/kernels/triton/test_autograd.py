"""The ops through the routes to Triton: forward, backward, LoRA beside them, embedding. Interpreted, against float64;
in float64 against finite differences."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from hqqplus import kernels
from hqqplus.kernels import reference, routes
from hqqplus.kernels.lora import Adapter, matmul_lora
from hqqplus.kernels.packed import Packed
from hqqplus.modules import PackedLinear
from hqqplus.quantization import QuantSpec
from tests.kernels.triton.harness import (
    differences,
    interpreted,
    needs_triton,
    print_outcomes,
    random_packed,
)
from tests.kernels.triton.test_dense import errors_dx
from tests.kernels.triton.test_product import errors, exact_weight

# (kernel of the forward product, spec, shape, rows of x, dtype)
PRODUCTS = [
    ("matmul", QuantSpec(2, 64, metadata_bits=16), (37, 520), 3, torch.bfloat16),
    ("matmul", QuantSpec(1, 32), (37, 300), 1, torch.float16),
    ("gemm", QuantSpec(2, 32), (37, 264), 17, torch.bfloat16),
    ("gemm", QuantSpec(4, 64, metadata_bits=16), (40, 128), 20, torch.float16),
    ("simt", QuantSpec(2, 8), (37, 72), 2, torch.float32),
    ("general", QuantSpec(3, 64), (37, 72), 3, torch.bfloat16),
    ("general", QuantSpec(2, 16, 0), (37, 72), 5, torch.float32),
    ("dense", QuantSpec(2, 16), (37, 128), 30, torch.bfloat16),
    ("dense", QuantSpec(1, -1, 0, metadata_bits=16), (40, 72), 30, torch.float16),
]


def _arguments(packed: Packed) -> tuple[Any, ...]:
    """What `torch.ops.hqqplus.matmul` takes behind x."""
    spec = packed.spec
    return (*packed[:4], spec.nbits, spec.group_size, spec.axis, *packed.shape)


def check_product(
    kernel: str,
    spec: QuantSpec,
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> list[str]:
    """y, dx and dbias; x [2, rows / 2, in_features] where rows are even, its second dimension not consecutive."""
    generator = torch.Generator(device).manual_seed(seed)
    packed = random_packed(spec, shape, seed, device)
    first = 2 if rows % 2 == 0 else 1
    x = torch.randn(rows // first, first, shape[1], generator=generator, device=device).transpose(0, 1).to(dtype)
    bias = torch.randn(shape[0], generator=generator, device=device)
    dy = torch.randn(first, rows // first, shape[0], generator=generator, device=device).to(dtype)
    x.requires_grad_(), bias.requires_grad_()
    with mock.patch.object(routes, "_forward", wraps=routes._forward) as forward:
        y = torch.ops.hqqplus.matmul(x, *_arguments(packed), bias)
    chosen = [call.args[0] for call in forward.call_args_list]
    wrong = [] if chosen == [kernel] or device != "cpu" else [f"{chosen} instead of {kernel}"]
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    wrong += [] if (dx.shape, dbias.dtype) == (x.shape, bias.dtype) else [f"dx {dx.shape}, dbias {dbias.dtype}"]
    flat = x.detach().reshape(rows, -1)
    wrong += errors(y.detach().view(rows, -1), chosen[0], flat, packed, bias.detach())
    wrong += errors_dx(dx.reshape(rows, -1), dy.view(rows, -1), exact_weight(packed)[0])
    exact = dy.double().sum((0, 1))
    wrong += [] if torch.allclose(dbias.double(), exact, rtol=0, atol=1e-5) else ["dbias"]
    return wrong


def check_lora(rows: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[str]:
    """A packed layer with an adapter beside it: the result and all gradients, to a few roundings of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(264, 40)
    torch.nn.init.normal_(linear.weight, generator=generator)
    layer = PackedLinear.from_linear(linear, QuantSpec(2, 64, metadata_bits=16)).to(device)
    x, a, b, dy = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((rows, 264), (4, 264), (40, 4), (rows, 40))
    )
    inputs = [t.requires_grad_() for t in (x, a, b)]
    y = matmul_lora(x, layer.op_arguments(), layer.bias, [Adapter(a, b, 0.5)])
    found = y, *torch.autograd.grad(y, inputs, dy)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weight = layer.dequantize(torch.float64)
    plain = exact[0] @ weight.t() + layer.bias.double() + 0.5 * exact[0] @ exact[1].t() @ exact[2].t()
    wanted = plain, *torch.autograd.grad(plain, exact, dy.double())
    off = [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]
    return [] if max(off) <= 4 * torch.finfo(dtype).eps else [f"y, dx, dA, dB are off by {off}"]


def check_op(spec: QuantSpec) -> list[str]:
    """torch's own checks of the schema, the shapes and the gradients' registration, with Triton behind the ops."""
    packed = random_packed(spec, (24, 264))
    x = torch.randn(2, 264, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(24, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2, 24, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(kernels.matmul, (x, *_arguments(packed), bias))
    torch.library.opcheck(kernels.matmul_dx, (dy, *_arguments(packed)))
    torch.library.opcheck(kernels.dequantize, (*_arguments(packed), torch.float16))
    return []


def check_embedding(device: str = "cpu", seed: int = 0) -> list[str]:
    spec = QuantSpec(4, 32)
    packed = random_packed(spec, (41, 136), seed)
    ids = torch.tensor([[3, 40], [0, 3]])
    *tensors, nbits, group, _, _, width = _arguments(packed)
    tensors = [None if t is None else t.to(device) for t in tensors]
    found = torch.ops.hqqplus.embedding(ids.to(device), *tensors, nbits, group, width, torch.bfloat16)
    return differences(found, reference.embedding(ids, packed, torch.bfloat16), spec)


def check_other_types(device: str = "cpu", seed: int = 0) -> list[str]:
    """float64 does not go to Triton; x without rows and x of one dimension do."""
    packed = random_packed(QuantSpec(2, 64), (37, 256), seed, device)
    weight = reference.dequantize(packed, torch.float32).double()
    x = torch.randn(3, 256, dtype=torch.float64, device=device)
    wrong = []
    with mock.patch.object(routes, "_forward", wraps=routes._forward) as forward:
        y = torch.ops.hqqplus.matmul(x, *_arguments(packed))
        wrong += [] if torch.allclose(y, x @ weight.t()) and not forward.called else ["float64"]
        y = torch.ops.hqqplus.matmul(x[:0].bfloat16(), *_arguments(packed))
        wrong += [] if y.shape == (0, 37) and y.dtype == torch.bfloat16 else ["no rows"]
        y = torch.ops.hqqplus.matmul(x[0].bfloat16(), *_arguments(packed))
        wrong += [] if y.shape == (37,) and forward.called else ["one dimension"]
    return wrong + errors(y[None], "matmul", x[:1].bfloat16(), packed, None)


def _cases() -> dict[str, Callable[..., list[str]]]:
    cases: dict[str, Callable[..., list[str]]] = {
        f"{kernel} of {rows} rows, {spec.nbits} bits g{spec.group_size} axis {spec.axis} {str(dtype)[6:]}": partial(
            check_product, kernel, spec, shape, rows, dtype
        )
        for kernel, spec, shape, rows, dtype in PRODUCTS
    }
    cases["LoRA, few rows"] = partial(check_lora, 4, torch.bfloat16)
    cases["LoRA, many rows"] = partial(check_lora, 30, torch.float32)
    cases["embedding"] = check_embedding
    cases["float64, no rows, one dimension"] = check_other_types
    return cases


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_autograd")


@needs_triton
@pytest.mark.parametrize("name", [*_cases(), "opcheck"])
def test_interpreted_the_ops_and_their_gradients_are_exact_to_rounding(
    name: str, outcomes: dict[str, list[str]]
) -> None:
    assert outcomes[name] == []


@pytest.mark.parametrize(
    "spec", [QuantSpec(1, 8), QuantSpec(2, 64), QuantSpec(3, 16, 0), QuantSpec(4, -1), QuantSpec(8, 32, 0)], ids=str
)
@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_the_gradients_are_those_of_finite_differences(spec: QuantSpec, metadata_bits: int) -> None:
    packed = random_packed(spec.replace(metadata_bits=metadata_bits), (40, 72))
    generator = torch.Generator().manual_seed(0)
    x, bias, dy = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2, 3, 72), (40,), (2, 3, 40))
    )
    assert torch.autograd.gradcheck(
        lambda x, bias: kernels.matmul(x, *_arguments(packed), bias), (x, bias), fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda dy: kernels.matmul_dx(dy, *_arguments(packed)), (dy,), fast_mode=True)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", _cases())
def test_on_a_gpu_the_ops_and_their_gradients_are_exact_to_rounding(name: str) -> None:
    seed = torch.seed() % 2**31
    assert _cases()[name](device="cuda", seed=seed) == [], seed


if __name__ == "__main__":
    print_outcomes({**_cases(), "opcheck": partial(check_op, QuantSpec(2, 64))})
