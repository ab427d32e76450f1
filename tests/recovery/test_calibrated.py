"""What is found out with training text before quantizing: samples, a calibrated base, a gain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.adapters import Fingerprint
from hqqplus.errors import UserError
from hqqplus.modules import packed_modules
from hqqplus.recipe import Recipe
from hqqplus.recovery.backbone import base_folder, load_backbone
from hqqplus.recovery.calibrated import Text, calibration_folder, described, sample_tokens, samples_of

CPU = torch.device("cpu")
DOCUMENTS = [f"{i} is {'long ' * (5 + i)}a document" for i in range(30)] + ["x", "yes", "no"]


@pytest.fixture
def make(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))

    def make(**sections: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"name_or_path": str(random_model("llama")), "dtype": "float32"},
            "quantization": {"nbits": 2, "group_size": 32},
            "calibration": {"method": "block", "samples": 8, "length": 16, "epochs": 1, "batch_size": 4},
            "adapter": {"r": 2},
            "data": {"path_or_name": str(rows), "max_length": 32},
            "output_dir": str(tmp_path / "out"),
        }
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(section, dict) else section
        return Recipe.model_validate(values)

    return make


def load(recipe: Recipe, tokenizer: Any, start: bool = False) -> Any:
    said: list[str] = []
    return load_backbone(recipe, CPU, {"hqqplus": "0"}, Text(lambda: DOCUMENTS, tokenizer), start, said.append), said


def test_samples_come_from_all_documents_in_an_order_of_the_seed(tokenizer: Any) -> None:
    one, again, other = (sample_tokens(DOCUMENTS, tokenizer, 8, 16, seed) for seed in (1, 1, 2))
    assert one.shape == (8, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    windows = {}
    for number, text in enumerate(DOCUMENTS):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        windows |= {(*ids[start : start + 16],): number for start in range(0, len(ids) - 15, 16)}
    assert {(*row.tolist(),) for row in one} <= windows.keys()
    # 30 documents are long enough: each gives a window before any gives another.
    firsts = sample_tokens([f"{chr(97 + i) * (40 + i)}" for i in range(20)], tokenizer, 20, 16, 0)
    assert len({row[-1].item() for row in firsts}) == 20


def test_short_documents_are_joined(tokenizer: Any) -> None:
    found = sample_tokens(["ab", "cd", "ef"] * 20, tokenizer, 4, 16, 0)
    assert found.shape == (4, 16)
    assert (found == tokenizer.bos_token_id).sum() >= 16  # one for each document of three tokens
    with pytest.raises(UserError, match=r"calibration\.samples: .* 11 samples of 16 tokens, 12 are asked for"):
        sample_tokens(["ab", "cd", "ef"] * 20, tokenizer, 12, 16, 0)


def test_a_calibrated_base_is_saved_noted_and_found_again(make: Callable[..., Recipe], tokenizer: Any) -> None:
    recipe = make(adapter={"init": "weighted"})
    backbone, _ = load(recipe, tokenizer, start=True)
    saved = Path(recipe.output_dir) / "base"
    assert base_folder(recipe) == str(saved)
    fingerprint = Fingerprint.read(saved)
    assert fingerprint is not None
    assert fingerprint.calibration == described(recipe, samples_of(recipe, Text(lambda: DOCUMENTS, tokenizer)))
    assert fingerprint.calibration["method"] == "block"
    assert backbone.factors.keys() == packed_modules(backbone.model).keys()
    assert all(a.shape[0] == b.shape[1] == 2 for a, b in backbone.factors.values())
    assert calibration_folder(saved).is_dir()
    plain, _ = load(make(calibration={"method": "none"}, quantization={"save_to": None}), tokenizer)
    assert plain.fingerprint.packed_sha256 != backbone.fingerprint.packed_sha256
    again, _ = load(recipe, tokenizer, start=True)
    assert again.fingerprint == fingerprint
    for name, (a, b) in backbone.factors.items():
        assert torch.equal(a, again.factors[name][0])
        assert torch.equal(b, again.factors[name][1])


def test_the_base_of_another_calibration_is_refused(make: Callable[..., Recipe], tokenizer: Any) -> None:
    load(make(calibration={"method": "importance"}), tokenizer)
    with pytest.raises(UserError, match=r"quantization\.save_to: .*base was quantized with another calibration"):
        load(make(calibration={"method": "importance", "samples": 9}), tokenizer)
    plain = {"calibration": {"method": "none"}, "quantization": {"save_to": base_folder(make())}}
    with pytest.raises(UserError, match="another calibration, or none"):
        load(make(**plain), tokenizer)


def test_the_residual_start_of_a_calibrated_base(make: Callable[..., Recipe], tokenizer: Any) -> None:
    backbone, _ = load(make(calibration={"method": "importance"}), tokenizer, start=True)
    assert backbone.factors.keys() == packed_modules(backbone.model).keys()
    backbone, _ = load(make(calibration={"method": "importance"}, adapter={"init": "default"}), tokenizer, start=True)
    assert backbone.factors is None


def test_a_gain_is_chosen_once(make: Callable[..., Recipe], tokenizer: Any, tmp_path: Path) -> None:
    changes = {"calibration": {"method": "none"}, "quantization": {"gain": "auto", "save_to": str(tmp_path / "base")}}
    documents = DOCUMENTS * 40
    text, said = Text(lambda: documents, tokenizer), list[str]()
    load_backbone(make(**changes), CPU, {}, text, False, said.append)
    (line,) = said
    assert line.startswith("quantization.gain: ")
    chosen = float(line.split()[1])
    fingerprint = Fingerprint.read(tmp_path / "base")
    assert fingerprint is not None
    assert fingerprint.quantization["solver"]["gain"] == chosen
    load_backbone(make(**changes), CPU, {}, Text(lambda: pytest.fail("asked again"), tokenizer), False, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [{"calibration": {"method": "block"}}, {"calibration": {"method": "none"}, "quantization": {"gain": "auto"}}],
)
def test_a_packed_model_is_not_calibrated(
    make: Callable[..., Recipe], tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    load(make(calibration={"method": "none"}, quantization={"save_to": str(tmp_path / "base")}), tokenizer)
    with pytest.raises(UserError, match=r"is packed already, and this looks at weights: name the parent model$"):
        load(make(model={"name_or_path": str(tmp_path / "base")}, **changes), tokenizer)
