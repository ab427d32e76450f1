"""The shipped adapter: what was measured is what is written, all of it or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import hqqplus
from hqqplus import HqqPlusConfig, models
from hqqplus.adapters import Fingerprint, adapter_size, round_adapter, ship_adapter

IDS = torch.arange(3, 35).view(1, -1)


@pytest.fixture(scope="module")
def packed(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "packed"
    hqqplus.quantize_folder(str(random_model("llama")), folder, HqqPlusConfig(nbits=2, group_size=32))
    return folder


@pytest.fixture(scope="module")
def tokenizer(packed: Path) -> Any:
    return models.load_tokenizer(str(packed))


@pytest.fixture(scope="module")
def fingerprint(packed: Path) -> Fingerprint:
    found = Fingerprint.read(packed)
    assert found is not None
    return found


def adapted(packed: Path, seed: int = 0, **arguments: Any) -> Any:
    """The packed model with an adapter that does something, in float32 that bf16 cannot hold."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **arguments)
    return get_peft_model(models.load(packed).requires_grad_(False), config).eval()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_reloaded_adapter_is_the_rounded_one(
    packed: Path, tokenizer: Any, fingerprint: Fingerprint, tmp_path: Path, variant: dict[str, Any]
) -> None:
    model = adapted(packed, **variant)
    exact = model(IDS).logits
    round_adapter(model)
    rounded = model(IDS).logits
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    ship_adapter(model, tokenizer, tmp_path / "adapter", fingerprint, "# A card\n")
    assert torch.equal(models.load(packed, tmp_path / "adapter")(IDS).logits, rounded)


def test_rounding_touches_the_adapter_alone_and_once(packed: Path) -> None:
    model = adapted(packed)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 20
    round_adapter(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    once = {name: p.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in model.parameters() if p.requires_grad)
    round_adapter(model)
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())


def test_the_folder_holds_the_adapter_in_bf16_and_nothing_of_the_base(
    packed: Path, tokenizer: Any, fingerprint: Fingerprint, tmp_path: Path
) -> None:
    model = adapted(packed)
    ship_adapter(model, tokenizer, tmp_path / "adapter", fingerprint, "# A card\n")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28  # A and B of seven projections in two layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all("lora_" in name for name in tensors)
    parameters, size = adapter_size(model)
    assert parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size == 2 * parameters
    written = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < written < size + 8_000  # and the header
    assert (tmp_path / "adapter" / "README.md").read_text() == "# A card\n"
    assert Fingerprint.read(tmp_path / "adapter") == fingerprint
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == fingerprint.base
    assert models.load_tokenizer(str(tmp_path / "adapter"))("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_an_older_adapter_is_replaced_altogether(
    packed: Path, tokenizer: Any, fingerprint: Fingerprint, tmp_path: Path
) -> None:
    ship_adapter(adapted(packed, seed=1), tokenizer, tmp_path / "adapter", fingerprint, "old")
    (tmp_path / "adapter" / "of_an_older_version.txt").write_text("")
    ship_adapter(adapted(packed, seed=2), tokenizer, tmp_path / "fresh", fingerprint, "new")
    ship_adapter(adapted(packed, seed=2), tokenizer, tmp_path / "adapter", fingerprint, "new")
    assert tree(tmp_path / "adapter") == tree(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "fresh"]


@pytest.mark.parametrize("failing", ["tokenizer", "fingerprint", "model"])
def test_a_failure_midway_leaves_the_older_adapter_in_place(
    packed: Path,
    tokenizer: Any,
    fingerprint: Fingerprint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    ship_adapter(adapted(packed, seed=1), tokenizer, tmp_path / "adapter", fingerprint, "old")
    before = tree(tmp_path)
    newer = adapted(packed, seed=2)
    seen: list[list[str]] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise OSError("no space left on device")

    owner, name = {
        "tokenizer": (type(tokenizer), "save_pretrained"),
        "fingerprint": (Fingerprint, "write"),
        "model": (type(newer), "save_pretrained"),
    }[failing]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="no space left"):
        ship_adapter(newer, tokenizer, tmp_path / "adapter", fingerprint, "new")
    assert len(seen) == 1
    assert len(seen[0]) == 2  # the older one, and the temporary one beside it
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failure_of_the_first_leaves_nothing(
    packed: Path, tokenizer: Any, fingerprint: Fingerprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        ship_adapter(adapted(packed), tokenizer, tmp_path / "adapter", fingerprint, "card")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_can_be_moved(packed: Path, tokenizer: Any, fingerprint: Fingerprint, tmp_path: Path) -> None:
    model = adapted(packed)
    round_adapter(model)
    ship_adapter(model, tokenizer, tmp_path / "adapter", fingerprint, "card")
    shutil.move(tmp_path / "adapter", tmp_path / "elsewhere")
    assert torch.equal(models.load(packed, tmp_path / "elsewhere")(IDS).logits, model(IDS).logits)
