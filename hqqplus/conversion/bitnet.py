"""BitNet b1.58 as transformers stores it: ternary weights and one scale a matrix.

    weight        uint8 [R = ceil(out / 4), in]   t + 1 of rows r, r + R, r + 2R, r + 3R, from the low bits of row r up
    weight_scale  [1]

    W = t / weight_scale       linear_class bitlinear (the default)
    W = t weight_scale         linear_class autobitlinear, quantization_mode offline; there t may also lie in `weight`
                               as it is, one number each
    W = round(w / m) m         autobitlinear, online: `weight` is w in 16 bits, m its mean absolute value, and what is
                               rounded is kept within -1 ... 1

t becomes the code t + 1 of 2 bits, in one group a row. m and a weight_scale in 16 bits are kept as they are; 1 /
weight_scale is rounded to a float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.conversion.layouts import Layout, Source, check_form, fault, type_for
from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.spec import WHOLE_ROW, matches
from hqqplus.shards import StoredTensor

_A_BYTE = 4
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The least mean that BitNet divides by.
_SMALLEST_MEAN = 1e-5


class BitNetLayout(Layout):
    """A ternary checkpoint in transformers' BitNet format.

    Raises:
        UserError: naming file and tensor, if parts of it are missing or of other shapes than the model's; if its
            layers have a norm of their own.
    """

    largest = 2

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._linear = source.choice("linear_class", ("bitlinear", "autobitlinear"), "bitlinear")
        mode = source.choice("quantization_mode", ("offline", "online"), "offline")
        self._online = self._linear == "autobitlinear" and mode == "online"
        self.title = f"BitNet, {self._linear}" + (f" {mode}" if self._linear == "autobitlinear" else "")
        self._shapes: dict[str, tuple[int, int]] = {}
        if source.settings.get("use_rms_norm"):
            raise UserError(
                "config.json: quantization_config: use_rms_norm is true: these layers normalise their input by "
                "weights of their own, which the model's class has no place for without transformers' BitNet layers"
            )
        layers = self._by_hand(source) if self._online else self._packed(source)
        for layer in layers:
            self._add(source, layer)
        if not self.specs:
            raise UserError("the checkpoint is said to be BitNet's, and has no ternary layer")
        self.remarks.append(
            "the source also rounds the inputs of each layer to 8 bits; the packed model takes them as they are"
        )

    def _packed(self, source: Source) -> list[str]:
        return [n.removesuffix(".weight_scale") for n in source.tensors if n.endswith(".weight_scale")]

    def _by_hand(self, source: Source) -> list[str]:
        """Layers that are rounded while the model runs: all linear ones but those that the settings leave out."""
        skip = source.settings.get("modules_to_not_convert") or []
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise UserError("config.json: quantization_config: modules_to_not_convert is no list of names")
        return [
            layer for layer in source.linears if f"{layer}.weight" in source.tensors and not _left_out(layer, skip)
        ]

    def _add(self, source: Source, layer: str) -> None:
        scale = None if self._online else source.tensors[f"{layer}.weight_scale"]
        weight = source.part(scale, f"{layer}.weight") if scale else source.tensors[f"{layer}.weight"]
        rows, width = source.shape_of(layer, weight)
        if scale is None:
            check_form(weight, (rows, width), _FLOATS)
            self.parts[layer] = {"weight": weight}
            dtype = "bfloat16" if weight.dtype == torch.bfloat16 else "float16"
        else:
            if scale.shape not in ((), (1,)):
                raise fault(scale, f"it is {list(scale.shape)}: one number for the matrix is needed")
            if weight.dtype == torch.uint8:
                check_form(weight, (-(-rows // _A_BYTE), width), (torch.uint8,))
            elif self._linear == "autobitlinear":
                check_form(weight, (rows, width), (torch.int8, *_FLOATS))
            else:
                check_form(weight, (-(-rows // _A_BYTE), width), (torch.uint8,))
            self.parts[layer] = {"weight": weight, "weight_scale": scale}
            dtype = type_for(scale) if self._linear == "autobitlinear" else "float16"
        self._shapes[layer] = rows, width
        self.specs[layer] = QuantSpec(2, WHOLE_ROW, 1, dtype, 16)

    def grid(self, layer: str) -> tuple[Tensor, Tensor]:
        rows, _ = self._shapes[layer]
        value = self._scale(layer)
        scale = torch.full((rows, 1), value, dtype=torch.float64)
        return scale, -scale

    def _scale(self, layer: str) -> float:
        parts = self.parts[layer]
        if self._online:
            weight = parts["weight"].read()
            return (1 / _inverse_mean(weight)).to(weight.dtype).item()
        stored = parts["weight_scale"]
        value = stored.read().double().item()
        if not torch.isfinite(torch.tensor(value)) or value <= 0:
            raise fault(stored, f"it is {value}: a positive number is needed")
        return value if self._linear == "autobitlinear" else 1 / value

    def codes(self, layer: str) -> Tensor:
        stored = self.parts[layer]["weight"]
        weight = stored.read()
        if self._online:
            return (weight.float() * _inverse_mean(weight)).round().clamp_(-1, 1).add_(1).to(torch.uint8)
        rows, _ = self._shapes[layer]
        codes = _unpack(weight, rows) if weight.dtype == torch.uint8 else _ternary(weight, stored)
        if int(codes.max()) > self.largest:
            raise fault(stored, "it holds the code 3, and a ternary weight has only 0, 1 and 2")
        return codes


def _unpack(weight: Tensor, rows: int) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(-1, 1, 1)
    return ((weight >> shifts) & 3).flatten(0, 1)[:rows]


def _ternary(weight: Tensor, stored: StoredTensor) -> Tensor:
    if not ((weight == 0) | (weight == 1) | (weight == -1)).all():
        raise fault(stored, "it holds other numbers than -1, 0 and 1")
    return (weight + 1).to(torch.uint8)


def _inverse_mean(weight: Tensor) -> Tensor:
    """1 / m, in float32 and in the order of steps of transformers' own rounding."""
    return 1.0 / weight.float().abs().mean().clamp_(min=_SMALLEST_MEAN)


def _left_out(layer: str, skip: list[str]) -> bool:
    return any(matches(layer, name) or layer.startswith(f"{name}.") for name in skip)
