"""Scales trained through the bytes that they are stored in."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.kernels.scales import current_scales
from hqqplus.modules import PackedLinear
from hqqplus.modules.trainable import bake, is_trained, train_scales, trained_metadata
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.metadata import decode, metadata_views
from hqqplus.quantization.spec import BLOCK

WIDTH, OUT = 172, 48  # a width that no group divides; 288 groups of 32, two blocks and a rest
SPECS = [QuantSpec(nbits, 32, metadata_bits=bits) for nbits, bits in itertools.product((1, 2, 3, 4, 8), (8, 16))]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[f"{s.nbits}-bit, {s.metadata_bits}" for s in SPECS])
EIGHT, SIXTEEN = QuantSpec(2, 32), QuantSpec(2, 32, metadata_bits=16)


def make(spec: QuantSpec, offsets: bool = True, bias: bool = True, seed: int = 0) -> PackedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(WIDTH, OUT, bias=bias)
    with torch.no_grad():
        linear.weight[5] = -0.125  # a row of constant groups
    layer = PackedLinear.from_linear(linear, spec)
    train_scales(layer, offsets)
    return layer


def move(layer: PackedLinear, size: float = 0.2) -> None:
    with torch.no_grad():
        for delta in (layer.scale_delta, layer.offset_delta):
            if delta is not None:
                delta.copy_(size * torch.randn_like(delta))


def stored(layer: PackedLinear) -> list[Tensor]:
    return [t.detach().clone() for t in (layer.scale, layer.offset, layer.blocks) if t is not None]


@every_spec
def test_at_the_start_the_bytes_are_those_of_the_layer(spec: QuantSpec) -> None:
    layer = make(spec)
    found = [t for t in trained_metadata(layer) if t is not None]
    assert all(torch.equal(one, other) for one, other in zip(found, stored(layer), strict=True))
    x = torch.randn(3, WIDTH)
    plain = PackedLinear(WIDTH, OUT, True, spec, torch.float32)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "delta" not in k})
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


@every_spec
@pytest.mark.parametrize("offsets", [False, True])
def test_the_forward_pass_is_what_is_baked_to_the_bit(spec: QuantSpec, offsets: bool) -> None:
    layer = make(spec, offsets)
    before, untouched = stored(layer), layer.W_q.clone()
    move(layer)
    x = torch.randn(3, WIDTH)
    trained, matrix, packed = layer(x), layer.weight.clone(), layer.packed().state()
    assert all(torch.equal(one, other) for one, other in zip(stored(layer), before, strict=True))
    bake(layer)
    assert not is_trained(layer)
    assert list(layer.state_dict()) == [*packed, "bias"]
    assert all(not torch.equal(one, other) for one, other in zip(stored(layer), before, strict=True))
    assert torch.equal(layer.W_q, untouched)
    assert torch.equal(layer(x), trained)
    assert torch.equal(layer.dequantize(), matrix)
    assert all(torch.equal(t, packed[name]) for name, t in layer.packed().state().items())
    assert not any(p.requires_grad for p in layer.parameters())


@every_spec
def test_what_is_stored_is_near_what_is_trained(spec: QuantSpec) -> None:
    layer = make(spec)
    move(layer, 0.05)
    scales, offsets = current_scales(layer.trained_scales(), spec.qmax)
    found = decode(*metadata_views(*trained_metadata(layer), spec.metadata_dtype), spec.qmax)
    for one, other in zip(found, (scales, offsets), strict=True):
        # Half a step of a block, and for the offset that of its middle and half qmax of the scale's.
        allowed = 2**-11 if spec.metadata_bits == 16 else (1 if one is found[0] else 1 + spec.qmax / 2) / 255
        assert (one - other).abs().max() <= allowed * other.abs().max()


@given(st.data())
def test_8_bit_blocks_in_which_nothing_moved_keep_their_bytes(data: st.DataObject) -> None:
    layer = make(EIGHT, data.draw(st.booleans()))
    count = OUT * 6
    entries = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
    which = data.draw(st.sampled_from([n for n in ("scale_delta", "offset_delta") if getattr(layer, n) is not None]))
    with torch.no_grad():
        for entry in entries:
            getattr(layer, which).view(-1)[entry] = 0.5
    scale, offset, blocks = trained_metadata(layer)
    moved = {entry // BLOCK for entry in entries}
    for block in range(-(-count // BLOCK)):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        same = (
            torch.equal(scale.flatten()[here], layer.scale.flatten()[here])
            and torch.equal(offset.flatten()[here], layer.offset.flatten()[here])
            and torch.equal(blocks[block], layer.blocks[block])
        )
        assert same or block in moved


@pytest.mark.parametrize("spec", [EIGHT, SIXTEEN], ids=["8", "16"])
def test_deltas_are_part_of_the_state_only_while_they_are_trained(spec: QuantSpec) -> None:
    layer = PackedLinear.from_linear(nn.Linear(WIDTH, OUT), spec)
    names = list(layer.state_dict())
    assert not is_trained(layer)
    train_scales(layer, offsets=False)
    assert set(layer.state_dict()) == {*names, "scale_delta"}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["scale_delta"]
    assert layer.scale_delta.dtype == torch.float32
    assert layer.scale_delta.shape == (OUT, 6)
    bake(layer)
    assert list(layer.state_dict()) == names
    train_scales(layer, offsets=True)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["scale_delta", "offset_delta"]


@pytest.mark.parametrize("spec", [EIGHT, SIXTEEN], ids=["8", "16"])
def test_baking_twice_and_baking_what_is_not_trained_change_nothing(spec: QuantSpec) -> None:
    layer = make(spec)
    move(layer)
    bake(layer)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    bake(layer)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_axis_0_and_a_second_time_are_refused() -> None:
    layer = PackedLinear.from_linear(nn.Linear(64, 32), QuantSpec(2, 32, axis=0))
    with pytest.raises(UserError, match="axis 1"):
        train_scales(layer, offsets=False)
    with pytest.raises(ValueError, match="already"):
        train_scales(make(EIGHT), offsets=False)


@pytest.mark.parametrize("spec", [EIGHT, SIXTEEN], ids=["8", "16"])
@pytest.mark.parametrize("silent", [False, True], ids=["in place", "unseen"])
def test_evaluation_after_a_step_sees_the_step(spec: QuantSpec, silent: bool) -> None:
    """Whatever an optimizer does: a kernel that writes into memory does not count as a change of the tensor."""
    layer = make(spec)
    x = torch.randn(3, WIDTH)

    def step() -> None:
        layer(x).sum().backward()
        for delta in (layer.scale_delta, layer.offset_delta):
            assert delta is not None
            if silent:
                delta.detach().numpy()[:] -= 0.1 * delta.grad.sign().numpy()
            else:
                with torch.no_grad():
                    delta.sub_(0.1 * delta.grad.sign())
            delta.grad = None

    with torch.no_grad():
        found = [layer(x)]
        assert layer.kept_metadata is not None  # and the second look is without encoding
        kept = layer.kept_metadata[1]
        assert torch.equal(layer(x), found[0])
        assert layer.kept_metadata[1] is kept
    for _ in range(2):
        step()
        with torch.no_grad():
            found.append(layer(x))
        other = copy.deepcopy(layer)
        other.kept_metadata = None
        with torch.no_grad():
            assert torch.equal(other(x), found[-1])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("spec", [EIGHT, SIXTEEN, QuantSpec(1, 16), QuantSpec(3, -1)], ids=str)
def test_it_learns_a_gain_and_a_shift_of_each_group(spec: QuantSpec) -> None:
    """From x W~^T to x W^T with W = W~ (1 + a) + u b, which is within its reach."""
    goal = make(spec)
    move(goal, 0.3)
    target = goal.dequantize(torch.float32).detach()
    layer = make(spec)
    optimizer = torch.optim.Adam([layer.scale_delta, layer.offset_delta], lr=0.02)
    x = torch.randn(256, WIDTH)
    errors = []
    for _ in range(150):
        error = (layer(x) - torch.nn.functional.linear(x, target, layer.bias)).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert min(errors[-20:]) < 0.01 * errors[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_autocast(autocast: bool, use_reentrant: bool) -> None:
    layer = make(EIGHT)
    move(layer)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    dy = torch.randn(2, 5, OUT)

    def gradients(checkpointed: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        layer.zero_grad()
        x.grad = None
        y.backward(dy.to(y.dtype))
        return [x.grad, layer.scale_delta.grad, layer.offset_delta.grad]

    expected = gradients(False)
    assert [g.dtype for g in expected] == [torch.float32] * 3
    expected = [g.clone() for g in expected]
    assert all(torch.equal(one, other) for one, other in zip(gradients(True), expected, strict=True))
