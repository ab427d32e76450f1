"""Every recipe of `recipes/` is valid, and one can be made into the trainer's own settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hqqplus.recipe import Recipe, load_recipe, recipe_digest
from tests.families import FAMILIES, Family

FOLDER = Path(__file__).parents[1] / "recipes"
PATHS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


def test_the_folder_is_found() -> None:
    assert len(PATHS) >= 23


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


def _adapted(recipe: Recipe, layers: int) -> Any:
    """The recipe's model in full width with so many of its blocks, packed and with its adapter, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from hqqplus.integrations.transformers import HqqPlusConfig, HqqPlusQuantizer
    from hqqplus.recovery.trainables import add_adapter

    family = FAMILIES[recipe.model.name_or_path]
    config = family.config(num_hidden_layers=layers)
    share = layers / family.sizes["num_hidden_layers"]
    if recipe.adapter.budget_mb is not None:
        section = recipe.adapter.model_copy(update={"budget_mb": recipe.adapter.budget_mb * share})
        recipe = recipe.model_copy(update={"adapter": section})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        quantizer = HqqPlusQuantizer(HqqPlusConfig.from_plan(recipe.quantization.plan()), pre_quantized=True)
        quantizer._process_model_before_weight_loading(model, dtype=torch.bfloat16)
        return add_adapter(model, recipe)


@pytest.fixture
def family(recipe: Recipe) -> Family:
    if recipe.model.name_or_path.startswith("embedded:"):
        pytest.skip("the embedded model is there itself")
    return FAMILIES[recipe.model.name_or_path]


def test_every_layer_of_the_model_is_packed_and_adapted(recipe: Recipe, family: Family) -> None:
    """With the real class in its full width, and all patterns and target modules finding something in it."""
    from torch import nn

    from hqqplus.adapters import adapter_size
    from hqqplus.integrations.peft import PackedLoraLinear
    from hqqplus.modules import PackedExperts, PackedState

    adapted = _adapted(recipe, 2)
    base = adapted.get_base_model()
    tied = family.traits["tie_word_embeddings"]
    named = [pattern for pattern in recipe.quantization.overrides if "*" not in pattern]
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name and "vision" not in name:
            # Only the smallest keep their head, which is their embedding, in 16 bits.
            assert isinstance(module, PackedState) or (name == "lm_head" and not named), f"{name} stays in 16 bits"
        if isinstance(module, PackedState) and name.endswith("_proj.base_layer"):
            spec = module.spec
            assert (spec.nbits, spec.group_size) == (recipe.quantization.nbits, recipe.quantization.group_size)
    if named:
        embedding = base.get_input_embeddings()
        assert isinstance(embedding, PackedState)
        assert isinstance(base.lm_head, PackedState)
        assert (base.lm_head.W_q is embedding.W_q) == tied
    found = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, PackedLoraLinear)}
    targets = recipe.adapter.target_modules
    assert found == set(targets) if not isinstance(targets, str) else found
    adapters = sum(isinstance(module, PackedLoraLinear) for module in base.modules())
    assert adapters == 2 * (7 if isinstance(targets, str) else len(targets))
    assert all(isinstance(m, PackedExperts) for n, m in base.named_modules() if n.endswith(".experts"))

    megabytes = adapter_size(adapted)[1] / 1e6 * family.sizes["num_hidden_layers"] / 2
    if recipe.recovery.scales == "gains" or recipe.calibration.method == "none":  # 70B, and the article's own sizes
        assert megabytes < 250
    else:
        assert megabytes < 60


def test_nobody_s_code_is_run(recipe: Recipe) -> None:
    assert recipe.model.trust_remote_code is False


def test_data_are_in_the_form_of_the_model(recipe: Recipe) -> None:
    """Chat models learn from conversations, the others from text; samples are asked for in the same form."""
    chats = recipe.model.name_or_path.startswith(("Qwen/Qwen3-", "google/gemma-3-", "microsoft/Phi-4-mini-instruct"))
    assert (recipe.data.messages is not None) == chats
    assert (recipe.data.text_field is None) == chats
    marked = ("<|im_start|>user", "<start_of_turn>user", "<|user|>")
    assert all(prompt.startswith(marked) == chats for prompt in recipe.evaluation.prompts)


def test_one_bit_is_for_large_models(recipe: Recipe, family: Family) -> None:
    weights = _packed_weights(family)
    assert recipe.quantization.nbits > 1 or weights > 3e9
    if weights < 3e9:
        assert recipe.quantization.group_size <= 32


def _packed_weights(family: Family) -> int:
    sizes = family.sizes
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head = sizes.get("head_dim", width // heads)
    attention = 2 * width * head * (heads + sizes["num_key_value_heads"])
    mlp = sizes.get("num_experts", sizes.get("num_local_experts", 1)) * sizes.get(
        "moe_intermediate_size", sizes["intermediate_size"]
    )
    return sizes["num_hidden_layers"] * (attention + 3 * width * mlp)


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
