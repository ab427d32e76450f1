"""The adapter as it ships: bf16 weights, tokenizer, fingerprint and model card in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hqqplus.adapters.fingerprint import Fingerprint
from hqqplus.files import replacing_folder, write_text
from hqqplus.modules.sharding import assign, gathered, whole
from hqqplus.modules.trainable import DELTAS

SHIPPED_DTYPE = torch.bfloat16


@torch.no_grad()
def round_adapter(model: Any) -> None:
    """Round the trainable weights of `model` to what will be shipped, in place and in their own dtype.

    What is measured afterwards is then what a user who loads the shipped adapter gets, to the bit.
    """
    for name, parameter in model.named_parameters():
        # Trained scales are shipped as bytes: a sharded model has their deltas to the end.
        if parameter.requires_grad and name.rpartition(".")[2] not in DELTAS:
            assign(parameter, whole(parameter).to(SHIPPED_DTYPE))


def adapter_size(model: Any) -> tuple[int, int]:
    """(parameters, bytes as shipped) of the trainable weights of `model`."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return count, count * SHIPPED_DTYPE.itemsize


def ship_adapter(
    model: Any, tokenizer: Any, folder: str | Path, fingerprint: Fingerprint, card: str, writes: bool = True
) -> None:
    """Write the adapter of PEFT model `model` to `folder`, all of it or nothing.

    `card` is the model card's Markdown. What stood at `folder` before is replaced.

    Args:
        writes: whether this process does; every process has to call, since a sharded model is gathered by all.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = fingerprint.base, fingerprint.revision
    shipped = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if "lora_" in name or "modules_to_save" in name or (config.bias != "none" and name.endswith(".bias"))
    }
    state = {
        name: tensor.to(SHIPPED_DTYPE) if tensor.is_floating_point() else tensor
        for name, tensor in gathered(shipped, writes).items()
    }
    if not writes:
        return
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        fingerprint.with_tokenizer(tokenizer).write(temporary)
        write_text(temporary / "README.md", card)
