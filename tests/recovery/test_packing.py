"""Packed documents: the probe's answer beside what the logits of each family show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import hqqplus
from hqqplus import QuantSpec
from hqqplus.errors import UserError
from hqqplus.recovery.packing import _packed_logits, keeps_documents_apart, settle_packing

APART = ["llama", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "phi"]
# Bloom has no positions at all (ALiBi), Mamba a state, and OPT builds its masks without looking at position ids.
TOGETHER = ["opt", "bloom", "mamba"]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def difference(model: Any) -> float:
    """How far the second of two packed documents is from itself alone, largest logit difference over largest logit."""
    first, second = torch.randint(3, 250, (9,)), torch.randint(3, 250, (14,))
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    both = torch.cat([first, second])[None]
    packed = model.eval()(input_ids=both, position_ids=positions, use_cache=False).logits[0, 9:]
    alone = model(input_ids=second[None], use_cache=False).logits[0]
    return float((packed - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", APART)
def test_families_that_keep_documents_apart(random_model: Callable[..., Path], kind: str, implementation: str) -> None:
    model = load(random_model(kind), attn_implementation=implementation)
    assert difference(model) < 1e-5
    assert keeps_documents_apart(model)
    assert keeps_documents_apart(model.to(torch.bfloat16), 100)
    assert settle_packing("auto", model) is settle_packing(True, model) is True
    assert settle_packing(False, model) is False


@pytest.mark.parametrize("kind", TOGETHER)
def test_families_that_do_not(random_model: Callable[..., Path], kind: str) -> None:
    model = load(random_model(kind))
    if kind != "mamba":  # which takes no position ids
        assert difference(model) > 1e-2
    assert not keeps_documents_apart(model)
    assert not keeps_documents_apart(model.to(torch.bfloat16))
    said: list[str] = []
    assert settle_packing("auto", model, say=said.append, where="packing") is False
    (line,) = said
    name = type(model).__name__
    assert line.startswith(f"packing: off, because documents packed together see each other in {name} (attn_")
    with pytest.raises(UserError, match=rf"^data\.packing: .* in {name} \(attn_implementation: .*\): set it to false"):
        settle_packing(True, model)
    assert settle_packing(False, model) is False


@pytest.mark.parametrize("nbits", [1, 2])
def test_a_packed_model_with_an_adapter(random_model: Callable[..., Path], nbits: int) -> None:
    model = hqqplus.quantize_model(load(random_model("llama")), QuantSpec(nbits, 32))
    assert keeps_documents_apart(model)
    opt = hqqplus.quantize_model(load(random_model("opt")), QuantSpec(nbits, 32))
    adapted = [
        get_peft_model(one, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        for one in (model, opt)
    ]
    assert keeps_documents_apart(adapted[0])
    with pytest.raises(UserError, match="OPTForCausalLM"):
        settle_packing(True, adapted[1])


@pytest.mark.parametrize("change", ["drops", "shifts", "leaks"])
def test_faults_are_found(random_model: Callable[..., Path], monkeypatch: Any, change: str) -> None:
    model = load(random_model("gpt2"))
    forward = model.forward

    def faulty(input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        if change == "drops":  # the documents become one
            position_ids = None
        if change == "shifts" and position_ids is not None:  # apart, but not where a document begins
            position_ids = position_ids + 3
        output = forward(input_ids=input_ids, position_ids=position_ids, **inputs)
        if change == "leaks":  # a hundredth of what came before goes on
            means = output.logits.cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
            output.logits = output.logits + 0.01 * means
        return output

    monkeypatch.setattr(model, "forward", faulty)
    assert not keeps_documents_apart(model)


def test_rounding_is_no_influence(random_model: Callable[..., Path], monkeypatch: Any) -> None:
    """Experts round differently in other company: what comes after does that as well, and cannot be seen."""
    model = load(random_model("llama"))
    forward = model.forward

    def noisy(input_ids: Tensor, **inputs: Any) -> Any:
        output = forward(input_ids=input_ids, **inputs)
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        output.logits = output.logits + 1e-5 * torch.randn(output.logits.shape, generator=generator)
        return output

    monkeypatch.setattr(model, "forward", noisy)
    assert keeps_documents_apart(model)


def test_the_inputs_are_those_of_the_collator() -> None:
    """TRL's own, with everything that it adds to the ids."""
    asked: dict[str, Any] = {}

    class Listener(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **inputs: Any) -> Any:
            asked.update(inputs)
            raise NotImplementedError

    first, second = torch.arange(5), torch.arange(7, 10)
    with pytest.raises(NotImplementedError):
        _packed_logits(Listener(), first, second)
    rows = [{"input_ids": first.tolist()}, {"input_ids": second.tolist()}]
    expected = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    expected = {**{key: value for key, value in expected.items() if key != "labels"}, "use_cache": False}
    assert asked.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(asked[key]), torch.as_tensor(value)), key
        assert torch.as_tensor(asked[key]).dtype == torch.as_tensor(value).dtype, key


def test_it_leaves_no_trace(random_model: Callable[..., Path]) -> None:
    model = load(random_model("llama"))
    model.train()
    model.model.layers[1].eval()
    flags = [part.training for part in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert keeps_documents_apart(model)
    assert [part.training for part in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
