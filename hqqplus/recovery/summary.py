"""From measurements and the trainer's log to what the report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hqqplus import models
from hqqplus.adapters import Fingerprint
from hqqplus.evaluation.report import Report, read_report
from hqqplus.modules import PackedEmbedding, PackedLinear, packed_modules
from hqqplus.recipe import Recipe, recipe_digest, to_dict
from hqqplus.recovery.measure import Measurement

STAGES = ("parent", "quantized", "recovered")
ADAPTER_FOLDER = "adapter"


def finished(output_dir: Path, recipe: Recipe) -> Report | None:
    """The report of this very recipe in `output_dir`, if nothing of the run is left to do; else None."""
    report, adapter = read_report(output_dir), output_dir / ADAPTER_FOLDER
    if report is None or report.evaluation.get("recipe_digest") != recipe_digest(recipe):
        return None
    # These change the report alone, and are no part of the digest.
    if report.recipe.get("evaluation") != to_dict(recipe)["evaluation"]:
        return None
    if not (adapter / "adapter_model.safetensors").is_file() or Fingerprint.read(adapter) is None:
        return None
    baked = recipe.recovery.scales == "bake"
    return None if baked and not models.is_packed(str(output_dir / models.PACKED_FOLDERS[0])) else report


def linear_weights(model: Any) -> int:
    """Weights of the packed linear layers and experts of `model`: those that `bits_per_weight` is an average over."""
    modules = packed_modules(model).values()
    shared = {id(module.W_q) for module in modules if isinstance(module, PackedEmbedding)}
    counted = [m for m in modules if not isinstance(m, PackedEmbedding) and id(m.W_q) not in shared]
    return sum(m.in_features * m.out_features if isinstance(m, PackedLinear) else m.weights for m in counted)


def curve(log_history: Iterable[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of every entry of the trainer's log that has `key`."""
    return [[entry["step"], entry[key]] for entry in log_history if key in entry]


def side_by_side(prompts: Sequence[str], measured: Mapping[str, Measurement | None]) -> list[dict[str, Any]]:
    """One row a prompt: the prompt and its completion at every stage that was measured."""
    return [
        {"prompt": prompt, **{stage: m.samples[i] if m else None for stage, m in measured.items()}}
        for i, prompt in enumerate(prompts)
    ]


def further_sets(names: Iterable[str], measured: Mapping[str, Measurement | None]) -> dict[str, dict[str, Any]]:
    """Perplexity of every stage on each further evaluation set."""
    return {name: {stage: m.perplexities[name] if m else None for stage, m in measured.items()} for name in names}


def how_to_load(base: str, adapter: Path) -> str:
    """The Python lines that load what the run made."""
    return f'import hqqplus\n\nmodel = hqqplus.load("{base}", adapter="{adapter}")\n'
