"""Which bits for which matrix: errors of the candidates, and the best choice within a budget.

The linearity theorem (Malinovskii et al., 2025, "Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem", arXiv 2411.17525) says that what a model loses is, to first order, a sum over its layers,

    ln PPL' - ln PPL  ~  sum over layers of a_l NMSE_l,      NMSE = ||W - Q||^2 / ||W||^2,

so that bits can be shared out by looking at each layer alone: choose one candidate a layer, such that the stored bits
stay within a budget and the sum is least. That is the multiple-choice knapsack problem. The budget is an integer and
the costs have a large common divisor, so dynamic programming over the bits solves it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqqplus.quantization.spec import QuantSpec
from hqqplus.quantization.tensor import PackedTensor, quantize

# Weights of a matrix that its error is measured on.
SAMPLE = 2**18
# Entries of the table of the dynamic programme: 224 layers of 12 candidates take about two seconds.
MAX_UNITS = 2**18


class Option(NamedTuple):
    """One way to store a layer: `cost` in bits, `loss` in any unit that adds up over layers."""

    cost: int
    loss: float


def candidate_specs(
    nbits: Iterable[int] = (1, 2, 3, 4), group_sizes: Iterable[int] = (32, 64, 128), **fields: Any
) -> tuple[QuantSpec, ...]:
    """Every pair of `nbits` and `group_sizes` as a `QuantSpec`; `fields` are its other fields, alike for all.

    Raises:
        ValueError, TypeError: for values that `QuantSpec` refuses.
    """
    return tuple(QuantSpec(bits, group, **fields) for bits, group in itertools.product(nbits, group_sizes))


def stored_bits(spec: QuantSpec, out_features: int, in_features: int) -> int:
    """Everything stored for an `[out_features, in_features]` matrix (codes with padding, metadata), in bits."""
    return round(spec.bits_per_weight(out_features, in_features) * out_features * in_features)


def sample_rows(weight: Tensor, axis: int = 1, sample: int = SAMPLE) -> Tensor:
    """Evenly spaced whole rows (axis 0: columns) of `weight` [out_features, in_features], `sample` weights or fewer.

    Groups lie within rows (columns), so those taken are quantized as they would be in the whole matrix. The same ones
    each time; at least one; all of them where the matrix is no larger.
    """
    along = 1 - axis
    lines, width = weight.shape[along], weight.shape[axis]
    count = min(lines, max(1, sample // width))
    if count == lines:
        return weight
    # The middles of `count` equal stretches.
    index = ((torch.arange(count, dtype=torch.float64) + 0.5) * (lines / count)).long()
    return weight.index_select(along, index.to(weight.device))


def measure_nmse(
    weight: Tensor,
    specs: Sequence[QuantSpec],
    sample: int = SAMPLE,
    quantizer: Callable[[Tensor, QuantSpec], PackedTensor] = quantize,
) -> tuple[float, ...]:
    """NMSE = ||W - Q||^2 / ||W||^2 of `weight` [out_features, in_features] for each of `specs`.

    A matrix of more than `sample` weights is judged by `sample_rows`. `quantizer` stands in for `quantize`.

    Raises:
        ValueError: if `weight` is not a matrix of floats, is empty, or cannot be quantized as a spec says.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a non-empty matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    errors = []
    for spec in specs:
        part = sample_rows(weight.detach(), spec.axis, sample)
        errors.append(quantizer(part, spec).nmse(part))
    return tuple(errors)


def choose(options: Sequence[Sequence[Option]], budget: int, max_units: int = MAX_UNITS) -> list[int]:
    """The index of one option per layer, such that the costs sum to `budget` or less and the losses to the least.

    Dynamic programming over the bits spent beyond the cheapest options, counted in units of their greatest common
    divisor: exact. Where that would take more than `max_units` units the unit is larger and costs are rounded up to
    it; then the result costs no more than `budget` still, and loses no more than the optimum for a budget smaller by
    one unit per layer, a unit being (dearest - cheapest total) / max_units bits. The unit does not depend on the
    budget, so a larger one never makes the loss larger. An option that costs more without losing less is never taken.

    Args:
        options: for each layer one option or more; costs are integers >= 0, losses finite.
        budget: bits.

    Returns:
        For each layer the position of its choice in `options`.

    Raises:
        ValueError: if a layer has no option, a loss is not finite, a cost is negative, or the budget is below the
            smallest possible cost; the message gives the range.
    """
    for layer, choices in enumerate(options):
        if not choices:
            raise ValueError(f"layer {layer} has no option to choose from")
        if not all(math.isfinite(option.loss) and option.cost >= 0 for option in choices):
            raise ValueError(f"layer {layer}: losses must be finite and costs 0 or more, got {list(choices)}")
    cheapest = [min(option.cost for option in choices) for choices in options]
    useful = [_undominated(choices) for choices in options]
    smallest, largest = (
        sum(cheapest),
        sum(choices[kept[-1]].cost for choices, kept in zip(options, useful, strict=True)),
    )
    if budget < smallest:
        raise ValueError(
            f"a budget of {budget} bits is below the smallest possible: these take {smallest} to {largest}"
        )
    extra = [
        [choices[index].cost - base for index in kept]
        for choices, kept, base in zip(options, useful, cheapest, strict=True)
    ]
    divisor = math.gcd(*itertools.chain.from_iterable(extra)) or 1
    unit = max(divisor, -(-(largest - smallest) // max_units))
    units = (budget - smallest) // unit
    if budget >= largest:  # the dearest of all fits, though its costs rounded up may not
        units = sum(-(-costs[-1] // unit) for costs in extra)
    # best[u]: the least loss of the layers so far for u units or fewer; picks: how it came about.
    best = torch.zeros(units + 1, dtype=torch.float64)
    picks = []
    for choices, kept, costs in zip(options, useful, extra, strict=True):
        total, pick = torch.full_like(best, math.inf), torch.zeros(units + 1, dtype=torch.int16)
        for position, (index, cost) in enumerate(zip(kept, costs, strict=True)):
            shift = -(-cost // unit)
            if shift > units:
                break
            candidate = best[: units + 1 - shift] + choices[index].loss
            better = candidate < total[shift:]
            total[shift:] = torch.where(better, candidate, total[shift:])
            pick[shift:].masked_fill_(better, position)
        best = total
        picks.append(pick)
    chosen, left = [0] * len(options), units
    for layer in reversed(range(len(options))):
        position = int(picks[layer][left])
        chosen[layer] = useful[layer][position]
        left -= -(-extra[layer][position] // unit)
    return chosen


def _undominated(choices: Sequence[Option]) -> list[int]:
    """Positions of the options for which none costs as little and loses as little; by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].loss)):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept
