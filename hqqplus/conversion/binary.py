"""Signs and scales: the plainest layout of a binary or ternary model, for those that have none of the others.

    quantization_config: {"quant_method": "binary", "bits": 1, "group_size": 128,
                          "bit_order": "little", "positive_bit": 1}

    weight        the signs: int8 [out, in] of -1 and 1 (with bits: 2 also 0); or their bits, uint8 [out, in / 8] or
                  int32 [out, in / 32]
    weight_scale  [out, groups]; [out], [out, 1] for whole rows (group_size: -1); or one number for the matrix

    W = sign weight_scale                kept exactly: binary as scale 2a and offset -a

`bit_order` says where the first of the bits of a byte is, little: at the low end; the bytes of a word go from its low
end up. `positive_bit` is the bit of a positive weight; 0 for those that keep the sign bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.conversion.exact import as_bytes, unpack_stream
from hqqplus.conversion.layouts import Layout, Source, check_form, fault, our_group, type_for
from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.spec import WHOLE_ROW
from hqqplus.shards import StoredTensor

_SUFFIX = ".weight_scale"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class BinaryLayout(Layout):
    """A checkpoint of signs and scales.

    Raises:
        UserError: naming file and tensor, if parts of it are missing or of other shapes than the model's.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        bits = source.choice("bits", (1, 2), 1)
        self.title = "binary" if bits == 1 else "signs and zeros"
        self.largest = bits
        self._group = source.number("group_size", WHOLE_ROW)
        self._big = source.choice("bit_order", ("little", "big"), "little") == "big"
        self._positive = source.choice("positive_bit", (0, 1), 1)
        self._repeats: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        for name, scale in source.tensors.items():
            if name.endswith(_SUFFIX):
                self._add(source, name.removesuffix(_SUFFIX), scale, bits)
        if not self.specs:
            raise UserError(f"the checkpoint is said to be binary, and has no tensor NAME{_SUFFIX}")

    def _add(self, source: Source, layer: str, scale: StoredTensor, bits: int) -> None:
        main = source.part(scale, f"{layer}.weight")
        rows, width = source.shape_of(layer, main)
        if main.shape == (rows, width) or bits == 2:
            check_form(main, (rows, width), (torch.int8, *_FLOATS))
        else:
            per_word = 8 * main.dtype.itemsize
            check_form(main, (rows, -(-width // per_word)), (torch.uint8, torch.int8, torch.int32, torch.uint32))
        group = width if self._group == WHOLE_ROW else self._group
        if group <= 0:
            raise fault(scale, f"groups of {group}: they need to be of some weights, or -1 for a whole row")
        groups = -(-width // group)
        if scale.shape not in ((), (1,)) and not (groups == 1 and scale.shape == (rows,)):
            check_form(scale, (rows, groups), _FLOATS, f" for groups of {group}")
        size, self._repeats[layer] = our_group(group, width, scale)
        self._shapes[layer] = rows, width
        self.specs[layer] = QuantSpec(bits, size, 1, type_for(scale), 16)
        self.parts[layer] = {"weight": main, "weight_scale": scale}

    def grid(self, layer: str) -> tuple[Tensor, Tensor]:
        (rows, width), spec = self._shapes[layer], self.specs[layer]
        count = spec.layout(rows, width).groups
        value = self.parts[layer]["weight_scale"].read().double()
        value = value.expand(rows).unsqueeze(1) if value.dim() == 1 else value
        value = value.expand(rows, -1) if value.dim() == 2 else value.expand(rows, 1)
        value = value.repeat_interleave(self._repeats[layer], 1)
        value = value[:, :count] if value.shape[1] > 1 else value.expand(rows, count)
        return (2 * value if spec.nbits == 1 else value), -value

    def codes(self, layer: str) -> Tensor:
        stored = self.parts[layer]["weight"]
        weight, (rows, width) = stored.read(), self._shapes[layer]
        if stored.shape == (rows, width):
            return self._from_signs(weight, stored)
        data = as_bytes(weight)
        bits = unpack_stream(data, 1)
        if self._big:
            bits = bits.view(rows, -1, 8).flip(-1).flatten(1)
        bits = bits[:, :width]
        return bits if self._positive else 1 - bits

    def _from_signs(self, weight: Tensor, stored: StoredTensor) -> Tensor:
        binary = self.largest == 1
        allowed = (weight == 1) | (weight == -1)
        if not (allowed if binary else allowed | (weight == 0)).all():
            raise fault(stored, f"it holds other numbers than {'-1 and 1' if binary else '-1, 0 and 1'}")
        return ((weight + 1) / 2 if binary else weight + 1).to(torch.uint8)
