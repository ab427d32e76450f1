"""The packed backbone of a run: quantized while loading, or read from where an earlier start saved it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hqqplus import models
from hqqplus.adapters import Fingerprint, ResidualCollector, residuals_from_parent
from hqqplus.adapters.residual import Factors
from hqqplus.errors import UserError
from hqqplus.files import check_output
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.modules import observe_packing
from hqqplus.recipe import Recipe


@dataclass(frozen=True)
class Backbone:
    """A packed model, the fingerprint of it, and (where asked for) the factors of the LoRA start."""

    model: Any
    fingerprint: Fingerprint
    factors: dict[str, Factors] | None


def parent_name(recipe: Recipe) -> str | None:
    """The full-precision model behind the recipe's model; None if that is packed and does not know its parent."""
    name = recipe.model.name_or_path
    if not models.is_packed(name):
        return name
    fingerprint = Fingerprint.read(name)
    return fingerprint.base if fingerprint else None


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


def load_backbone(
    recipe: Recipe, tokenizer: Any, device: torch.device, versions: dict[str, str], residual: bool, writes: bool
) -> Backbone:
    """Bring up the packed model of `recipe` on `device`.

    Args:
        residual: also compute the factors of the residual LoRA start.
        writes: whether this process may write `quantization.save_to`.

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
    if saved is not None:
        check_output(saved, "quantization.save_to")
    if saved is not None and Path(saved).exists():
        fingerprint = _check_saved(saved, name, recipe.model.revision, config)
        if not residual:
            return Backbone(models.load_causal_lm(saved, **{**options, "revision": None}), fingerprint, None)
    if not residual:
        model, factors = models.load_causal_lm(name, quantization=config, **options), None
    else:
        collector = ResidualCollector(recipe.adapter.r)
        with observe_packing(collector):
            model = models.load_causal_lm(name, quantization=config, **options)
        factors = collector.factors
    fingerprint = models.fingerprint_of(model, name, recipe.model.revision, versions)
    if saved is not None and writes:
        models.save_packed(model, tokenizer, saved, fingerprint)
    return Backbone(model, fingerprint, factors)


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
    if not residual:
        return Backbone(model, fingerprint, None)
    if parent is None:
        raise UserError(f"adapter.init: {name} does not say what it was quantized from; use init: default")
    reader = models.parent_weights(parent, fingerprint.revision)
    return Backbone(model, fingerprint, residuals_from_parent(model, reader, recipe.adapter.r))


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
