"""The packed backbone of a run: quantized while loading, or read from where an earlier start saved it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hqqplus import models
from hqqplus.adapters import Fingerprint, ResidualCollector, residuals_from_parent
from hqqplus.adapters.residual import Factors
from hqqplus.errors import UserError
from hqqplus.files import check_output
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.modules import observe_packing
from hqqplus.recipe import Recipe
from hqqplus.streaming import quantize_checkpoint


@dataclass(frozen=True)
class Backbone:
    """A packed model, the fingerprint of it, and (where asked for) the factors of the LoRA start."""

    model: Any
    fingerprint: Fingerprint
    factors: dict[str, Factors] | None


def parent_of(recipe: Recipe) -> tuple[str, str | None] | None:
    """(name, revision) of the full-precision model behind the recipe's; None if that is packed and knows no parent."""
    name = recipe.model.name_or_path
    if not models.is_packed(name):
        return name, recipe.model.revision
    fingerprint = Fingerprint.read(name)
    return (fingerprint.base, fingerprint.revision) if fingerprint else None


def load_options(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The arguments of `models.load_causal_lm` that the recipe's model section settles."""
    section = recipe.model
    return {
        "revision": section.revision,
        "dtype": section.dtype,
        "device": device,
        "attn_implementation": section.attn_implementation,
        "trust_remote_code": section.trust_remote_code,
    }


def load_backbone(recipe: Recipe, device: torch.device, versions: dict[str, str], residual: bool) -> Backbone:
    """Bring up the packed model of `recipe` on `device`, by way of `quantization.save_to` where that is given.

    Args:
        residual: also compute the factors of the residual LoRA start.

    Raises:
        UserError: if the model cannot be read, if `save_to` holds something else, or if the residual start needs a
            parent that is not known.
    """
    options = load_options(recipe, device)
    name, section = recipe.model.name_or_path, recipe.quantization
    config = HqqPlusConfig.from_plan(section.plan())
    if models.is_packed(name):
        return _packed(recipe, name, config, options, versions, residual)
    saved = section.save_to
    if saved is None:
        collector = ResidualCollector(recipe.adapter.r)
        with observe_packing(collector) if residual else nullcontext():
            model = models.load_causal_lm(name, quantization=config, **options)
        fingerprint = models.fingerprint_of(model, name, recipe.model.revision, versions)
        return Backbone(model, fingerprint, collector.factors if residual else None)

    check_output(saved, "quantization.save_to")
    state = PartialState()
    # One process quantizes and writes; all of them read what it wrote.
    with state.main_process_first():
        if state.is_main_process and not Path(saved).exists():
            quantize_checkpoint(
                name,
                saved,
                config,
                revision=recipe.model.revision,
                device=device,
                trust_remote_code=recipe.model.trust_remote_code,
                versions=versions,
                where="model.name_or_path",
            )
    fingerprint = _check_saved(saved, name, recipe.model.revision, config)
    model = models.load_causal_lm(saved, **{**options, "revision": None})
    return Backbone(model, fingerprint, _factors(model, fingerprint, recipe) if residual else None)


def _factors(model: Any, fingerprint: Fingerprint, recipe: Recipe) -> dict[str, Factors]:
    reader = models.parent_weights(fingerprint.base, fingerprint.revision)
    return residuals_from_parent(model, reader, recipe.adapter.r)


def _packed(
    recipe: Recipe, name: str, config: HqqPlusConfig, options: dict[str, Any], versions: dict[str, str], residual: bool
) -> Backbone:
    model = models.load_causal_lm(name, **options)
    own = model.config.quantization_config
    if "quantization" in recipe.model_fields_set and own.plan() != config.plan():
        raise UserError(
            f"quantization: {name} is packed already, to {own.nbits} bits in groups of {own.group_size}: leave this "
            "section out, or name the parent model"
        )
    noted = Fingerprint.read(name)
    parent = noted.base if noted else None
    fingerprint = models.fingerprint_of(model, parent or name, noted.revision if noted else None, versions)
    if residual and parent is None:
        raise UserError(f"adapter.init: {name} does not say what it was quantized from; use init: default")
    return Backbone(model, fingerprint, _factors(model, fingerprint, recipe) if residual else None)


def _check_saved(saved: str, name: str, revision: str | None, config: HqqPlusConfig) -> Fingerprint:
    """The fingerprint of the packed model in folder `saved`, which must be `name` quantized as `config` says."""
    fingerprint = Fingerprint.read(saved)
    wanted = {key: value for key, value in config.to_dict().items() if key != "quant_method"}
    if fingerprint is None or not models.is_packed(saved):
        raise UserError(f"quantization.save_to: {saved} exists and is no packed model: name another folder")
    if (fingerprint.base, fingerprint.quantization) != (name, wanted) or revision not in (None, fingerprint.revision):
        raise UserError(
            f"quantization.save_to: {saved} holds {fingerprint.describe()}, not what this recipe makes: "
            "name another folder"
        )
    return fingerprint
