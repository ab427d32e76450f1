"""Every recipe of `recipes/` is valid, and one can be made into the trainer's own settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hqqplus.recipe import Recipe, load_recipe, recipe_digest

FOLDER = Path(__file__).parents[1] / "recipes"
PATHS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


def test_the_folder_is_found() -> None:
    assert len(PATHS) >= 4


def test_name_says_bits_and_output(path: Path, recipe: Recipe) -> None:
    bits = re.fullmatch(r"[a-z0-9_]+_(\d)bit", path.stem)
    assert bits, "a recipe is called <model>_<bits>bit.yaml"
    assert recipe.quantization.nbits == int(bits[1])
    assert recipe.output_dir == f"runs/{path.stem}"


def test_plan(recipe: Recipe) -> None:
    spec = recipe.quantization.plan().default
    assert (spec.nbits, spec.group_size) == (recipe.quantization.nbits, recipe.quantization.group_size)


def test_the_trainer_takes_the_settings(recipe: Recipe, tmp_path: Path) -> None:
    from trl import SFTConfig

    # On the CPU, so that a machine without a GPU does not refuse bf16.
    config = SFTConfig(output_dir=str(tmp_path), seed=recipe.seed, **{**recipe.training, "use_cpu": True})
    assert config.learning_rate == recipe.training["learning_rate"]
    assert config.save_total_limit == 2
    assert config.eval_strategy == "steps"


def test_recipes_differ() -> None:
    assert len({recipe_digest(load_recipe(path)) for path in PATHS}) == len(PATHS)


def test_llama_keeps_embedding_and_head_small() -> None:
    for bits in (1, 2):
        plan = load_recipe(FOLDER / f"llama3_8b_{bits}bit.yaml").quantization.plan()
        layer = plan.spec_for("model.layers.0.self_attn.q_proj")
        assert layer is not None
        assert layer.bits_per_weight(4096, 4096) == bits + 16.5 / 32
        for name in ("model.embed_tokens", "lm_head"):
            spec = plan.override_for(name)
            assert spec is not None
            assert (spec.nbits, spec.group_size) == (8, 64)


def test_the_two_llamas_share_everything_else() -> None:
    one, two = (load_recipe(FOLDER / f"llama3_8b_{bits}bit.yaml") for bits in (1, 2))
    assert (one.model, one.adapter, one.data, one.training) == (two.model, two.adapter, two.data, two.training)
