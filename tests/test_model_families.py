"""Every recipe on a small copy of its model: quantized both ways, trained for a step, saved, and loaded again.

Two recipes stand for the rest in CI, those with most that sets them apart; the others run with `make test-long`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.modules import PackedEmbedding, PackedLinear, PackedStack, packed_modules
from hqqplus.recipe import Recipe, load_recipe
from hqqplus.recovery import measure
from hqqplus.streaming import quantize_checkpoint
from hqqplus.train import run
from tests.families import FAMILIES, write_small

pytestmark = pytest.mark.slow

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
# A scaled embedding, windows and conversations; fused projections and a tied head; experts.
IN_CI = {"gemma3_1b_2bit", "phi4_mini_1bit", "qwen3_30b_a3b_2bit"}
IDS = torch.arange(3, 35).view(1, -1)


def _cases() -> Iterator[Any]:
    for path in RECIPES:
        if load_recipe(path).model.name_or_path in FAMILIES:
            marks = [] if path.stem in IN_CI else [pytest.mark.long]
            yield pytest.param(path, id=path.stem, marks=marks)


def _rows(folder: Path) -> Path:
    """Rows in the forms that the recipes have: texts and conversations."""
    rows = []
    for number in range(24):
        question, answer = f"What comes after {number}, and why?", f"After {number} comes {number + 1}, by counting."
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"text": f"{question} {answer}", "messages": talk})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _small(path: Path, folder: Path) -> Recipe:
    """The recipe, with a small copy of its model and less of everything; what it does stays."""
    name = load_recipe(path).model.name_or_path
    changes = {
        "model.name_or_path": write_small(name, folder / "parent"),
        "quantization.save_to": folder / "base",
        "data.path_or_name": _rows(folder),
        "data.split": "train",
        "data.eval_split": "null",
        "data.config_name": "null",
        "data.max_length": 64,
        "training.max_steps": 1,
        "training.gradient_accumulation_steps": 1,
        "training.warmup_steps": 0,  # it would be the only step, at a rate of 0
        "training.eval_steps": 1,
        "training.save_steps": 1,
        "training.logging_steps": 1,
        "evaluation.max_tokens": 200,
        "evaluation.max_new_tokens": 2,
        "output_dir": folder / "out",
    }
    if "num_train_epochs" in load_recipe(path).training:
        changes["training.per_device_train_batch_size"] = 2
    if load_recipe(path).calibration.method != "none":
        changes |= {"calibration.samples": 4, "calibration.length": 32, "calibration.epochs": 1}
    if load_recipe(path).adapter.budget_mb is not None:
        # Rank 1 everywhere would be more than the budget of the real one divided by its layers.
        changes["adapter.budget_mb"] = 0.02
    return load_recipe(path, [f"{key}={value}" for key, value in changes.items()])


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def _same_both_ways(recipe: Recipe, folder: Path) -> None:
    """Quantized on the disk and while loading, without calibration, the model has the same bytes."""
    config = HqqPlusConfig.from_plan(recipe.quantization.plan())
    parent = recipe.model.name_or_path
    found = quantize_checkpoint(parent, folder / "disk", config, device="cpu", quiet=True)
    assert found.streamed == (not AutoConfig.from_pretrained(parent).sub_configs)  # composed models are loaded whole
    loaded = models.load_causal_lm(parent, quantization=config, dtype="checkpoint", device="cpu")
    loaded.save_pretrained(folder / "memory")
    assert _bytes(folder / "disk") == _bytes(folder / "memory")
    assert (folder / "disk" / "config.json").read_bytes() == (folder / "memory" / "config.json").read_bytes()
    again = models.load_causal_lm(str(folder / "disk"), dtype="checkpoint", device="cpu")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    # Computed in another dtype than that of the checkpoint, as on a CPU.
    wide = models.load_causal_lm(str(folder / "disk"), dtype="float32", device="cpu")
    while_loading = models.load_causal_lm(parent, quantization=config, dtype="float32", device="cpu")
    assert torch.equal(wide(IDS).logits, while_loading(IDS).logits)


@pytest.mark.parametrize("path", _cases())
def test_a_recipe_runs_on_its_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _small(path, tmp_path)
    _same_both_ways(recipe, tmp_path)
    meters: list[measure.Meter] = []

    class Meter(measure.Meter):
        """One that can be used again."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            meters.append(self)

    monkeypatch.setattr(measure, "Meter", Meter)
    report = run(recipe)
    ends = (report.ppl_parent, report.ppl_quantized, report.ppl_recovered)
    assert all(number is None or math.isfinite(number) for number in ends)
    assert (report.ppl_parent is None) == (not recipe.evaluation.parent)

    out = tmp_path / "out"
    baked = recipe.recovery.scales == "bake"
    base = out / "backbone" if baked else tmp_path / "base"
    # Nothing but LoRA, and what the recipe trains beside it, is shipped: no embedding, no head.
    shipped = load_file(out / "adapter" / "adapter_model.safetensors")
    gains = recipe.recovery.scales == "gains"
    kinds = {name.split(".lora_")[1].split(".")[0] for name in shipped}
    assert kinds == {"A", "B", *({"gain_in", "gain_out"} if gains else ())}
    assert {tensor.dtype for tensor in shipped.values()} == {torch.bfloat16}

    # Loaded as the card says, it is the model that was measured.
    options = {"dtype": recipe.model.dtype, "device": "cpu"}
    adapted = hqqplus.load(out / "adapter", **options)
    assert meters[-1].measure(adapted, 0).perplexities["evaluation"] == report.ppl_recovered
    named = hqqplus.load(base, adapter=out / "adapter", **options)
    assert torch.equal(named(IDS).logits, adapted(IDS).logits)

    # And the base alone: written again it is the same.
    packed = hqqplus.load(base, **options)
    assert {type(module) for module in packed_modules(packed).values()} <= {PackedLinear, PackedEmbedding, PackedStack}
    logits = packed(IDS).logits
    assert not torch.equal(logits, adapted(IDS).logits)
    packed.save_pretrained(tmp_path / "again")
    again = models.load_causal_lm(str(tmp_path / "again"), **options)
    assert torch.equal(again(IDS).logits, logits)
