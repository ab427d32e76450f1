from __future__ import annotations

import pytest
import torch
from torch import nn

from hqqplus.modules import PackedLinear
from hqqplus.quantization import QuantSpec, quantize

SPEC = QuantSpec(nbits=2, group_size=32, metadata_bits=16)
EIGHT = SPEC.replace(metadata_bits=8)
both = pytest.mark.parametrize("spec", [SPEC, EIGHT], ids=["16", "8"])


def make(bias: bool = True, spec: QuantSpec = SPEC) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(172, 48, bias=bias)
    return linear, PackedLinear.from_linear(linear, spec)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@both
def test_forward_is_the_quantized_matrix_and_the_kept_bias(bias: bool, axis: int, spec: QuantSpec) -> None:
    linear, packed = make(bias, spec.replace(axis=axis))
    weight = quantize(linear.weight, packed.spec).dequantize(torch.float32)
    x = torch.randn(2, 3, 172)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, linear.bias))


@both
def test_everything_is_frozen_and_packed_state_is_integer(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    assert isinstance(packed, nn.Linear)
    names = ["W_q", "scale", "offset"] + ["blocks"] * (spec.metadata_bits == 8)
    assert list(packed.state_dict()) == [*names, "bias"]
    assert list(packed.packed_parameters()) == names
    assert not list(packed.buffers())
    assert not any(p.requires_grad for p in packed.parameters())
    assert {p.dtype for p in packed.packed_parameters().values()} == {torch.uint8}
    assert packed.packed_bytes == sum(p.numel() for p in packed.packed_parameters().values())


@both
def test_no_cast_touches_packed_state(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    before = {name: tensor.clone() for name, tensor in packed.packed().state().items()}
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        cast(packed)
        for name, tensor in before.items():
            assert torch.equal(getattr(packed, name), tensor)


@both
def test_state_dict_round_trip_is_exact(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    other = PackedLinear(172, 48, True, spec, torch.float32)
    other.load_state_dict(packed.state_dict())
    x = torch.randn(4, 172)
    assert torch.equal(other(x), packed(x))


def test_weight_is_readable_and_dequantized() -> None:
    _, packed = make()
    assert torch.equal(packed.weight, packed.dequantize(torch.float32))
    assert packed.weight.dtype == packed.compute_dtype == torch.float32
    with pytest.raises((AttributeError, KeyError)):
        packed.weight = nn.Parameter(torch.zeros(48, 172))


def test_a_state_dict_of_other_metadata_bits_is_refused() -> None:
    for spec, other, said in ((SPEC, EIGHT, "Missing key.*blocks"), (EIGHT, SPEC, "Unexpected key.*blocks")):
        with pytest.raises(RuntimeError, match=f"(?s){said}"):
            PackedLinear(172, 48, True, other, torch.float32).load_state_dict(make(spec=spec)[1].state_dict())


@both
def test_description_tells_the_bits(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    text = repr(packed)
    assert ("metadata_bits=8" in text) == (spec == EIGHT)
    assert "nbits=2" in text
    assert "group_size=32" in text
    assert f"bpw={packed.bits_per_weight:.3f}" in text
    assert packed.bits_per_weight == spec.bits_per_weight(48, 172)


def test_autocast_computes_in_the_lower_dtype() -> None:
    _, packed = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 172)).dtype == torch.bfloat16


@both
def test_gradient_checkpointing_gives_the_same_gradient(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    x = torch.randn(4, 172, requires_grad=True)
    (plain,) = torch.autograd.grad(packed(x).square().sum(), x)
    checkpointed = torch.utils.checkpoint.checkpoint(packed, x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(checkpointed.square().sum(), x)
    assert torch.equal(plain, recomputed)


@both
def test_compiles_without_a_graph_break(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    x = torch.randn(4, 172, requires_grad=True)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed(x))
    gradients = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (compiled, packed)]
    assert torch.equal(*gradients)


# 8-bit activations ---------------------------------------------------------------------------------------------------

ONE = QuantSpec(nbits=1, group_size=32)


@both
def test_int8_is_taken_where_no_gradient_is_asked_for(spec: QuantSpec) -> None:
    _, packed = make(spec=spec.replace(nbits=1))
    x = torch.randn(3, 172)
    sixteen = packed(x)
    packed.compute = "int8"
    eight = torch.ops.hqqplus.matmul_int8(x, *packed.op_arguments(), packed.bias)
    assert not torch.equal(eight, sixteen)
    assert (eight - sixteen).abs().max() < 0.05 * sixteen.abs().max()
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert torch.equal(packed(x), eight)
    assert torch.equal(packed(x), sixteen)
    x.requires_grad_()
    packed(x).sum().backward()
    expected = torch.autograd.grad(nn.functional.linear(x, packed.weight).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        assert torch.equal(packed(x), eight)


@pytest.mark.parametrize("spec", [SPEC, ONE.replace(axis=0), SPEC.replace(nbits=8)], ids=str)
def test_int8_is_for_one_bit_along_the_input(spec: QuantSpec) -> None:
    _, packed = make(spec=spec)
    x = torch.randn(3, 172)
    with torch.no_grad():
        expected = packed(x)
        packed.compute = "int8"
        assert not packed.takes_int8()
        assert torch.equal(packed(x), expected)


def test_int8_rounds_what_autocast_leaves() -> None:
    _, packed = make(spec=ONE)
    packed.compute = "int8"
    x = torch.randn(3, 172)
    with torch.no_grad():
        expected = packed(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), expected)


def test_int8_is_a_choice_of_the_process() -> None:
    _, packed = make(spec=ONE)
    names, text = list(packed.state_dict()), repr(packed)
    packed.compute = "int8"
    assert list(packed.state_dict()) == names
    assert repr(packed) == text.replace(")", ", compute=int8)")
    assert make(spec=ONE)[1].compute == "auto"


def test_int8_compiles_without_a_graph_break() -> None:
    _, packed = make(spec=ONE)
    packed.compute = "int8"
    x = torch.randn(3, 172)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))
    assert torch.equal(compiled(x), packed(x))  # the gradient mode is a guard


def test_a_weight_with_nan_is_refused() -> None:
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PackedLinear.from_linear(linear, SPEC)


def test_set_packed_refuses_another_shape() -> None:
    _, packed = make()
    for other in (quantize(torch.randn(48, 64), SPEC), quantize(torch.randn(48, 172), EIGHT)):
        with pytest.raises(ValueError, match="does not fit"):
            packed.set_packed(other)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_layer_of_any_size_returns_may_be_added_to_in_place(grad: bool) -> None:
    # Half a million weights: beyond the reference's reach on a CPU.
    layer = PackedLinear.from_linear(nn.Linear(1024, 512), QuantSpec(1, 64))
    added = torch.zeros(512, requires_grad=True)
    for shape in ((1, 1024), (2, 3, 1024)):
        y = layer(torch.randn(shape, requires_grad=grad))
        y += added
        y.sum().backward()
    assert added.grad is not None
    assert torch.equal(added.grad, torch.full((512,), 7.0))
