"""Trainable scales over a whole model, and their file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters import apply_residual_start, residuals_from_parent
from hqqplus.adapters.scales import (
    EXTRAS,
    add_trainable_scales,
    bake_scales,
    extras_state,
    load_extras,
    plain_name,
    save_extras,
    scale_parameters,
)
from hqqplus.errors import UserError
from hqqplus.integrations.peft import add_gains, norm_modules
from hqqplus.modules import PackedLinear, packed_modules

IDS = torch.arange(3, 35).view(1, -1)


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with layers of 1 and 2 bits and an 8-bit head."""
    folder = tmp_path_factory.mktemp("base") / "packed"
    overrides = {"*.down_proj": {"nbits": 1}, "lm_head": {"nbits": 8}}
    hqqplus.quantize_folder(str(random_model("qwen2")), folder, HqqPlusConfig(2, 32, overrides=overrides))
    return folder


def adapted(packed: Path, **arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **arguments}
    return get_peft_model(models.load(packed).requires_grad_(False), LoraConfig(task_type="CAUSAL_LM", **arguments))


def train(model: Any, steps: int = 3, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("offsets", "expected"), [(None, 2), (False, 0), (True, 14)])
def test_all_projections_but_not_the_head(packed: Path, offsets: bool | None, expected: int) -> None:
    model = adapted(packed)
    start = model(IDS).logits
    adapter = {id(p) for p in model.parameters() if p.requires_grad}
    assert add_trainable_scales(model, offsets) == 14
    assert torch.equal(model(IDS).logits, start)
    layers = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert layers["lm_head"].scale_delta is None
    assert sum(layer.offset_delta is not None for layer in layers.values()) == expected
    if offsets is None:
        assert all((m.offset_delta is not None) == (m.spec.nbits == 1) for n, m in layers.items() if n != "lm_head")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == adapter | {id(p) for p in scale_parameters(model)}
    assert len(scale_parameters(model)) == 14 + expected


def test_scales_and_adapter_are_trained_together_and_apart(packed: Path) -> None:
    model = adapted(packed)
    add_trainable_scales(model)
    codes = {n: m.W_q.clone() for n, m in packed_modules(model).items()}
    adapter = [p.clone() for n, p in model.named_parameters() if "lora_" in n]
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.15
    assert all(bool((p != 0).any()) for p in scale_parameters(model))
    moved = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(not torch.equal(one, other) for one, other in zip(moved, adapter, strict=True))
    assert all(torch.equal(m.W_q, codes[n]) for n, m in packed_modules(model).items())


def test_disabling_the_adapter_leaves_the_scales(packed: Path) -> None:
    model = adapted(packed).eval()
    add_trainable_scales(model)
    train(model)
    with model.disable_adapter():
        found = model(IDS).logits
    model.get_base_model()
    bake_scales(model)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, found)


def test_baking_in_place_changes_no_logit_and_ends_the_training(packed: Path) -> None:
    model = adapted(packed).eval()
    add_trainable_scales(model)
    train(model)
    logits = model(IDS).logits
    assert bake_scales(model) == 14
    assert scale_parameters(model) == []
    assert torch.equal(model(IDS).logits, logits)
    assert bake_scales(model) == 0


def test_without_peft(packed: Path) -> None:
    model = models.load(packed).requires_grad_(False)
    assert add_trainable_scales(model) == 14
    losses = train(model, 8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.2}], ids=str)
def test_beside_what_pefts_own_forward_pass_serves(packed: Path, variant: dict[str, Any]) -> None:
    model = adapted(packed, **variant)
    add_trainable_scales(model)
    train(model)
    assert all(bool((p != 0).any()) for p in scale_parameters(model))


