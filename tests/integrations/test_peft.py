"""Every door of PEFT on a packed base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging import version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig
from hqqplus.adapters import round_adapter
from hqqplus.errors import UserError
from hqqplus.integrations.peft import PackedLoraLinear, add_gains, gain_parameters, norm_modules, train_in_float32
from hqqplus.modules import PackedLinear, packed_modules
from hqqplus.quantization import QuantSpec
from tests.conftest import load_benchmark

IDS = torch.arange(3, 35).view(1, -1)
lora_only = pytest.param(
    "lora_only",
    marks=pytest.mark.xfail(
        version.parse(peft.__version__) < version.parse("0.21"),
        strict=True,
        reason="PEFT 0.20 looks for the biases where those of unwrapped layers are, and saves none",
    ),
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    config = HqqPlusConfig(nbits=2, group_size=32)
    AutoModelForCausalLM.from_pretrained(random_model("qwen2"), quantization_config=config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder: Path, **arguments: Any) -> Any:
    torch.manual_seed(0)
    config = {
        "r": 4,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
        **arguments,
    }
    return get_peft_model(load(folder), LoraConfig(**config))


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_trains_the_adapter_and_nothing_else(packed: Path, variant: dict[str, Any]) -> None:
    model = adapted(packed, **variant)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_all_linear_finds_every_packed_projection_but_not_the_head(packed: Path) -> None:
    model = adapted(packed)
    wrapped = {
        n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, PackedLoraLinear)
    }
    assert wrapped == set(packed_modules(load(packed)))
    assert {n.rsplit(".", 1)[1] for n in wrapped} == set(PROJECTIONS)


def test_saved_adapter_reloads_bit_exactly_through_every_door(packed: Path, tmp_path: Path) -> None:
    model = adapted(packed, use_rslora=True).eval()
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(load(packed), tmp_path)(IDS).logits, logits)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, logits)
    direct = load(packed)
    direct.load_adapter(str(tmp_path))
    assert torch.equal(direct(IDS).logits, logits)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, load(packed)(IDS).logits)


def test_two_adapters_side_by_side(packed: Path, tmp_path: Path) -> None:
    one, two = adapted(packed).eval(), adapted(packed, r=8, lora_alpha=32).eval()
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    both = PeftModel.from_pretrained(load(packed), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", "two")
    both.eval()
    mixed = both(IDS.repeat(2, 1), adapter_names=["one", "two"]).logits
    torch.testing.assert_close(mixed[:1], one(IDS).logits)
    torch.testing.assert_close(mixed[1:], two(IDS).logits)


def test_prepare_for_kbit_training_casts_nothing_packed(packed: Path) -> None:
    model = load(packed)
    before = {n: m.packed().state() for n, m in packed_modules(model).items()}
    before = {n: {k: t.clone() for k, t in state.items()} for n, state in before.items()}
    model = prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    for name, module in packed_modules(model).items():
        assert all(torch.equal(t, before[name][k]) for k, t in module.packed().state().items())
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter.train()
    adapter(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_alternatives(packed: Path, merge: str) -> None:
    model = adapted(packed)
    with pytest.raises(ValueError, match=r"beside the base.*hqqplus export"):
        getattr(model, merge)()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "pissa_niter_4"])
def test_inits_that_rewrite_the_base_are_refused(packed: Path, init: str) -> None:
    with pytest.raises(ValueError, match="rewrites the base weight"):
        adapted(packed, init_lora_weights=init)


def test_target_parameters_are_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        adapted(packed, target_modules=[], target_parameters=["q_proj.W_q"])


def test_lora_on_an_ordinary_model_is_left_to_peft(random_model: Callable[..., Path]) -> None:
    model = adapted(random_model("qwen2"))
    assert not any(isinstance(m, PackedLoraLinear) for m in model.modules())
    model.merge_and_unload()


# One layer, against PEFT's own forward pass on it.

IN, OUT = 64, 48


def layer_with(*adapters: dict[str, Any], bias: bool = False) -> PackedLoraLinear:
    """A packed layer in training mode with these adapters, all of them active and trained."""
    torch.manual_seed(0)
    model = nn.Sequential(PackedLinear.from_linear(nn.Linear(IN, OUT, bias), QuantSpec(2, 32)))
    configs = [LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["0"], **a}) for a in adapters]
    adapted = get_peft_model(model, configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        adapted.add_adapter(str(number), config)
    adapted.base_model.set_adapter([str(number) for number in range(len(configs))])
    layer = adapted.base_model.model[0]
    assert type(layer) is PackedLoraLinear
    return layer.train()


def is_fused(y: Tensor) -> bool:
    return y.grad_fn is not None and "MatmulLora" in type(y.grad_fn).__name__


def outputs_and_gradients(forward: Callable[..., Tensor], layer: Any, x: Tensor, **arguments: Any) -> list[Tensor]:
    """[y, gradients of x (where it wants one) and of all trained parameters], from the same random state."""
    torch.manual_seed(1)
    y = forward(layer, x, **arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy)]


TWO = [{"r": 4, "lora_alpha": 3}, {"r": 6, "use_rslora": True, "lora_dropout": 0.4}]


@pytest.mark.parametrize(
    "adapters",
    [[{}], [{"r": 3, "lora_alpha": 5}], [{"use_rslora": True}], [{"lora_dropout": 0.3}], TWO],
    ids=["plain", "scaled", "rslora", "dropout", "two"],
)
@pytest.mark.parametrize("train_x", [True, False], ids=["x", "first layer"])
def test_fused_forward_and_gradients_equal_pefts(adapters: list[dict[str, Any]], train_x: bool) -> None:
    layer = layer_with(*adapters, bias=True)
    layer.base_layer.bias.requires_grad_()
    x = torch.randn(3, 5, IN).requires_grad_(train_x)
    found = outputs_and_gradients(PackedLoraLinear.forward, layer, x)
    expected = outputs_and_gradients(PeftLoraLinear.forward, layer, x)
    assert is_fused(found[0])
    assert not is_fused(expected[0])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    layer.eval()
    torch.testing.assert_close(layer(x), PeftLoraLinear.forward(layer, x))


def test_the_scale_that_peft_sets_is_the_one_that_is_used() -> None:
    layer = layer_with({})
    x = torch.randn(3, IN)
    layer.set_scale("0", 2.5)
    torch.testing.assert_close(layer(x), PeftLoraLinear.forward(layer, x))
    layer.scale_layer(0.0)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_a_disabled_or_foreign_adapter_leaves_the_base() -> None:
    layer = layer_with({}, {"r": 2})
    x = torch.randn(3, IN)
    base = layer.base_layer(x)
    layer.set_adapter("1")
    torch.testing.assert_close(layer(x), PeftLoraLinear.forward(layer, x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer._active_adapter = ["of another layer"]
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_what_is_not_plain_is_left_to_peft(variant: dict[str, Any]) -> None:
    for layer in (layer_with(variant, bias=True), layer_with({}, variant, bias=True)):
        x = torch.randn(3, IN, requires_grad=True)
        found = outputs_and_gradients(PackedLoraLinear.forward, layer, x)
        assert not is_fused(found[0])
        torch.testing.assert_close(found, outputs_and_gradients(PeftLoraLinear.forward, layer, x), rtol=0, atol=0)


def test_a_batch_of_mixed_adapters_is_left_to_peft() -> None:
    layer = layer_with({}, {"r": 2}).eval()
    x = torch.randn(3, 5, IN)
    names = ["1", "__base__", "0"]
    found = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        layer.set_adapter([] if name == "__base__" else name)
        torch.testing.assert_close(found[row], layer(x[row]))


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "forward", "class"])
def test_a_part_that_is_hooked_or_replaced_is_called(part: str, how: str) -> None:
    """Offloading, DeepSpeed and FSDP bring the parameters when the part is called."""
    layer = layer_with({})
    x = torch.randn(3, IN, requires_grad=True)
    assert is_fused(layer(x))
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["0"]
    calls = []
    if how == "hook":
        module.register_forward_hook(lambda *_: calls.append(1))
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    elif how == "backward hook":
        module.register_full_backward_hook(lambda *_: calls.append(1))
    elif how == "forward":
        original = module.forward
        module.forward = lambda x: calls.append(1) or original(x)
    else:
        kind = type(module)
        module.__class__ = type("Wrapped", (kind,), {"forward": lambda m, x: calls.append(1) or kind.forward(m, x)})
    y = layer(x)
    y.sum().backward()
    assert calls
    assert not is_fused(y)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)],
    ids=["bf16", "bf16 autocast", "fp32 autocast", "fp32"],
)
def test_dtypes_are_pefts_and_errors_no_larger(dtype: torch.dtype, autocast: bool) -> None:
    layer = layer_with({"lora_alpha": 32})
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    x = torch.randn(400, IN, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        found = outputs_and_gradients(PackedLoraLinear.forward, layer, x)
        peft = outputs_and_gradients(PeftLoraLinear.forward, layer, x)
    assert is_fused(found[0])
    assert [t.dtype for t in found] == [t.dtype for t in peft]
    # PEFT's double, in float64: what both should give.
    layer.double()
    exact = outputs_and_gradients(PeftLoraLinear.forward, layer, x.detach().double().requires_grad_())
    # Without autocast PEFT computes the adapter in float32, which is what this route does without: a rounding more.
    allowed = 1.05 if autocast or dtype == torch.float32 else 3
    for one, other, truth in zip(found, peft, exact, strict=True):
        errors = [(t.double() - truth).norm() / truth.norm() for t in (one, other)]
        assert errors[0] <= allowed * errors[1] + 1e-6
        assert errors[0] < 1e-2


@pytest.mark.parametrize("case", ["bf16", "bf16, autocast", "fp32"])
def test_memory_beside_input_output_and_gradients(case: str) -> None:
    """No copy of x, no tensor of the size of y or dx; PEFT's forward pass has several, so the counting is right."""
    benchmark = load_benchmark("lora_memory")
    layer = benchmark.make_layer(256, 256, 4)
    dtype, autocast = benchmark.CASES[case]
    tokens = 512
    result = benchmark.compare(layer, tokens, dtype, autocast)
    size = tokens * 256 * dtype.itemsize  # of x, y, dy and dx
    h, adapter = tokens * 4 * dtype.itemsize, 2 * 256 * 4 * dtype.itemsize
    ours, peft = result["hqqplus"], result["peft"]
    assert ours["kept"] == h
    assert ours["forward"] <= h + adapter
    assert ours["backward"] <= 2 * h + 2 * adapter
    assert h + adapter < size / 10
    assert peft["kept"] >= (h if case == "fp32" else size)
    assert peft["forward"] >= 2 * size
    assert peft["backward"] >= 2 * size


