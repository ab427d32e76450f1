"""The packed backbone of a run: quantized while loading, or read from where an earlier start saved it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hqqplus import models
from hqqplus.adapters import Fingerprint, ResidualCollector, residuals_from_parent
from hqqplus.adapters.fingerprint import (
    CONTENTS,
    FILE_NAME,
    PACKED,
    PARENT,
    REVISION,
    SCALES,
    SOLVER,
    check_tokenizer,
    differences,
    flattened,
    quantization_identity,
    settle,
)
from hqqplus.adapters.residual import Factors
from hqqplus.calibration.calibrate import Calibration
from hqqplus.errors import UserError
from hqqplus.evaluation.layers import LayerCollector, Layers, read_layers
from hqqplus.files import check_output
from hqqplus.integrations.transformers import HqqPlusConfig
from hqqplus.modules import model_bytes, observe_packing
from hqqplus.modules.replace import Solutions, packed_already
from hqqplus.quantization.solver import SOLVER_VERSION
from hqqplus.recipe import Recipe
from hqqplus.recovery.calibrated import Text, calibrate_parent, calibration_folder, described, gain_of, samples_of
from hqqplus.recovery.costs import Timed, untimed
from hqqplus.recovery.processes import is_sharded
from hqqplus.streaming import quantize_checkpoint
from hqqplus.streaming.partial import remove_rest

Judge = Callable[[str, Sequence[str], str], None]
"""What `settle` does with a head, differences and a way out: it refuses, or says what is allowed."""


@dataclass(frozen=True)
class Backbone:
    """A packed model, the fingerprint of it, and (where asked for) the factors of the LoRA start.

    `layers`: how well each layer came out, where that is known: of a packed folder, what lies in it.
    """

    model: Any
    fingerprint: Fingerprint
    factors: dict[str, Factors] | None = None
    layers: Layers | None = None


def parent_of(recipe: Recipe) -> tuple[str, str | None] | None:
    """(name, revision) of the full-precision model behind the recipe's; None if that is packed and knows no parent."""
    name = recipe.model.name_or_path
    if not models.is_packed(name):
        return name, recipe.model.revision
    fingerprint = Fingerprint.read(name)
    if fingerprint is None or fingerprint.converted:  # from one that is packed itself
        return None
    return fingerprint.base, fingerprint.revision


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


