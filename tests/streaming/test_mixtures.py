"""Mixtures of experts: quantized on the disk and while loading, saved, reloaded, adapted and turned back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import hqqplus
from hqqplus import HqqPlusConfig, QuantPlan, QuantSpec
from hqqplus.adapters.fingerprint import packed_sha256
from hqqplus.calibration.calibrate import CalibrationOptions, calibrate
from hqqplus.calibration.gain import choose_gain
from hqqplus.errors import UserError
from hqqplus.evaluation.layers import LayerCollector, read_layers
from hqqplus.integrations.peft import PackedLoraLinear, targets_beside_experts
from hqqplus.modules import PackedExperts, bits_per_weight, observe_packing, packed_modules
from hqqplus.modules.replace import packed_already
from hqqplus.recovery.processes import check_experts
from hqqplus.streaming import Quantized
from hqqplus.streaming import quantize as streaming
from tests.streaming.checkpoints import IDS, made, same_tensors, sharded, tensors, while_loading

pytestmark = pytest.mark.slow

# Different bits in a layer, both axes, both kinds of metadata, one matrix left alone.
PLAN: dict[str, Any] = {
    "nbits": 2,
    "group_size": 32,
    "overrides": {
        "*.experts.down_proj": {"nbits": 4, "axis": 0},
        "*.layers.1.*.gate_up_proj": {"nbits": 1, "metadata_bits": 16},
    },
    "modules_to_not_convert": ["*.layers.1.mlp.experts.down_proj"],
}
UP = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS = 12  # so that number 10 comes before number 2 by the alphabet


@pytest.fixture(scope="module")
def mixtral(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In files that are smaller than the experts of a layer."""
    return sharded(random_model("mixtral"), tmp_path_factory.mktemp("mixtral"), "200KB")


