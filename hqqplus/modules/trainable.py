"""Training the scales and offsets of a packed linear layer through the bytes that they are stored in.

    train_scales(layer)      adds the float32 parameters `scale_delta` and, where asked for, `offset_delta`
    trained_metadata(layer)  the metadata that they stand for now, as stored: what every product computes with
    bake(layer)              writes those bytes into the layer and takes the parameters away

What the parameters mean is told by `kernels/scales.py`. With both at zero the bytes are those of the layer: 16-bit
floats by themselves, 8-bit codes because a block in which nothing has moved keeps its codes and maps. A block in which
something has moved is encoded anew, maps and all, since its largest scale may have grown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.kernels.scales import TrainedScales, current_scales
from hqqplus.modules.sharding import is_sharded, whole
from hqqplus.quantization.metadata import encode, fit_maps, metadata_dtype, metadata_views, to_storage
from hqqplus.quantization.spec import BLOCK, QuantSpec

if TYPE_CHECKING:
    from hqqplus.modules.linear import PackedLinear

DELTAS = ("scale_delta", "offset_delta")

Stored = tuple[Tensor, Tensor, Tensor | None]
"""scale, offset and blocks as bytes, in the shapes of the layer's parameters."""


def train_scales(layer: PackedLinear, offsets: bool) -> None:
    """Make the scales of `layer` trainable, and with `offsets` its offsets too, from where they are.

    Raises:
        UserError: for a layer with axis 0.
        ValueError: if they are trained already.
    """
    if layer.spec.axis != 1:
        raise UserError("trainable scales need axis 1: with axis 0 a group holds weights of several output rows")
    if is_trained(layer):
        raise ValueError("the scales of this layer are trained already")
    layout = layer.spec.layout(*layer.matrix_shape)
    for name in DELTAS if offsets else DELTAS[:1]:
        zeros = torch.zeros(layout.rows, layout.groups, dtype=torch.float32, device=layer.W_q.device)
        setattr(layer, name, nn.Parameter(zeros))


def is_trained(layer: PackedLinear) -> bool:
    return layer.scale_delta is not None


def trained_scales(layer: PackedLinear) -> TrainedScales:
    """What is trained, as the kernels take it."""
    assert layer.scale_delta is not None
    start = metadata_views(whole(layer.scale), whole(layer.offset), whole(layer.blocks), layer.spec.metadata_dtype)
    return TrainedScales(whole(layer.scale_delta), whole(layer.offset_delta), start)


def trained_metadata(layer: PackedLinear) -> Stored:
    """The metadata of `layer` as they are now, in the bytes that will be stored.

    Raises:
        ValueError: if 8-bit metadata have become infinite or too large for their 16-bit maps.
    """
    if not is_trained(layer):
        return layer.scale, layer.offset, layer.blocks
    if torch.is_grad_enabled():
        # What is kept for evaluation ends here: an optimizer's kernel need not count its change as a version.
        layer.kept_metadata = None
        return _encoded(layer)
    if is_sharded(layer.scale_delta):
        return _encoded(layer)  # nothing of a sharded layer is kept: it would be whole
    deltas = [getattr(layer, name) for name in DELTAS]
    state = tuple((d.data_ptr(), d._version) for d in deltas if d is not None)
    if layer.kept_metadata is None or layer.kept_metadata[0] != state:
        layer.kept_metadata = state, _encoded(layer)
    return layer.kept_metadata[1]


@torch.no_grad()
def bake(layer: PackedLinear) -> None:
    """Write the trained metadata into `layer` and end its training; a layer that is not trained stays as it is."""
    for name, stored in zip(("scale", "offset", "blocks"), trained_metadata(layer), strict=True):
        if stored is not None and stored is not getattr(layer, name):
            setattr(layer, name, nn.Parameter(stored, requires_grad=False))
    for name in DELTAS:
        setattr(layer, name, None)
    layer.kept_metadata = None


@torch.no_grad()
def _encoded(layer: PackedLinear) -> Stored:
    with torch.autocast(layer.W_q.device.type, enabled=False):  # it has opinions on 16-bit floats of two types
        return _encode(layer)


def _encode(layer: PackedLinear) -> Stored:
    scales, offsets = current_scales(trained_scales(layer), layer.spec.qmax)
    if layer.blocks is None:
        dtype = metadata_dtype(layer.spec.metadata_dtype)
        return to_storage(scales.to(dtype)), to_storage(offsets.to(dtype)), None
    scale, offset, blocks = _encode_8bit(scales, offsets, layer.spec)
    deltas = [whole(d) for name in DELTAS if (d := getattr(layer, name)) is not None]
    moved = torch.stack([d != 0 for d in deltas]).any(0).flatten()
    moved = nn.functional.pad(moved, (0, -moved.numel() % BLOCK)).view(-1, BLOCK).any(1)  # [blocks]
    entries = moved.repeat_interleave(BLOCK)[: scale.numel()].view(scale.shape)
    return (
        torch.where(entries, scale, whole(layer.scale)),
        torch.where(entries, offset, whole(layer.offset)),
        torch.where(moved[:, None], blocks, whole(layer.blocks)),
    )


def _encode_8bit(scales: Tensor, offsets: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of scales and middles [rows, groups] and the bytes of their blocks [blocks, 8]."""
    codes, maps = [], []
    for values in (scales, offsets + scales * (spec.qmax / 2)):
        flat = values.flatten()
        maps.append(fit_maps(flat, spec.metadata_dtype))
        codes.append(encode(flat, maps[-1]).view(values.shape))
    return codes[0], codes[1], to_storage(torch.cat(maps, dim=1))
