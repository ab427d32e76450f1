from __future__ import annotations

import pytest
import torch
from torch import nn

from hqqplus.modules import PackedEmbedding, PackedLinear, observe_packing, packed_modules
from hqqplus.modules.replace import (
    Solutions,
    bits_per_weight,
    check_solutions,
    model_bytes,
    pack_module,
    packed_already,
    plan_modules,
    solutions_in_use,
    unpack_modules,
)
from hqqplus.quantization import QuantPlan, QuantSpec, quantize

SPEC = QuantSpec(2, 32, metadata_bits=16)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(self.embed(ids)).relu()))


def pack(model: nn.Module, plan: QuantPlan) -> None:
    for name, spec in plan_modules(model, plan, frozenset({"head"})).items():
        pack_module(model, name, model.get_submodule(name).weight, spec, torch.float32)


def test_linear_layers_follow_the_plan_and_heads_and_embeddings_wait_to_be_named() -> None:
    plan = QuantPlan(SPEC, {"down": {"nbits": 4}})
    assert plan_modules(Toy(), plan, frozenset({"head"})) == {"up": SPEC, "down": SPEC.replace(nbits=4)}
    named = QuantPlan(SPEC, {"head": {"nbits": 8}, "embed": {"nbits": 8}}, skip=("up",))
    assert set(plan_modules(Toy(), named, frozenset({"head"}))) == {"down", "head", "embed"}


def test_tied_modules_go_together() -> None:
    tied = ("embed", "head")
    eight = SPEC.replace(nbits=8)
    for pattern in tied:
        specs = plan_modules(Toy(), QuantPlan(SPEC, {pattern: {"nbits": 8}}), frozenset({"head"}), tied)
        assert specs["embed"] == specs["head"] == eight
    with pytest.raises(ValueError, match="share one weight"):
        plan_modules(Toy(), QuantPlan(SPEC, {"embed": {"nbits": 8}, "head": {"nbits": 4}}), frozenset({"head"}), tied)


def test_an_embedding_cannot_be_grouped_across_rows() -> None:
    with pytest.raises(ValueError, match="axis must be 1"):
        plan_modules(Toy(), QuantPlan(SPEC, {"embed": {"axis": 0}}))


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_packing_and_unpacking_leave_a_model_that_computes_the_same(metadata_bits: int) -> None:
    model, ids = Toy(), torch.tensor([[1, 2, 19]])
    pack(model, QuantPlan(SPEC.replace(metadata_bits=metadata_bits), {"embed": {"nbits": 8}}))
    assert isinstance(model.up, PackedLinear)
    assert isinstance(model.embed, PackedEmbedding)
    assert type(model.head) is nn.Linear
    logits = model(ids)
    unpack_modules(model, torch.float32)
    assert not packed_modules(model)
    torch.testing.assert_close(model(ids), logits)


def test_observers_see_weight_and_packed_form_only_within_the_block() -> None:
    seen = []
    model = Toy()
    weight = model.up.weight.detach().clone()
    with observe_packing(lambda name, full, packed: seen.append((name, torch.equal(full, weight), packed.spec))):
        pack_module(model, "up", model.up.weight, SPEC, torch.float32)
    pack_module(model, "down", model.down.weight, SPEC, torch.float32)
    assert seen == [("up", True, SPEC)]


def test_what_is_solved_already_is_packed_as_it_is_and_seen_by_observers() -> None:
    model, seen = Toy(), {}
    other = quantize(torch.randn(64, 32), SPEC)
    solutions = Solutions({"up": other}, "digest")
    with packed_already(solutions), observe_packing(lambda name, full, packed: seen.update({name: packed})):
        assert solutions_in_use() is solutions
        pack(model, QuantPlan(SPEC))
    assert solutions_in_use() is None
    assert isinstance(model.up, PackedLinear)
    assert torch.equal(model.up.dequantize(), other.dequantize())
    assert torch.equal(seen["up"].W_q, other.W_q)
    plain = Toy()
    pack(plain, QuantPlan(SPEC))
    assert torch.equal(model.down.W_q, plain.down.W_q)
    assert not torch.equal(model.up.W_q, plain.up.W_q)


def test_solutions_of_another_form_or_model_are_refused() -> None:
    model = Toy()
    for weight, spec in ((torch.randn(64, 32), SPEC.replace(nbits=4)), (torch.randn(32, 64), SPEC)):
        with (
            packed_already(Solutions({"up": quantize(weight, spec)}, "")),
            pytest.raises(ValueError, match=r"up\.weight: its solution is .* asked for is .*\(64, 32\)"),
        ):
            pack(model, QuantPlan(SPEC))
        assert type(model.up) is nn.Linear
    with packed_already(Solutions({"up": quantize(torch.randn(64, 32), SPEC)}, "")):
        check_solutions(["up", "down"])
        with pytest.raises(ValueError, match="a solution for up, which is no module that this model packs"):
            check_solutions(["down"])
    check_solutions([])


def test_a_bad_weight_is_named() -> None:
    model = Toy()
    with pytest.raises(ValueError, match=r"up\.weight: .*NaN"):
        pack_module(model, "up", torch.full((64, 32), float("nan")), SPEC, torch.float32)
    assert type(model.up) is nn.Linear


def test_sizes() -> None:
    model = Toy()
    full = model_bytes(model)
    assert full == 2 * (20 * 32 + 32 * 64 + 64 + 64 * 32 + 32 * 20)
    pack(model, QuantPlan(SPEC))
    assert bits_per_weight(model) == 2 + 32 / 32
    assert model_bytes(model) == full - 2 * (2 * 32 * 64) + 2 * 32 * 64 * 3 // 8
    eight = Toy()
    pack(eight, QuantPlan(SPEC, {"*": {"metadata_bits": 8}}, skip=("embed", "head")))
    assert bits_per_weight(eight) == 2 + 16 / 32 + 64 / (64 * 32)  # 64 groups: half a block
    assert model_bytes(eight) == full - 2 * (2 * 32 * 64) + 2 * 32 * 64 * bits_per_weight(eight) / 8
