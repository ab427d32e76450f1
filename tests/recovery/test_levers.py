"""Whole runs with the levers of recovery: what they leave behind, and that they continue exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hqqplus
from hqqplus.adapters import Fingerprint
from hqqplus.errors import UserError
from hqqplus.modules import packed_modules
from hqqplus.recipe import Recipe
from hqqplus.train import run

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 35).view(1, -1)
ALL: dict[str, Any] = {
    "calibration": {"method": "block", "samples": 8, "length": 16, "epochs": 1},
    "adapter": {"r": 2, "init": "weighted", "lora_dropout": 0.1},
    "recovery": {"loss": "kd", "scales": "bake", "scales_learning_rate": 5e-3, "norms": True},
}


@pytest.fixture
def make(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    texts = [f"{i} is the number that comes before {i + 1}, and {i - 1} before it" for i in range(60)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(output: str = "out", **sections: Any) -> Recipe:
        training = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "save_steps": 2,
            **sections.pop("training", {}),
        }
        values: dict[str, Any] = {
            "model": {"name_or_path": str(random_model("llama")), "dtype": "float32"},
            "quantization": {"nbits": 1, "group_size": 32},
            "data": {"path_or_name": str(rows), "max_length": 64},
            "training": training,
            "evaluation": {"max_tokens": 300},
            "output_dir": str(tmp_path / output),
            **sections,
        }
        return Recipe.model_validate(values)

    return make


def tensors(recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    output = Path(recipe.output_dir)
    folders = {"adapter": "adapter_model.safetensors", "backbone": "model.safetensors"}
    return {name: load_file(output / name / file) for name, file in folders.items() if (output / name).is_dir()}


def test_all_levers_together(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(**ALL)
    report = run(recipe)
    output = Path(recipe.output_dir)
    assert {path.name for path in output.iterdir()} >= {"adapter", "backbone", "base"}
    assert not (output / "base.calibration").exists()
    base, baked = Fingerprint.read(output / "base"), Fingerprint.read(output / "backbone")
    adapter = Fingerprint.read(output / "adapter")
    assert base is not None
    assert baked is not None
    assert baked.baked
    assert baked == adapter
    assert baked.packed_sha256 != base.packed_sha256
    assert baked.calibration == base.calibration
    stored = tensors(recipe)
    assert sum(t.numel() for t in stored["adapter"].values()) == report.adapter_parameters
    assert any("norm" in name for name in stored["adapter"])
    # Codes are frozen, scales are not, and the report's figure is that of what is loaded.
    before = load_file(output / "base" / "model.safetensors")
    codes = [name for name in before if name.endswith("W_q")]
    assert all(torch.equal(before[name], stored["backbone"][name]) for name in codes)
    assert any(not torch.equal(before[name[:-3] + "scale"], stored["backbone"][name[:-3] + "scale"]) for name in codes)
    model = hqqplus.load(str(output / "backbone"), adapter=str(output / "adapter"), dtype="float32", device="cpu")
    assert report.ppl_recovered == pytest.approx(perplexity_of(recipe, model), rel=1e-12)
    alone = hqqplus.load(output / "adapter", dtype="float32", device="cpu")  # finds the folder beside it
    assert torch.equal(alone(IDS).logits, model(IDS).logits)
    (output / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"no quantizing of .* brings back \(its scales were trained\): name the packed"
    ):
        hqqplus.load(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(output / "adapter")
    with pytest.raises(UserError, match=r"scales trained.*but the base is"):
        hqqplus.load(str(output / "base"), adapter=str(output / "adapter"))
    log = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert all({"kl", "ce", "hidden"} <= entry.keys() for entry in log if "loss" in entry)


def perplexity_of(recipe: Recipe, model: Any) -> float:
    from hqqplus import models
    from hqqplus.evaluation.perplexity import make_windows, perplexity
    from hqqplus.recovery import setup

    tokenizer = models.load_tokenizer(recipe.model.name_or_path)
    texts = setup.load_data(recipe, tokenizer, lambda text: None).texts[setup.EVALUATION_SET]
    windows = make_windows(texts, tokenizer, recipe.data.max_length, recipe.evaluation.max_tokens)
    return perplexity(model, windows, recipe.evaluation.batch_size).perplexity


# With distillation and trained scales tests/faults does it.
@pytest.mark.parametrize("recovery", [{"scales": "gains", "biases": True}], ids=["gains"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(make: Callable[..., Recipe], recovery: dict[str, Any]) -> None:
    from hqqplus.recovery.checkpoints import checkpoint_folder

    whole = make("whole", **{**ALL, "recovery": recovery})
    run(whole)
    expected = tensors(whole)
    # What a process killed after step 2 leaves.
    import shutil

    broken = make("broken", **{**ALL, "recovery": recovery})
    run(broken)
    output = Path(broken.output_dir)
    shutil.rmtree(checkpoint_folder(output, 4))
    (output / "report.json").unlink()
    for name in ("adapter", "backbone"):
        shutil.rmtree(output / name, ignore_errors=True)
    run(broken)
    found = tensors(broken)
    assert found.keys() == expected.keys()
    for part, state in expected.items():
        assert found[part].keys() == state.keys()
        assert all(torch.equal(found[part][name], tensor) for name, tensor in state.items()), part


def test_a_cached_teacher_is_computed_before_quantizing(
    make: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"loss": "kd", "teacher": "cache", "hidden_weight": 0, "top_k": 16}
    recipe = make(recovery=section, quantization={"nbits": 2, "group_size": 32, "save_to": None})
    report = run(recipe)
    cache = Path(recipe.output_dir) / "teacher"
    assert json.loads((cache / "manifest.json").read_text())["k"] == 16
    said = capsys.readouterr().out
    assert said.index("computing the teacher's targets") < said.index("quantized to")
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    online = run(
        make("online", recovery={**section, "teacher": "online"}, quantization={"nbits": 2, "group_size": 32})
    )
    assert report.ppl_recovered == pytest.approx(online.ppl_recovered, rel=0.05)
    # Another run with the same data and parent reads it.
    again = make(
        "again", recovery={**section, "teacher_cache": str(cache)}, quantization={"nbits": 2, "group_size": 32}
    )
    assert run(again).ppl_recovered == report.ppl_recovered
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written


def test_gains_ship_in_the_adapter(make: Callable[..., Recipe]) -> None:
    recipe = make(recovery={"scales": "gains", "scales_learning_rate": 1e-2})
    report = run(recipe)
    output = Path(recipe.output_dir)
    assert not (output / "backbone").exists()
    gains = {name: t for name, t in tensors(recipe)["adapter"].items() if "lora_gain" in name}
    assert len(gains) == 28
    assert any(t.any() for t in gains.values())
    model = hqqplus.load(str(output / "adapter"), dtype="float32", device="cpu")
    assert len(packed_modules(model)) == 14
    assert report.ppl_recovered == pytest.approx(perplexity_of(recipe, model), rel=1e-12)
