"""Which rank for which layer, within a number of bytes.

`allocate_ranks` goes by what each direction of a layer's residual is worth (`adapters/weighted.py`). `role_ranks`
needs no data: it gives the MLP half as much again as attention, which has more rank than it needs (RILQ,
arXiv:2412.01129); for an 8B Llama and 56.1 MB in 16 bits that is 8 and 12. `rank_pattern` says it to PEFT.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

Shape = tuple[int, int]  # (out_features, in_features)


def adapter_bytes(shapes: Mapping[str, Shape], ranks: Mapping[str, int], bytes_per_weight: int = 2) -> int:
    """The size of the LoRA weights: r (in + out) for each layer."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items()) * bytes_per_weight


def allocate_ranks(
    shapes: Mapping[str, Shape],
    energies: Mapping[str, Tensor | Sequence[float]],
    budget_bytes: int,
    *,
    bytes_per_weight: int = 2,
    minimum: int = 1,
    multiple: int = 1,
    weights: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """The ranks that together take most energy off the residuals, within `budget_bytes`.

    Directions are bought one step after another, each time the one that takes off most per byte among those that
    still can be paid. Energies fall within a layer, so this is the optimum for what is spent; where the budget ends
    in the middle of a step it is less than that step away from the optimum.

    Args:
        shapes: (out_features, in_features) of each layer.
        energies: what directions 1, 2, ... of each layer's residual take off its output error
            (`WeightedFactors.energy`), not rising. A layer gets no rank beyond their number.
        budget_bytes: for all layers together.
        minimum: rank of every layer, 0 or more, rounded up to `multiple`.
        multiple: ranks are multiples of it (and of nothing else: energies that are left over are not used).
        weights: how much a layer's energy counts, 1 by default. Outputs of layers have different units: with
            1 / tr(W M W^T) the energies are shares of each layer's output.

    Raises:
        ValueError: if the layers of the arguments differ, an energy is negative, not finite or rises, a weight is not
            a number of 0 or more, a layer has fewer energies than its minimum, or the budget is below the minimum of
            all layers; the message says which.
    """
    if minimum < 0 or multiple < 1 or bytes_per_weight < 1:
        raise ValueError(
            f"minimum is {minimum}, multiple {multiple}, bytes_per_weight {bytes_per_weight}: the first must be 0 or "
            "more, the others 1 or more"
        )
    if shapes.keys() != energies.keys():
        raise ValueError(f"shapes and energies name different layers: {sorted(shapes.keys() ^ energies.keys())[:4]}")
    start = -(-minimum // multiple) * multiple
    gains = {name: _steps(name, energies[name], start, multiple, weights) for name in shapes}
    costs = {name: sum(shape) * multiple * bytes_per_weight for name, shape in shapes.items()}
    ranks = dict.fromkeys(shapes, start)
    left = budget_bytes - adapter_bytes(shapes, ranks, bytes_per_weight)
    if left < 0:
        raise ValueError(
            f"{budget_bytes} bytes are too few: rank {start} in all {len(shapes)} layers takes {budget_bytes - left}"
        )
    # Best first; of equals the first layer.
    order = {name: index for index, name in enumerate(shapes)}
    waiting = [(-gain[0] / costs[name], order[name], name) for name, gain in gains.items() if gain]
    heapq.heapify(waiting)
    while waiting:
        _, _, name = heapq.heappop(waiting)
        # Too dear now is too dear for good.
        if costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += multiple
        done = (ranks[name] - start) // multiple
        if done < len(gains[name]):
            heapq.heappush(waiting, (-gains[name][done] / costs[name], order[name], name))
    return ranks


def role_ranks(
    shapes: Mapping[str, Shape],
    attention: Collection[str],
    budget_bytes: int,
    *,
    mlp_to_attention: float = 1.5,
    bytes_per_weight: int = 2,
) -> dict[str, int]:
    """One rank for the layers of `attention`, another for all others, as large as `budget_bytes` allow.

    The second is `mlp_to_attention` times the first, rounded to the nearest; what then is left is spent on the second.
    `attention_layers` finds the first.

    Raises:
        ValueError: if `attention` names other layers, the ratio is not positive, or the budget is too small for
            rank 1.
    """
    if unknown := sorted(set(attention) - shapes.keys()):
        raise ValueError(f"attention: {unknown[0]} is none of the layers")
    if not (math.isfinite(mlp_to_attention) and mlp_to_attention > 0):
        raise ValueError(f"mlp_to_attention is {mlp_to_attention}: it must be a positive number")

    def ranks(first: int, second: int) -> dict[str, int]:
        return {name: first if name in attention else second for name in shapes}

    def fits(first: int, second: int) -> bool:
        return adapter_bytes(shapes, ranks(first, second), bytes_per_weight) <= budget_bytes

    def partner(first: int) -> int:
        return max(1, round(first * mlp_to_attention))

    if not fits(1, 1):
        raise ValueError(
            f"{budget_bytes} bytes are too few: rank 1 takes {adapter_bytes(shapes, ranks(1, 1), bytes_per_weight)}"
        )
    highest = max((min(shape) for shape in shapes.values()), default=1)
    first = max((r for r in range(1, highest + 1) if fits(r, partner(r))), default=1)
    second = partner(first)
    while second > 1 and not fits(first, second):
        second -= 1
    while second < partner(first + 1) and fits(first, second + 1) and len(attention) < len(shapes):
        second += 1
    return ranks(first, second)


def attention_layers(model: nn.Module, names: Collection[str]) -> set[str]:
    """Those of the linear layers `names` of `model` that lie in an attention, by their attribute's or class's name.

    Raises:
        UserError: if the model has no list of decoder blocks.
    """
    # Its module needs models, which need adapters: at the top there would be a circle.
    from hqqplus.allocation import decoder_blocks, in_attention

    found = set()
    for path in decoder_blocks(model):
        block = model.get_submodule(path)
        inside = {name: name[len(path) + 1 :] for name in names if name.startswith(f"{path}.")}
        found |= {name for name, local in inside.items() if in_attention(block, local.rpartition(".")[0])}
    return found


def rank_pattern(
    ranks: Mapping[str, int], alpha_over_rank: float = 2.0, default: int | None = None
) -> tuple[dict[str, int], dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` of a `peft.LoraConfig`, with alpha / r the same everywhere.

    The keys are regular expressions that match a layer's whole name: PEFT would take `layers.1.mlp` for the end of
    `model.layers.1.mlp` too, and its dots for any letter. Layers of rank 0 are in neither: they belong in
    `exclude_modules` (`without_adapter`), since PEFT has no rank 0.

    Args:
        ranks: layer -> rank, by the names of the model that PEFT is given.
        alpha_over_rank: alpha / r; for rsLoRA, whose scaling is alpha / sqrt(r), it is not the scaling.
        default: layers of this rank are left out, `LoraConfig(r=default, lora_alpha=alpha_over_rank * default)` being
            what they get.

    Raises:
        ValueError: for a rank below 0, or a ratio that is not positive.
    """
    if wrong := [name for name, rank in ranks.items() if rank < 0]:
        raise ValueError(f"the rank of {wrong[0]} is {ranks[wrong[0]]}: it must be 0 or more")
    if not (math.isfinite(alpha_over_rank) and alpha_over_rank > 0):
        raise ValueError(f"alpha_over_rank is {alpha_over_rank}: it must be a positive number")
    named = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank > 0 and rank != default}
    alphas = {pattern: rank * alpha_over_rank for pattern, rank in named.items()}
    # PEFT's own alphas are whole numbers, and so are these where they can be.
    return named, {pattern: int(alpha) if alpha.is_integer() else alpha for pattern, alpha in alphas.items()}


def without_adapter(ranks: Mapping[str, int]) -> list[str]:
    """The layers of rank 0, as `exclude_modules` of a `peft.LoraConfig` takes them: whole names."""
    return [name for name, rank in ranks.items() if rank == 0]


def _steps(
    name: str,
    energies: Tensor | Sequence[float],
    start: int,
    multiple: int,
    weights: Mapping[str, float] | None,
) -> list[float]:
    """What each further `multiple` of directions beyond the first `start` is worth."""
    values = [float(value) for value in energies]
    weight = 1.0 if weights is None else weights.get(name, 1.0)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weights: {name} gets {weight}: it must be 0 or more")
    if len(values) < start:
        raise ValueError(f"{name} has energies of {len(values)} directions, but rank {start} at least")
    tolerance = 1e-6 * max(values, default=0.0)
    falling = all(later <= earlier + tolerance for earlier, later in itertools.pairwise(values))
    if not (all(math.isfinite(value) and value >= 0 for value in values) and falling):
        raise ValueError(f"the energies of {name} must be finite, not negative, and not rise")
    whole = range(start, len(values) - multiple + 1, multiple)
    return [weight * sum(values[first : first + multiple]) for first in whole]
