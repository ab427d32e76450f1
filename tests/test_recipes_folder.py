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
    bits = re.fullmatch(r"[a-z0-9_]+_(\d)bit(_article)?", path.stem)
    assert bits, "a recipe is called <model>_<bits>bit.yaml, or <model>_<bits>bit_article.yaml"
    assert recipe.quantization.nbits == int(bits[1])
    # The article's runs are told apart by their group size, which is given on the command line.
    assert recipe.output_dir == (f"runs/article_{bits[1]}bit_g64" if bits[2] else f"runs/{path.stem}")


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
        assert layer.bits_per_weight(4096, 4096) == bits + 16.5 / {1: 32, 2: 64}[bits]
        for name in ("model.embed_tokens", "lm_head"):
            spec = plan.override_for(name)
            assert spec is not None
            assert (spec.nbits, spec.group_size) == (8, 64)


def test_the_two_llamas_share_everything_else() -> None:
    one, two = (load_recipe(FOLDER / f"llama3_8b_{bits}bit.yaml") for bits in (1, 2))
    for name in ("model", "calibration", "adapter", "recovery", "data", "training"):
        assert getattr(one, name) == getattr(two, name)


def test_the_articles_recipes_are_plain() -> None:
    for bits in (1, 2):
        recipe = load_recipe(FOLDER / f"llama3_8b_{bits}bit_article.yaml")
        assert (recipe.calibration.method, recipe.recovery.loss, recipe.recovery.scales) == ("none", "ce", "frozen")
        assert (recipe.quantization.group_size, recipe.quantization.metadata_bits) == (64, 16)


def test_the_adapter_of_the_8b_stays_below_60_mb() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hqqplus.adapters.ranks import adapter_bytes, attention_layers, role_ranks

    # Llama-3-8B with 2 of its 32 layers.
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items() if name != "lm_head"}
    budget = load_recipe(FOLDER / "llama3_8b_1bit.yaml").adapter.budget_mb
    assert budget is not None
    ranks = role_ranks(shapes, attention_layers(model, shapes), int(budget * 1e6 / 16))
    assert set(ranks.values()) == {8, 12}
    assert 16 * adapter_bytes(shapes, ranks) == 56_098_816
