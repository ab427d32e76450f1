"""Block-wise reconstruction: what a block's linear layers are quantized to, trained by gradient (`reconstruct`).

For each layer, in groups of weights W with stored scale s and middle m (the centre of the group's levels),

    W~ = m + s (q - qmax / 2)        q = clamp(round((W - m) / s + qmax / 2), 0, qmax)

and minimised is the squared error of the block's output on the inputs that it will really get (they come through the
quantized blocks before it) against the full-precision block's output on full-precision inputs, over the energy of the
latter. Block-AP of EfficientQAT (arXiv 2407.11062), OmniQuant (2308.13137) and ApiQ (2402.05147) are of this family.

Trained are, by Adam,

- log s and m, the latter in units of its group's first s. Their gradients are those of W~ with q held fixed, which is
  linear in both;
- as an option W, in the same units, whose rounding changes q as it passes a boundary. Rounding is passed straight
  through: dW~ / dW = 1, as long as W is not more than `reach` steps outside the outer levels. A reach of half a step
  is what differentiating the clamp gives; at one bit a tenth of all weights lie beyond it and never flip. Here it has
  no bound.

All three are relative to s, so a learning rate means the same for all layers, widths and models.

What is trained is what is stored: s and m pass through the rounding of the metadata (16-bit floats, or 8-bit codes
under maps that are fitted anew in each step), and their gradients straight through that. After each epoch the state is
packed and measured on samples that were not trained on. The best is returned, which may be the start.

Memory on a device, for a block of Llama-3-8B (218 M weights, bfloat16): weights 0.44 GB, W~ and its gradient 0.44
each, codes 0.22; where W is trained, float32 W, its gradient and two moments of Adam, 0.87 GB each; beside that the
activations of one batch, as in any training of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqplus.calibration.blocks import Blocks
from hqqplus.quantization import PackedTensor
from hqqplus.quantization.metadata import (
    decode,
    decode_values,
    encode,
    fit_maps,
    metadata_dtype,
    metadata_views,
    to_storage,
)
from hqqplus.quantization.packing import pack, unpack

_BETAS = (0.9, 0.95)
# Of all steps, those in which the rates rise.
_WARM_UP = 0.05
# How far from the boundary of its code's cell a weight begins, in steps, that a solver has moved to another code.
_MARGIN = 0.05


@dataclass(frozen=True)
class Training:
    """How a block is trained.

    Args:
        epochs: passes over the samples.
        batch_size: samples of a step.
        learning_rate: of log s, and of m in units of s.
        weight_learning_rate: of the weights in units of s; 0 leaves the codes as they are.
        reach: how many steps outside the outer levels a weight may lie and still be moved.
    """

    epochs: int = 4
    batch_size: int = 4
    learning_rate: float = 5e-3
    weight_learning_rate: float = 3e-2
    reach: float = math.inf


@dataclass(frozen=True)
class Reconstruction:
    """What came of it.

    Attributes:
        packed: the layers of the block, by their names in it.
        curve: the loss on the held-out samples, at the start and after each epoch; that of `packed` is the least.
    """

    packed: dict[str, PackedTensor]
    curve: tuple[float, ...]


class TooLarge(ValueError):
    """Scale or middle have left the range of the type that they are stored in."""


class TrainedLayer:
    """One linear layer in training, from what a solver made of it.

    Args:
        weight: [out_features, in_features] in full precision, on the device.
        start: what it is quantized to, to begin with.
        train_codes: whether the weights are trained.
        reach: as in `Training`.

    Attributes:
        log_scale, shift: [rows, groups], what is trained of s and m: s = s0 exp(log_scale), m = m0 + s0 shift.
        latent: [rows, groups, group], the weights as (W - m0) / s0; None where they are not trained. In constant
            groups, whose s0 is 0, nothing is trained.
    """

    def __init__(self, weight: Tensor, start: PackedTensor, train_codes: bool, reach: float = math.inf) -> None:
        spec = start.spec
        self._spec, self._shape, self._reach = spec, start.shape, reach
        self._layout = layout = spec.layout(*start.shape)
        self._half = spec.qmax / 2
        views = metadata_views(start.scale, start.offset, start.blocks, spec.metadata_dtype)
        scale, offset = (values.to(weight.device) for values in decode(*views, spec.qmax))
        self._scale, self._middle = scale, offset + scale * self._half  # s0 and m0 [rows, groups]
        codes = unpack(start.W_q, spec.nbits, layout.plane).to(weight.device)
        self._codes = codes.view(layout.rows, layout.groups, layout.group)
        self.log_scale = torch.zeros_like(scale, requires_grad=True)
        self.shift = torch.zeros_like(scale, requires_grad=True)
        self.latent = self._cells(weight).requires_grad_() if train_codes else None

    def _cells(self, weight: Tensor) -> Tensor:
        """The weights [rows, groups, group] in units of their grids, each within the cell of its code.

        A solver may have reasons to choose another code than the nearest; its weight begins just inside that cell.
        """
        layout, spec = self._layout, self._spec
        matrix = (weight if spec.axis == 1 else weight.t()).float()
        matrix = torch.nn.functional.pad(matrix, (0, layout.padded - layout.width))
        groups = matrix.reshape(layout.rows, layout.groups, layout.group)
        step = torch.where(self._scale > 0, self._scale, torch.inf).unsqueeze(-1)
        level, inside = self._codes.float() - self._half, 0.5 - _MARGIN
        low = torch.where(self._codes > 0, level - inside, -torch.inf)
        high = torch.where(self._codes < spec.qmax, level + inside, torch.inf)
        return ((groups - self._middle.unsqueeze(-1)) / step).clamp_(min=low, max=high)

    def weight(self) -> Tensor:
        """[out_features, in_features], float32, as it would be stored now; gradients flow."""
        scale, middle = self._grid()
        with torch.no_grad():
            kept_scale, kept_middle, _ = self._rounded(scale, middle)
            codes, alive = self._round(kept_scale, kept_middle)
        scale, middle = scale + (kept_scale - scale).detach(), middle + (kept_middle - middle).detach()
        levels = _Levels.apply(scale, middle, self.latent, codes, alive, self._scale, self._half)
        matrix = levels.flatten(1)[:, : self._layout.width]
        return matrix if self._spec.axis == 1 else matrix.t()

    @torch.no_grad()
    def pack(self) -> PackedTensor:
        """As it would be stored now."""
        scale, middle, stored = self._rounded(*self._grid())
        codes = self._round(scale, middle)[0].flatten(1).clone()
        codes[:, self._layout.width :] = 0
        packed = pack(codes, self._spec.nbits, self._layout.plane)
        blocks = stored[2] if len(stored) > 2 else None
        return PackedTensor(packed, stored[0], stored[1], self._spec, self._shape, blocks)

    def _grid(self) -> tuple[Tensor, Tensor]:
        return self._scale * self.log_scale.exp(), self._middle + self._scale * self.shift

    def _rounded(self, scale: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scale and middle [rows, groups] -> the same as they can be stored, and the stored tensors.

        Raises:
            TooLarge: if they cannot.
        """
        name, shape = self._spec.metadata_dtype, scale.shape
        if self._spec.metadata_bits == 16:
            dtype = metadata_dtype(name)
            kept = scale.to(dtype)
            offset = (middle - kept.float() * self._half).to(dtype)
            if not (torch.isfinite(kept).all() and torch.isfinite(offset).all()):
                raise TooLarge
            centre = offset.float() + kept.float() * self._half
            return kept.float(), centre, (to_storage(kept), to_storage(offset))
        try:
            maps = [fit_maps(values.flatten(), name) for values in (scale, middle)]
        except ValueError as error:
            raise TooLarge from error
        codes = [encode(values.flatten(), m) for values, m in zip((scale, middle), maps, strict=True)]
        kept, centre = (decode_values(c, m).view(shape) for c, m in zip(codes, maps, strict=True))
        return kept, centre, (codes[0].view(shape), codes[1].view(shape), to_storage(torch.cat(maps, 1)))

    def _round(self, scale: Tensor, middle: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scale and middle -> codes [rows, groups, group] (uint8), and which of the weights can be moved."""
        if self.latent is None:
            return self._codes, None
        values = torch.addcmul(self._middle.unsqueeze(-1), self._scale.unsqueeze(-1), self.latent.detach())
        step = torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
        place = values.sub_(middle.unsqueeze(-1)).div_(step).add_(self._half)  # in steps from code 0
        alive = None
        if self._reach != math.inf:
            alive = (place >= -self._reach) & (place <= self._spec.qmax + self._reach)
        return place.round_().clamp_(0, self._spec.qmax).to(torch.uint8), alive


class _Levels(torch.autograd.Function):
    """middle + scale (codes - half): scale and middle [rows, groups], codes [rows, groups, group] (uint8).

    The gradient of `latent` [rows, groups, group], from which the codes were rounded in units of `unit` [rows,
    groups], is that of the levels where it is `alive`. Nothing in float32 of the size of the weights is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        middle: Tensor,
        latent: Tensor | None,
        codes: Tensor,
        alive: Tensor | None,
        unit: Tensor,
        half: float,
    ) -> Tensor:
        ctx.save_for_backward(codes, alive, unit)
        ctx.half = half
        return torch.addcmul(middle.unsqueeze(-1), codes.to(scale.dtype) - half, scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, alive, unit = ctx.saved_tensors
        by_scale = (gradient * (codes.to(gradient.dtype) - ctx.half)).sum(-1)
        by_latent = None
        if ctx.needs_input_grad[2]:
            by_latent = gradient * unit.unsqueeze(-1)
            by_latent = by_latent if alive is None else by_latent * alive
        return by_scale, gradient.sum(-1), by_latent, None, None, None, None


def reconstruct(
    blocks: Blocks,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    weights: Mapping[str, Tensor],
    start: Mapping[str, PackedTensor],
    training: Training,
    held_out: Tensor,
    generator: torch.Generator,
    watch: Callable[[str], None] = lambda text: None,
) -> Reconstruction:
    """Train what the layers of block `index`, which is placed, are quantized to.

    On a CPU the outcome depends on nothing but the arguments.

    Args:
        inputs, targets: [samples, length, width] what the block gets and what it should return, in its dtype; batches
            of them are brought to the device.
        weights: name of a layer within the block -> its full-precision weight, on the device.
        start: the same names -> what they are quantized to, to begin with.
        held_out: numbers of the samples that are measured on and not trained on.
        generator: for the order of the others.
        watch: told after each epoch how it went.

    Training that leads nowhere, or out of the range of the metadata, ends, and does no harm.
    """
    trained = torch.ones(len(inputs), dtype=torch.bool).index_fill_(0, held_out, False).nonzero().squeeze(1)
    size, device = training.batch_size, blocks.device

    def measured(packed: Mapping[str, PackedTensor]) -> float:
        return block_loss(blocks, index, inputs, targets, held_out, size, packed)

    best, curve = dict(start), [measured(start)]
    train_codes = training.weight_learning_rate > 0
    layers = {name: TrainedLayer(weights[name], p, train_codes, training.reach) for name, p in start.items()}
    optimizer, schedule = _optimizer(layers.values(), training, training.epochs * -(-len(trained) // size))
    # A sum over the elements in units of their mean square, not a mean: gradients of single groups would be so small
    # that Adam's epsilon counts, and those in float16 would be zero.
    energy = sum(float(targets[i].double().square().mean()) for i in trained.tolist()) / len(trained)
    for epoch in range(training.epochs):
        order = trained[torch.randperm(len(trained), generator=generator)]
        try:
            for batch in order.split(size):
                given = {f"{name}.weight": layer.weight().to(inputs.dtype) for name, layer in layers.items()}
                output = blocks.run(index, inputs[batch].to(device), given)
                loss = (output.float() - targets[batch].to(device).float()).square().sum() / max(energy, 1e-30)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            packed = {name: layer.pack() for name, layer in layers.items()}
        except TooLarge:
            watch("the metadata have become too large for their type: no further training")
            break
        curve.append(measured(packed))
        # A loss that is not finite is not below any other; later ones would not be finite either.
        if not math.isfinite(curve[-1]):
            break
        if curve[-1] < min(curve[:-1]):
            best = packed
        watch(f"epoch {epoch + 1} of {training.epochs}, loss {curve[-1]:.4g}")
    return Reconstruction(best, tuple(curve))


def _optimizer(layers: Iterable[TrainedLayer], training: Training, steps: int) -> tuple[Any, Any]:
    """Adam over what is trained of `layers`, and its schedule: a short rise, then half a cosine to zero."""
    layers = list(layers)
    grids = [parameter for layer in layers for parameter in (layer.log_scale, layer.shift)]
    groups: list[dict[str, Any]] = [{"params": grids, "lr": training.learning_rate}]
    if latents := [layer.latent for layer in layers if layer.latent is not None]:
        groups.append({"params": latents, "lr": training.weight_learning_rate})
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=grids[0].is_cuda)
    warm = max(1, round(steps * _WARM_UP))

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def block_loss(
    blocks: Blocks,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    samples: Tensor,
    batch_size: int,
    packed: Mapping[str, PackedTensor],
) -> float:
    """||block(inputs) - targets||^2 / ||targets||^2 over `samples`, with the layers of `packed` as they are stored."""
    weights = {f"{name}.weight": p.dequantize(inputs.dtype).to(blocks.device) for name, p in packed.items()}
    error = energy = 0.0
    for batch in samples.split(batch_size):
        wanted = targets[batch].to(blocks.device).float()
        output = blocks.run(index, inputs[batch].to(blocks.device), weights).float()
        error += float((output - wanted).square().sum(dtype=torch.float64))
        energy += float(wanted.square().sum(dtype=torch.float64))
    return error / energy if energy > 0 else (0.0 if error == 0 else math.inf)