def _packed_options(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The arguments for a packed folder that is going to be trained.

    Where it will be sharded it stays in CPU memory, where the processes of a machine map the same files, and each
    later copies its own share to its device: no device ever holds the whole.
    """
    options = load_options(recipe, device)
    if is_sharded(recipe.training, PartialState()):
        dtype = models.compute_dtype(recipe.model.dtype, device, "model.dtype")
        options |= {"device": torch.device("cpu"), "dtype": dtype}
    return options


def load_backbone(
    recipe: Recipe,
    device: torch.device,
    versions: dict[str, str],
    text: Text,
    start: bool,
    say: Callable[[str], None],
    allow_mismatch: bool = False,
    timed: Timed = untimed,
) -> Backbone:
    """Bring up the packed model of `recipe` on `device`, by way of `quantization.save_to` where that is given.

    Args:
        text: for what is found out before quantizing (`calibrated.py`).
        start: also compute the factors of the LoRA start that the recipe names.
        allow_mismatch: take a packed model that is not what the recipe makes, and say so.
        timed: notes what calibrating and quantizing cost.

    Raises:
        UserError: if the model cannot be read, if `save_to` holds something else, if a packed model is not what its
            `hqqplus.json` says, or if the start needs a parent that is not known.
    """

    def judge(head: str, changes: Sequence[str], way_out: str) -> None:
        for sentence in settle(head, changes, way_out, allow_mismatch):
            say(sentence)

    name, section = recipe.model.name_or_path, recipe.quantization
    residual = start and recipe.adapter.init == "residual"
    if models.is_packed(name):
        for key, used in (
            ("calibration.method", recipe.calibration.method != "none"),
            ("quantization.gain", section.gain == "auto"),
        ):
            if used:
                raise UserError(f"{key}: {name} is packed already, and this looks at weights: name the parent model")
        # As it lies there: by now the run's own may have the template of the recipe.
        known: dict[str, Any] = {
            "revision": recipe.model.revision,
            "trust_remote_code": recipe.model.trust_remote_code,
        }
        own = models.load_tokenizer(name, **known)
        for sentence in check_tokenizer(own, models.resolve_name(name), allow_mismatch):
            say(sentence)
        plan = HqqPlusConfig.from_plan(recipe.quantization.plan())
        backbone = _packed(recipe, name, plan, device, versions, residual, judge)
        return replace(backbone, fingerprint=backbone.fingerprint.with_tokenizer(text.tokenizer))
    if recipe.calibration.method != "none":
        return _calibrated(recipe, device, versions, text, start, judge, timed)
    config = _config(recipe, device, text, say, timed)
    options = load_options(recipe, device)
    saved = section.save_to
    if saved is None:
        collector, compared = ResidualCollector(recipe.adapter.start_rank), LayerCollector()
        writes = PartialState().is_main_process
        with (
            timed("quantize"),
            observe_packing(collector) if residual else nullcontext(),
            observe_packing(compared) if writes else nullcontext(),
        ):
            model = models.load_causal_lm(name, quantization=config, **options)
        layers = compared.layers(_title(name, config), model, model_bytes(model)) if writes else None
        revision, tokenizer = recipe.model.revision, text.tokenizer
        fingerprint = models.fingerprint_of(model, name, revision, versions, tokenizer=tokenizer)
        return Backbone(model, fingerprint, collector.factors if residual else None, layers)
    fingerprint = _save(recipe, saved, config, device, versions, judge, timed)
    model = models.load_causal_lm(saved, **{**_packed_options(recipe, device), "revision": None})
    factors = _factors(model, fingerprint, recipe) if residual else None
    return Backbone(model, fingerprint, factors, read_layers(saved))


def _title(name: str, config: HqqPlusConfig) -> str:
    group = "row" if config.group_size == -1 else config.group_size
    return f"{name}, {config.nbits}-bit g{group}"


def base_folder(recipe: Recipe) -> str | None:
    """Where the packed model of the recipe lies; a calibrated one always lies somewhere."""
    saved = recipe.quantization.save_to
    if saved is None and recipe.calibration.method != "none":
        return str(Path(recipe.output_dir) / "base")
    return saved


def _config(
    recipe: Recipe, device: torch.device, text: Text, say: Callable[[str], None], timed: Timed
) -> HqqPlusConfig:
    """The recipe's quantization, its gain chosen where that is `auto`: once, if the packed model is saved."""
    section = recipe.quantization
    if section.gain != "auto":
        return HqqPlusConfig.from_plan(section.plan())
    noted = Fingerprint.read(section.save_to) if section.save_to else None
    solver = noted.quantization.get("solver") if noted is not None else None
    if isinstance(solver, dict) and isinstance(gain := solver.get("gain"), int | float):
        return HqqPlusConfig.from_plan(section.plan(gain))
    with timed("calibrate"):
        choice = gain_of(recipe, section.plan(), text, device)
    tried = ", ".join(f"{gamma:g}: {kl:.3f}" for gamma, kl in choice.kl.items())
    say(f"quantization.gain: {choice.gamma:g} (KL to the parent by gain, {choice.tokens:,} tokens: {tried})")
    return HqqPlusConfig.from_plan(section.plan(choice.gamma))


def _save(
    recipe: Recipe,
    saved: str,
    config: HqqPlusConfig,
    device: torch.device,
    versions: dict[str, str],
    judge: Judge,
    timed: Timed,
    calibration: dict[str, Any] | None = None,
    solve: Callable[[], Solutions] | None = None,
) -> Fingerprint:
    """Quantize the recipe's model to folder `saved`, unless it is there already; returns its fingerprint.

    Args:
        calibration: what the fingerprint says of it, and `solve`, which runs it.
    """
    name, section = recipe.model.name_or_path, recipe.model
    check_output(saved, "quantization.save_to")
    state = PartialState()
    # One process quantizes and writes; all of them read what it wrote.
    with state.main_process_first():
        if state.is_main_process and Path(saved).exists():
            remove_rest(Path(saved))
        elif state.is_main_process:
            solutions = None
            if solve is not None:
                with timed("calibrate"):
                    solutions = solve()
            with timed("quantize"), packed_already(solutions) if solutions is not None else nullcontext():
                quantize_checkpoint(
                    name,
                    saved,
                    config,
                    revision=section.revision,
                    device=device,
                    trust_remote_code=section.trust_remote_code,
                    versions=versions,
                    calibration=calibration,
                    where="model.name_or_path",
                )
    return _check_saved(saved, name, section.revision, config, calibration, judge)


def _calibrated(
    recipe: Recipe, device: torch.device, versions: dict[str, str], text: Text, start: bool, judge: Judge, timed: Timed
) -> Backbone:
    saved = base_folder(recipe)
    assert saved is not None
    tokens = samples_of(recipe, text)
    plan, folder = recipe.quantization.plan(), calibration_folder(saved)
    rank = recipe.adapter.start_rank if recipe.adapter.init == "weighted" else 0

    def solve() -> Calibration:
        return calibrate_parent(recipe, plan, tokens, folder, device, rank)

    config = HqqPlusConfig.from_plan(plan)
    how = described(recipe, tokens)
    fingerprint = _save(recipe, saved, config, device, versions, judge, timed, how, lambda: solve().solutions)
    model = models.load_causal_lm(saved, **{**_packed_options(recipe, device), "revision": None})
    layers = read_layers(saved)
    if not start or recipe.adapter.init == "default":
        return Backbone(model, fingerprint, None, layers)
    if recipe.adapter.init == "residual":
        return Backbone(model, fingerprint, _factors(model, fingerprint, recipe), layers)
    state = PartialState()
    with state.main_process_first():  # nothing is left to solve: what was found is read
        found = solve().factors
    return Backbone(model, fingerprint, {name: (a, b) for name, (a, b, _) in found.items()}, layers)


def _factors(model: Any, fingerprint: Fingerprint, recipe: Recipe) -> dict[str, Factors]:
    reader = models.parent_weights(fingerprint.base, fingerprint.revision)
    return residuals_from_parent(model, reader, recipe.adapter.start_rank)


def _packed(
    recipe: Recipe,
    name: str,
    config: HqqPlusConfig,
    device: torch.device,
    versions: dict[str, str],
    residual: bool,
    judge: Judge,
) -> Backbone:
    model = models.load_causal_lm(name, **_packed_options(recipe, device))
    own = model.config.quantization_config
    if "quantization" in recipe.model_fields_set and own.plan() != config.plan():
        raise UserError(
            f"quantization: {name} is packed already, to {own.nbits} bits in groups of {own.group_size}: leave this "
            "section out, or name the parent model"
        )
    noted = Fingerprint.read(models.resolve_name(name))
    parent = noted.base if noted else None
    fingerprint = models.fingerprint_of(model, parent or name, noted.revision if noted else None, versions)
    # Neither the parent nor this solver was at work here.
    fingerprint = replace(fingerprint, parent_digest=None, solver=None)
    if noted is not None:
        changes = differences({PACKED: noted.packed_sha256}, {PACKED: fingerprint.packed_sha256}, FILE_NAME)
        head = f"model.name_or_path: {name}: this packed model is not the one that it was written as"
        judge(head, changes, "fetch or quantize it anew")
        kept = ("baked", "calibration", "parent_digest", "solver", "converted")
        fingerprint = replace(fingerprint, **{field: getattr(noted, field) for field in kept})
    if residual and parent is None:
        raise UserError(f"adapter.init: {name} does not say what it was quantized from; use init: default")
    if residual and fingerprint.converted:
        raise UserError(
            f"adapter.init: {name} was converted, the weights before its quantization are not known; use init: default"
        )
    factors = _factors(model, fingerprint, recipe) if residual else None
    return Backbone(model, fingerprint, factors, read_layers(models.resolve_name(name)))


def _check_saved(
    saved: str,
    name: str,
    revision: str | None,
    config: HqqPlusConfig,
    calibration: dict[str, Any] | None,
    judge: Judge,
) -> Fingerprint:
    """The fingerprint of the packed model in folder `saved`, which must be `name` quantized as `config` says."""
    found = Fingerprint.read(saved)
    wanted = {key: value for key, value in config.to_dict().items() if key != "quant_method"}
    if found is None or not models.is_packed(saved):
        raise UserError(f"quantization.save_to: {saved} exists and is no packed model: name another folder")
    contents = models.content_digest(name, revision)
    known = {PARENT: name, REVISION: revision, CONTENTS: contents, SOLVER: str(SOLVER_VERSION), SCALES: "no"}
    here = {key: value for key, value in known.items() if value is not None}
    changes = differences(found.identity(), here, FILE_NAME)
    if found.base != name and not (contents and found.parent_digest and contents != found.parent_digest):
        # A copy of the parent would make the same, but not under the name that adapters will look for.
        changes.insert(0, f"{PARENT}: {found.base} ({FILE_NAME}), {name} (here)")
    changes += _complete_differences(quantization_identity(found.quantization), quantization_identity(wanted))
    head = f"quantization.save_to: {saved} holds {found.describe()}, not what this recipe makes"
    judge(head, changes, "name another folder")
    noted, here = (flattened(how or {"method": "none"}, "calibration") for how in (found.calibration, calibration))
    changes = (
        _complete_differences(noted, here)
        if found.calibration and calibration
        else differences(noted, here, FILE_NAME)
    )
    head = f"quantization.save_to: {saved} was quantized with another calibration, or none"
    judge(head, changes, "name another folder")
    return found


def _complete_differences(stored: dict[str, str], here: dict[str, str]) -> list[str]:
    """`differences` between two sides that know everything: what one of them lacks is not set there."""
    names = dict.fromkeys([*stored, *here], "not set")
    return differences({**names, **stored}, {**names, **here}, FILE_NAME)
