"""A model without weights knows what loading and saving the real one would do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig
from hqqplus.errors import UserError
from hqqplus.integrations.skeleton import NotStreamable, Skeleton, build_skeleton, no_progress_bars
from hqqplus.modules import packed_modules

OVERRIDES = {"lm_head": {"nbits": 8}}


def skeleton(folder: Path, cast_to: torch.dtype | None = None, **settings: Any) -> Skeleton:
    config = HqqPlusConfig(**{"nbits": 2, "group_size": 32, "overrides": OVERRIDES, **settings})
    return build_skeleton(folder, config, torch.float32, cast_to)


@pytest.mark.parametrize("tied", [True, False])
def test_it_names_what_is_saved(random_model: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    folder = random_model("qwen2", tied)
    found = skeleton(folder, torch.bfloat16)
    assert all(parameter.is_meta for parameter in found.model.parameters())
    config = HqqPlusConfig(2, 32, overrides=OVERRIDES)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    before = {name: (tuple(t.shape), t.dtype) for name, t in load_file(folder / "model.safetensors").items()}
    ties = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    assert {name: form for name, form in found.loaded.items() if name not in ties} == before
    assert found.ties == ties
    model.save_pretrained(tmp_path / "real")
    saved = {name: tuple(t.shape) for name, t in load_file(tmp_path / "real" / "model.safetensors").items()}
    assert {name: shape for name, (shape, _) in found.stored.items()} == saved
    assert {dtype for _, dtype in found.stored.values()} == {torch.uint8, torch.bfloat16}
    names = [name for name in packed_modules(model) if not (tied and name == "lm_head")]
    assert list(found.layers()) == list(found.shapes()) == names


def test_it_packs_as_loading_does_and_stays_empty(random_model: Callable[..., Path]) -> None:
    folder = random_model("qwen2")
    found = skeleton(folder)
    config = HqqPlusConfig(2, 32, overrides=OVERRIDES)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module in found.specs:
            for key, tensor in found.pack(module, weight).state().items():
                assert torch.equal(tensor, model.get_parameter(f"{module}.{key}"))
    assert all(parameter.is_meta for parameter in found.model.parameters())
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"^{name}\.weight: .*NaN or infinite"):
        found.pack(name, torch.full(found.shapes()[name], torch.nan))
    with pytest.raises(ValueError, match=rf"^{name}\.weight: its shape is \(3, 4\)"):
        found.pack(name, torch.zeros(3, 4))


def test_names_that_loading_changes_are_refused(random_model: Callable[..., Path]) -> None:
    found = skeleton(random_model("qwen2"))
    found.check_names(found.loaded)
    found.check_names(["something.else", "model.layers.0.rotary_emb.inv_freq"])
    with pytest.raises(
        NotStreamable, match=r"has norm\.weight in its checkpoint, which is loaded as model\.norm\.weight"
    ):
        found.check_names(["norm.weight"])
    experts = skeleton(random_model("mixtral"))
    with pytest.raises(NotStreamable, match=r"is loaded as a part of model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        experts.check_names(["model.layers.0.block_sparse_moe.experts.0.w1.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized by another method already"),
        ({"transformers_weights": "other.safetensors"}, "keeps weights in files of other names"),
    ],
)
def test_configurations_that_only_loading_understands(
    random_model: Callable[..., Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(NotStreamable, match=reason):
        skeleton(folder)


def test_nothing_to_quantize(random_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="has no linear layer to quantize with these skips"):
        skeleton(random_model("llama"), modules_to_not_convert=["*"])


def test_a_model_without_generation_config_takes_it_from_its_config(
    random_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model("llama"), folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 0.5, "do_sample": True}))
    skeleton(folder).save(tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / side / "generation_config.json").read_text() for side in ("ours", "theirs"))
    assert ours == theirs
    assert json.loads(ours)["temperature"] == 0.5


def test_saving_writes_no_weights_and_no_bars(
    random_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = skeleton(random_model("llama"))
    capfd.readouterr()
    found.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json"]
    assert capfd.readouterr() == ("", "")


def test_bars_come_back() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    with no_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before
