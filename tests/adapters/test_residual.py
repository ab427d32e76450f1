from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig, QuantSpec, models, quantize
from hqqplus.adapters import ResidualCollector, apply_residual_start, residual_factors, residuals_from_parent
from hqqplus.modules import observe_packing

IDS = torch.arange(3, 35).view(1, -1)


@pytest.mark.parametrize("rank", [1, 4, 24, 40])
def test_factors_are_the_best_approximation_of_the_residual(rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 48)
    packed = quantize(weight, QuantSpec(2, 16))
    a, b = residual_factors(weight, packed, rank)
    assert (a.shape, b.shape) == ((rank, 48), (24, rank))
    residual = (weight - packed.dequantize(torch.float32)).double()
    lost = (residual - b.double() @ a.double()).square().sum()
    best = torch.linalg.svdvals(residual)[rank:].square().sum()
    torch.testing.assert_close(lost, best, atol=1e-6, rtol=1e-5)


def test_wide_matrices_are_decomposed_at_random_but_always_alike() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1040, 1056)
    packed = quantize(weight, QuantSpec(1, 32))
    state = torch.get_rng_state()
    first = residual_factors(weight, packed, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    second = residual_factors(weight, packed, 8)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    residual = weight - packed.dequantize(torch.float32)
    captured = 1 - (residual - first[1] @ first[0]).square().sum() / residual.square().sum()
    best = torch.linalg.svdvals(residual)[:8].square().sum() / residual.square().sum()
    assert captured > 0.95 * best


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_full_rank_start_gives_back_the_parent(random_model: Callable[..., Path], variant: dict[str, Any]) -> None:
    folder = random_model("qwen2")
    collector = ResidualCollector(96)
    with observe_packing(collector):
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HqqPlusConfig(nbits=2, group_size=32))
    parent = AutoModelForCausalLM.from_pretrained(folder)
    assert (base(IDS).logits - parent(IDS).logits).abs().max() > 0.05
    config = LoraConfig(r=96, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **variant)
    model = get_peft_model(base, config).eval()
    assert apply_residual_start(model, collector.factors) == 14
    torch.testing.assert_close(model(IDS).logits, parent(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_layer_of_another_rank_takes_the_best_directions_that_it_has_room_for(
    random_model: Callable[..., Path],
) -> None:
    collector = ResidualCollector(4)
    with observe_packing(collector):
        base = AutoModelForCausalLM.from_pretrained(
            random_model("llama"), quantization_config=HqqPlusConfig(nbits=2, group_size=32)
        )
    ranks = {"q_proj": 2, "up_proj": 6}
    config = LoraConfig(
        r=4, lora_alpha=4, rank_pattern=ranks, alpha_pattern=ranks, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    apply_residual_start(model, collector.factors)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        a, b = collector.factors[name]
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        kept = min(4, len(lora_a))
        assert len(lora_a) == ranks.get(name.rsplit(".", 1)[1], 4)
        torch.testing.assert_close(lora_b @ lora_a, b[:, :kept] @ a[:kept])
        assert lora_a[kept:].abs().sum(1).gt(0).all()  # or these directions would never learn


def test_factors_from_the_parent_equal_those_taken_while_quantizing(story_model: Path) -> None:
    collector = ResidualCollector(4)
    with observe_packing(collector):
        base = AutoModelForCausalLM.from_pretrained(
            story_model, quantization_config=HqqPlusConfig(nbits=1, group_size=32)
        )
    later = residuals_from_parent(base, models.parent_weights(str(story_model)), 4)
    assert later.keys() == collector.factors.keys()
    for name, factors in later.items():
        assert all(torch.equal(x, y) for x, y in zip(factors, collector.factors[name], strict=True))
