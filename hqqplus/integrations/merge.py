"""PEFT: an adapter merged into the dequantized weights of a packed model, a layer at a time.

Merging into packed weights is refused (`integrations/peft.py`). Here each packed layer is first replaced by an
ordinary one in float32, which PEFT then merges its adapter into, plain LoRA or a variant; what comes out is rounded
once, to 16 bits, before the next layer is touched. So the whole model is never there in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hqqplus.integrations.peft import GAINS, PackedLoraLinear
from hqqplus.modules import PackedLinear


@torch.no_grad()
def merge_and_unload(model: Any, dtype: torch.dtype, advance: Callable[[int, str], None] | None = None) -> Any:
    """The model under PEFT model `model`, its adapter merged into weights in `dtype`; `model` is used up.

    Packed layers without an adapter, and everything that PEFT has not touched, stay as they are.

    Args:
        advance: told the number of weights and the name of each layer that is done.

    Raises:
        ValueError, RuntimeError: PEFT's own, for what it cannot merge.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, PackedLoraLinear) and isinstance(layer.get_base_layer(), PackedLinear):
            _unpack(layer)
        _cast(layer.get_base_layer(), torch.float32)
        layer.merge()  # type: ignore[operator]
        base = layer.get_base_layer()
        _cast(base, dtype)
        if advance is not None:
            advance(sum(p.numel() for p in base.parameters(recurse=False)), name)
    with warnings.catch_warnings():
        # It merges what is not merged yet: nothing.
        warnings.filterwarnings("ignore", message="Already (following|merged)|All adapters are already")
        return model.merge_and_unload()


def _unpack(layer: PackedLoraLinear) -> None:
    """Make `layer` an ordinary LoRA layer of PEFT's over the dequantized weight, float32, with its gains in that."""
    packed = cast(PackedLinear, layer.get_base_layer())
    weight = packed.dequantize(torch.float32)
    inner, outer = layer._gains([name for name in layer.active_adapters if name in layer.lora_A])
    if inner is not None:
        weight *= 1 + inner.float()
    if outer is not None:
        weight *= 1 + outer.float()[:, None]
    with torch.device("meta"):
        plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if packed.bias is not None:
        plain.bias = nn.Parameter(packed.bias.detach().float(), requires_grad=False)
    layer.base_layer = plain
    for gain in GAINS:
        layer._modules.pop(gain, None)
    layer.__class__ = LoraLinear  # type: ignore[assignment]  # whose merge is not refused, and which has no gains


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
