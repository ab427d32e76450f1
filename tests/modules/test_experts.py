"""Packed experts: the same outputs and gradients as the class's own forward pass over the dequantized matrices."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import hqqplus
from hqqplus import HqqPlusConfig, QuantPlan, QuantSpec
from hqqplus.errors import UserError
from hqqplus.modules import PackedExperts, PackedStack, bits_per_weight, packed_modules
from hqqplus.modules.experts import routers, why_not
from hqqplus.modules.replace import plan_modules, unpack_modules

EXPERTS, WIDTH, INNER, TOKENS = 5, 24, 40, 11
CLASSES: list[type[nn.Module]] = [
    MixtralExperts,
    Qwen2MoeExperts,
    Qwen3MoeExperts,
    OlmoeExperts,
    NemotronHExperts,
]
with suppress(ImportError):  # older ones have no such model; it is here for its gate
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    CLASSES.append(DeepseekV4Experts)
SPECS = [QuantSpec(2, 16), QuantSpec(1, -1, metadata_bits=16), QuantSpec(3, 16, axis=0)]


class Sizes:
    """A configuration with the names that these classes ask for."""

    num_local_experts = num_experts = n_routed_experts = EXPERTS
    hidden_size, moe_latent_size = WIDTH, None
    intermediate_size = moe_intermediate_size = INNER
    hidden_act, mlp_hidden_act, mlp_bias = "silu", "relu2", False
    swiglu_limit = 0.6  # low enough to bind
    _experts_implementation = "grouped_mm"


def experts_of(kind: type[nn.Module] = MixtralExperts) -> Any:
    made: Any = kind(Sizes())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def packed_of(original: nn.Module, spec: QuantSpec = SPECS[0], skip: tuple[str, ...] = ()) -> PackedExperts:
    holder = nn.ModuleDict({"experts": copy.deepcopy(original)})
    hqqplus.quantize_model(holder, QuantPlan(spec, skip=skip))
    found = holder["experts"]
    assert isinstance(found, PackedExperts)
    return found


def dequantized(packed: PackedExperts) -> Any:
    """An ordinary module with what `packed` stands for."""
    return copy.deepcopy(packed).unpacked(torch.float32)


def eager(experts: Any, *arguments: Tensor) -> Tensor:
    return type(experts).forward.__wrapped__(experts, *arguments)


def routed(seed: int = 0, tokens: int = TOKENS, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    return (
        torch.randn(tokens, WIDTH, generator=generator),
        chosen,
        torch.rand(tokens, top_k, generator=generator),
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_outputs_and_gradients_are_those_of_the_class_itself(kind: type[nn.Module]) -> None:
    packed = packed_of(experts_of(kind))
    plain = dequantized(packed).double()
    x, chosen, weights = routed()
    results = []
    for run, dtype in ((packed, torch.float32), (lambda *a: eager(plain, *a), torch.float64)):
        inputs = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        y = run(inputs[0], chosen, inputs[1])
        results.append((y, *torch.autograd.grad((y * y).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_spec(spec: QuantSpec) -> None:
    original = experts_of()
    packed = packed_of(original, spec)
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(packed, name)
        whole, weight = stack.dequantize(torch.float32), getattr(original, name)
        for index in range(EXPERTS):
            found = hqqplus.quantize(weight[index].detach(), spec)
            assert all(torch.equal(found.state()[key], value) for key, value in stack.expert(index).state().items())
            assert torch.equal(whole[index], found.dequantize())
        assert stack.bits_per_weight == pytest.approx(spec.bits_per_weight(*weight.shape[1:]))
    x, chosen, weights = routed()
    torch.testing.assert_close(packed(x, chosen, weights), eager(dequantized(packed), x, chosen, weights))


@pytest.mark.parametrize(
    "chosen",
    [
        torch.tensor([[3, 1]]),
        torch.full((TOKENS, 1), 2),
        torch.tensor([[0, 4], [4, 0], [0, 4]]),
        torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS]]),  # transformers' sign for no expert
        torch.empty(0, 2, dtype=torch.int64),
    ],
    ids=["one token", "all to one expert", "some experts idle", "to no expert", "no token"],
)
def test_whatever_the_router_chooses(chosen: Tensor) -> None:
    packed = packed_of(experts_of())
    x, weights = torch.randn(len(chosen), WIDTH).requires_grad_(), torch.rand(chosen.shape)
    y = packed(x, chosen, weights)
    expected = eager(dequantized(packed), x, chosen.clamp(max=EXPERTS - 1), weights * (chosen < EXPERTS))
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, packed(x, chosen, weights))
    if len(chosen):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (theirs,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    packed, (x, chosen, weights) = packed_of(experts_of()), routed()
    gradients = []
    for run in (packed, lambda *a: checkpoint(packed, *a, use_reentrant=reentrant)):
        inputs = x.clone().requires_grad_()
        run(inputs, chosen, weights).square().sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)


def test_autocast() -> None:
    packed, (x, chosen, weights) = packed_of(experts_of()), routed()
    plain = dequantized(packed)
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = packed(x, chosen, weights), eager(plain, x, chosen, weights)
    assert y.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(y, theirs, rtol=2e-2, atol=2e-2)
    assert not torch.equal(y, packed(x, chosen, weights)), "computed in bfloat16"


def test_no_more_than_one_expert_is_dequantized() -> None:
    packed, (x, chosen, weights) = packed_of(experts_of()), routed(tokens=3, top_k=EXPERTS)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            if isinstance(found, Tensor) and found.is_floating_point():
                self.numbers = max(self.numbers, found.numel())
            return found

    with Largest() as largest:
        packed(x.requires_grad_(), chosen, weights).sum().backward()
    assert 0 < largest.numbers <= 2 * INNER * WIDTH
    assert not hasattr(packed.down_proj, "weight")


def test_the_state_is_integers_and_survives_casts_and_copies() -> None:
    packed = packed_of(experts_of())
    assert not list(packed.buffers())
    assert {name.rpartition(".")[0] for name, _ in packed.named_parameters()} == {"gate_up_proj", "down_proj"}
    assert {(p.dtype, p.requires_grad) for p in packed.parameters()} == {(torch.uint8, False)}
    assert all(len(parameter) == EXPERTS for parameter in packed.parameters())
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    other = copy.deepcopy(packed).to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    x, chosen, weights = routed()
    assert torch.equal(packed(x, chosen, weights), other(x, chosen, weights))
    with pytest.raises(ValueError, match="does not fit"):
        packed.down_proj.set_expert(0, packed.gate_up_proj.expert(0))
    with pytest.raises(TypeError, match="a matrix for each expert"):
        packed.down_proj.packed()


def test_one_projection_may_stay_in_full_precision() -> None:
    original = experts_of()
    packed = packed_of(original, skip=("*.down_proj",))
    assert torch.equal(packed.down_proj, original.down_proj)
    assert isinstance(packed.gate_up_proj, PackedStack)
    x, chosen, weights = routed()
    torch.testing.assert_close(packed(x, chosen, weights), eager(dequantized(packed), x, chosen, weights))


def test_it_turns_into_what_it_was() -> None:
    holder = nn.Sequential(nn.ModuleDict({"experts": experts_of()}))
    hqqplus.quantize_model(holder, SPECS[0])
    assert bits_per_weight(holder) == pytest.approx(
        sum(8 * p.numel() for p in holder.parameters()) / (3 * 40 * 24 * 5)
    )
    packed = holder[0]["experts"]  # type: ignore[index]
    x, chosen, weights = routed()
    expected = packed(x, chosen, weights)
    unpack_modules(holder, torch.float32)
    assert type(holder[0]["experts"]) is MixtralExperts  # type: ignore[index]
    assert not packed_modules(holder)
    torch.testing.assert_close(eager(holder[0]["experts"], x, chosen, weights), expected)  # type: ignore[index]


# Plans ---------------------------------------------------------------------------------------------------------------


def mixture(kind: str = "mixtral", **sizes: Any) -> Any:
    """A small model of that kind without weights."""
    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, intermediate_size=48, **{**common, **sizes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.mark.parametrize(
    ("overrides", "skip", "bits"),
    [
        ({}, (), (2, 2)),
        ({"*.experts.gate_up_proj": {"nbits": 1}}, (), (1, 2)),
        ({"experts.down_proj": {"nbits": 4}, "*.experts": {"nbits": 3}}, (), (3, 4)),
        ({"*.experts.*": {"nbits": 3}}, ("*.down_proj",), (3, None)),
        ({}, ("*.experts",), (None, None)),
        ({}, ("mlp.experts",), (None, None)),
    ],
)
def test_patterns(overrides: dict[str, Any], skip: tuple[str, ...], bits: tuple[int | None, int | None]) -> None:
    specs = plan_modules(mixture(), QuantPlan(QuantSpec(2, 32), overrides, skip))
    assert tuple(specs[name].nbits if name in specs else None for name in (UP, DOWN)) == bits
    assert "model.layers.0.self_attn.q_proj" in specs
    assert "model.layers.0.mlp.gate" not in specs


def test_routers_are_packed_only_where_they_are_named() -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
    model = mixture("qwen2_moe", **sizes)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert routers(model) == {gate}
    assert gate not in plan_modules(model, QuantPlan())
    assert gate in plan_modules(model, QuantPlan(overrides={"shared_expert_gate": {"nbits": 8}}))
    assert "model.layers.0.mlp.shared_expert.gate_proj" in plan_modules(model, QuantPlan())


@pytest.mark.parametrize(
    ("kind", "sizes", "name", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "GptOssExperts", "it has biases"),
        (
            "llama4_text",
            {"num_local_experts": 4, "head_dim": 16},
            "Llama4TextExperts",
            "it is of a layout that is not known",
        ),
    ],
)
def test_others_are_refused_by_name(kind: str, sizes: dict[str, Any], name: str, reason: str) -> None:
    model = mixture(kind, **sizes)
    with pytest.raises(UserError) as caught:
        hqqplus.quantize_model(model, HqqPlusConfig(2, 32))
    says = str(caught.value)
    weights = sum(
        parameter.numel() for key, parameter in model.named_parameters() if ".experts." in key and "bias" not in key
    )
    found = round(100 * weights / model.num_parameters())
    assert says.startswith(
        f"{type(model).__name__}: {found} % of its weights are experts of class {name}, which cannot"
    )
    assert reason in says
    assert "Mixtral, Qwen2-MoE" in says
    assert says.endswith("(quantization.skip, --skip, modules_to_not_convert): '*.experts'")
    pattern = says.rpartition("'*")[2].rstrip("'")
    specs = plan_modules(model, QuantPlan(skip=(f"*{pattern}",)))
    assert specs
    assert not any(".experts." in module for module in specs)


def test_a_class_that_computes_something_else_is_refused() -> None:
    class Doubled(MixtralExperts):
        def forward(self, *arguments: Tensor) -> Tensor:
            return super().forward(*arguments) * 2

        forward.__wrapped__ = lambda self, *a: 2 * MixtralExperts.forward.__wrapped__(self, *a)  # type: ignore[attr-defined]

    assert why_not(experts_of()) is None
    assert why_not(experts_of(Doubled)) == "computes something else than gate, product and sum"
    biased = experts_of(MixtralExperts)
    biased.extra = nn.Parameter(torch.zeros(EXPERTS))
    assert "holds other tensors than gate_up_proj and down_proj" in str(why_not(biased))
    with pytest.raises(ValueError, match="a Doubled cannot be packed: it computes something else"):
        PackedExperts(experts_of(Doubled))


def test_what_cannot_be_quantized_is_named() -> None:
    original = experts_of()
    with torch.no_grad():
        original.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^experts\.down_proj, expert 3: .*NaN"):
        packed_of(original)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [QuantSpec(2, 64), QuantSpec(1, 32)])
def test_on_a_gpu(spec: QuantSpec) -> None:
    """In bfloat16, by the kernels of the GPU, for few and for many tokens; the same twice."""

    class Large(Sizes):
        hidden_size, intermediate_size = 256, 384

    original: Any = MixtralExperts(Large())
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.05)
    packed = packed_of(original, spec).cuda()
    plain = dequantized(packed)
    for tokens in (1, 7, 300):
        _, chosen, weights = (part.cuda() for part in routed(tokens=tokens))
        x = torch.randn(tokens, 256, device="cuda")
        results = []
        for run, dtype in (
            (packed, torch.bfloat16),
            (packed, torch.bfloat16),
            (lambda *a: eager(plain, *a), torch.float32),
        ):
            inputs = x.to(dtype).requires_grad_()
            y = run(inputs, chosen, weights.to(dtype))
            results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
        for ours, again, theirs in zip(*results, strict=True):
            assert torch.equal(ours, again)
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 0.02
