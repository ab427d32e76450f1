"""The packed model of a run is what its recipe makes, or the run is refused with both values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hqqplus import models
from hqqplus.adapters import Fingerprint
from hqqplus.digests import tokenizer_digest
from hqqplus.errors import UserError
from hqqplus.recipe import Recipe, to_dict
from hqqplus.recovery.backbone import Backbone, load_backbone
from hqqplus.recovery.calibrated import Text

CPU = torch.device("cpu")


@pytest.fixture
def parent(random_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_model("llama"), tmp_path / "parent"))


@pytest.fixture
def make(parent: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(parent), "dtype": "float32"},
            "quantization": {"nbits": 2, "group_size": 32, "save_to": str(tmp_path / "base")},
            "adapter": {"r": 2, "init": "default"},
            "data": {"path_or_name": "rows.jsonl"},
            "output_dir": str(tmp_path / "out"),
        }
        for name, section in sections.items():
            if section is None:
                del values[name]
            else:
                values[name] = {**values[name], **section}
        return Recipe.model_validate(values)

    return make


def load(recipe: Recipe, allow: bool = False) -> tuple[Backbone, list[str]]:
    said: list[str] = []
    text = Text(lambda: ["a text"] * 40, models.load_tokenizer(recipe.model.name_or_path))
    return load_backbone(recipe, CPU, {"hqqplus": "0"}, text, False, said.append, allow), said


def edit_fingerprint(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "hqqplus.json").read_text())
    (folder / "hqqplus.json").write_text(json.dumps({**values, **changes}))


def edit_tensor(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors[key].view(-1)
    tensor[0] = tensor[0] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "in memory"])
def test_the_fingerprint_of_a_backbone(make: Callable[..., Recipe], parent: Path, saved: bool) -> None:
    recipe = make() if saved else make(quantization={"save_to": None})
    found = load(recipe)[0].fingerprint
    assert (found.base, found.parent_digest) == (str(parent), models.content_digest(str(parent)))
    assert (found.solver, found.template, found.data) == (1, "none", None)
    assert found.tokenizer == tokenizer_digest(models.load_tokenizer(str(parent)))


@pytest.mark.parametrize("change", ["parent", "spec", "options", "solver", "scales"])
def test_a_saved_base_of_something_else_is_refused_or_allowed(
    make: Callable[..., Recipe], parent: Path, tmp_path: Path, change: str
) -> None:
    recipe, base = make(), tmp_path / "base"
    made = load(recipe)[0].fingerprint
    assert load(recipe)[1] == []
    if change == "parent":
        edit_tensor(parent, "model.embed_tokens.weight")
        digests = made.parent_digest[:12], str(models.content_digest(str(parent)))[:12]  # type: ignore[index]
        said = (
            f"parent: {parent} with contents {digests[0]} (hqqplus.json), {parent} with contents {digests[1]} (here)"
        )
    elif change == "spec":
        recipe = make(quantization={"overrides": {"lm_head": {"nbits": 8}}})
        said = 'quantization.overrides: [] (hqqplus.json), [["lm_head", {"nbits": 8}]] (here)'
    elif change == "options":
        recipe = make(quantization={"lp_norm": 0.7})
        said = "quantization.solver.lp_norm: 2.0 (hqqplus.json), 0.7 (here)"
    elif change == "solver":
        edit_fingerprint(base, solver=0)
        said = "solver version: 0 (hqqplus.json), 1 (here)"
    else:
        edit_fingerprint(base, baked=True)
        said = "trained scales: yes (hqqplus.json), no (here)"
    before = contents(base)
    with pytest.raises(UserError) as caught:
        load(recipe)
    text = str(caught.value)
    assert text.startswith(f"quantization.save_to: {base} holds 2-bit g32 with 8-bit metadata of {parent}")
    assert f"not what this recipe makes: {said}: name another folder, or say --allow-mismatch" in text
    backbone, sentences = load(recipe, allow=True)
    assert [said in sentence for sentence in sentences] == [True]
    assert backbone.fingerprint == Fingerprint.read(base)
    assert contents(base) == before


def test_a_base_from_before_the_digests_is_used(make: Callable[..., Recipe], parent: Path, tmp_path: Path) -> None:
    load(make())
    edit_fingerprint(tmp_path / "base", **dict.fromkeys(("parent_digest", "solver", "tokenizer", "template")))
    assert load(make())[1] == []
    elsewhere = Path(shutil.copytree(parent, tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=rf"parent: {parent} \(hqqplus\.json\), {elsewhere} \(here\): name another"):
        load(make(model={"name_or_path": str(elsewhere)}))


def test_another_calibration_is_named(make: Callable[..., Recipe], tmp_path: Path) -> None:
    load(make())
    calibrated = {"method": "importance", "samples": 2, "length": 8}
    recipe = Recipe.model_validate({**to_dict(make()), "calibration": calibrated})
    said = r"another calibration, or none: calibration\.method: none \(hqqplus\.json\), importance \(here\)"
    with pytest.raises(UserError, match=said):
        load(recipe)
    assert len(load(recipe, allow=True)[1]) == 1


@pytest.mark.parametrize("change", ["tensor", "tokenizer", "template"])
def test_a_packed_model_that_was_changed_is_refused_or_allowed(
    make: Callable[..., Recipe], tmp_path: Path, change: str
) -> None:
    load(make())
    base = tmp_path / "base"
    recipe = make(model={"name_or_path": str(base)}, quantization=None)
    found, said = load(recipe)
    assert (found.fingerprint, said) == (Fingerprint.read(base), [])
    if change == "tensor":
        edit_tensor(base, "model.layers.0.mlp.up_proj.W_q")
        message = (
            r"^model\.name_or_path: .*base: this packed model is not the one that it was written as: packed weights"
        )
    elif change == "template":
        (base / "chat_template.jinja").write_text("{{ messages }}")
        message = r"base: this tokenizer is not the one that it was made with: chat template: none \(hqqplus\.json\), "
    else:
        values = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": "<s>"}))
        message = r"base: this tokenizer is not the one that it was made with: tokenizer: \w+ \(hqqplus\.json\), "
    with pytest.raises(UserError, match=message):
        load(recipe)
    assert len(load(recipe, allow=True)[1]) == 1
