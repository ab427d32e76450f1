"""Scale and offset as they are stored: the bytes of 16-bit floats, or 8-bit codes.

Integers are what no part of the stack re-types: `.to(dtype)`, an fp32 upcast before training, a mixed-precision policy
or a reload with another dtype all cast floating tensors only.

With 8 bits a group has one code for its scale and one for its *middle*, m = offset + scale * qmax / 2, which is what
the group's grid lies about. It is stored instead of the offset because it is close to zero: its range is several times
smaller, and so is its step. `BLOCK` consecutive entries of the flattened [rows, groups] array share two affine maps,
one for the scales and one for the middles, each of them two 16-bit floats, (256 step, zero):

    value = step * (code - zero)        zero a whole number in 0 ... 255, so that 0 is exact

256 steps are stored rather than one because they are about as large as the values themselves: a float16 has its full
precision from 6e-5 up only, and one step of the scales of an ordinary model is below that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.quantization.spec import BLOCK, METADATA_DTYPES

# Bytes, not int16: neither NCCL nor gloo can send an int16, so DDP could not start.
STORAGE_DTYPE = torch.uint8
_LARGEST_CODE = 255
_STORED_STEPS = 256


def metadata_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` or `"float16"` as a torch dtype.

    Raises:
        ValueError: for any other name.
    """
    if name not in METADATA_DTYPES:
        raise ValueError(f"metadata_dtype is {name!r}: it must be one of {', '.join(METADATA_DTYPES)}")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def to_storage(values: Tensor) -> Tensor:
    """The bytes of a 16-bit float tensor [..., n]: [..., 2 n] uint8."""
    return values.contiguous().view(STORAGE_DTYPE)


def from_storage(stored: Tensor, name: str) -> Tensor:
    """Bytes [..., 2 n] seen as the 16-bit float type called `name`: [..., n]."""
    return stored.view(metadata_dtype(name))


def metadata_views(
    scale: Tensor, offset: Tensor, blocks: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stored tensors as `decode` and the ops take them: bytes of 16-bit floats seen as such, nothing copied.

    Without blocks, scale and offset [rows, 2 groups] -> [rows, groups]. With them scale and offset are codes and stay
    as they are, and blocks [blocks, 8] -> [blocks, 4].
    """
    if blocks is None:
        return from_storage(scale, name), from_storage(offset, name), None
    return scale, offset, from_storage(blocks, name)


def fit_maps(values: Tensor, name: str) -> Tensor:
    """The maps (256 step, zero) of the blocks of `values` [n] (float32 or float64), in the 16-bit type called `name`.

    A step is the range of its block, zero included, over 255, rounded up: both ends can be reached, and no value of
    the block is further than half a step from the nearest code's. Returns [ceil(n / BLOCK), 2].

    Raises:
        ValueError: if the range of a block does not fit into the type.
    """
    dtype = metadata_dtype(name)
    # One more zero changes no range: zero belongs to each of them.
    blocks = torch.nn.functional.pad(values, (0, -values.shape[0] % BLOCK)).view(-1, BLOCK)
    low, high = blocks.amin(1).clamp_max_(0), blocks.amax(1).clamp_min_(0)
    exact = (high - low) * (_STORED_STEPS / _LARGEST_CODE)
    stored = exact.to(dtype)
    # The next float is the next integer of its bits.
    stored = torch.where(stored < exact, (stored.view(torch.int16) + 1).view(dtype), stored)
    if not torch.isfinite(stored).all():
        raise too_large(name)
    step = stored.to(values.dtype) / _STORED_STEPS
    zero = (low.abs_() / torch.where(step > 0, step, torch.inf)).round_()
    return torch.stack([stored, zero.to(dtype)], dim=1)


def encode(values: Tensor, maps: Tensor) -> Tensor:
    """The nearest codes [n], uint8, of `values` [n] under the maps [blocks, 2] of their blocks."""
    stored, zero = maps.to(values.dtype).repeat_interleave(BLOCK, 0)[: values.shape[0]].unbind(1)
    step = stored / _STORED_STEPS
    codes = (values / torch.where(step > 0, step, torch.inf)).round_().add_(zero)
    return codes.clamp_(0, _LARGEST_CODE).to(torch.uint8)


def decode_values(codes: Tensor, maps: Tensor, entries: Tensor | None = None) -> Tensor:
    """The float32 values of `codes` [...], which are the given `entries` [...] of a flattened array, or all of it.

    `maps` [blocks, 2] are those of all blocks of that array.
    """
    stored, zero = maps.float().unbind(1)
    step = stored / _STORED_STEPS
    if entries is not None:
        block = entries // BLOCK
        return (codes.float() - zero[block]) * step[block]
    # Block by block, which is much faster than to look up each entry's.
    blocks = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    values = (blocks.float() - zero[:, None]) * step[:, None]
    return values.flatten()[: codes.numel()].view(codes.shape)


def decode(
    scale: Tensor, offset: Tensor, blocks: Tensor | None, qmax: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and the offset of each group in float32, [rows, groups] both.

    With weights of at most 4 bits every step but the last subtraction is exact: all devices find the same.

    Args:
        scale, offset: [rows, groups]: with `blocks` None 16-bit floats; else the uint8 codes of scales and middles.
        blocks: [blocks, 4] 16-bit floats: the maps of the scales, then those of the middles, of the whole matrix.
        qmax: the largest code of a weight.
        rows: [rows] which rows of the matrix these are; by default they are all of them.
    """
    if blocks is None:
        return scale.float(), offset.float()
    entries = None
    if rows is not None:
        groups = scale.shape[1]
        entries = rows[:, None] * groups + torch.arange(groups, device=scale.device)  # [rows, groups]
    scales, middles = decode_values(scale, blocks[:, :2], entries), decode_values(offset, blocks[:, 2:], entries)
    return scales, middles - scales * (qmax / 2)


def too_large(name: str) -> ValueError:
    """The refusal of a weight whose scales do not fit into the 16-bit type called `name`."""
    advice = "; bfloat16 has the range of float32" if name == "float16" else ""
    return ValueError(f"the weight is too large for scales in {name}{advice}")
