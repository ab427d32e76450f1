"""Checkpoints quantized on the disk and while loading, and how they are compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hqqplus import HqqPlusConfig, models
from hqqplus.streaming import Quantized, quantize_checkpoint

IDS = torch.arange(3, 35).view(1, -1)
# A layer of each kind: tied or not, with biases or not, of 2, 4 and 8 bits, along both axes, one left alone.
MIXED: dict[str, Any] = {
    "nbits": 2,
    "group_size": 32,
    "metadata_bits": 16,
    "overrides": {"lm_head": {"nbits": 8}, "*.down_proj": {"nbits": 4, "axis": 0}, "v_proj": {"metadata_bits": 8}},
    "modules_to_not_convert": ["*.layers.0.*.o_proj"],
}
FILES = ("config.json", "generation_config.json")


def made(parent: Path, output: Path, config: HqqPlusConfig | None = None, **options: Any) -> Quantized:
    config = config or HqqPlusConfig(**MIXED)
    return quantize_checkpoint(str(parent), output, config, **{"device": "cpu", "quiet": True, **options})


def while_loading(parent: Path, output: Path, config: HqqPlusConfig | None = None, **options: Any) -> Any:
    """What the other route makes of it, saved to `output`."""
    config = config or HqqPlusConfig(**MIXED)
    model = models.load_causal_lm(
        str(parent), quantization=config, **{"dtype": "checkpoint", "device": "cpu", **options}
    )
    model.save_pretrained(output)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def sharded(parent: Path, folder: Path, size: str = "60KB", dtype: torch.dtype | None = None) -> Path:
    """`parent` again, in several files."""
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=dtype or "auto")
    model.save_pretrained(folder, max_shard_size=size)
    for path in parent.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
