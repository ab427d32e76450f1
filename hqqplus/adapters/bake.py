"""A new packed backbone from a model whose scales were trained.

    train -> round_adapter -> bake_backbone(model, folder, ...) -> ship_adapter(model, ..., the fingerprint it returns)

The folder is an ordinary packed model: codes as they were, metadata as trained, everything else as it was before
training, without the adapter. Trained norms are a part of the adapter, so the base keeps its own; biases that PEFT
trains in place are in both. `hqqplus.load(folder, adapter=...)` then computes what the trained model does, to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.adapters.fingerprint import Fingerprint, packed_sha256
from hqqplus.adapters.scales import EXTRA_PARTS, plain_name
from hqqplus.files import full_disk, replacing_folder
from hqqplus.modules import PackedLinear
from hqqplus.modules.sharding import gathered, is_sharded
from hqqplus.modules.trainable import is_trained


def bake_backbone(
    model: Any,
    folder: str | Path,
    tokenizer: Any,
    fingerprint: Fingerprint,
    max_shard_size: int | str = "5GB",
    writes: bool = True,
) -> Fingerprint:
    """Write the packed backbone under `model` with its scales as they are now to `folder`, all of it or nothing.

    `model` (a packed model, with PEFT's layers in it or around it, or without) stays as it is; what stood at `folder`
    before is replaced.

    Args:
        fingerprint: of the backbone before training.
        max_shard_size: of a file, as in `save_pretrained`.
        writes: whether this process does; every process has to call, since a sharded model is gathered by all.

    Returns:
        The fingerprint of the new backbone, for the adapter that goes with it; `fingerprint` itself in a process that
        does not write.

    Raises:
        UserError: if the disk is full.
    """
    from hqqplus import models

    state = baked_state(model, keep=writes)
    if not writes:
        return fingerprint
    clean = _without_adapter(model, state)
    fingerprint = dataclasses.replace(fingerprint, packed_sha256=packed_sha256(clean), baked=True)
    fingerprint = fingerprint.with_tokenizer(tokenizer)
    with full_disk(folder, "the baked backbone"), replacing_folder(folder) as temporary:
        clean.config.use_cache = True  # which the trainer switches off
        clean.save_pretrained(temporary, max_shard_size=max_shard_size)
        models.write_companions(temporary, tokenizer, fingerprint)
    return fingerprint


@torch.no_grad()
def baked_state(model: Any, keep: bool = True) -> dict[str, Tensor]:
    """The state of the packed model under `model` by its names without PEFT, trained metadata as they will be stored.

    Shares all tensors with `model` but those metadata. A sharded model is gathered on the CPU, by all processes
    together; those that do not `keep` it get nothing.
    """
    held = model.state_dict(keep_vars=True)  # tied ones are one object only there
    state = {plain_name(name): tensor for name, tensor in held.items() if not _is_extra(name)}
    trained = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and is_trained(m)}
    # What is trained is encoded below.
    replaced = {f"{plain_name(name)}.{key}" for name, layer in trained.items() for key in layer.packed_parameters()}
    sharded = any(is_sharded(tensor) for tensor in state.values())
    found = gathered({name: tensor for name, tensor in state.items() if name not in replaced}, keep)
    for name, layer in trained.items():
        for key, tensor in layer.packed().state().items():
            if keep:
                found[f"{plain_name(name)}.{key}"] = tensor.cpu() if sharded else tensor
    return found


def _is_extra(name: str) -> bool:
    """Whether a tensor of that name belongs to the adapter, or to the training of scales."""
    return any(part.startswith("lora_") or part in EXTRA_PARTS for part in name.split("."))


def _without_adapter(model: Any, state: dict[str, Tensor]) -> Any:
    """A packed model of its own like the one under `model`, with `state`, fit for `save_pretrained` and no more."""
    from hqqplus.integrations.transformers import HqqPlusQuantizer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = _smallest_dtype(state)
    with torch.device("meta"):
        clean = type(base)(copy.deepcopy(base.config))
    quantizer = HqqPlusQuantizer(base.config.quantization_config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(clean, dtype=base.dtype)
    clean.load_state_dict(_cast(state, dtype) if dtype else state, assign=True)  # strict: nothing is left out
    clean.generation_config = base.generation_config
    return clean


def _smallest_dtype(state: dict[str, Tensor]) -> torch.dtype | None:
    """The 16-bit type that holds all floats of `state` exactly; None where none does.

    A model is computed in float32 on a CPU, whatever its checkpoint was.
    """
    floats = [tensor for tensor in state.values() if _is_float(tensor)]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats):
            return dtype
    return None


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`state` with its floats in `dtype`; tied ones stay one tensor."""
    cast = {tensor.data_ptr(): tensor.to(dtype) for tensor in state.values() if _is_float(tensor)}
    return {name: cast[tensor.data_ptr()] if _is_float(tensor) else tensor for name, tensor in state.items()}


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
