"""The packed backbone with its trained scales as a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters import Fingerprint, packed_sha256, round_adapter, ship_adapter
from hqqplus.adapters.bake import bake_backbone
from hqqplus.adapters.scales import add_trainable_scales, bake_scales, scale_parameters
from hqqplus.errors import UserError
from hqqplus.integrations.peft import add_gains, gain_parameters, norm_modules

IDS = torch.arange(3, 35).view(1, -1)
TIED = {"lm_head": {"nbits": 8}}
CASES = {
    "plain": ("llama", False, {}),
    "bias": ("qwen2", False, {"metadata_bits": 16}),
    "tied": ("llama", True, {}),
    "packed tied head": ("llama", True, {"nbits": 1, "overrides": TIED}),
    "packed head": ("qwen3", False, {"overrides": {**TIED, "model.embed_tokens": {"nbits": 8}}}),
}


@pytest.fixture(scope="module")
def make_base(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(case: str) -> Path:
        kind, tied, changes = CASES[case]
        folder = tmp_path_factory.mktemp("base") / "packed"
        config = HqqPlusConfig(**{"nbits": 2, "group_size": 32, **changes})
        hqqplus.quantize_folder(str(random_model(kind, tied)), folder, config, dtype="bfloat16")
        return folder

    return make


def trained(base: Path, **arguments: Any) -> Any:
    """A PEFT model whose adapter and scales have moved, the adapter as it ships."""
    torch.manual_seed(0)
    model = models.load(base).requires_grad_(False)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **arguments)
    model = get_peft_model(model, config).eval()
    add_trainable_scales(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    round_adapter(model)
    return model


def ship(model: Any, base: Path, folder: Path, **arguments: Any) -> tuple[Path, Path]:
    """(baked folder, adapter folder)."""
    tokenizer, fingerprint = models.load_tokenizer(str(base)), Fingerprint.read(base)
    assert fingerprint is not None
    fingerprint = bake_backbone(model, folder / "baked", tokenizer, fingerprint, **arguments)
    ship_adapter(model, tokenizer, folder / "adapter", fingerprint, "card")
    return folder / "baked", folder / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_the_baked_base_with_its_adapter_is_the_trained_model(
    make_base: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    base = make_base(case)
    model = trained(base)
    logits, state = model(IDS).logits, {n: t.clone() for n, t in model.state_dict().items()}
    with model.disable_adapter():
        bare = model(IDS).logits
    baked, adapter = ship(model, base, tmp_path)
    assert torch.equal(models.load(baked, adapter)(IDS).logits, logits)
    assert torch.equal(models.load(baked)(IDS).logits, bare)
    assert (models.load(base)(IDS).logits - bare).abs().max() > 1e-3
    # The folder is the packed one with other metadata.
    old, new = (load_file(folder / "model.safetensors") for folder in (base, baked))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        is_metadata = name.rpartition(".")[2] in ("scale", "offset", "blocks") and "lm_head" not in name
        is_metadata &= "embed_tokens" not in name
        assert tensor.dtype == old[name].dtype
        assert tensor.shape == old[name].shape
        assert torch.equal(tensor, old[name]) == (not is_metadata), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, baked)]
    assert sizes[0] == sizes[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, baked)]
    assert configs[0] == configs[1]
    report = {"layers.json", "layers.md", "nmse.png"}  # of the quantization
    assert {p.name for p in base.iterdir()} - report == {p.name for p in baked.iterdir()}
    assert models.load_tokenizer(str(baked))("ab")["input_ids"] == models.load_tokenizer(str(base))("ab")["input_ids"]
    # The model in memory is as it was, and baking it there is the same.
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    bake_scales(model)
    assert torch.equal(model(IDS).logits, logits)


def test_the_fingerprint_names_the_parent_and_says_that_it_is_baked(
    make_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_base("plain")
    before = Fingerprint.read(base)
    baked, adapter = ship(trained(base), base, tmp_path)
    after = Fingerprint.read(baked)
    assert before is not None
    assert after is not None
    assert (after.base, after.quantization, after.revision) == (before.base, before.quantization, before.revision)
    assert (before.baked, after.baked) == (False, True)
    assert after.packed_sha256 == packed_sha256(models.load(baked)) != before.packed_sha256
    assert Fingerprint.read(adapter) == after
    assert "scales trained" in after.describe()
    assert "scales trained" in (baked / "README.md").read_text()
    with pytest.raises(UserError, match="packed folder that came with it"):
        models.load(base, adapter)
    with pytest.raises(UserError, match="packed folder that came with it"):
        models.load(adapter)  # its parent, quantized anew


def test_files_of_earlier_versions_are_not_baked(make_base: Callable[[str], Path]) -> None:
    base = make_base("plain")
    values = json.loads((base / "hqqplus.json").read_text())
    del values["baked"]
    (base / "hqqplus.json").write_text(json.dumps(values))
    found = Fingerprint.read(base)
    assert found is not None
    assert not found.baked
    (base / "hqqplus.json").write_text(json.dumps({**values, "baked": "yes"}))
    with pytest.raises(UserError, match="baked"):
        Fingerprint.read(base)


def test_several_files(make_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = make_base("packed tied head")
    model = trained(base)
    baked, adapter = ship(model, base, tmp_path, max_shard_size="20KB")
    assert len(list(baked.glob("model-*.safetensors"))) > 1
    assert torch.equal(models.load(baked, adapter)(IDS).logits, model(IDS).logits)


def test_norms_are_the_bases_own_and_the_trained_ones_the_adapters(
    make_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = make_base("plain")
    model = trained(base, modules_to_save=norm_modules(models.load(base)))
    baked, adapter = ship(model, base, tmp_path)
    assert torch.equal(models.load(baked, adapter)(IDS).logits, model(IDS).logits)
    assert torch.equal(models.load(baked).model.norm.weight, models.load(base).model.norm.weight)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        assert sum("norm" in key for key in tensors.keys()) == 5  # noqa: SIM118  # not a dict


def test_biases_that_peft_trains_in_place(make_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = make_base("bias")
    model = trained(base, bias="all")
    baked, adapter = ship(model, base, tmp_path)
    assert torch.equal(models.load(baked, adapter)(IDS).logits, model(IDS).logits)


def test_gains_norms_and_biases_ship_together_in_16_bits(make_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = make_base("bias")
    model = trained(base, bias="all", modules_to_save=norm_modules(models.load(base)))
    add_gains(model)
    with torch.no_grad():
        for gain in gain_parameters(model):
            gain.normal_(0, 0.1)
    round_adapter(model)
    baked, adapter = ship(model, base, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert [sum(part in name for name in tensors) for part in ("lora_gain", "norm", ".bias")] == [28, 5, 6]
    assert torch.equal(models.load(baked, adapter)(IDS).logits, model(IDS).logits)


def test_a_model_without_peft(make_base: Callable[[str], Path], tmp_path: Path) -> None:
    base = make_base("plain")
    model = models.load(base).requires_grad_(False)
    add_trainable_scales(model)
    with torch.no_grad():
        for delta in scale_parameters(model):
            delta.normal_(0, 0.1)
    fingerprint = Fingerprint.read(base)
    assert fingerprint is not None
    bake_backbone(model, tmp_path / "baked", models.load_tokenizer(str(base)), fingerprint)
    assert torch.equal(models.load(tmp_path / "baked")(IDS).logits, model(IDS).logits)


def test_a_real_model_keeps_its_16_bit_size(story_model: Path, tmp_path: Path) -> None:
    """It is trained in float32 on a CPU; what its checkpoint has in 16 bits goes back to them."""
    base = tmp_path / "packed"
    hqqplus.quantize_folder(str(story_model), base, HqqPlusConfig(2, 32), dtype="bfloat16")
    model = trained(base)
    baked, adapter = ship(model, base, tmp_path)
    assert torch.equal(models.load(baked, adapter)(IDS).logits, model(IDS).logits)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, baked)]
    assert sizes[0] == sizes[1]


def test_a_failure_leaves_what_was_there(
    make_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("plain")
    model = trained(base)
    (tmp_path / "baked").mkdir()
    (tmp_path / "baked" / "older").write_text("")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Fingerprint, "write", fail)
    with pytest.raises(UserError, match="the disk is full"):
        ship(model, base, tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["baked", "older"]
