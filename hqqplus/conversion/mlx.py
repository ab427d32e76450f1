"""MLX's affine layout, in which 1-bit models with a scale for 128 weights are published too.

    weight  uint32 [out, in bits / 32]   codes of a row, one after the other from the low bits of its words up
    scales  [out, groups]
    biases  [out, groups]

    W = scales q + biases                our own formula: both are kept as they are

A binary model with the scale a in a group is stored as scales = 2a and biases = -a. `config.json` has `quantization`,
with bits and group_size, and there by the name of a layer what differs. Embeddings and head may be packed like any
layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.conversion.exact import as_bytes, unpack_stream
from hqqplus.conversion.layouts import Layout, Source, check_bits, check_form, fault, our_group, shown, type_for
from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec
from hqqplus.shards import StoredTensor

_WORD = 32
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WORDS = (torch.uint32, torch.int32)


class MLXLayout(Layout):
    """A checkpoint in MLX's affine layout.

    Raises:
        UserError: naming file and tensor, if parts of it are missing or of other shapes than the model's; for another
            mode than affine.
    """

    title = "MLX, affine"

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._repeats: dict[str, int] = {}
        source.choice("mode", ("affine",), "affine")
        for name, scales in source.tensors.items():
            if name.endswith(".scales"):
                self._add(source, name.removesuffix(".scales"), scales)
        if not self.specs:
            raise UserError("the checkpoint is said to be MLX's, and has no tensor NAME.scales")

    def _add(self, source: Source, layer: str, scales: StoredTensor) -> None:
        main = source.part(scales, f"{layer}.weight")
        biases = source.part(scales, f"{layer}.biases")
        own = source.settings.get(layer)
        if own is not None and not isinstance(own, dict):
            raise UserError(f"config.json: quantization: {layer} is {shown(own)}, and the layer is packed")
        of_layer = Source(source.config, {**source.settings, **(own or {})}, {})
        of_layer.choice("mode", ("affine",), "affine")
        bits, group = of_layer.number("bits"), of_layer.number("group_size")
        check_bits(bits)
        rows, width = source.shape_of(layer, main)
        if width * bits % _WORD or group <= 0:
            raise fault(main, f"rows of {width} weights of {bits} bits in groups of {group} fill no whole words")
        check_form(main, (rows, width * bits // _WORD), _WORDS, f" for {bits} bits")
        groups = -(-width // group)
        for part in (scales, biases):
            check_form(part, (rows, groups), _FLOATS, f" for groups of {group}")
        size, self._repeats[layer] = our_group(group, width, scales)
        self.specs[layer] = QuantSpec(bits, size, 1, type_for(scales), 16)
        self.parts[layer] = {"weight": main, "scales": scales, "biases": biases}

    def grid(self, layer: str) -> tuple[Tensor, Tensor]:
        parts, spec = self.parts[layer], self.specs[layer]
        rows, words = parts["weight"].shape
        count = spec.layout(rows, words * _WORD // spec.nbits).groups
        scale, offset = (
            parts[name].read().double().repeat_interleave(self._repeats[layer], 1)[:, :count]
            for name in ("scales", "biases")
        )
        return scale, offset

    def codes(self, layer: str) -> Tensor:
        return unpack_stream(as_bytes(self.parts[layer]["weight"].read()), self.specs[layer].nbits)
