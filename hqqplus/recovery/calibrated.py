"""What a run finds out with training text before it quantizes: the solutions of a calibration, or the gain."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus import models
from hqqplus.adapters.weighted import weighted_factors
from hqqplus.calibration.calibrate import Calibration, CalibrationOptions, calibrate
from hqqplus.calibration.gain import GainChoice, choose_gain
from hqqplus.calibration.store import StartFactors
from hqqplus.errors import UserError
from hqqplus.quantization import QuantPlan
from hqqplus.recipe import Recipe

# "A few thousand": the gain is one number, and more tokens choose the same.
_GAIN_TOKENS = 8192


@dataclass(frozen=True)
class Text:
    """Where samples come from: the training rows as documents, read when they are asked for."""

    documents: Callable[[], list[str]]
    tokenizer: Any


def calibration_folder(base: str | Path) -> Path:
    """Where the solutions for packed folder `base` are kept until the run ends."""
    return Path(f"{base}.calibration")


def sample_tokens(documents: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Token ids [samples, length] from all over `documents`, BOS in front of each document, drawn with `seed`.

    Documents are cut into windows that do not overlap. Each gives one, drawn at random, before any gives a second; no
    window spans documents unless they are too short, in which case they are joined.

    Raises:
        UserError: if the documents hold too few tokens.
    """
    draw = random.Random(seed)
    order = list(range(len(documents)))
    draw.shuffle(order)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    first: list[list[int]] = []
    further: list[list[int]] = []
    rest: list[int] = []
    for index in order:
        if len(first) == samples:
            break
        ids = tokenizer(documents[index], add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if ids[:1] == bos else [*bos, *ids]
        cuts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if cuts:
            first.append(cuts.pop(draw.randrange(len(cuts))))
            further += cuts
        elif len(rest) < samples * length:
            rest += ids
    draw.shuffle(further)
    joined = (rest[start : start + length] for start in range(0, len(rest) - length + 1, length))
    found = [*first, *further, *joined][:samples]
    if len(found) < samples:
        raise UserError(
            f"calibration.samples: the training rows hold {len(found)} samples of {length} tokens, {samples} are "
            "asked for: ask for fewer or shorter ones (calibration.length)"
        )
    return torch.tensor(found)


def samples_of(recipe: Recipe, text: Text) -> Tensor:
    """The samples that the recipe's calibration sees: [samples, length]."""
    section = recipe.calibration
    length = section.length or recipe.data.max_length
    return sample_tokens(text.documents(), text.tokenizer, section.samples, length, recipe.seed)


def described(recipe: Recipe, tokens: Tensor) -> dict[str, Any]:
    """What is written into the fingerprint of a calibrated base: how it was made, and with which tokens."""
    section = recipe.calibration
    settings = {name: getattr(section, name) for name in type(section).model_fields if name != "store"}
    digest = hashlib.sha256(tokens.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {**settings, "length": tokens.shape[1], "seed": recipe.seed, "tokens_sha256": digest}


def calibrate_parent(
    recipe: Recipe, plan: QuantPlan, tokens: Tensor, folder: Path, device: torch.device, start_rank: int
) -> Calibration:
    """Run the recipe's calibration, or go on with it: solutions in `folder`.

    Args:
        start_rank: rank of the activation-weighted LoRA start; 0 for none.

    Raises:
        UserError: if the parent cannot be read or run block by block, or `folder` holds something else.
    """
    section, name = recipe.calibration, recipe.model
    options = CalibrationOptions(
        method=section.method,
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.scale_learning_rate,
        weight_learning_rate=section.weight_learning_rate,
        store=section.store,
        seed=recipe.seed,
        start_rank=start_rank,
    )
    model = models.load_causal_lm(
        name.name_or_path,
        revision=name.revision,
        dtype=name.dtype if device.type == "cpu" else models.compute_dtype(name.dtype, device, "model.dtype"),
        device="cpu",
        attn_implementation=name.attn_implementation,
        trust_remote_code=name.trust_remote_code,
    )
    factors = _factors if start_rank else None
    return calibrate(model, plan, tokens, options, folder, device=device, factors=factors)


def _factors(residual: Tensor, moment: Tensor, rank: int) -> StartFactors:
    found = weighted_factors(residual, moment, rank)
    return found.a, found.b, found.energy.sqrt()


def gain_of(recipe: Recipe, plan: QuantPlan, text: Text, device: torch.device) -> GainChoice:
    """The gain exponent for the recipe's model, chosen on its training text."""
    section = recipe.model
    length = min(recipe.data.max_length, 512)
    tokens = sample_tokens(text.documents(), text.tokenizer, max(2, _GAIN_TOKENS // length), length, recipe.seed)
    return choose_gain(
        section.name_or_path,
        plan,
        tokens,
        revision=section.revision,
        dtype=section.dtype,
        device=device,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )
