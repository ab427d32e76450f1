"""From another layout's numbers to stored ones: codes out of words, and 16-bit metadata without a loss where possible.

Every layout here means W = s q + o with some s and o of a group, known exactly; ours stores both in 16-bit floats.
Most layouts have a scale in 16 bits and a whole zero point z, o = -s z, which 16 bits need not hold: 3 s has up to 13
significant bits, a float16 has 11. But a group can be stored from its other end as well:

    s q + o  =  (-s) (Q - q) + (o + s Q)        with Q the largest code

and of the two offsets, -s z and s (Q - z), one is a power of two times s (or zero) for every z of 1, 2 and 3 bits:

    2 bits    z 0 1 2 as they are, 3 from the other end
    3 bits    z 0 1 2 4 8 as they are, 3 5 6 7 from the other end
    4 bits    z 0 1 2 4 8 16 as they are, 7 11 13 14 15 from the other end; 3 5 6 9 10 12 need more bits than there are

so that such weights are kept exactly. For the rest the nearer end is taken, and the error is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqqplus.quantization import PackedTensor, QuantSpec
from hqqplus.quantization.metadata import metadata_dtype, to_storage, too_large
from hqqplus.quantization.packing import pack

_CHUNK = 2**22  # weights made of codes together: 32 MB in float64


def unpack_stream(data: Tensor, bits: int) -> Tensor:
    """Codes that lie one after the other from the low bits of a row's bytes up: [rows, n bits / 8] -> [rows, n].

    Words of 16 or 32 bits, seen as bytes, are such a row on a little-endian machine. `data` and the codes are uint8;
    3-bit codes come in threes of bytes.
    """
    rows = data.shape[0]
    if bits == 8:
        return data.clone()
    if bits == 3:
        low, middle, high = data.view(rows, -1, 3).to(torch.int32).unbind(-1)
        shifts = torch.arange(0, 24, 3, dtype=torch.int32)
        codes = ((low | middle << 8 | high << 16).unsqueeze(-1) >> shifts) & 7  # [rows, threes, 8]
        return codes.to(torch.uint8).flatten(1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((data.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def as_bytes(words: Tensor) -> Tensor:
    """A matrix of words seen as bytes: [rows, n] -> [rows, bytes], uint8."""
    return words.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Fitted:
    """The metadata of a matrix as they are stored.

    Attributes:
        scale, offset: [rows, groups] 16-bit floats.
        mirrored: [rows, groups] groups that are stored from their other end.
        error: [rows, groups] float64, the most that a weight of the group is off by.
        relative: the largest error over the largest absolute value that a weight of its group can have.
    """

    scale: Tensor
    offset: Tensor
    mirrored: Tensor
    error: Tensor
    relative: float

    @property
    def exact(self) -> bool:
        """Whether every weight is stored as it was."""
        return not bool(self.error.any())


def fit(scale: Tensor, offset: Tensor, spec: QuantSpec, largest: int) -> Fitted:
    """Store W = scale q + offset, [rows, groups] float64 both, in the 16-bit type of `spec`.

    Args:
        largest: the largest code that there is, at most `spec.qmax`.

    Raises:
        ValueError: if scale or offset are not finite, or too large for the type.
    """
    if not (torch.isfinite(scale).all() and torch.isfinite(offset).all()):
        raise ValueError("it holds NaN or infinite values")
    dtype, qmax = metadata_dtype(spec.metadata_dtype), spec.qmax
    other_end = offset + scale * qmax
    near, far = offset.to(dtype), other_end.to(dtype)
    stored = scale.to(dtype)
    slack = stored.double() - scale
    straight = _worst(near.double() - offset, slack, 0, largest)
    turned = _worst(far.double() - other_end, -slack, qmax - largest, qmax)
    mirrored = turned < straight
    error = torch.where(mirrored, turned, straight)
    if not torch.isfinite(error).all():
        raise too_large(spec.metadata_dtype)
    size = torch.maximum(offset.abs(), (offset + scale * largest).abs())
    share = error / torch.where(error > 0, size.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return Fitted(
        torch.where(mirrored, -stored, stored),
        torch.where(mirrored, far, near),
        mirrored,
        error,
        float(share.max()),
    )


def _worst(offset: Tensor, scale: Tensor, first: int, last: int) -> Tensor:
    """The largest of |offset + scale q| over codes first ... last; infinity where it is no number."""
    error = torch.maximum((offset + scale * first).abs(), (offset + scale * last).abs())
    return torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf)


def packed_tensor(codes: Tensor, fitted: Fitted, spec: QuantSpec) -> PackedTensor:
    """Codes [rows, width] (uint8) with the metadata of their groups."""
    rows, width = codes.shape
    layout = spec.layout(rows, width)
    codes = torch.nn.functional.pad(codes, (0, layout.padded - width)).view(rows, layout.groups, layout.group)
    if fitted.mirrored.any():
        codes = torch.where(fitted.mirrored.unsqueeze(-1), spec.qmax - codes, codes)
    packed = pack(codes.flatten(1), spec.nbits, layout.plane)
    return PackedTensor(packed, to_storage(fitted.scale), to_storage(fitted.offset), spec, (rows, width))


def dequantized(codes: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """What the layout stands for: scale q + offset in float64, rounded once to float32 [rows, width]."""
    rows, width = codes.shape
    group = spec.layout(rows, width).group
    weight = torch.empty(rows, width)
    step = max(1, _CHUNK // width)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        spread = [metadata[here].repeat_interleave(group, 1)[:, :width] for metadata in (scale, offset)]
        weight[here] = codes[here].double().mul_(spread[0]).add_(spread[1])
    return weight
