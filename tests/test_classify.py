"""Classifiers of 1 bit: their recipe and their rows, and a run from start to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus.classify import (
    ClassificationRecipe,
    LabelledData,
    load_classifier,
    load_labelled,
    load_trained,
    main,
    quantize,
)
from hqqplus.errors import UserError
from hqqplus.modules import packed_modules
from hqqplus.recipe import load_as
from tests.conftest import ROOT

FOLDER = ROOT / "recipes" / "classification"


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid(path: Path) -> None:
    recipe = load_as(ClassificationRecipe, path)
    assert recipe.quantization.nbits == 1
    assert recipe.output_dir == f"runs/classification_{path.stem.removeprefix('embedded_')}"


def test_what_a_recipe_may_not_say(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  name_or_path: x\ndata:\n  path_or_name: y\n  labels: z\nadapter:\n  budget_mb: 1\n"
        "  init: weighted\nquantization:\n  gain: auto\n  save_to: w\ntraining:\n  packing: true\noutput_dir: out\n"
    )
    with pytest.raises(UserError) as caught:
        load_as(ClassificationRecipe, path)
    for said in ("5: data.labels: unknown key", "7: adapter.budget_mb", "8: adapter.init", "10: quantization.gain"):
        assert f"recipe.yaml:{said}" in str(caught.value)
    assert "11: quantization.save_to" in str(caught.value)


def test_labels_of_each_kind(tmp_path: Path) -> None:
    for values, expected in (
        (["b", "a", "b", "c"], ["a", "b", "c"]),
        ([10, 2, 1, 10], ["1", "2", "10"]),
        ([True, False, True, False], ["False", "True"]),
    ):
        path = rows_file(tmp_path, [{"text": f"t{i}", "label": value} for i, value in enumerate(values)])
        section = LabelledData(path_or_name=path, eval_path_or_name=path)
        train, measured, labels = load_labelled(section, seed=0)
        assert labels == expected
        assert list(train["label"]) == [str(value) for value in values]
        assert len(measured) == 4


def test_rows_that_will_not_do(tmp_path: Path) -> None:
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for rows, field, said in (
        ([*good, {"text": "c", "label": None}], "label", "row 3: label is None"),
        ([*good, {"text": None, "label": "x"}], "label", "row 3: text is None"),
        ([{"text": "a", "label": "x"}] * 3, "label", "all rows have the label 'x'"),
        (good, "kind", "has no column 'kind'; it has text, label"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], "label", "row 1: label is 0.5"),
    ):
        path = rows_file(tmp_path, rows)
        with pytest.raises(UserError, match=said):
            load_labelled(LabelledData(path_or_name=path, eval_path_or_name=path, label_field=field), seed=0)
    (tmp_path / "more.jsonl").write_text('{"text": "a", "label": "z"}\n')
    section = LabelledData(path_or_name=rows_file(tmp_path, good), eval_path_or_name=str(tmp_path / "more.jsonl"))
    with pytest.raises(UserError, match="no training row has the label 'z'"):
        load_labelled(section, seed=0)


def test_an_encoder_keeps_its_new_head_and_packs_the_rest(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0
    )
    # Without a pooler, which is new then, as the head is.
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    recipe = ClassificationRecipe.model_validate(
        {
            "model": {"name_or_path": str(tmp_path / "bert")},
            "quantization": {"nbits": 1, "group_size": 16},
            "data": {"path_or_name": "x"},
            "output_dir": "out",
        }
    )
    model, heads = load_classifier(recipe, ["a", "b", "c"], torch.device("cpu"))
    assert heads == ["bert.pooler.dense", "classifier"]
    factors = quantize(model, heads, recipe)
    packed = packed_modules(model)
    assert len(packed) == 2 * 6
    assert not set(heads) & set(packed)
    assert factors is not None
    assert set(factors) == set(packed)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.slow
def test_a_run(random_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of two letters is there more often: small enough for a random model to learn."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(320):
        few, many = "ab" if index % 2 else "ba"
        letters = [few] * 4 + [many] * 12
        order = torch.randperm(16, generator=generator).tolist()
        rows.append({"body": "".join(letters[place] for place in order), "kind": many})
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"extends: {FOLDER / 'embedded_1bit.yaml'}\n"
        f"model:\n  name_or_path: {random_model('llama')}\n"
        f"data:\n  path_or_name: {rows_file(tmp_path, rows)}\n  eval_split: null\n  text_field: body\n"
        "  label_field: kind\n"
        "training:\n  max_steps: 60\n  per_device_train_batch_size: 16\n"
        "  learning_rate: 1e-2\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    assert main([str(path)]) == 0
    assert "16-bit model: accuracy" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["majority"] == pytest.approx(0.5, abs=0.2)
    assert report["accuracy_parent"] >= 0.9
    assert report["accuracy"] >= 0.9
    assert report["bits_per_weight"] == pytest.approx(1 + 16.5 / 32, abs=0.1)
    # What was measured is what is written.
    model, tokenizer = load_trained(tmp_path / "run")
    right = 0
    for row in rows[:64]:
        with torch.no_grad():
            logits = model(**tokenizer(row["body"], return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == row["kind"]
    assert right >= 56
    # A second start does not write over it, and a backbone of another kind is refused.
    assert main([str(path)]) == 2
    assert "holds a finished classifier" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "adapter" / "hqqplus.json").read_text())
    (tmp_path / "run" / "adapter" / "hqqplus.json").write_text(json.dumps({**config, "packed_sha256": "0" * 64}))
    with pytest.raises(UserError, match="packed weights"):
        load_trained(tmp_path / "run")
