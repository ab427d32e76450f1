"""Reconstruction by gradient: what is trained is what is stored, and it is never worse than what it began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hqqplus import models
from hqqplus.calibration.blocks import Blocks
from hqqplus.calibration.reconstruct import Reconstruction, TrainedLayer, Training, block_loss, reconstruct
from hqqplus.quantization import PackedTensor, QuantSpec, quantize

SPECS = [
    QuantSpec(1, 32),
    QuantSpec(2, 64, metadata_bits=16),
    QuantSpec(3, 16),
    QuantSpec(4, 32, axis=0, metadata_bits=16, metadata_dtype="bfloat16"),
    QuantSpec(2, 32, axis=0),
    QuantSpec(2, -1, metadata_bits=16),
]
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def name_of(spec: QuantSpec) -> str:
    return f"{spec.nbits}b-g{spec.group_size}-a{spec.axis}-m{spec.metadata_bits}"


def matrix(rows: int = 24, columns: int = 100, seed: int = 0) -> Tensor:
    """A weight whose width no group size divides."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def blocks(random_model: Callable[..., Path]) -> Blocks:
    return Blocks(models.load_causal_lm(str(random_model("llama")), device="cpu", dtype=torch.float32))


def samples(blocks: Blocks, count: int = 10) -> tuple[Tensor, Tensor]:
    """Inputs of block 0, somewhat off, and what it should return."""
    generator = torch.Generator().manual_seed(0)
    exact = blocks.embed(torch.randint(0, 256, (count, 16), generator=generator), batch_size=count)
    inputs = exact + 0.05 * exact.std() * torch.randn(exact.shape, generator=generator)
    with blocks.placed(0):
        blocks.advance(0, exact, count)
    return inputs, exact


def trained(
    blocks: Blocks, spec: QuantSpec, training: Training, importance: bool = False
) -> tuple[Reconstruction, dict[str, PackedTensor], Callable[[dict[str, PackedTensor]], float]]:
    """What came of block 0, what it began with, and the loss on held-out samples of anything."""
    inputs, targets = samples(blocks)
    held_out, generator = torch.tensor([1, 4]), torch.Generator().manual_seed(0)
    with blocks.placed(0) as block:
        weights = {name: block.get_submodule(name).weight.detach() for name in LAYERS}
        start = {name: quantize(weight, spec) for name, weight in weights.items()}
        result = reconstruct(blocks, 0, inputs, targets, weights, start, training, held_out, generator)

    def loss(packed: dict[str, PackedTensor]) -> float:
        with blocks.placed(0):
            return block_loss(blocks, 0, inputs, targets, held_out, 4, packed)

    return result, start, loss


@pytest.mark.parametrize("train_codes", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_it_begins_with_what_the_solver_made(spec: QuantSpec, train_codes: bool) -> None:
    weight = matrix()
    start = quantize(weight, spec)
    layer = TrainedLayer(weight, start, train_codes)
    gap = (start.dequantize() - layer.weight()).abs().max() / start.dequantize().abs().max()
    # Maps of 8-bit metadata are fitted anew to values that are on the old ones.
    assert gap < (1e-6 if spec.metadata_bits == 16 else 0.01)
    packed = layer.pack()
    assert packed.W_q.shape == start.W_q.shape
    if spec.metadata_bits == 16 or not train_codes:
        assert torch.equal(packed.W_q, start.W_q)
    assert (packed.spec, packed.shape) == (start.spec, start.shape)
    assert {k: (t.shape, t.dtype) for k, t in packed.state().items()} == {
        k: (t.shape, t.dtype) for k, t in start.state().items()
    }


@pytest.mark.parametrize("train_codes", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_what_is_trained_is_what_is_stored(spec: QuantSpec, train_codes: bool) -> None:
    weight = matrix()
    layer = TrainedLayer(weight, quantize(weight, spec), train_codes)
    generator = torch.Generator().manual_seed(1)
    for parameter in (layer.log_scale, layer.shift, layer.latent):
        if parameter is not None:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    torch.testing.assert_close(layer.pack().dequantize(), layer.weight().detach(), rtol=1e-5, atol=1e-7)


def test_codes_that_a_solver_chose_against_the_nearest_are_kept() -> None:
    weight, spec = matrix(8, 64), QuantSpec(2, 64, metadata_bits=16)
    start = quantize(weight, spec)
    other = dataclasses.replace(start, W_q=start.W_q ^ 0b01)  # the first of four codes in each byte, another one
    packed = TrainedLayer(weight, other, train_codes=True).pack()
    assert torch.equal(packed.W_q, other.W_q)
    assert not torch.equal(other.W_q, start.W_q)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_gradients_are_those_of_the_formula(spec: QuantSpec) -> None:
    weight = matrix()
    start = quantize(weight, spec)
    layer = TrainedLayer(weight, start, train_codes=True)
    layer.log_scale.data += 0.1
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (layer.weight() * direction).sum().backward()
    # W~ = m + s (q - qmax / 2) with stored scale s and codes q: by log s it changes by (q - qmax / 2) times the scale
    # before rounding, by m / s0 by s0, and by W / s0 by s0.
    layout = spec.layout(*weight.shape)
    turned = direction if spec.axis == 1 else direction.t()
    pushed = torch.nn.functional.pad(turned, (0, layout.padded - layout.width)).double()
    pushed = pushed.view(layout.rows, layout.groups, layout.group)
    packed = layer.pack()
    values = packed.dequantize().double()
    values = values if spec.axis == 1 else values.t()
    values = torch.nn.functional.pad(values, (0, layout.padded - layout.width)).view(pushed.shape)
    first = TrainedLayer(weight, start, train_codes=True)
    unit = first._scale.double()
    scale, middle, _ = layer._rounded(*(t.detach() for t in layer._grid()))
    exact = layer._grid()[0].detach().double()
    level = torch.where(pushed != 0, (values - middle.double().unsqueeze(-1)) / scale.double().unsqueeze(-1), 0.0)
    by_scale = (pushed * level).sum(-1) * exact
    torch.testing.assert_close(layer.log_scale.grad.double(), by_scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.shift.grad.double(), pushed.sum(-1) * unit, rtol=1e-4, atol=1e-5)
    assert layer.latent is not None
    torch.testing.assert_close(layer.latent.grad.double(), pushed * unit.unsqueeze(-1), rtol=1e-4, atol=1e-5)


def test_the_reach_says_how_far_outside_a_weight_is_still_moved() -> None:
    weight, spec = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)), QuantSpec(1, 256, metadata_bits=16)
    start = quantize(weight, spec)
    far = (weight - start.dequantize()).abs() > 0.5 * TrainedLayer(weight, start, True)._scale
    outside = far & (weight.abs() > start.dequantize().abs())
    assert 0.05 < outside.float().mean() < 0.2
    for reach, moved in ((0.5, ~outside), (float("inf"), torch.ones_like(outside))):
        layer = TrainedLayer(weight, start, True, reach)
        layer.weight().sum().backward()
        assert layer.latent is not None
        assert torch.equal(layer.latent.grad.flatten(1) != 0, moved)


