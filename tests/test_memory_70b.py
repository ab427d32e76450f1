"""The memory that the 70B recipes claim is what `benchmarks/memory_70b.py` adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from hqqplus.integrations.bare import bare_model
from hqqplus.recipe import Recipe, load_recipe
from tests.conftest import ROOT, load_benchmark

memory = load_benchmark("memory_70b")
FILES = [ROOT / "recipes" / f"llama3_70b_{bits}bit.yaml" for bits in (1, 2)]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


def test_the_comment_is_the_sum(path: Path, recipe: Recipe) -> None:
    expected = "".join(f"#   {line}\n" for line in memory.table(recipe, memory.LLAMA3_70B))
    assert expected in path.read_text(encoding="utf-8")


def test_the_model_is_llamas() -> None:
    model = bare_model(memory.LLAMA3_70B, None, torch.bfloat16)
    # The published number of parameters of Llama-3-70B.
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_553_706_496


def test_a_small_model_has_these_bytes(recipe: Recipe) -> None:
    """What is counted for a block is what packing it makes."""
    from hqqplus.modules.replace import empty_packed

    small = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    plan = recipe.quantization.plan()
    spec, override = plan.spec_for("model.layers.0.mlp.up_proj"), plan.override_for("lm_head")
    assert spec is not None
    assert override is not None

    def packed_bytes(shapes: list[tuple[int, int]], of: object) -> int:
        layers = [torch.nn.Linear(columns, rows, bias=False, device="meta") for rows, columns in shapes]
        return sum(empty_packed(layer, of, torch.bfloat16).packed_bytes for layer in layers)

    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    counted = memory.estimate(recipe, small, 1)
    assert counted.packed * 1e9 == pytest.approx(3 * packed_bytes(shapes, spec))
    assert counted.tables * 1e9 == pytest.approx(2 * packed_bytes([(1024, 256)], override))
    # Rank 8 and the gains: 9 numbers a row and a column; each with its gradient and two moments.
    assert counted.trained * 1e9 == pytest.approx(3 * 16 * 9 * sum(map(sum, shapes)))


def test_more_cards_hold_less(recipe: Recipe) -> None:
    two, four, eight = (memory.estimate(recipe, memory.LLAMA3_70B, cards) for cards in memory.CARDS)
    assert two.total > four.total > eight.total
    assert two.packed == pytest.approx(4 * eight.packed)
    assert two.kept == eight.kept


def test_claims_of_the_recipes() -> None:
    one, two = map(load_recipe, FILES)
    # An L4 has 22 GB to use.
    assert memory.estimate(one, memory.LLAMA3_70B, 2).total < 20
    assert memory.estimate(two, memory.LLAMA3_70B, 2).total > 21.5
    assert memory.estimate(two, memory.LLAMA3_70B, 4).total < 20
    # "a scale for every group (bake) would take 68 GB more over all cards": two numbers a group, 16 bytes each.
    weights = 8 * 1e9 * memory.estimate(one, memory.LLAMA3_70B, 1).packed / (1 + 16.5 / 32)
    assert weights / one.quantization.group_size * 2 * 16 / 1e9 == pytest.approx(68, abs=0.5)


def test_what_is_not_counted_is_refused() -> None:
    recipe = load_recipe(FILES[0], ["recovery.scales=bake"])
    with pytest.raises(ValueError, match="LoRA of one rank and gains"):
        memory.estimate(recipe, memory.LLAMA3_70B, 2)
    with pytest.raises(ValueError, match="checkpointing"):
        memory.estimate(load_recipe(FILES[0], ["training.gradient_checkpointing=false"]), memory.LLAMA3_70B, 2)
