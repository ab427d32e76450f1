"""The ops against their definition: full matrices, float64, and torch's own checks of schema, fake and autograd."""

from __future__ import annotations

import pytest
import torch

from hqqplus import kernels
from hqqplus.quantization import QuantSpec, quantize
from hqqplus.quantization.metadata import metadata_views

CASES = [
    QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
    for nbits in (1, 2, 3, 4, 8)
    for group_size in (8, 64, -1)
    for axis in (0, 1)
    for metadata_bits in (16, 8)
]
EIGHT = QuantSpec(2, 32, metadata_bits=8)


def packed_arguments(spec: QuantSpec, out_features: int = 40, in_features: int = 72) -> tuple[torch.Tensor, tuple]:
    """(the full matrix, the arguments of `matmul` behind x)."""
    torch.manual_seed(0)
    packed = quantize(torch.randn(out_features, in_features), spec)
    metadata = metadata_views(packed.scale, packed.offset, packed.blocks, spec.metadata_dtype)
    sizes = (spec.nbits, spec.group_size, spec.axis, out_features, in_features)
    return packed.dequantize(torch.float32), (packed.W_q, *metadata, *sizes)


@pytest.mark.parametrize("spec", CASES, ids=str)
def test_matmul_and_its_gradient_equal_the_dense_product(spec: QuantSpec) -> None:
    weight, arguments = packed_arguments(spec)
    x = torch.randn(3, 5, weight.shape[1], requires_grad=True)
    y = kernels.matmul(x, *arguments)
    torch.testing.assert_close(y, x @ weight.t())
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ weight)


@pytest.mark.parametrize("spec", CASES[::7], ids=str)
def test_torch_accepts_the_registrations(spec: QuantSpec) -> None:
    _, arguments = packed_arguments(spec)
    x = torch.randn(4, 72, requires_grad=True)
    torch.library.opcheck(kernels.matmul, (x, *arguments))
    torch.library.opcheck(kernels.matmul_dx, (torch.randn(4, 40, requires_grad=True), *arguments))
    torch.library.opcheck(kernels.dequantize, (*arguments, torch.bfloat16))
    if spec.axis == 1:
        *packed, nbits, group_size, _, _, width = arguments
        ids = torch.tensor([[0, 3], [39, 3]])
        torch.library.opcheck(kernels.embedding, (ids, *packed, nbits, group_size, width, torch.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_bias_is_added_and_has_its_gradient(axis: int) -> None:
    weight, arguments = packed_arguments(QuantSpec(2, 8, axis))
    x, bias = torch.randn(3, 5, 72, requires_grad=True), torch.randn(40, requires_grad=True)
    dy = torch.randn(3, 5, 40)
    found = torch.autograd.grad(kernels.matmul(x, *arguments, bias), (x, bias), dy)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), dy)
    torch.testing.assert_close(found, expected)
    torch.library.opcheck(kernels.matmul, (x, *arguments, bias))


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_only_packed_tensors_are_kept_for_the_backward_pass(metadata_bits: int) -> None:
    _, arguments = packed_arguments(QuantSpec(2, 8, metadata_bits=metadata_bits))
    kept: list[torch.Tensor] = []
    x = torch.randn(512, 72, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.matmul(x, *arguments)
    packed = {t.data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
    assert len(packed) == (3 if metadata_bits == 16 else 4)
    assert {t.data_ptr() for t in kept} == packed


def test_with_8_bit_metadata_the_ops_take_codes() -> None:
    _, (_, scale, offset, blocks, *_) = packed_arguments(QuantSpec(2, 8, metadata_bits=8))  # 40 rows of 9 groups
    assert (scale.dtype, offset.dtype, blocks.dtype) == (torch.uint8, torch.uint8, torch.float16)
    assert (scale.shape, offset.shape, blocks.shape) == ((40, 9), (40, 9), (3, 4))


def test_no_gradient_is_computed_for_an_input_that_needs_none() -> None:
    _, arguments = packed_arguments(QuantSpec(2, 64))
    assert not kernels.matmul(torch.randn(2, 72), *arguments).requires_grad


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_the_second_derivative_is_there(metadata_bits: int) -> None:
    _, arguments = packed_arguments(QuantSpec(4, 8, metadata_bits=metadata_bits))
    packed = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    x = torch.randn(2, 72, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: kernels.matmul(x, *packed).square(), (x,), atol=1e-4)


@pytest.mark.parametrize("spec", [spec for spec in CASES if spec.axis == 1], ids=str)
def test_embedding_reads_rows(spec: QuantSpec) -> None:
    weight, (*packed, nbits, group_size, _, _, width) = packed_arguments(spec)
    # With groups of 8, rows 14 and 28 are each in two blocks of 8-bit metadata.
    ids = torch.tensor([[0, 39, 14], [28, 14, 1]])
    rows = kernels.embedding(ids, *packed, nbits, group_size, width, torch.float32)
    assert torch.equal(rows, weight[ids])
    assert kernels.embedding(ids[:0], *packed, nbits, group_size, width, torch.float32).shape == (0, 3, width)


@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_rounds_once(dtype: torch.dtype, metadata_bits: int) -> None:
    weight, arguments = packed_arguments(QuantSpec(3, 64, 0, metadata_bits=metadata_bits))
    assert torch.equal(kernels.dequantize(*arguments, dtype), weight.to(dtype))
    assert kernels.matmul(torch.randn(2, 72, dtype=dtype), *arguments).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("spec", CASES, ids=str)
def test_a_gpu_computes_what_the_cpu_does(spec: QuantSpec) -> None:
    weight, arguments = packed_arguments(spec)
    on_gpu = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
    result = kernels.dequantize(*on_gpu, torch.float32).cpu()
    if spec.nbits == 8 and spec.metadata_bits == 8:  # here alone a product has too many digits for float32
        torch.testing.assert_close(result, weight, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(result, weight)
    x = torch.randn(5, 72, device="cuda", requires_grad=True)
    y = kernels.matmul(x, *on_gpu)
    torch.testing.assert_close(y.cpu(), x.detach().cpu() @ weight.t(), atol=1e-4, rtol=1e-4)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx.cpu(), torch.ones(5, 40) @ weight, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec", [QuantSpec(1, 32), QuantSpec(2, 64), QuantSpec(4, 64), QuantSpec(8, 64), EIGHT], ids=str
)
def test_a_gpu_solves_as_well_as_the_cpu(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    assert quantize(weight.cuda(), spec).nmse(weight.cuda()) == pytest.approx(
        quantize(weight, spec).nmse(weight), rel=1e-3
    )