@pytest.fixture(scope="module")
def qwen(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    config = AutoConfig.from_pretrained(random_model("mixtral")).to_dict()
    config = {key: config[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")}
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3_moe", **config, **sizes, num_key_value_heads=2), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    for path in random_model("mixtral").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def whole(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return made(mixtral, tmp_path_factory.mktemp("whole") / "out", HqqPlusConfig(**PLAN))


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_both_ways_give_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    parent = request.getfixturevalue(kind)
    collector = LayerCollector()
    found = made(parent, tmp_path / "ours", HqqPlusConfig(**PLAN))
    with observe_packing(collector):
        model = while_loading(parent, tmp_path / "theirs", HqqPlusConfig(**PLAN))
    assert found.streamed
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert found.fingerprint.packed_sha256 == packed_sha256(model)
    assert [layer.name for layer in found.layers.layers] == list(packed_modules(model))
    assert found.layers == collector.layers(found.layers.title, model, found.layers.total_bytes)
    assert found.layers.bits_per_weight == pytest.approx(bits_per_weight(model))
    assert found.layers.total_bytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "ours").values())
    again = read_layers(tmp_path / "ours")
    assert again is not None
    (layer,) = [layer for layer in again.layers if layer.name == UP]
    experts = model.get_submodule(UP)
    assert layer.statistics.shape == (experts.experts, *experts.matrix_shape)
    assert layer.kind == "gate_up_proj"

    reloaded = hqqplus.load(tmp_path / "ours", dtype="checkpoint", device="cpu")
    assert isinstance(reloaded.model.layers[0].mlp.experts, PackedExperts)
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(reloaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    reloaded.save_pretrained(tmp_path / "again")
    same_tensors(tmp_path / "ours", tmp_path / "again")


def test_the_statistics_are_of_all_experts_together(mixtral: Path, whole: Quantized) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    packed = AutoModelForCausalLM.from_pretrained(whole.folder)
    weight, restored = model.get_parameter(UP).double(), packed.get_submodule(UP).dequantize(torch.float32).double()
    nmse = ((weight - restored).square().sum() / weight.square().sum()).item()
    (found,) = [layer.statistics for layer in whole.layers.layers if layer.name == UP]
    assert found.nmse == pytest.approx(nmse)
    assert found.weights == weight.numel()
    assert found.bits_per_weight == pytest.approx(packed.get_submodule(UP).bits_per_weight)


def test_it_turns_back_into_an_ordinary_mixture(mixtral: Path, whole: Quantized, tmp_path: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(whole.folder)
    logits = packed(IDS).logits
    packed.dequantize().save_pretrained(tmp_path)
    names = tensors(mixtral).keys()
    assert tensors(tmp_path).keys() == names
    assert "model.layers.0.block_sparse_moe.experts.7.w3.weight" in names
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(IDS).logits, logits)


def test_an_interrupted_stack_is_done_again(mixtral: Path, whole: Quantized, tmp_path: Path, monkeypatch: Any) -> None:
    real, seen = streaming.PackedStack.set_expert, []

    def dying(stack: Any, index: int, packed: Any) -> None:
        seen.append(index)
        if len(seen) == 13:  # in the second stack
            raise KeyboardInterrupt
        real(stack, index, packed)

    monkeypatch.setattr(streaming.PackedStack, "set_expert", dying)
    with pytest.raises(KeyboardInterrupt):
        made(mixtral, tmp_path / "out", HqqPlusConfig(**PLAN))
    monkeypatch.setattr(streaming.PackedStack, "set_expert", real)
    found = made(mixtral, tmp_path / "out", HqqPlusConfig(**PLAN))
    assert found.kept
    same_tensors(tmp_path / "out", whole.folder)
    assert found.layers == whole.layers


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("experts.3.w1.weight", None, f"the checkpoint lacks parts of {UP}: it has 15 of 16"),
        ("experts.7.w2.weight", None, "has 7 experts, and config.json asks for 8"),
        ("experts.0.w3.weight", lambda t: t[1:], "not all of one shape"),
        ("experts.5.w1.weight", lambda t: t * torch.nan, rf"{UP}, expert 5: .*NaN"),
    ],
)
def test_what_is_wrong_with_experts_is_said(
    random_model: Callable[..., Path], tmp_path: Path, name: str, change: Any, says: str
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(random_model("mixtral"), parent)
    weights = load_file(parent / "model.safetensors")
    key = f"model.layers.0.block_sparse_moe.{name}"
    value = weights.pop(key)
    if change is not None:
        weights[key] = change(value).contiguous()
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=says):
        made(parent, tmp_path / "out", HqqPlusConfig(2, 32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_a_checkpoint_without_packed_experts_is_no_packed_one(whole: Quantized, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if name != f"{UP}.scale"}
        save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks.*{UP}\.scale"):
        hqqplus.load(tmp_path / "cut")


def test_lora_beside_the_experts(mixtral: Path, whole: Quantized) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    assert targets_beside_experts(model, "all-linear") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    for names in (["q_proj", "gate_proj", "down_proj"], ["experts"], ["w1"]):
        with pytest.raises(UserError, match=r"^adapter\.target_modules: .*: LoRA on packed experts is not supported"):
            targets_beside_experts(model, names)
    with pytest.raises(ValueError, match="LoRA on packed experts"):
        get_peft_model(model, LoraConfig(target_modules=r".*\.experts"))
    # PEFT's own "all-linear" takes the router in.
    model = hqqplus.quantize_model(AutoModelForCausalLM.from_pretrained(mixtral), QuantSpec(2, 32))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    found = {name.split(".")[-1] for name, module in adapted.named_modules() if isinstance(module, PackedLoraLinear)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name and "experts" in name]
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "q_proj.lora_B" in name]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_zero_3_is_refused(whole: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage in ("2", "3"):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        if stage == "2":
            check_experts(model, {})
        else:
            with pytest.raises(UserError, match=r"ZeRO-3 has not been tried with packed experts: .*fsdp2\.yaml"):
                check_experts(model, {})


def test_calibration_leaves_experts_to_the_solver(
    random_model: Callable[..., Path], tmp_path: Path, caplog: Any, capsys: Any
) -> None:
    parent, plan = random_model("mixtral"), QuantPlan(QuantSpec(2, 32))
    model = AutoModelForCausalLM.from_pretrained(parent)
    ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "hqqplus"):
        found = calibrate(model, plan, ids, CalibrationOptions(epochs=1), device="cpu")
    said = caplog.text + "".join(capsys.readouterr())
    assert f"4 stacks of experts, such as {UP}, are not calibrated: they are solved without data" in said
    assert len(found.solutions.tensors) == 8
    with packed_already(found.solutions):
        calibrated = made(parent, tmp_path / "calibrated", HqqPlusConfig(2, 32))
    plain = made(parent, tmp_path / "plain", HqqPlusConfig(2, 32))
    assert calibrated.streamed
    ours, theirs = tensors(calibrated.folder), tensors(plain.folder)
    differing = {name.rpartition(".")[0] for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert differing == set(found.solutions.tensors)
    with pytest.raises(UserError, match=rf"^gain: {UP} holds the matrices of experts, on which gains are not tried"):
        choose_gain(model, plan, [ids[0]])
