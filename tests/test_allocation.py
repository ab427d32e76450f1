from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hqqplus
from hqqplus import HqqPlusConfig, QuantPlan, QuantSpec, allocate, candidate_specs, describe_plan, hybrid_plan
from hqqplus.allocation import (
    ModelErrors,
    decoder_blocks,
    down_projections,
    exact_patterns,
    layer_errors,
    prior_weights,
    probe,
)
from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import perplexity
from hqqplus.integrations.transformers import plan_of
from hqqplus.modules import PackedEmbedding, bits_per_weight, model_bytes, packed_modules
from hqqplus.quantization.spec import matches
from tests.conftest import load_benchmark

IDS = torch.arange(3, 35).view(1, -1)
# Spelled out where a size is expected: 2 bits in groups of 64 are 2.5 bits per weight.
EXACT = candidate_specs(metadata_bits=16)
FAMILIES = ["llama", "qwen2", "gpt_neox", "opt", "phi"]
DOWN = {"llama": "mlp.down_proj", "qwen2": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2"}
BLOCKS = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def on_meta(kind: str, **sizes: Any) -> Any:
    config = AutoConfig.for_model(kind, vocab_size=64, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def specs_of(model: Any) -> dict[str, QuantSpec]:
    return {name: module.spec for name, module in packed_modules(model).items()}


@pytest.fixture(scope="module")
def story_errors(shared: Path) -> tuple[Path, ModelErrors]:
    folder = shared / "models" / "tinystories-656K"
    return folder, layer_errors(str(folder), EXACT)


class TestPatterns:
    # Names that are parts of each other, and such as a glob would misread.
    NAME = st.lists(
        st.sampled_from(["layers", "1", "11", "head", "proj", "my_proj", "q[0]", "*", "?", "[h]ead", "!a"]),
        min_size=1,
        max_size=4,
    ).map(".".join)

    @given(st.sets(NAME, min_size=1, max_size=12))
    def test_a_pattern_matches_its_own_name_only(self, names: set[str]) -> None:
        patterns = exact_patterns(names, names)
        hits = {name: {other for other in names if matches(other, pattern)} for name, pattern in patterns.items()}
        assert hits == {name: {name} for name in names}

    def test_ordinary_names_stay_as_they_are(self) -> None:
        names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]
        assert exact_patterns(names, names) == dict(zip(names, names, strict=True))

    def test_a_trailing_part_of_another_name_is_told_apart(self) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(32, 32)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.inner, self.head, self.other = Inner(), nn.Linear(32, 32), nn.Linear(32, 32)

        model = Outer()
        pairs = {"head": 4, "inner.head": 1, "other": 1}
        candidates = [EXACT[0], EXACT[9]]
        # 1 bit costs 2, 4 bits cost 5: one of three layers can have them, and only `head` counts.
        plan = allocate(model, 3.0, candidates=candidates, weights={"*": 0, "inner.head": 1e-9, "head": 1})
        hqqplus.quantize_model(model, plan)
        assert {name: spec.nbits for name, spec in specs_of(model).items()} == pairs


class TestAllocate:
    def test_the_packed_model_keeps_to_the_target(self, story_model: Path) -> None:
        # Groups of 88 divide no width but nearly 172: costs that have only a small divisor in common.
        errors = layer_errors(str(story_model), candidate_specs((1, 2, 4), (64, 88)))
        for target in (1.6, 2.25, 2.5, 3.3):
            model = hqqplus.quantize_model(loaded(story_model), errors.plan_for(target))
            assert bits_per_weight(model) <= target
            # Nor is much left unused.
            assert bits_per_weight(model) > target - 0.02

    def test_a_uniform_target_is_met_by_the_uniform_plan_or_a_better_one(
        self, story_errors: tuple[Path, ModelErrors]
    ) -> None:
        _, errors = story_errors
        for index, spec in enumerate(EXACT):
            uniform = {layer.name: spec for layer in errors.layers}
            bits = sum(spec.bits_per_weight(*layer.shape) * math.prod(layer.shape) for layer in errors.layers)
            plan = errors.plan_for(bits / errors.weights)
            chosen = {layer.name: plan.spec_for(layer.name) for layer in errors.layers}
            total = sum(layer.nmse[EXACT.index(chosen[layer.name])] for layer in errors.layers)
            assert total <= sum(layer.nmse[index] for layer in errors.layers) + 1e-12, uniform

    def test_weights_decide_who_gets_the_bits(self, story_errors: tuple[Path, ModelErrors]) -> None:
        _, errors = story_errors
        plan = errors.plan_for(2.25, {"*": 1, "*.layers.1.*": 100})
        bits = {name.name: plan.spec_for(name.name) for name in errors.layers}
        by_block = [[spec.nbits for name, spec in bits.items() if spec and f".{i}." in name] for i in (0, 1)]
        assert max(by_block[0]) <= min(by_block[1])
        # The full name wins over any pattern, wherever it stands.
        name = "model.layers.0.mlp.down_proj"
        assert errors.plan_for(2.25, {name: 1e4, "*": 1}).spec_for(name) == EXACT[9]

    def test_overrides_name_only_what_differs_and_survive_json_in_any_order(
        self, story_errors: tuple[Path, ModelErrors]
    ) -> None:
        folder, errors = story_errors
        plan = errors.plan_for(2.5)
        assert set(plan.overrides) < {layer.name for layer in errors.layers}
        again = HqqPlusConfig(**json.loads(json.dumps(HqqPlusConfig.from_plan(plan).to_dict(), sort_keys=True))).plan()
        assert plan_of(loaded(folder), again) == plan_of(loaded(folder), plan)

    def test_by_name_and_loaded_measure_the_same(self, story_model: Path) -> None:
        model = loaded(story_model)
        candidates = candidate_specs((1, 2), (64,))
        errors = layer_errors(model, candidates)
        assert layer_errors(str(story_model), candidates) == errors
        assert allocate(str(story_model), 2, candidates=candidates) == errors.plan_for(2, prior_weights(model))
        assert allocate(model, 2, candidates=candidates) == errors.plan_for(2, probe(model))

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_families(self, random_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
        folder = random_model(kind)
        for model in (str(folder), loaded(folder)):
            plan = allocate(model, 2.6, candidates=[EXACT[0], EXACT[3], EXACT[9]], skip=["*.1.*"])
            packed = hqqplus.quantize_model(loaded(folder), plan)
            assert bits_per_weight(packed) <= 2.6
            assert len(set(specs_of(packed).values())) > 1
            assert not [name for name in specs_of(packed) if ".1." in name]
            assert torch.isfinite(packed(IDS).logits).all()

    @pytest.mark.parametrize("kind", ["llama", "opt"])
    def test_folders(self, random_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
        folder = random_model(kind, tied=True)
        chosen = allocate(str(folder), 3.5, candidates=[EXACT[3], EXACT[9]])
        plan = hybrid_plan(str(folder), chosen, embeddings=8)
        written = hqqplus.quantize_folder(str(folder), tmp_path / "packed", HqqPlusConfig.from_plan(plan))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert specs_of(again) == specs_of(written) == specs_of(hqqplus.quantize_model(loaded(folder), plan))
        assert torch.equal(again(IDS).logits, written(IDS).logits)

    def test_a_target_out_of_reach_is_refused_with_the_range(self, story_errors: tuple[Path, ModelErrors]) -> None:
        folder, errors = story_errors
        with pytest.raises(UserError, match=r"target_bpw is 1.2: .* takes 1.25 bits per weight or more, up to 5"):
            errors.plan_for(1.2)
        assert bits_per_weight(hqqplus.quantize_model(loaded(folder), errors.plan_for(16))) == 5

    @pytest.mark.parametrize("target", [float("nan"), float("inf"), "2", None, -1])
    def test_a_target_that_is_none_is_refused(self, story_errors: tuple[Path, ModelErrors], target: Any) -> None:
        with pytest.raises(UserError, match="target_bpw is"):
            story_errors[1].plan_for(target)

    @pytest.mark.parametrize("weight", [-1, float("nan"), "high"])
    def test_a_bad_weight_is_refused(self, story_errors: tuple[Path, ModelErrors], weight: Any) -> None:
        with pytest.raises(UserError, match=r"weights: model\.layers\.1\.mlp\.down_proj gets"):
            story_errors[1].plan_for(2.5, {"layers.1.mlp.down_proj": weight})

    def test_bad_models_are_refused(self, random_model: Callable[..., Path], tmp_path: Path) -> None:
        folder = random_model("llama")
        with pytest.raises(UserError, match="no candidate"):
            allocate(str(folder), 2.5, candidates=())
        with pytest.raises(UserError, match="no linear layer"):
            allocate(str(folder), 2.5, skip=("*",))
        with pytest.raises(UserError, match="no such folder"):
            allocate(str(tmp_path / "nowhere"), 2.5)
        packed = hqqplus.quantize_model(loaded(folder), QuantSpec(2, 32))
        packed.save_pretrained(tmp_path / "packed")
        for model in (packed, str(tmp_path / "packed")):
            for function in (lambda m: allocate(m, 2.5), lambda m: hybrid_plan(m, QuantSpec())):
                with pytest.raises(UserError, match="packed already"):
                    function(model)

    def test_a_weight_with_nan_is_named(self, random_model: Callable[..., Path], tmp_path: Path) -> None:
        shutil.copytree(random_model("llama"), tmp_path / "broken")
        tensors = load_file(tmp_path / "broken" / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
        for model in (str(tmp_path / "broken"), loaded(tmp_path / "broken")):
            with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN"):
                allocate(model, 2.5, candidates=candidate_specs((1, 2), (32,)))


class TestProbe:
    def test_it_finds_the_layer_that_matters_and_leaves_the_model_alone(self, story_model: Path) -> None:
        model = loaded(story_model)
        with torch.no_grad():
            # A layer whose output goes nowhere, and one that is all of its block's MLP.
            model.model.layers[1].self_attn.o_proj.weight.zero_()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        found = probe(model)
        assert model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert set(found) == set(plan_of(model, QuantPlan()))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert found[f"model.layers.1.self_attn.{name}"] == pytest.approx(0, abs=1e-5)
        assert found["model.layers.1.mlp.down_proj"] > 0.1
        assert probe(model) == found

    def test_it_is_the_divergence_over_the_error(self, random_model: Callable[..., Path]) -> None:
        model, name = loaded(random_model("llama")), "model.layers.0.mlp.up_proj"
        spec = QuantSpec(1, 32)
        found = probe(model, input_ids=IDS, spec=spec, skip=["*.1.*"])
        assert not [layer for layer in found if ".1." in layer]
        only = QuantPlan(spec, skip=tuple(other for other in plan_of(model, QuantPlan()) if other != name))
        packed = hqqplus.quantize_model(loaded(random_model("llama")), only)
        with torch.no_grad():
            p, q = (m(IDS).logits.double().log_softmax(-1) for m in (model, packed))
        divergence = (p.exp() * (p - q)).sum(-1).mean().item()
        nmse = packed.get_submodule(name).packed().nmse(model.get_submodule(name).weight)
        assert found[name] == pytest.approx(divergence / nmse, rel=0.01)

    def test_predictions_that_are_not_finite_are_refused(self, random_model: Callable[..., Path]) -> None:
        model = loaded(random_model("llama"))
        with torch.no_grad():
            model.model.norm.weight.fill_(math.inf)
        with pytest.raises(UserError, match="predictions of LlamaForCausalLM on random tokens are not finite"):
            probe(model)


class TestHybrid:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", FAMILIES)
    def test_embeddings_and_head(self, random_model: Callable[..., Path], kind: str, tied: bool, bits: int) -> None:
        folder = random_model(kind, tied)
        default = QuantSpec(2, 32, axis=0)
        plan = hybrid_plan(str(folder), default, embeddings=bits)
        assert plan == hybrid_plan(loaded(folder), default, embeddings=bits)
        model = hqqplus.quantize_model(loaded(folder), plan)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, PackedEmbedding)
        expected = QuantSpec(bits, 64 if bits == 8 else 32)
        assert embedding.spec == head.spec == expected
        assert (head.W_q is embedding.W_q) == bool(model.config.tie_word_embeddings)
        others = {spec for name, spec in specs_of(model).items() if ".layers." in name}
        assert others == {default}
        assert torch.isfinite(model(IDS).logits).all()

    @pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt"])
    def test_edge_blocks_and_down_projections(self, kind: str) -> None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4}
        model = on_meta(kind, intermediate_size=96, ffn_dim=96, **sizes)
        blocks, down = BLOCKS.get(kind, "model.layers"), DOWN[kind]
        assert decoder_blocks(model) == [f"{blocks}.{i}" for i in range(12)]
        assert down_projections(model) == [f"{blocks}.{i}.{down}" for i in range(12)]
        plan = hybrid_plan(model, QuantSpec(2, 32), embeddings=None, edge_blocks=3, down_proj=4)
        specs = plan_of(model, plan)
        assert all(spec.group_size == 32 for spec in specs.values())
        for name, spec in specs.items():
            edge = name.startswith((f"{blocks}.0.", f"{blocks}.11."))
            assert spec.nbits == (4 if name.endswith(down) else 3 if edge else 2), name
        assert {name for name in specs if ".layers." not in name} == set()

    def test_a_square_mlp_and_a_wide_attention_are_told_apart(self) -> None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        square = on_meta("llama", intermediate_size=64, **sizes)
        wide = on_meta("qwen3", intermediate_size=96, head_dim=64, **sizes)
        for model in (square, wide):
            assert down_projections(model) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]

    def test_bits_are_only_ever_raised(self, story_errors: tuple[Path, ModelErrors]) -> None:
        folder, errors = story_errors
        first = errors.plan_for(2.5)
        plan = hybrid_plan(str(folder), first, embeddings=8, edge_blocks=1, down_proj=3)
        model = loaded(folder)
        before, after = plan_of(model, first), plan_of(model, plan)
        for name, spec in before.items():
            floor = 3 if name.endswith("down_proj") else spec.nbits
            assert after[name] == spec.replace(nbits=max(spec.nbits, floor))
        assert set(after) - set(before) == {"model.embed_tokens", "lm_head"}

    def test_a_plan_of_overlapping_patterns_and_skips_stays_what_it_is(
        self, random_model: Callable[..., Path]
    ) -> None:
        folder = random_model("llama")
        patterns = {"*.mlp.*": {"nbits": 3}, "down_proj": {"nbits": 1}, "lm_head": {}, "embed_tokens": {"nbits": 3}}
        plan = QuantPlan(QuantSpec(2, 32), patterns, skip=("*.1.self_attn.*", "lm_head"))
        model = loaded(folder)
        kept = hybrid_plan(str(folder), plan, embeddings=None)
        assert plan_of(model, kept) == plan_of(model, plan)
        eight = plan_of(model, hybrid_plan(str(folder), plan, embeddings=8))
        assert eight == {**plan_of(model, plan), "model.embed_tokens": QuantSpec(8, 64)}
        named = QuantPlan(QuantSpec(2, 32), {"lm_head": {}})
        assert plan_of(model, hybrid_plan(str(folder), named, embeddings=None))["lm_head"] == QuantSpec(2, 32)

    def test_groups_divide_the_width_of_the_embedding(self) -> None:
        for width, groups in ((64, (64, 32)), (96, (32, 32)), (80, (16, 16)), (172, (64, 32))):
            heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
            model = on_meta("llama", hidden_size=width, **heads)
            for bits, group in zip((8, 4), groups, strict=True):
                plan = hybrid_plan(model, QuantSpec(), embeddings=bits)
                assert plan.override_for("model.embed_tokens") == QuantSpec(bits, group)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"embeddings": 2}, "embeddings is 2: it must be 8, 4 or None"),
            ({"edge_blocks": 5}, "edge_blocks is 5: it must be one of 1, 2, 3, 4, 8 or None"),
            ({"down_proj": "4"}, "down_proj is '4': it must be one of"),
        ],
    )
    def test_bad_bits_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            hybrid_plan(on_meta("llama", num_hidden_layers=1), QuantSpec(), **arguments)

    def test_what_cannot_be_found_or_packed_is_said(self) -> None:
        small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        with pytest.raises(UserError, match="do more than look rows up"):
            hybrid_plan(on_meta("gemma", head_dim=32, **small), QuantSpec())
        fused = on_meta("mixtral", num_key_value_heads=2, num_local_experts=2, **small)
        with pytest.raises(UserError, match=r"experts\.\w+ holds the matrices of experts, and bits are shared out"):
            layer_errors(fused)
        plan = hybrid_plan(fused, QuantSpec(), down_proj=4, embeddings=None)
        down = plan.override_for("model.layers.0.mlp.experts.down_proj")
        assert down is not None
        assert down.nbits == 4
        assert plan.override_for("model.layers.0.mlp.experts.gate_up_proj") is None
        assert "| mlp.experts.down_proj | 0 | 4 | 32 |" in describe_plan(fused, plan)
        with pytest.raises(UserError, match="no list of blocks"):
            decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


