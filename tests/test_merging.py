"""Exports: dequantized weights and the adapter as an ordinary checkpoint, and the check that they say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import hqqplus
from hqqplus import HqqPlusConfig, merging, models
from hqqplus.adapters import round_adapter, ship_adapter
from hqqplus.errors import UserError
from hqqplus.integrations.peft import add_gains, gain_parameters, norm_modules
from hqqplus.integrations.transformers import QUANT_METHOD
from tests.test_models import IDS, made

__all__ = ["made"]


def slow(*values: str) -> list[Any]:
    """Parameters that are tried among the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


_READ_PLAIN = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output = sys.argv[1:]
assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
assert "hqqplus" not in sys.modules
save_file({"logits": model(torch.arange(3, 35).view(1, -1)).logits.detach()}, output)
"""


@pytest.mark.slow
def test_an_export_is_read_without_hqqplus(
    made: SimpleNamespace, run_python: Callable[..., Any], tmp_path: Path
) -> None:
    merging.export(str(made.packed), made.adapter, tmp_path / "plain", torch.float16)
    output = tmp_path / "logits.safetensors"
    run_python("-c", _READ_PLAIN, str(tmp_path / "plain"), str(output))
    assert (load_file(output)["logits"] - made.logits).abs().max() < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("arguments", [("packed", "adapter"), ("adapter", None), ("packed", None)])
def test_an_export_is_an_ordinary_checkpoint_with_the_same_logits(
    made: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, tolerance: float, arguments: tuple[str, str | None]
) -> None:
    name, adapter = arguments
    merging.export(str(getattr(made, name)), getattr(made, adapter) if adapter else None, tmp_path / "plain", dtype)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as exported:
        with safe_open(made.parent / "model.safetensors", "pt") as parent:
            assert set(exported.keys()) == set(parent.keys())
        assert {exported.get_tensor(key).dtype for key in exported.keys()} == {dtype}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    expected = made.base_logits if name == "packed" and adapter is None else made.logits
    assert (model(IDS).logits - expected).abs().max() < tolerance
    assert not [path for path in tmp_path.iterdir() if path.name != "plain"]


def test_the_tolerance_tells_base_from_adapted(made: SimpleNamespace) -> None:
    assert (made.base_logits - made.logits).abs().max() > 0.3


def test_an_export_of_a_tied_model_stays_tied(random_model: Callable[..., Path], tmp_path: Path) -> None:
    config = HqqPlusConfig(nbits=4, group_size=32, overrides={"model.embed_tokens": {"nbits": 8}})
    logits = hqqplus.quantize_folder(str(random_model("qwen3", True)), tmp_path / "packed", config)(IDS).logits
    merging.export(str(tmp_path / "packed"), None, tmp_path / "plain", torch.float16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model(IDS).logits - logits).abs().max() < 0.02


def test_an_export_that_fails_leaves_nothing(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    tokenizer = models.load_tokenizer(str(made.packed))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        merging.export(str(made.packed), None, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


# Adapters of all kinds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gains", *slow("norms", "dora", "rslora", "biases")])
def test_what_an_adapter_may_have(made: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    model = models.load(made.packed).requires_grad_(False)
    options: dict[str, Any] = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.get(kind, {})
    options |= {"norms": {"modules_to_save": norm_modules(model)}, "biases": {"bias": "all"}}.get(kind, {})
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(model, config).eval()
    if kind == "gains":
        add_gains(model)
    with torch.no_grad():
        moved = gain_parameters(model) if kind == "gains" else [p for p in model.parameters() if p.requires_grad]
        for parameter in moved:
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    round_adapter(model)
    ship_adapter(model, models.load_tokenizer(str(made.packed)), tmp_path / "adapter", made.fingerprint, "card")
    expected = model(IDS).logits
    agreement = merging.export(str(made.packed), tmp_path / "adapter", tmp_path / "plain", torch.float16)
    assert agreement is not None
    assert agreement.difference < 2 * agreement.rounding
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert (exported(IDS).logits - expected).abs().max() < 0.02
    assert (made.base_logits - expected).abs().max() > 0.1


def test_an_adapter_on_a_model_that_is_not_packed(made: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(hqqplus.load(made.parent), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    agreement = merging.export(str(made.parent), tmp_path / "adapter", tmp_path / "plain")
    assert agreement is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert (exported(IDS).logits - model(IDS).logits).abs().max() < 0.05


# The check -----------------------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_the_rounding(made: SimpleNamespace, tmp_path: Path) -> None:
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        agreement = merging.export(str(made.packed), made.adapter, tmp_path / str(dtype), dtype)
        assert agreement is not None
        assert agreement.holds()
        assert 0.3 < agreement.difference / agreement.rounding < 2
        found[dtype] = agreement
    # bf16 has three bits less.
    assert 4 < found[torch.bfloat16].rounding / found[torch.float16].rounding < 16
    assert "logits differ by " in agreement.describe()


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "wrong", ["the delta left out", *slow("one projection", "a bias", "the embedding", "infinite")]
)
def test_an_export_that_says_something_else_is_refused(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    reload = merging._reload

    def spoiled(folder: Path, *arguments: Any) -> Any:
        if wrong == "one projection":
            spoil(folder, "model.layers.1.mlp.up_proj.weight", torch.neg)
        elif wrong == "a bias":
            spoil(folder, "model.layers.0.self_attn.q_proj.bias", torch.zeros_like)
        elif wrong == "the embedding":
            spoil(folder, "model.embed_tokens.weight", lambda weight: weight.roll(1, 0))
        elif wrong == "infinite":
            spoil(folder, "model.layers.0.mlp.up_proj.weight", lambda weight: weight / 0)
        else:
            plain = models.load(made.packed).dequantize(torch.bfloat16)
            name = "model.layers.0.mlp.down_proj"
            spoil(folder, f"{name}.weight", lambda weight: plain.get_submodule(name).weight.detach().to(weight.dtype))
        return reload(folder, *arguments)

    monkeypatch.setattr(merging, "_reload", spoiled)
    with pytest.raises(UserError, match=r"what was written does not say what the packed model says: logits differ"):
        merging.export(str(made.packed), made.adapter, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []
    assert merging.export(str(made.packed), made.adapter, tmp_path / "plain", verify=False) is None
    assert (tmp_path / "plain" / "model.safetensors").is_file()


@pytest.mark.parametrize("problem", ["lost", *slow("more", "quantized")])
def test_an_export_that_transformers_would_read_otherwise_is_refused(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    reload = merging._reload

    def spoiled(folder: Path, *arguments: Any) -> Any:
        tensors = load_file(folder / "model.safetensors")
        if problem == "lost":
            del tensors["model.norm.weight"]
        elif problem == "more":
            tensors["model.extra.weight"] = torch.ones(2)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps({**config, "quantization_config": {"quant_method": QUANT_METHOD, "nbits": 8}})
            )
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return reload(folder, *arguments)

    monkeypatch.setattr(merging, "_reload", spoiled)
    with pytest.raises(UserError, match=rf"^export: {made.packed}: "):
        merging.export(str(made.packed), None, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_in_float32_leaves_everything_as_it_was(made: SimpleNamespace) -> None:
    model = hqqplus.load(made.packed, made.adapter, dtype=torch.bfloat16)
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        sixteen = model(IDS).logits
        with merging.in_float32(model):
            logits = model(IDS).logits
            assert logits.dtype == torch.float32
        assert torch.equal(model(IDS).logits, sixteen)
        # As a model whose bf16 weights were raised before it started.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for layer in models.packed_modules(model).values():
            layer.compute_dtype = torch.float32
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        dtype, values = before[name]
        assert torch.equal(parameter.to(dtype), values), name


def test_in_float32_ends_with_an_error_too() -> None:
    class Failing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.dtype == torch.float32
            raise RuntimeError("no")

    model = nn.Sequential(Failing(3, 4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="no"), merging.in_float32(model):
        model(torch.ones(3))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lies_within_the_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(5000, generator=generator) * 10.0**power for power in (-7, -3, 0, 3)])
    values = torch.cat([values, torch.tensor([0.0, 1.0, -1.0, 2.0**-14])]).to(dtype)
    moved = merging.within_rounding(values.float(), dtype, generator)
    assert torch.equal(moved[values == 0], torch.zeros(int((values == 0).sum())))
    # Back to where they were, but at powers of two, whose lower neighbour is nearer.
    back = moved.to(dtype) == values
    mantissa = torch.frexp(values.float()).mantissa.abs()
    assert back[mantissa != 0.5].all()
    whole = values.float().abs() > 1e-4
    distance = (moved - values.float())[whole].abs() / values.float()[whole].abs()
    assert torch.finfo(dtype).eps / 8 < distance.mean() < torch.finfo(dtype).eps / 4
