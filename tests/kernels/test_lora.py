"""The packed product with LoRA beside it, against the same sum of dense products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.kernels.lora import Adapter, matmul_lora
from hqqplus.modules import PackedLinear
from hqqplus.quantization import QuantSpec

IN, OUT = 72, 40


def packed_layer(spec: QuantSpec, bias: bool = False) -> PackedLinear:
    torch.manual_seed(0)
    return PackedLinear.from_linear(torch.nn.Linear(IN, OUT, bias), spec)


def matrices(rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(rank, IN, dtype=dtype), torch.randn(OUT, rank, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[Adapter]) -> Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    for a, b, scaling, own in adapters:
        y = y + scaling * (x if own is None else own) @ a.t() @ b.t()
    return y


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(1, 8, 0, metadata_bits=16), QuantSpec(3, -1)], ids=str)
def test_all_gradients_are_those_of_finite_differences(spec: QuantSpec) -> None:
    layer = packed_layer(spec, bias=True)
    (a1, b1), (a2, b2) = matrices(3), matrices(2)
    x, own = torch.randn(2, 2, 2, IN, dtype=torch.float64).unbind()
    x, own, bias = x.requires_grad_(), own.requires_grad_(), layer.bias.double().requires_grad_()

    def product(x: Tensor, bias: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, own: Tensor) -> Tensor:
        adapters = [Adapter(a1, b1, 0.3), Adapter(a2, b2, -1.7, own)]
        return matmul_lora(x, layer.op_arguments(), bias, adapters)

    inputs = (x, bias, a1, b1, a2, b2, own)
    expected = dense(x, layer.dequantize(torch.float64), bias, [Adapter(a1, b1, 0.3), Adapter(a2, b2, -1.7, own)])
    torch.testing.assert_close(product(*inputs), expected)
    # Fast mode projects on random vectors, which no wrong factor or term survives.
    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN)], ids=str)
def test_every_shape_of_x(shape: tuple[int, ...]) -> None:
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    y = matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    expected = dense(x, layer.dequantize(torch.float32), None, [Adapter(a, b, 2.0)])
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, a, b), dy), torch.autograd.grad(expected, (x, a, b), dy), rtol=1e-4, atol=1e-4
    )


def test_x_and_dy_of_any_strides() -> None:
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(IN, 6, 2).permute(1, 2, 0).requires_grad_()
    y = matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    expected = dense(x, layer.dequantize(torch.float32), None, [Adapter(a, b, 2.0)])
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    for dy in (torch.randn(OUT, 6, 2).permute(1, 2, 0), torch.ones(()).expand(y.shape)):
        found = torch.autograd.grad(y, (x, a, b), dy, retain_graph=True)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected, (x, a, b), dy, retain_graph=True), rtol=1e-4, atol=1e-4
        )


def kept_storages(function: Any) -> set[int]:
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        function()
    return kept


@pytest.mark.parametrize("train_a", [True, False])
@pytest.mark.parametrize("train_b", [True, False])
@pytest.mark.parametrize("train_x", [True, False])
def test_nothing_is_kept_or_returned_for_what_is_frozen(train_x: bool, train_a: bool, train_b: bool) -> None:
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(50, IN)
    for tensor, train in ((x, train_x), (a, train_a), (b, train_b)):
        tensor.requires_grad_(train)
    outputs: list[Tensor] = []
    kept = kept_storages(lambda: outputs.append(matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])))
    y = outputs[0]
    if not (train_x or train_a or train_b):
        assert not kept
        assert not y.requires_grad
        return
    stored = {p.data_ptr() for p in layer.parameters()} | {a.data_ptr(), b.data_ptr()}
    assert stored <= kept
    assert (x.data_ptr() in kept) == train_a
    assert len(kept - stored) == train_a + train_b  # x and h [50, 4]
    trained = [t for t in (x, a, b) if t.requires_grad]
    expected = dense(x, layer.dequantize(torch.float32), None, [Adapter(a, b, 2.0)])
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), trained), torch.autograd.grad(expected.sum(), trained), rtol=1e-4, atol=1e-4
    )


def test_without_grad_mode_nothing_is_kept() -> None:
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(50, IN, requires_grad=True)
    with torch.no_grad():
        kept = kept_storages(lambda: matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)]))
        y = matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    assert not kept
    assert not y.requires_grad
    assert torch.equal(y, matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)]))


def test_a_second_derivative_is_refused() -> None:
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(5, IN, requires_grad=True)
    y = matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_an_adapter_changed_before_the_backward_pass_is_refused() -> None:
    """A changed adapter would give the gradients of another function: autograd's version check has to see it."""
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    y = matmul_lora(torch.randn(5, IN), layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_come_in_the_dtype_of_what_they_belong_to(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    layer = packed_layer(QuantSpec(2, 8), bias=True)
    bias = layer.bias.detach().requires_grad_()
    a, b = matrices(4, adapter_dtype)
    x = torch.randn(30, IN, dtype=dtype, requires_grad=True)
    y = matmul_lora(x, layer.op_arguments(), bias, [Adapter(a, b, 0.7)])
    dy = torch.randn(30, OUT)
    assert y.dtype == dtype
    found = torch.autograd.grad(y, (x, a, b, bias), dy.to(dtype))
    assert [g.dtype for g in found] == [dtype, adapter_dtype, adapter_dtype, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, a, b, bias)]
    expected = dense(exact[0], layer.dequantize(torch.float64), exact[3], [Adapter(exact[1], exact[2], 0.7)])
    wanted = torch.autograd.grad(expected, exact, dy.to(dtype).double())
    # A few roundings of the coarsest type that takes part.
    rounding = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps)
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        assert (one.double() - other).norm() <= 2 * rounding * other.norm()


def test_the_backward_pass_may_run_under_autocast() -> None:
    """The dtypes of its products are those of the forward pass."""
    layer = packed_layer(QuantSpec(2, 8))
    a, b = matrices(4, torch.float32)
    x = torch.randn(5, IN, requires_grad=True)
    dy = torch.randn(5, OUT)
    expected = torch.autograd.grad(matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)]), (x, a, b), dy)
    y = matmul_lora(x, layer.op_arguments(), None, [Adapter(a, b, 2.0)])
    with torch.autocast("cpu"):
        found = torch.autograd.grad(y, (x, a, b), dy)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