def test_the_residual_start_goes_before_or_after(packed: Path, random_model: Callable[..., Path]) -> None:
    weights = models.parent_weights(str(random_model("qwen2")))
    logits = []
    for first in (True, False):
        model = adapted(packed).eval()
        if first:
            add_trainable_scales(model)
        base = model.get_base_model()
        factors = {
            plain_name(n): f for n, f in residuals_from_parent(base, lambda n: weights(plain_name(n)), 4).items()
        }
        assert apply_residual_start(model, factors) == 14
        if not first:
            add_trainable_scales(model)
        logits.append(model(IDS).logits)
    assert torch.equal(*logits)


def test_extras_bring_the_deltas_back_to_the_bit(packed: Path, tmp_path: Path) -> None:
    model = adapted(packed).eval()
    add_trainable_scales(model)
    train(model)
    save_extras(model, tmp_path)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / EXTRAS)
    assert stored.keys() == extras_state(model).keys()
    assert "model.layers.0.mlp.down_proj.offset_delta" in stored
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    fresh = models.put_adapter(models.load(packed), tmp_path)
    add_trainable_scales(fresh)
    load_extras(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    # PEFT wraps the layers; the names are those without it.
    bare = models.load(packed)
    add_trainable_scales(bare)
    load_extras(bare, tmp_path)
    with model.disable_adapter():
        assert torch.equal(bare(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("case", ["none", "damaged", "missing", "more", "shape"])
def test_extras_of_another_model_are_refused(packed: Path, tmp_path: Path, case: str) -> None:
    model = models.load(packed)
    add_trainable_scales(model)
    state = extras_state(model)
    name = "model.layers.1.self_attn.q_proj.scale_delta"
    if case == "missing":
        del state[name]
    elif case == "more":
        state["model.layers.7.self_attn.q_proj.scale_delta"] = torch.zeros(64, 2)
    elif case == "shape":
        state[name] = torch.zeros(64, 3)
    if case != "none":
        save_file({n: t + 1 for n, t in state.items()}, tmp_path / EXTRAS)
    if case == "damaged":
        (tmp_path / EXTRAS).write_bytes((tmp_path / EXTRAS).read_bytes()[:-5])
    text = {
        "none": "has no trained scales",
        "damaged": "truncated or damaged",
        "missing": f"{name} is not in the file",
        "more": r"layers\.7\.self_attn\.q_proj\.scale_delta is in the file",
        "shape": r"\(64, 3\), the layer needs \(64, 2\)",
    }
    with pytest.raises(UserError, match=text[case]):
        load_extras(model, tmp_path)
    assert not any(bool(p.any()) for p in scale_parameters(model))  # all or nothing


def test_models_that_have_nothing_to_train_are_refused(random_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no packed linear layer"):
        add_trainable_scales(nn.Sequential(nn.Linear(64, 64)))
    model = models.load_causal_lm(str(random_model("llama")), quantization=HqqPlusConfig(2, 32, axis=0), device="cpu")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj is quantized along axis 0"):
        add_trainable_scales(model)
    assert scale_parameters(model) == []


@pytest.mark.slow
def test_trls_trainer_trains_all_of_it_and_resumes_to_the_bit(packed: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class SaveExtras(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            save_extras(kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}")

    rows = Dataset.from_dict({"input_ids": [list(range(i + 3, i + 35)) for i in range(12)]})

    def run(folder: Path, steps: int, resume: Path | None = None) -> Any:
        model = adapted(packed, modules_to_save=norm_modules(models.load(packed)), bias="all")
        add_gains(model)
        add_trainable_scales(model)
        if resume:
            load_extras(model, resume)
        arguments = SFTConfig(
            str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, bf16=False,
            use_cpu=True, report_to=[], lr_scheduler_type="constant", disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        tokenizer = models.load_tokenizer(str(packed))
        trainer = SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[SaveExtras()]
        )
        before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    resumed = run(tmp_path / "part", 4, tmp_path / "part" / "checkpoint-2")
    kinds = ("lora_A", "lora_gain_in", "lora_gain_out", "modules_to_save", "base_layer.bias", "scale_delta", "offset_")
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert all(any(kind in name for name in trained) for kind in kinds)
    assert all(torch.equal(p, trained[n]) for n, p in resumed.named_parameters() if n in trained)
