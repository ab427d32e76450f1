"""The GPTQ format, as AutoGPTQ and GPTQModel write it.

    qweight  int32 [in bits / 32, out]       codes of a column, one after the other from the low bits of its words up
    qzeros   int32 [groups, out bits / 32]   zero points of a group, the same along its row
    scales   [groups, out]
    g_idx    int32 [in]                      the group of each input; may be missing

    W[i, o] = scales[g, o] (q[i, o] - z[g, o])          g = g_idx[i]

Version 1 of the format (`checkpoint_format` gptq, or none) stores z - 1, version 2 stores z. GPTQModel, which
transformers reads with, takes the 1 off whole words and puts it back so: a zero point of 0 borrows from the next one
of its word. So do we. With 3 bits the two libraries differ in what they take off; there only symmetric weights are
read, whose z is 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.conversion.exact import as_bytes, unpack_stream
from hqqplus.conversion.layouts import Layout, Source, check_bits, check_form, fault, our_group, type_for
from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.spec import WHOLE_ROW
from hqqplus.shards import StoredTensor

_WORD = 32
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class GPTQLayout(Layout):
    """A checkpoint in the GPTQ format.

    Raises:
        UserError: naming file and tensor, if parts of it are missing, or of other shapes than the model's; if its
            groups are not consecutive inputs.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.version = 2 if source.choice("checkpoint_format", (None, "", "gptq", "gptq_v2")) == "gptq_v2" else 1
        self.title = f"GPTQ, version {self.version}"
        bits, group = source.number("bits"), source.number("group_size")
        check_bits(bits)
        # GPTQModel's and AutoRound's ways to give single layers other settings.
        self._mixed = any(source.settings.get(name) for name in ("dynamic", "extra_config"))
        self._repeats: dict[str, int] = {}
        for name, main in source.tensors.items():
            if name.endswith(".qweight"):
                self._add(source, name.removesuffix(".qweight"), main, bits, group)
        if not self.specs:
            raise UserError("the checkpoint is said to be GPTQ's, and has no tensor NAME.qweight")
        ambiguous = sum(self._ambiguous(layer) for layer in self.specs) if self.version == 1 else 0
        if ambiguous:
            self.remarks.append(
                f"{ambiguous:,} zero points are stored as the largest number there is, which readers of version 1 do "
                "not agree about: they are read as GPTQModel reads them"
            )

    def _add(self, source: Source, layer: str, main: StoredTensor, bits: int, group: int) -> None:
        rows, width = source.shape_of(layer, main)
        if self._mixed and len(main.shape) == 2 and width:
            bits = main.shape[0] * _WORD // width
            check_bits(bits, main)
        if width * bits % _WORD or rows * bits % _WORD:
            raise fault(main, f"{rows} x {width} weights of {bits} bits fill no whole words")
        names = ("qzeros", "scales", *(["g_idx"] if f"{layer}.g_idx" in source.tensors else []))
        parts = {name: source.part(main, f"{layer}.{name}") for name in names}
        check_form(main, (width * bits // _WORD, rows), (torch.int32,), f" for {bits} bits")
        scales = parts["scales"]
        group = self._group(scales, group, width)
        groups = -(-width // group)
        check_form(scales, (groups, rows), _FLOATS, f" for groups of {group}")
        check_form(parts["qzeros"], (groups, rows * bits // _WORD), (torch.int32,), f" for {bits} bits")
        if "g_idx" in parts:
            _check_order(parts["g_idx"], width, group)
        size, self._repeats[layer] = our_group(group, width, scales)
        self.specs[layer] = QuantSpec(bits, size, 1, type_for(scales), 16)
        self.parts[layer] = {"qweight": main, **parts}

    def _group(self, scales: StoredTensor, group: int, width: int) -> int:
        """The inputs of a group; where layers may differ, by the number of scales."""
        group = width if group == WHOLE_ROW else group
        found = scales.shape[0] if len(scales.shape) == 2 else 0
        if group > 0 and found == -(-width // group):
            return group
        if self._mixed and found and width % found == 0:
            return width // found
        raise fault(
            scales,
            f"{found} groups for {width} inputs, and quantization_config has group_size {group}: layers may differ "
            "only where it has dynamic or extra_config",
        )

    def grid(self, layer: str) -> tuple[Tensor, Tensor]:
        parts, spec = self.parts[layer], self.specs[layer]
        scale = parts["scales"].read().double().t()  # [rows, groups]
        zeros = self._zeros(parts["qzeros"], spec.nbits).t().double()
        count = spec.layout(scale.shape[0], self._width(layer)).groups
        scale, offset = (t.repeat_interleave(self._repeats[layer], 1)[:, :count] for t in (scale, -scale * zeros))
        return scale, offset

    def _zeros(self, stored: StoredTensor, bits: int) -> Tensor:
        """The zero points, [groups, rows] uint8."""
        words = stored.read()
        if self.version == 2:
            return unpack_stream(as_bytes(words), bits)
        if bits != 3:
            return unpack_stream(as_bytes(_add_one(words, bits)), bits)
        zeros = unpack_stream(as_bytes(words), bits) + 1
        if not bool((zeros == 4).all()):
            raise fault(
                stored,
                "zero points of 3 bits in version 1 of the format, which its writers do not agree about unless all of "
                "them are 4: a checkpoint with sym true, or with checkpoint_format gptq_v2, can be converted",
            )
        return zeros

    def codes(self, layer: str) -> Tensor:
        words = self.parts[layer]["qweight"].read()  # [words, rows]
        return unpack_stream(as_bytes(words.t()), self.specs[layer].nbits)

    def _width(self, layer: str) -> int:
        return self.parts[layer]["qweight"].shape[0] * _WORD // self.specs[layer].nbits

    def _ambiguous(self, layer: str) -> int:
        bits = self.specs[layer].nbits
        if bits == 3:
            return 0
        stored = unpack_stream(as_bytes(self.parts[layer]["qzeros"].read()), bits)
        return int((stored == 2**bits - 1).sum())


def _add_one(words: Tensor, bits: int) -> Tensor:
    """One more for each code of `words` [rows, n] int32, in whole words: what is too large is carried to the next."""
    one = sum(1 << bit for bit in range(0, _WORD, bits))
    sums = words.to(torch.int64) + one
    return sums.view(torch.int32)[:, ::2].contiguous()  # the lower halves


def _check_order(g_idx: StoredTensor, width: int, group: int) -> None:
    check_form(g_idx, (width,), (torch.int32, torch.int64))
    if not torch.equal(g_idx.read().long(), torch.arange(width) // group):
        raise fault(
            g_idx,
            "the inputs were quantized in the order of their activations (desc_act), so that a group is no run of "
            "consecutive inputs, which our format needs: a checkpoint made with desc_act false can be converted",
        )
