"""What a run trains: LoRA, and beside it, as the recipe asks, group scales or gains, norms and biases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from hqqplus.adapters.ranks import attention_layers, rank_pattern, role_ranks
from hqqplus.adapters.scales import add_trainable_scales, load_extras, save_extras, scale_parameters
from hqqplus.errors import UserError
from hqqplus.integrations.peft import (
    add_gains,
    gain_parameters,
    norm_modules,
    targets_beside_experts,
    train_in_float32,
)
from hqqplus.integrations.trl import Extras
from hqqplus.modules import PackedLinear
from hqqplus.recipe import Adapter, Recipe
from hqqplus.recovery.processes import check_experts


def add_adapter(model: Any, recipe: Recipe) -> Any:
    """`get_peft_model` as the recipe says, with PEFT's own start: LoRA, trained norms and biases, gains.

    Raises:
        UserError: if the target modules name nothing, the output head or experts; if the byte budget is too small.
    """
    from peft import LoraConfig, get_peft_model

    section = recipe.adapter
    check_experts(model, recipe.training)
    targets = targets_beside_experts(model, section.target_modules)
    ranks, alphas = _patterns(model, section, targets)
    norms = norm_modules(model) if recipe.recovery.norms else []
    if recipe.recovery.norms and not norms:
        raise UserError(f"recovery.norms: {type(model).__name__} has no norm with a weight: set it to false")
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT divides by r or sqrt(r): a float is fine
        lora_dropout=section.lora_dropout,
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=norms or None,
        bias="all" if recipe.recovery.biases else "none",
        use_dora=section.use_dora,
        use_rslora=section.use_rslora,
        task_type="CAUSAL_LM",
    )
    head: Any = model.get_output_embeddings()
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None
    if adapted.get_base_model().get_output_embeddings() is not head:
        raise UserError(
            "adapter.target_modules: LoRA on the output head is not supported (its loss is fused): leave it out"
        )
    if recipe.recovery.scales == "gains":
        add_gains(adapted)
    train_in_float32(adapted)
    return adapted


def _patterns(model: Any, section: Adapter, targets: str | list[str]) -> tuple[dict[str, int], dict[str, Any]]:
    """`rank_pattern` and `alpha_pattern`, with alpha / r the same in all layers."""
    ratio = section.alpha / section.r
    if section.budget_mb is None:
        alphas = {pattern: rank * ratio for pattern, rank in section.rank_pattern.items()}
        return dict(section.rank_pattern), alphas
    shapes = targeted_shapes(model, targets)
    try:
        ranks = role_ranks(shapes, attention_layers(model, shapes), int(section.budget_mb * 1e6))
    except ValueError as error:
        raise UserError(f"adapter.budget_mb: {error}") from None
    return rank_pattern(ranks, ratio, section.r)


def targeted_shapes(model: Any, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the packed linear layers that LoRA will be put on."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and m is not head}
    if isinstance(targets, str):
        chosen = [name for name in layers if targets == "all-linear" or re.fullmatch(targets, name)]
    else:
        chosen = [name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)]
    return {name: (layers[name].out_features, layers[name].in_features) for name in chosen}


def train_scales(model: Any, recipe: Recipe) -> Extras | None:
    """Make the group scales of PEFT model `model` trainable where the recipe bakes them.

    Returns:
        What saves and loads them with a checkpoint, since PEFT does not.
    """
    if recipe.recovery.scales != "bake":
        return None
    offsets = recipe.recovery.offsets
    add_trainable_scales(model, None if offsets == "auto" else bool(offsets))

    def save(folder: Path) -> None:
        save_extras(model, folder, writes=PartialState().is_main_process)

    def load(folder: Path) -> None:
        load_extras(model, folder)

    return Extras(save, load)


def param_groups(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """The groups with a learning rate of their own: scales, or gains. Nothing pulls them to where they started."""
    rate = recipe.recovery.scales_learning_rate
    parameters = [*scale_parameters(model), *gain_parameters(model)]
    if rate is None or not parameters:
        return []
    return [{"params": parameters, "lr": rate, "weight_decay": 0.0}]
