from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hqqplus.adapters.ranks import (
    Shape,
    adapter_bytes,
    allocate_ranks,
    attention_layers,
    rank_pattern,
    role_ranks,
    without_adapter,
)

# (out, in) of the linear layers of a block of Llama-3-8B.
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def random_layers(
    seed: int, layers: int, directions: int, alike: bool
) -> tuple[dict[str, Shape], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (layers, 2), generator=generator).tolist()
    shapes = {f"l{i}": (8, 8) if alike else (out, width) for i, (out, width) in enumerate(sizes)}
    energies = {name: torch.rand(directions, generator=generator).sort(descending=True).values for name in shapes}
    return shapes, energies


def exhaustive(
    shapes: dict[str, Shape], energies: dict[str, torch.Tensor], budget: int, multiple: int, minimum: int
) -> float:
    """The most energy that any choice of ranks takes off."""
    choices = [range(-(-minimum // multiple) * multiple, len(energies[name]) + 1, multiple) for name in shapes]
    best = -1.0
    for picked in itertools.product(*choices):
        ranks = dict(zip(shapes, picked, strict=True))
        if adapter_bytes(shapes, ranks) <= budget:
            best = max(best, sum(float(energies[name][:rank].sum()) for name, rank in ranks.items()))
    return best


@given(
    seed=st.integers(0, 999),
    layers=st.integers(1, 4),
    directions=st.integers(1, 5),
    share=st.floats(0, 1.2),
    multiple=st.integers(1, 2),
    minimum=st.integers(0, 1),
    alike=st.booleans(),
)
@settings(max_examples=60)
def test_against_exhaustive_search(
    seed: int, layers: int, directions: int, share: float, multiple: int, minimum: int, alike: bool
) -> None:
    shapes, energies = random_layers(seed, layers, max(directions, minimum * multiple), alike)
    least = adapter_bytes(shapes, dict.fromkeys(shapes, minimum * multiple))
    budget = least + round(share * directions * sum(map(sum, shapes.values())) * 2)
    ranks = allocate_ranks(shapes, energies, budget, multiple=multiple, minimum=minimum)
    assert adapter_bytes(shapes, ranks) <= budget
    assert all(rank % multiple == 0 and rank >= minimum for rank in ranks.values())
    found = sum(float(energies[name][:rank].sum()) for name, rank in ranks.items())
    best = exhaustive(shapes, energies, budget, multiple, minimum)
    # Where all steps cost the same it is the optimum; else less than one step may be missing.
    step = max(float(energies[name][:multiple].sum()) for name in shapes)
    assert found == pytest.approx(best, abs=1e-6) if alike else found >= best - step - 1e-6


def test_energy_goes_where_it_is_worth_its_bytes() -> None:
    shapes = {"small": (10, 10), "large": (40, 40)}
    energies = {"small": [3.0, 2.0, 1.0], "large": [10.0, 6.0, 1.0]}
    # Per byte: small 3 / 20, 2 / 20, 1 / 20; large 10 / 80, 6 / 80, 1 / 80.
    assert allocate_ranks(shapes, energies, 2 * 20, minimum=0) == {"small": 1, "large": 0}
    assert allocate_ranks(shapes, energies, 2 * 120, minimum=0) == {"small": 2, "large": 1}
    assert allocate_ranks(shapes, energies, 2 * 200, minimum=0) == {"small": 2, "large": 2}
    assert allocate_ranks(shapes, energies, 10**9, minimum=0) == {"small": 3, "large": 3}
    assert allocate_ranks(shapes, energies, 4 * 120, minimum=0, bytes_per_weight=4) == {"small": 2, "large": 1}
    favoured = allocate_ranks(shapes, energies, 2 * 200, minimum=0, weights={"large": 0.01})
    assert favoured == {"small": 3, "large": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bytes": 30}, "30 bytes are too few: rank 1 in all 1 layers takes 40"),
        ({"energies": {"b": [1.0]}}, "different layers"),
        ({"energies": {"a": [1.0, 2.0]}}, "not rise"),
        ({"energies": {"a": [1.0, -1.0]}}, "not negative"),
        ({"energies": {"a": [1.0]}, "minimum": 2}, "energies of 1 directions"),
        ({"weights": {"a": -1.0}}, "0 or more"),
        ({"multiple": 0}, "multiple 0"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"shapes": {"a": (10, 10)}, "energies": {"a": [2.0, 1.0]}, "budget_bytes": 1000, **change}
    with pytest.raises(ValueError, match=message):
        allocate_ranks(**arguments)


class TestRoles:
    shapes: ClassVar = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in LLAMA_8B.items()}
    attention: ClassVar = {name for name in shapes if "self_attn" in name}

    def test_an_8b_llama_in_56_mb(self) -> None:
        ranks = role_ranks(self.shapes, self.attention, 56_100_000)
        assert {ranks[name] for name in self.attention} == {8}
        assert {ranks[name] for name in self.shapes.keys() - self.attention} == {12}
        assert adapter_bytes(self.shapes, ranks) == 56_098_816  # 28.05 M parameters

    @pytest.mark.parametrize("budget", [7_000_000, 30_000_000, 56_000_000, 84_000_000, 400_000_000])
    @pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5, 3.0])
    def test_as_much_as_the_budget_holds(self, budget: int, ratio: float) -> None:
        ranks = role_ranks(self.shapes, self.attention, budget, mlp_to_attention=ratio)
        (first,) = {ranks[name] for name in self.attention}
        (second,) = {ranks[name] for name in self.shapes.keys() - self.attention}
        assert adapter_bytes(self.shapes, ranks) <= budget
        # The next rank of either would not fit, or would leave the ratio.
        more = {name: rank + (name not in self.attention) for name, rank in ranks.items()}
        assert adapter_bytes(self.shapes, more) > budget or second >= round((first + 1) * ratio)
        assert first == 1 or second >= round(first * ratio)

    def test_models_of_one_kind_of_layer(self) -> None:
        assert set(role_ranks({"a": (10, 10)}, {"a"}, 2 * 20 * 7).values()) == {7}
        assert set(role_ranks({"a": (100, 100)}, (), 2 * 200 * 7).values()) == {7}

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="rank 1 takes 5242880"):
            role_ranks(self.shapes, self.attention, 1000)
        with pytest.raises(ValueError, match="none of the layers"):
            role_ranks(self.shapes, {"other"}, 10**9)
        with pytest.raises(ValueError, match="positive"):
            role_ranks(self.shapes, self.attention, 10**9, mlp_to_attention=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_attention_is_found_by_structure(random_model: Callable[..., Path], kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(random_model(kind))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert attention_layers(model, names) == {name for name in names if "self_attn" in name}
    assert attention_layers(model, []) == set()


def test_peft_gives_each_layer_its_rank(tmp_path: Path) -> None:
    """On a packed Llama of twelve blocks: blocks 1, 10 and 11 must not be taken for one another."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from hqqplus import QuantPlan, QuantSpec, quantize_model
    from hqqplus.modules import packed_modules

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=12, **sizes))
    quantize_model(model, QuantPlan(QuantSpec(2, 8)))
    names = list(packed_modules(model))
    ranks = {name: index % 5 for index, name in enumerate(names)}
    patterns, alphas = rank_pattern(ranks, alpha_over_rank=1.5, default=3)
    excluded = without_adapter(ranks)
    assert set(ranks.values()) == {0, 1, 2, 3, 4}
    assert len(patterns) == sum(rank in (1, 2, 4) for rank in ranks.values())
    config = LoraConfig(
        r=3,
        lora_alpha=1.5 * 3,
        target_modules="all-linear",
        exclude_modules=excluded,
        rank_pattern=patterns,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path)

    def found(model: Any) -> dict[str, int]:
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert {m.scaling["default"] for m in layers.values()} == {1.5}
        return {name: m.lora_A["default"].weight.shape[0] for name, m in layers.items()}

    expected = {name: rank for name, rank in ranks.items() if rank}
    assert found(model) == expected
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert found(again) == expected


def test_patterns() -> None:
    patterns, alphas = rank_pattern({"a.1.q": 4, "b": 0, "c": 3}, default=3)
    assert patterns == {r"^a\.1\.q": 4}
    assert alphas == {r"^a\.1\.q": 8}
    assert isinstance(alphas[r"^a\.1\.q"], int)
    assert rank_pattern({"a": 3}, 0.5)[1] == {"^a": 1.5}
    with pytest.raises(ValueError, match="the rank of a is -1"):
        rank_pattern({"a": -1})
    with pytest.raises(ValueError, match="alpha_over_rank"):
        rank_pattern({"a": 1}, 0)
