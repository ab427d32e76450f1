"""Trainable group scales over a model: which layers, their parameters, and their file beside a checkpoint.

    from hqqplus.adapters.scales import add_trainable_scales, scale_parameters

    model = get_peft_model(model, config)           # first: PEFT freezes all that is not its own
    add_trainable_scales(model)
    optimizer = AdamW([{"params": adapter, "lr": 1e-4}, {"params": scale_parameters(model), "lr": 1e-3}])

What is trained belongs to the backbone, so PEFT saves none of it: a checkpoint has it in `hqqplus_extras.safetensors`
(`save_extras`), and in the end a new packed backbone is written (`bake.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.files import replacing
from hqqplus.modules import PackedLinear
from hqqplus.modules.sharding import assign, gathered, is_sharded
from hqqplus.modules.trainable import DELTAS, bake, is_trained, train_scales

EXTRAS = "hqqplus_extras.safetensors"

# What PEFT puts into the names of modules and tensors: in front of all, and where it wraps a module.
_PREFIX, _WRAPPED = "base_model.model.", frozenset({"base_layer", "original_module"})
# Parts of the names of tensors that are no part of the backbone, beside those that begin with lora_.
EXTRA_PARTS = frozenset({"modules_to_save", *DELTAS})


def add_trainable_scales(model: nn.Module, offsets: bool | None = None) -> int:
    """Make the scales of all packed linear layers of `model` trainable, but for the output head.

    Args:
        model: a transformers model or a PEFT model around one.
        offsets: whether the offsets are trained too; None: in layers of 1 bit.

    Returns:
        How many layers.

    Raises:
        UserError: if there is none, or one has axis 0.
    """
    head = _head(model)
    layers = {name: layer for name, layer in _linears(model).items() if layer is not head}
    if not layers:
        raise UserError("trainable scales: the model has no packed linear layer")
    for name, layer in layers.items():
        if layer.spec.axis != 1:
            raise UserError(
                f"trainable scales: {name} is quantized along axis 0, whose groups hold weights of several output "
                "rows: quantize with axis 1"
            )
    for layer in layers.values():
        train_scales(layer, layer.spec.nbits == 1 if offsets is None else offsets)
    return len(layers)


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained deltas of scales and offsets: a parameter group with a learning rate of its own."""
    return list(_deltas(model).values())


def bake_scales(model: nn.Module) -> int:
    """Write all trained metadata into their layers and end their training; returns how many layers.

    A sharded model goes on computing them from their deltas, which gives the same to the bit.
    """
    trained = [m for m in _linears(model).values() if is_trained(m) and not is_sharded(m.scale_delta)]
    for layer in trained:
        bake(layer)
    return len(trained)


def extras_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Name, as it is without PEFT -> trained delta, float32 on the CPU; nothing where it is not to `keep`."""
    deltas: dict[str, Tensor] = {**_deltas(model)}
    return {name: delta.detach().float().cpu().contiguous() for name, delta in gathered(deltas, keep).items()}


def save_extras(model: nn.Module, folder: str | Path, writes: bool = True) -> None:
    """Write the trained deltas of `model` into `folder`, whole or not at all.

    Args:
        writes: whether this process does; every process has to call, since a sharded model is gathered by all.
    """
    from safetensors.torch import save_file

    state = extras_state(model, keep=writes)
    if not writes:
        return
    with replacing(Path(folder) / EXTRAS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


@torch.no_grad()
def load_extras(model: nn.Module, folder: str | Path) -> None:
    """Set the deltas of `model`, whose scales are trained, to those in `folder`; every process reads them.

    Raises:
        UserError: if the file is missing or damaged, or holds other layers or shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, deltas = Path(folder) / EXTRAS, _deltas(model)
    if not path.is_file():
        raise UserError(f"{path}: missing: this checkpoint has no trained scales")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the file is truncated or damaged ({error})") from None
    for name in sorted(deltas.keys() ^ stored.keys()):
        lacks = "is not in the file" if name in deltas else "is in the file, but is not trained here"
        raise UserError(f"{path}: {name} {lacks}")
    for name, delta in deltas.items():
        if stored[name].shape != delta.shape:
            shapes = tuple(stored[name].shape), tuple(delta.shape)
            raise UserError(f"{path}: {name} has the shape {shapes[0]}, the layer needs {shapes[1]}")
    for name, delta in deltas.items():
        assign(delta, stored[name])
    for layer in _linears(model).values():
        layer.kept_metadata = None


def plain_name(name: str) -> str:
    """The name of a module or tensor of a PEFT model as it is in the model without PEFT."""
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part not in _WRAPPED)


def _linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {}
    for name, layer in _linears(model).items():
        for kind in DELTAS:
            if (delta := getattr(layer, kind)) is not None:
                found[f"{name}.{kind}"] = delta
    return found


def _head(model: Any) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None
