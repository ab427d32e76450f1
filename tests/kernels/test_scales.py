"""The gradients of scales, offsets and gains, against float64 autograd through a dense formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqqplus.kernels import scales as scales_module
from hqqplus.kernels.lora import Adapter, Gains, gained, matmul_lora
from hqqplus.kernels.scales import TrainedScales, current_scales, metadata_gradients, offset_unit
from hqqplus.modules import PackedLinear
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack

OUT = 24


def packed_layer(spec: QuantSpec, width: int, bias: bool = False) -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(width, OUT, bias)
    with torch.no_grad():
        linear.weight[3] = 0.25  # constant groups, whose scale is 0
    return PackedLinear.from_linear(linear, spec)


def codes_of(layer: PackedLinear) -> Tensor:
    """[out, groups, group] float64, the padding of the last group included."""
    layout = layer.spec.layout(*layer.matrix_shape)
    return unpack(layer.W_q, layer.spec.nbits, layout.plane).view(OUT, layout.groups, layout.group).double()


def dense_weight(layer: PackedLinear, scale: Tensor, offset: Tensor) -> Tensor:
    """[out, in] from scale and offset [out, groups], differentiable."""
    matrix = codes_of(layer) * scale.unsqueeze(2) + offset.unsqueeze(2)
    return matrix.flatten(1)[:, : layer.in_features]


def start_of(layer: PackedLinear) -> Any:
    return layer.metadata()


def random_deltas(layer: PackedLinear, offsets: bool = True) -> TrainedScales:
    layout = layer.spec.layout(*layer.matrix_shape)
    a, b = (0.1 * torch.randn(OUT, layout.groups) for _ in range(2))
    return TrainedScales(a.requires_grad_(), b.requires_grad_() if offsets else None, start_of(layer))


def dense_deltas(layer: PackedLinear, trained: TrainedScales) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, a, b) in float64: the formula at the head of `kernels/scales.py`."""
    scale, offset = (t.double() for t in decode(*trained.start, layer.spec.qmax))
    a = trained.scale_delta.detach().double().requires_grad_()
    b = torch.zeros_like(a) if trained.offset_delta is None else trained.offset_delta.detach().double()
    b.requires_grad_()
    unit = torch.where(scale != 0, scale.abs(), scale.abs().mean(1, keepdim=True))
    return dense_weight(layer, scale * (1 + a), offset * (1 + a) + unit * b), a, b


def exact_metadata(layer: PackedLinear, trained: TrainedScales) -> tuple[Any, ...]:
    """The arguments of the op with float32 metadata, not rounded: only the reference backend takes them."""
    spec = layer.spec
    values = current_scales(trained, spec.qmax)
    sizes = spec.nbits, spec.group_size, spec.axis, *layer.matrix_shape
    return layer.W_q, *(v.detach() for v in values), None, *sizes


ALL = [
    QuantSpec(nbits, group, metadata_bits=bits)
    for nbits, group, bits in itertools.product((1, 2, 3, 4, 8), (16, -1), (8, 16))
]