def test_dropout_keeps_one_tensor_of_the_size_of_x() -> None:
    benchmark = load_benchmark("lora_memory")
    layer = benchmark.make_layer(256, 256, 4, lora_dropout=0.5)
    x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = layer.train()(x)
    assert is_fused(y)
    packed = {p.data_ptr() for p in layer.parameters()}
    large = [t for pointer, t in kept.items() if pointer not in packed and t.numel() == x.numel()]
    # What the dropout left, and the mask that dropout itself keeps; x is not among them.
    assert len(large) == 2
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    packed: Path, use_reentrant: bool, dropout: float, autocast: bool
) -> None:
    model = adapted(packed, lora_dropout=dropout).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    found = gradients()
    assert len(found) == 2 * 2 * len(PROJECTIONS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_learns_the_same_with_pefts_forward_pass(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        model = adapted(packed, use_rslora=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours = losses()
    monkeypatch.setattr(PackedLoraLinear, "forward", PeftLoraLinear.forward)
    assert ours == pytest.approx(losses(), rel=1e-5)
    assert ours[-1] < ours[0]


# Gains.


def randomise(gains: list[nn.Parameter], size: float = 0.2) -> None:
    with torch.no_grad():
        for gain in gains:
            gain.normal_(0, size)


def with_gains(packed: Path, **arguments: Any) -> Any:
    model = adapted(packed, **arguments).eval()
    add_gains(model)
    randomise(gain_parameters(model))
    return model


def dense_gained(layer: PackedLoraLinear, x: Tensor, names: list[str]) -> Tensor:
    """y = r (W (c x)) + bias + LoRA of x, in float64 from the dequantized matrix."""
    x, base = x.double(), layer.base_layer
    inner = outer = torch.ones(())
    for name in (name for name in names if name in layer.lora_gain_in):
        inner, outer = (
            inner * (1 + layer.lora_gain_in[name].double()),
            outer * (1 + layer.lora_gain_out[name].double()),
        )
    y = (x * inner) @ base.dequantize(torch.float64).t() * outer
    y = y if base.bias is None else y + base.bias.double()
    for name in names:
        y = (
            y
            + layer.scaling[name]
            * (x @ layer.lora_A[name].weight.double().t())
            @ layer.lora_B[name].weight.double().t()
        )
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
def test_gains_are_the_dense_formula_on_every_route(bias: bool, hooked: bool) -> None:
    layer = layer_with({}, {"r": 2}, {"r": 3}, bias=bias)
    for name in ("0", "1"):
        layer.add_gains(name)
    randomise([*layer.lora_gain_in.values(), *layer.lora_gain_out.values()])
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, IN, requires_grad=True)
    for names in (["0"], ["1"], ["2"], ["0", "1", "2"], ["0", "2"]):
        layer.set_adapter(names)
        y = layer(x)
        assert is_fused(y) != hooked
        expected = dense_gained(layer, x, names)
        assert (y - expected).norm() <= 1e-5 * expected.norm()
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        found = torch.autograd.grad(y, wanted, torch.ones_like(y))
        exact = torch.autograd.grad(expected, wanted, torch.ones_like(expected))
        assert all((one - other).norm() <= 1e-4 * other.norm() + 1e-6 for one, other in zip(found, exact, strict=True))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gains_under_autocast_give_what_the_called_base_layer_gives(dropout: float) -> None:
    layer = layer_with({"lora_dropout": dropout}, bias=True)
    layer.add_gains("0")
    randomise([*layer.lora_gain_in.values(), *layer.lora_gain_out.values()])
    x = torch.randn(2, 5, IN, requires_grad=True)
    with torch.autocast("cpu"):
        fused = outputs_and_gradients(PackedLoraLinear.forward, layer, x)
        called = outputs_and_gradients(lambda m, x: m._gained_forward(x.bfloat16(), ["0"]), layer, x)
    assert is_fused(fused[0])
    assert [t.dtype for t in fused] == [t.dtype for t in called]
    for one, other in zip(fused, called, strict=True):
        assert (one - other).float().norm() <= 0.02 * other.float().norm()


def test_gains_start_at_one_and_are_trained_with_the_adapter(packed: Path) -> None:
    model = adapted(packed).train()
    start = model(IDS).logits
    assert add_gains(model) == len(packed_modules(model)) == 14
    assert torch.equal(model(IDS).logits, start)
    sizes = [m.in_features + m.out_features for m in packed_modules(model).values()]
    assert sum(p.numel() for p in gain_parameters(model)) == sum(sizes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(bool((p != 0).all()) for p in gain_parameters(model))
    assert losses[-1] < losses[0] - 0.1
    assert add_gains(model) == 14  # and what is there stays
    assert all(bool(p.any()) for p in gain_parameters(model))


def test_the_gains_of_llama_3_8b_are_5_mb() -> None:
    """In 16 bits, counted on the meta device: 32 layers of these projections."""
    hidden, small, wide = 4096, 1024, 14336
    shapes = [(hidden, hidden), (hidden, small), (hidden, small), (hidden, hidden)]
    shapes += [(hidden, wide), (hidden, wide), (wide, hidden)]
    model = nn.Sequential(*(PackedLinear(width, out, False, QuantSpec(2, 64), device="meta") for width, out in shapes))
    peft = get_peft_model(model, LoraConfig(r=1, target_modules=[str(i) for i in range(7)]), low_cpu_mem_usage=True)
    add_gains(peft)
    assert 32 * 2 * sum(p.numel() for p in gain_parameters(peft)) == 5_242_880


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_gains_are_saved_and_come_back_through_every_door(
    packed: Path, tmp_path: Path, task: str | None, low_cpu_mem_usage: bool
) -> None:
    model = with_gains(packed, task_type=task)
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as tensors:
        keys = [key for key in tensors.keys() if "gain" in key]  # noqa: SIM118  # not a dict
    assert len(keys) == 28
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_gain_in" in keys
    fresh = PeftModel.from_pretrained(load(packed), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(fresh(IDS).logits, logits)
    assert not any(p.requires_grad for p in gain_parameters(fresh))
    trainable = PeftModel.from_pretrained(load(packed), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in gain_parameters(trainable))
    second = adapted(packed)
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert torch.equal(second.eval()(IDS).logits, logits)
    if task is not None:  # PEFT drops the mark that transformers' own loading needs
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, logits)
        direct = load(packed)
        direct.load_adapter(str(tmp_path))
        assert torch.equal(direct(IDS).logits, logits)


def test_gains_belong_to_one_adapter(packed: Path, tmp_path: Path) -> None:
    base, one, two = load(packed)(IDS).logits, with_gains(packed), adapted(packed, r=8).eval()
    expected = [m(IDS).logits for m in (one, two)]
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    both = PeftModel.from_pretrained(load(packed), tmp_path / "one", adapter_name="one").eval()
    both.load_adapter(tmp_path / "two", "two")
    for name, logits in zip(("one", "two"), expected, strict=True):
        both.set_adapter(name)
        assert torch.equal(both(IDS).logits, logits)
    with both.disable_adapter():
        assert torch.equal(both(IDS).logits, base)
    mixed = both(IDS.repeat(3, 1), adapter_names=["two", "one", "__base__"]).logits
    for row, logits in zip(mixed, (expected[1], expected[0], base), strict=True):
        torch.testing.assert_close(row, logits[0], rtol=1e-4, atol=1e-4)
    both.delete_adapter("one")
    assert gain_parameters(both) == []


def test_gains_of_8_bit_activations() -> None:
    layer = layer_with({}, bias=True)
    one_bit = PackedLinear.from_linear(nn.Linear(IN, OUT), QuantSpec(1, 32))
    layer.base_layer = one_bit
    layer.add_gains("0")
    randomise([*layer.lora_gain_in.values(), *layer.lora_gain_out.values()])
    one_bit.compute = "int8"
    x = torch.randn(40, IN)
    with torch.no_grad():
        assert one_bit.takes_int8()
        y = layer(x)
    expected = dense_gained(layer, x, ["0"])
    assert 1e-5 < (y - expected).norm() / expected.norm() < 0.02


def test_gains_beside_anything_but_plain_lora_are_refused(packed: Path) -> None:
    with pytest.raises(UserError, match="without use_dora"):
        add_gains(adapted(packed, use_dora=True))
    with pytest.raises(UserError, match="no adapter 'other'"):
        add_gains(adapted(packed), "other")
    layer = layer_with({}, {"use_dora": True})
    layer.add_gains("0")
    with pytest.raises(ValueError, match="cannot be active beside"):
        layer(torch.randn(3, IN))


# Norms and biases.


def test_norms_are_found_by_what_they_are(packed: Path, random_model: Callable[..., Path]) -> None:
    # "norm" alone is the end of every name: what PEFT takes by it are norms, all of them.
    assert norm_modules(load(packed)) == ["input_layernorm", "norm", "post_attention_layernorm"]
    found = norm_modules(AutoModelForCausalLM.from_pretrained(random_model("qwen3")))
    assert found == ["input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]
    assert norm_modules(nn.Linear(8, 8)) == []
    # Where the end of a name would take another module too, whole names; where those do, nothing would be right.
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"norm": nn.RMSNorm(8)}), "b": nn.ModuleDict({"no_norm": nn.Linear(8, 8)})}
    )
    assert norm_modules(model) == ["a.norm"]
    with pytest.raises(UserError, match="cannot tell them apart"):
        norm_modules(nn.ModuleDict({"norm": nn.LayerNorm(8), "no_norm": nn.Linear(8, 8)}))


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_and_biases_take_small_steps_in_a_16_bit_model(packed: Path, tmp_path: Path, autocast: bool) -> None:
    def trained_model() -> Any:
        base = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
        config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=norm_modules(base), bias="all")
        return get_peft_model(base, config)

    plain, model = trained_model(), trained_model()
    with torch.autocast("cpu", enabled=autocast):
        expected = plain(IDS).logits
        assert train_in_float32(model) == 5 + 6
        assert train_in_float32(model) == 0
        assert torch.equal(model(IDS).logits, expected)
    for m in (plain, model):
        trained = [p for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
        for _ in range(3):
            with torch.autocast("cpu", enabled=autocast):
                m(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    norms = [[p for n, p in m.named_parameters() if "modules_to_save" in n] for m in (plain, model)]
    assert all(bool((p == 1).all()) for p in norms[0])  # where every step is lost
    assert all(bool((p != 1).any()) for p in norms[1])
    assert {p.dtype for p in norms[1]} == {torch.float32}
    round_adapter(model)
    model.eval()
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16), tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("bias", ["none", lora_only, "all"])
def test_norms_and_biases_are_trained_saved_and_come_back(packed: Path, tmp_path: Path, bias: str) -> None:
    model = adapted(packed, modules_to_save=norm_modules(load(packed)), bias=bias).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in trained.items()}
    assert sum("modules_to_save" in n for n in trained) == 5
    assert sum(n.endswith("base_layer.bias") for n in trained) == (0 if bias == "none" else 6)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in trained.items() if "k_proj.base_layer.bias" not in n)
    model.eval()
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(load(packed), tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    for name, parameter in fresh.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name])
    again = load(packed)
    with fresh.disable_adapter():
        if bias == "none":
            assert torch.equal(fresh(IDS).logits, again(IDS).logits)
