from __future__ import annotations

import pytest
import torch
from torch import nn

from hqqplus.modules import PackedLinear
from hqqplus.quantization import QuantSpec, quantize

SPEC = QuantSpec(nbits=2, group_size=32)


def make(bias: bool = True, spec: QuantSpec = SPEC) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(172, 48, bias=bias)
    return linear, PackedLinear.from_linear(linear, spec)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_forward_is_the_quantized_matrix_and_the_kept_bias(bias: bool, axis: int) -> None:
    linear, packed = make(bias, SPEC.replace(axis=axis))
    weight = quantize(linear.weight, packed.spec).dequantize(torch.float32)
    x = torch.randn(2, 3, 172)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight, linear.bias))


def test_everything_is_frozen_and_packed_state_is_integer() -> None:
    _, packed = make()
    assert isinstance(packed, nn.Linear)
    assert list(packed.state_dict()) == ["W_q", "scale", "offset", "bias"]
    assert not list(packed.buffers())
    assert not any(p.requires_grad for p in packed.parameters())
    assert {packed.W_q.dtype, packed.scale.dtype, packed.offset.dtype} == {torch.uint8}


def test_no_cast_touches_packed_state() -> None:
    _, packed = make()
    before = {name: tensor.clone() for name, tensor in packed.packed().state().items()}
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        cast(packed)
        for name, tensor in before.items():
            assert torch.equal(getattr(packed, name), tensor)


def test_state_dict_round_trip_is_exact() -> None:
    _, packed = make()
    other = PackedLinear(172, 48, True, SPEC, torch.float32)
    other.load_state_dict(packed.state_dict())
    x = torch.randn(4, 172)
    assert torch.equal(other(x), packed(x))


def test_weight_is_readable_and_dequantized() -> None:
    _, packed = make()
    assert torch.equal(packed.weight, packed.dequantize(torch.float32))
    assert packed.weight.dtype == packed.compute_dtype == torch.float32
    with pytest.raises((AttributeError, KeyError)):
        packed.weight = nn.Parameter(torch.zeros(48, 172))


def test_description_tells_the_bits() -> None:
    _, packed = make()
    text = repr(packed)
    assert "nbits=2" in text
    assert "group_size=32" in text
    assert f"bpw={packed.bits_per_weight:.3f}" in text
    assert packed.bits_per_weight == SPEC.bits_per_weight(48, 172)


def test_autocast_computes_in_the_lower_dtype() -> None:
    _, packed = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 172)).dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    _, packed = make()
    x = torch.randn(4, 172, requires_grad=True)
    (plain,) = torch.autograd.grad(packed(x).square().sum(), x)
    checkpointed = torch.utils.checkpoint.checkpoint(packed, x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(checkpointed.square().sum(), x)
    assert torch.equal(plain, recomputed)


def test_compiles_without_a_graph_break() -> None:
    _, packed = make()
    x = torch.randn(4, 172)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed(x))


def test_a_weight_with_nan_is_refused() -> None:
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PackedLinear.from_linear(linear, SPEC)


def test_set_packed_refuses_another_shape() -> None:
    _, packed = make()
    with pytest.raises(ValueError, match="does not fit"):
        packed.set_packed(quantize(torch.randn(48, 64), SPEC))
