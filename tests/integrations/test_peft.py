"""Every door of PEFT on a packed base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig
from hqqplus.integrations.peft import PackedLoraLinear
from hqqplus.modules import packed_modules

IDS = torch.arange(3, 35).view(1, -1)
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