@pytest.mark.parametrize("bits", [8, 16])
def test_constant_groups_stay_and_make_nothing_infinite(bits: int) -> None:
    weight = matrix(8, 64)
    weight[:, :32] = 0.25
    weight[3] = 0.0
    layer = TrainedLayer(weight, quantize(weight, QuantSpec(2, 32, metadata_bits=bits)), train_codes=True)
    optimizer = torch.optim.Adam([layer.log_scale, layer.shift, layer.latent], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer.weight() - 1).square().sum().backward()
        optimizer.step()
    made = layer.pack().dequantize()
    assert torch.isfinite(made).all()
    assert torch.isfinite(layer.weight()).all()
    torch.testing.assert_close(made[:3, :32], weight[:3, :32], rtol=0, atol=0.02)
    assert not torch.equal(made[:3, 32:], quantize(weight, layer._spec).dequantize()[:3, 32:])


@pytest.mark.parametrize("spec", [QuantSpec(1, 32), QuantSpec(2, 64), QuantSpec(2, 32, axis=0, metadata_bits=16)])
def test_the_loss_on_samples_that_were_not_trained_on_goes_down(blocks: Blocks, spec: QuantSpec) -> None:
    result, start, loss = trained(blocks, spec, Training(epochs=4, batch_size=2))
    assert result.curve[0] == pytest.approx(loss(start), rel=1e-6)
    assert min(result.curve) < 0.9 * result.curve[0]
    assert loss(result.packed) == pytest.approx(min(result.curve), rel=1e-6)


def test_without_a_rate_for_weights_the_codes_stay(blocks: Blocks) -> None:
    result, start, _ = trained(blocks, QuantSpec(2, 32), Training(2, 2, 1e-2, 0.0))
    assert min(result.curve) < result.curve[0]
    for name, packed in result.packed.items():
        assert torch.equal(packed.W_q, start[name].W_q)
        assert not torch.equal(packed.scale, start[name].scale)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rate", [3.0, 1e3])
def test_where_training_leads_nowhere_the_start_is_returned(blocks: Blocks, rate: float, bits: int) -> None:
    spec = QuantSpec(2, 32, metadata_bits=bits)
    result, start, loss = trained(blocks, spec, Training(2, 2, rate, rate))
    assert len(result.curve) == (3 if rate == 3.0 else 1)  # at 1e3 the scales leave the range of float16
    assert all(
        torch.equal(packed.state()[key], t)
        for name, packed in result.packed.items()
        for key, t in start[name].state().items()
    )
    assert loss(result.packed) == pytest.approx(result.curve[0], rel=1e-6)


def test_it_comes_out_the_same_each_time(blocks: Blocks) -> None:
    (one, *_), (other, *_) = (trained(blocks, QuantSpec(1, 32), Training(1, 4)) for _ in range(2))
    assert one.curve == other.curve
    for name, packed in one.packed.items():
        assert all(torch.equal(t, other.packed[name].state()[key]) for key, t in packed.state().items())


def test_it_learns_what_one_group_should_be(blocks: Blocks) -> None:
    """A layer whose scales are all wrong by a third gets them back, on the codes that it has."""
    spec = QuantSpec(2, 32, metadata_bits=16)
    inputs, targets = samples(blocks)
    with blocks.placed(0) as block:
        weight = block.get_submodule("mlp.up_proj").weight.detach()
        right = quantize(weight, spec)
        wrong = quantize(1.33 * weight, spec)
        assert torch.equal(right.W_q, wrong.W_q)
        targets = targets.clone()
        exact = inputs.clone()
        blocks.advance(0, exact, 10, {"mlp.up_proj.weight": right.dequantize()})
        result = reconstruct(
            blocks,
            0,
            inputs,
            exact,
            {"mlp.up_proj": weight},
            {"mlp.up_proj": wrong},
            Training(40, 2, 3e-2, 0.0),
            torch.tensor([0]),
            torch.Generator().manual_seed(0),
        )
    assert min(result.curve) < 0.01 * result.curve[0]
    scales = [TrainedLayer(weight, packed, False)._scale for packed in (right, result.packed["mlp.up_proj"])]
    assert ((scales[1] / scales[0]).log().abs().mean()) < 0.05
