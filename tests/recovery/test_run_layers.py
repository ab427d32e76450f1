"""A run knows how well each layer was quantized, whichever way its backbone came up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus import models
from hqqplus.evaluation.layers import Layers, read_layers
from hqqplus.modules import bits_per_weight
from hqqplus.recipe import Recipe
from hqqplus.recovery.backbone import Backbone, load_backbone
from hqqplus.recovery.calibrated import Text
from hqqplus.recovery.summary import linear_weights

CPU = torch.device("cpu")


@pytest.fixture
def load(random_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Backbone]:
    def load(saved: Path | None = None, model: Path | None = None) -> Backbone:
        quantization = {"nbits": 2, "group_size": 32, "save_to": str(saved) if saved else None}
        values: dict[str, Any] = {
            "model": {"name_or_path": str(model or random_model("llama")), "dtype": "float32"},
            "quantization": quantization,
            "adapter": {"r": 2, "init": "default"},
            "data": {"path_or_name": "rows.jsonl"},
            "output_dir": str(tmp_path / "out"),
        }
        if model is not None:
            del values["quantization"]
        recipe = Recipe.model_validate(values)
        text = Text(lambda: [], models.load_tokenizer(recipe.model.name_or_path))
        return load_backbone(recipe, CPU, {}, text, False, print)

    return load


def test_the_same_whichever_way(load: Callable[..., Backbone], tmp_path: Path) -> None:
    loaded = load().layers
    saved = load(tmp_path / "base").layers
    again = load(model=tmp_path / "base").layers
    assert loaded is not None
    assert saved is not None
    assert again == saved
    # What is not packed is counted in the dtype that it is stored in; all else is the same.
    assert (saved.title, saved.layers) == (loaded.title, loaded.layers)
    assert all(0 < layer.statistics.nmse < 0.2 for layer in saved.layers)


def test_a_packed_folder_without_them(load: Callable[..., Backbone], tmp_path: Path) -> None:
    load(tmp_path / "base")
    (tmp_path / "base" / "layers.json").unlink()
    assert load(model=tmp_path / "base").layers is None


def test_layers_come_back_from_json(load: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = load()
    layers = backbone.layers
    assert layers is not None
    (tmp_path / "layers.json").write_text(json.dumps(layers.to_json()))
    assert read_layers(tmp_path) == layers
    assert Layers.from_json(layers.to_json()) == layers
    weights = linear_weights(backbone.model)
    assert weights == sum(layer.statistics.weights for layer in layers.layers if not layer.embedding)
    assert bits_per_weight(backbone.model) == pytest.approx(layers.bits_per_weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("layers"),
        lambda values: values.update(title=None),
        lambda values: values.update(total_bytes="1"),
        lambda values: values.update(layers=[1]),
        lambda values: values["layers"][0].pop("nmse"),
        lambda values: values["layers"][0].update(shape="ab"),
        lambda values: values["layers"][0].update(embedding=1),
    ],
)
def test_damaged_layers_are_not_read(
    load: Callable[..., Backbone], tmp_path: Path, change: Callable[[Any], object]
) -> None:
    (tmp_path / "layers.json").write_text("{")
    assert read_layers(tmp_path) is None
    layers = load().layers
    assert layers is not None
    values = layers.to_json()
    change(values)
    (tmp_path / "layers.json").write_text(json.dumps(values))
    assert read_layers(tmp_path) is None
