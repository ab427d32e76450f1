"""What a run trains: the adapter as its section says, and what goes beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqplus import HqqPlusConfig, models
from hqqplus.errors import UserError
from hqqplus.modules import PackedLinear
from hqqplus.recipe import Recipe
from hqqplus.recovery import trainables


@pytest.fixture
def make() -> Callable[..., Recipe]:
    def make(**sections: Any) -> Recipe:
        values = {"model": {"name_or_path": "m"}, "data": {"path_or_name": "d"}, "output_dir": "o", **sections}
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def packed(random_model: Callable[..., Path]) -> Any:
    return models.load_causal_lm(str(random_model("llama")), quantization=HqqPlusConfig(nbits=2, group_size=32))


def test_the_adapter_follows_its_section(make: Callable[..., Recipe], packed: Any) -> None:
    section = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["q_proj", "up_proj"]}
    model = trainables.add_adapter(packed.requires_grad_(False), make(adapter=section))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rsplit(".", 1)[1] for name in layers} == {"q_proj", "up_proj"}
    assert len(layers) == 4
    for layer in layers.values():
        assert isinstance(layer.get_base_layer(), PackedLinear)
        assert (layer.r["default"], layer.scaling["default"]) == (3, 2.0)
        assert layer.lora_dropout["default"].p == 0.25
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 8


def test_all_linear_leaves_the_head_alone(make: Callable[..., Recipe], packed: Any) -> None:
    model = trainables.add_adapter(packed, make())
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == 14
    assert not hasattr(model.get_base_model().lm_head, "lora_A")


@pytest.mark.parametrize("targets", [["nothing"], "nothing_.*"])
def test_targets_that_match_nothing_are_refused(make: Callable[..., Recipe], packed: Any, targets: Any) -> None:
    with pytest.raises(UserError, match=r"^adapter\.target_modules: .*nothing") as caught:
        trainables.add_adapter(packed, make(adapter={"target_modules": targets}))
    assert "\n" not in str(caught.value)


def test_lora_on_the_head_is_refused(make: Callable[..., Recipe], packed: Any) -> None:
    with pytest.raises(UserError, match=r"^adapter\.target_modules: LoRA on the output head is not supported"):
        trainables.add_adapter(packed, make(adapter={"target_modules": ["q_proj", "lm_head"]}))


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_alpha_is_twice_the_rank_in_every_layer(make: Callable[..., Recipe], packed: Any) -> None:
    section = {"r": 4, "rank_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 6}}
    model = trainables.add_adapter(packed, make(adapter=section))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    ranks = {name.removeprefix("base_model.model.model.layers."): m.r["default"] for name, m in layers.items()}
    assert ranks["0.self_attn.q_proj"] == ranks["1.self_attn.q_proj"] == 1
    assert (ranks["0.mlp.up_proj"], ranks["1.mlp.up_proj"], ranks["1.self_attn.k_proj"]) == (4, 6, 4)


def test_a_budget_is_kept_and_the_mlp_gets_more(make: Callable[..., Recipe], packed: Any) -> None:
    model = trainables.add_adapter(packed, make(adapter={"budget_mb": 0.03}))
    size = 2 * sum(p.numel() for p in trained(model).values())
    assert 0.02e6 < size <= 0.03e6
    ranks = {n: m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    attention = {rank for name, rank in ranks.items() if "self_attn" in name}
    others = {rank for name, rank in ranks.items() if "mlp" in name}
    assert len(attention) == len(others) == 1
    assert others.pop() > attention.pop()


def test_a_budget_that_is_too_small_is_refused(make: Callable[..., Recipe], packed: Any) -> None:
    with pytest.raises(UserError, match=r"^adapter\.budget_mb: 100 bytes are too few"):
        trainables.add_adapter(packed, make(adapter={"budget_mb": 1e-4}))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*\.mlp\..*_proj", 6), (["model.layers.0.mlp.up_proj"], 1)],
)
def test_targeted_shapes_are_those_that_peft_finds(
    make: Callable[..., Recipe], packed: Any, targets: Any, layers: int
) -> None:
    recipe = make(adapter={"target_modules": targets, "r": 2})
    shapes = trainables.targeted_shapes(packed, recipe.adapter.target_modules)
    assert len(shapes) == layers
    model = trainables.add_adapter(packed, recipe)
    adapted = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name: (m.out_features, m.in_features) for name, m in adapted.items()} == shapes


def test_norms_gains_and_scales_are_trained_where_the_recipe_says(make: Callable[..., Recipe], packed: Any) -> None:
    recipe = make(recovery={"norms": True, "scales": "bake", "scales_learning_rate": 0.5})
    model = trainables.add_adapter(packed.requires_grad_(False), recipe)
    extras = trainables.train_scales(model, recipe)
    assert extras is not None
    names = trained(model)
    assert sum("norm" in name for name in names) == 5
    deltas = [parameter for name, parameter in names.items() if name.endswith("_delta")]
    assert len(deltas) == 14  # at 2 bits the offsets stay
    (group,) = trainables.param_groups(recipe, model)
    assert {id(p) for p in group["params"]} == {id(p) for p in deltas}
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_offsets_are_trained_at_one_bit(make: Callable[..., Recipe], random_model: Callable[..., Path]) -> None:
    model = models.load_causal_lm(str(random_model("llama")), quantization=HqqPlusConfig(nbits=1, group_size=32))
    for offsets, count in (("auto", 28), (False, 14)):
        recipe = make(recovery={"scales": "bake", "offsets": offsets})
        adapted = trainables.add_adapter(model.requires_grad_(False), recipe)
        trainables.train_scales(adapted, recipe)
        assert sum(name.endswith("_delta") for name in trained(adapted)) == count
        assert trainables.param_groups(recipe, adapted) == []  # with the rate of all others
        model = adapted.unload()
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.scale_delta = module.offset_delta = None


def test_gains_belong_to_the_adapter(make: Callable[..., Recipe], packed: Any) -> None:
    recipe = make(recovery={"scales": "gains", "scales_learning_rate": 1e-3})
    model = trainables.add_adapter(packed.requires_grad_(False), recipe)
    assert trainables.train_scales(model, recipe) is None
    assert sum("lora_gain" in name for name in trained(model)) == 28
    assert len(trainables.param_groups(recipe, model)[0]["params"]) == 28


def test_extras_come_back(make: Callable[..., Recipe], packed: Any, tmp_path: Path) -> None:
    recipe = make(recovery={"scales": "bake"})
    model = trainables.add_adapter(packed, recipe)
    extras = trainables.train_scales(model, recipe)
    assert extras is not None
    deltas = {name: p for name, p in trained(model).items() if name.endswith("scale_delta")}
    with torch.no_grad():
        for number, delta in enumerate(deltas.values()):
            delta.fill_(number / 100)
    extras.save(tmp_path)
    with torch.no_grad():
        for delta in deltas.values():
            delta.zero_()
    extras.load(tmp_path)
    assert [delta.unique().item() for delta in deltas.values()] == pytest.approx([n / 100 for n in range(14)])