class TestDescribe:
    def test_the_table(self, story_errors: tuple[Path, ModelErrors]) -> None:
        folder, _ = story_errors
        plan = QuantPlan(EXACT[4], {"layers.1.mlp.up_proj": {"nbits": 4}, "embed_tokens": {"nbits": 8}})
        lines = describe_plan(str(folder), plan).splitlines()
        assert "| self_attn.q_proj | 0-1 | 2 | 64 | 2.500 |" in lines
        up = [line for line in lines if "up_proj" in line]
        assert up == ["| mlp.up_proj | 0 | 2 | 64 | 2.500 |", "| mlp.up_proj | 1 | 4 | 64 | 4.500 |"]
        assert "| model.embed_tokens |  | 8 | 64 | 8.500 |" in lines
        # The tied head is the embedding's; linear layers are counted as `bits_per_weight` does.
        model = hqqplus.quantize_model(loaded(folder), plan)
        assert lines[-1] == f"| all linear layers | | | | {bits_per_weight(model):.3f} |"
        assert describe_plan(loaded(folder), plan).splitlines() == lines


class TestBenchmark:
    def test_it_measures_what_a_packed_model_computes(
        self, story_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = load_benchmark("allocation")
        monkeypatch.setattr(script, "MAX_TOKENS", 1000)
        bench = script.Bench(story_model.name)
        plan = hybrid_plan(bench.model, QuantSpec(2, 64), embeddings=8, down_proj=4)
        row = bench.measure(plan)
        packed = hqqplus.quantize_model(loaded(story_model), plan)
        assert row["perplexity"] == pytest.approx(perplexity(packed, bench.windows).perplexity, rel=1e-4)
        assert row["bits_per_weight"] == pytest.approx(bits_per_weight(packed))
        assert row["megabytes"] == pytest.approx(model_bytes(packed) / 1e6)
        # The model is left as it was.
        assert bench.nll() == bench.parent
