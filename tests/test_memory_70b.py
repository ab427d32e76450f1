"""The memory that the 70B recipes claim is what `benchmarks/memory_70b.py` adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

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


def test_the_architecture_is_llamas() -> None:
    """By the shapes of transformers' own model, with 2 of its 80 blocks."""
    model = memory.LLAMA3_70B
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=2,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        vocab_size=model.vocabulary,
    )
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    block = built.model.layers[0]
    found = {n: tuple(m.weight.shape) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found == model.linears
    linears = model.blocks * sum(rows * columns for rows, columns in found.values())
    norms = (2 * model.blocks + 1) * model.hidden
    # The published number of parameters of Llama-3-70B.
    assert linears + norms + 2 * model.vocabulary * model.hidden == 70_553_706_496


def test_a_small_model_has_these_bytes(path: Path, recipe: Recipe) -> None:
    """What is counted for a block is what packing it makes."""
    from hqqplus.modules.replace import empty_packed

    plan = recipe.quantization.plan()
    small = memory.Architecture(256, 512, 1, 4, 2, 1024)
    counted = memory.estimate(recipe, small, 1)
    spec = plan.spec_for("model.layers.0.mlp.up_proj")
    assert spec is not None
    layers = [
        empty_packed(torch.nn.Linear(columns, rows, bias=False, device="meta"), spec, torch.bfloat16)
        for rows, columns in small.linears.values()
    ]
    assert counted.packed * 1e9 == pytest.approx(sum(layer.packed_bytes for layer in layers))
    override = plan.override_for("lm_head")
    assert override is not None
    table = empty_packed(torch.nn.Linear(256, 1024, bias=False, device="meta"), override, torch.bfloat16)
    assert counted.tables * 1e9 == pytest.approx(2 * table.packed_bytes)


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
    weights = memory.LLAMA3_70B.blocks * sum(rows * columns for rows, columns in memory.LLAMA3_70B.linears.values())
    assert weights / one.quantization.group_size * 2 * 16 / 1e9 == pytest.approx(68, abs=0.5)


def test_what_is_not_counted_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(FILES[0], ["recovery.scales=bake"])
    with pytest.raises(ValueError, match="LoRA of one rank and gains"):
        memory.estimate(recipe, memory.LLAMA3_70B, 2)
    with pytest.raises(ValueError, match="checkpointing"):
        memory.estimate(load_recipe(FILES[0], ["training.gradient_checkpointing=false"]), memory.LLAMA3_70B, 2)