@pytest.mark.parametrize("width", [64, 72, 51])
@pytest.mark.parametrize("spec", ALL, ids=str)
def test_gradients_of_scale_and_offset_are_those_of_the_dense_formula(spec: QuantSpec, width: int) -> None:
    layer = packed_layer(spec, width)
    scale, offset = (t.double().requires_grad_() for t in decode(*start_of(layer), spec.qmax))
    x, dy = torch.randn(7, width).double(), torch.randn(7, OUT).double()
    weight = dense_weight(layer, scale, offset)
    expected = torch.autograd.grad(x @ weight.t(), (scale, offset), dy)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = metadata_gradients(dy.to(dtype), x.to(dtype), layer.W_q, layer.op_arguments()[4:])
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("slice_bytes", [1, 4 * 80 * 5, 2**26])
def test_slices_of_rows_make_no_difference(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed_layer(QuantSpec(2, 16), 72)
    x, dy = torch.randn(7, 72), torch.randn(7, OUT)
    sizes = layer.op_arguments()[4:]
    expected = metadata_gradients(dy.double(), x.double(), layer.W_q, sizes)
    monkeypatch.setattr(scales_module, "SLICE_BYTES", slice_bytes)
    for one, other in zip(metadata_gradients(dy, x, layer.W_q, sizes), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_gradient() -> None:
    layer = packed_layer(QuantSpec(2, 16), 72)
    found = metadata_gradients(torch.empty(0, OUT), torch.empty(0, 72), layer.W_q, layer.op_arguments()[4:])
    assert all(torch.equal(one, torch.zeros(OUT, 5)) for one in found)


def test_the_unit_of_a_constant_group_is_the_mean_scale_of_its_row() -> None:
    scale = torch.tensor([[0.0, 2.0, -4.0], [0.0, 0.0, 0.0]])
    assert torch.equal(offset_unit(scale), torch.tensor([[2.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))


CASES = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(("lora", "own", "gains", "offsets"), CASES)
@pytest.mark.parametrize("spec", [QuantSpec(1, 16, metadata_bits=16), QuantSpec(3, 32, metadata_bits=16)], ids=str)
def test_the_node_is_the_dense_formula(spec: QuantSpec, lora: bool, own: bool, gains: bool, offsets: bool) -> None:
    """y and all gradients at once, in float64 with metadata that nothing has rounded."""
    layer = packed_layer(spec, 51, bias=True)
    trained = random_deltas(layer, offsets)

    def leaf(*shape: int) -> Tensor:
        return (0.5 * torch.randn(*shape)).double().requires_grad_()

    x, seen, bias, a, b, inner, outer = (
        leaf(2, 5, 51),
        leaf(2, 5, 51),
        leaf(OUT),
        leaf(3, 51),
        leaf(OUT, 3),
        leaf(51),
        leaf(OUT),
    )
    adapters = [Adapter(a, b, 0.7, seen if own else None)] if lora else []
    y = matmul_lora(
        x, exact_metadata(layer, trained), bias, adapters, Gains(inner, outer) if gains else Gains(), trained
    )
    weight, dense_a, dense_b = dense_deltas(layer, trained)
    expected = (x * (1 + inner) if gains else x) @ weight.t()
    expected = (expected * (1 + outer) if gains else expected) + bias
    if lora:
        expected = expected + 0.7 * ((seen if own else x) @ a.t()) @ b.t()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    inputs = [
        x,
        bias,
        *([a, b] if lora else []),
        *([seen] if lora and own else []),
        *([inner, outer] if gains else []),
    ]
    dy = torch.randn(2, 5, OUT).double()
    deltas = [trained.scale_delta, *([trained.offset_delta] if offsets else [])]
    found = torch.autograd.grad(y, [*inputs, *deltas], dy)
    wanted = torch.autograd.grad(expected, [*inputs, dense_a, *([dense_b] if offsets else [])], dy)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("frozen", ["inner", "outer", "x", "scale_delta", "offset_delta"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    layer = packed_layer(QuantSpec(2, 16), 72)
    trained = random_deltas(layer)
    leaves = {
        "inner": (0.1 * torch.randn(72)).requires_grad_(),
        "outer": (0.1 * torch.randn(OUT)).requires_grad_(),
        "x": torch.randn(6, 72, requires_grad=True),
        "scale_delta": trained.scale_delta,
        "offset_delta": trained.offset_delta,
    }
    dy = torch.randn(6, OUT)

    def gradients() -> dict[str, Tensor]:
        y = matmul_lora(leaves["x"], layer.op_arguments(), None, (), Gains(leaves["inner"], leaves["outer"]), trained)
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        return dict(zip(names, torch.autograd.grad(y, [leaves[name] for name in names], dy), strict=True))

    expected = gradients()
    leaves[frozen].requires_grad_(False)
    found = gradients()
    assert found.keys() == expected.keys() - {frozen}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_are_not_rounded_with_the_1_in_front_of_them(dtype: torch.dtype) -> None:
    x, gain = torch.randn(4000, 64).to(dtype), (torch.finfo(dtype).eps * torch.randn(64)).to(dtype)
    exact = x.double() * (1 + gain.double())
    assert torch.equal(gained(x, gain), exact.to(dtype))
    assert not torch.equal(x * (1 + gain), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_come_in_float32_for_deltas_and_in_its_own_dtype_for_x(dtype: torch.dtype) -> None:
    layer = packed_layer(QuantSpec(2, 16), 72)
    trained = random_deltas(layer)
    x = torch.randn(64, 72).to(dtype).requires_grad_()
    gains = Gains(torch.zeros(72, requires_grad=True), torch.zeros(OUT, requires_grad=True))
    y = matmul_lora(x, layer.op_arguments(), None, (), gains, trained)
    dy = torch.randn(64, OUT).to(dtype)
    inputs = (x, *gains, trained.scale_delta, trained.offset_delta)
    found = torch.autograd.grad(y, inputs, dy)
    assert [g.dtype for g in found] == [dtype] + 4 * [torch.float32]
    start = TrainedScales(torch.zeros_like(trained.scale_delta), torch.zeros_like(trained.offset_delta), trained.start)
    weight, a, b = dense_deltas(layer, start)
    exact = [x.detach().double().requires_grad_(), *(g.detach().double().requires_grad_() for g in gains)]
    product = ((exact[0] * (1 + exact[1])) @ weight.t()) * (1 + exact[2])
    wanted = torch.autograd.grad(product, [*exact, a, b], dy.double())
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 3 * torch.finfo(dtype).eps * other.norm() + 1e-6


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    layer = packed_layer(QuantSpec(2, 16), 72)
    trained = random_deltas(layer)
    x = torch.randn(50, 72, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        matmul_lora(x, layer.op_arguments(), None, (), Gains(), trained)
    packed = {p.data_ptr() for p in layer.parameters()}
    rest = [t for t in kept.values() if t.data_ptr() not in packed]
    assert [t.data_ptr() for t in rest] == [x.data_ptr()]
