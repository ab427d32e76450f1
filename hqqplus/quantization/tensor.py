"""`PackedTensor`: a quantized matrix as three tensors, and `quantize`, which makes one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hqqplus.quantization.metadata import from_storage, to_storage
from hqqplus.quantization.packing import pack, packed_width, unpack
from hqqplus.quantization.solver import solve
from hqqplus.quantization.spec import QuantSpec

# The names of the stored tensors, which are also the parameter names of the packed layers and the keys on disk.
STATE_NAMES = ("W_q", "scale", "offset")


def state_shapes(
    spec: QuantSpec, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Name -> (shape, dtype) of the stored tensors of an `[out_features, in_features]` weight."""
    layout = spec.layout(out_features, in_features)
    return {
        "W_q": ((layout.rows, packed_width(layout.padded, spec.nbits)), torch.uint8),
        "scale": ((layout.rows, 2 * layout.groups), torch.uint8),
        "offset": ((layout.rows, 2 * layout.groups), torch.uint8),
    }


def dequantize_rows(
    W_q: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, width: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a packed matrix in full: [rows, bytes], [rows, groups] twice -> [rows, width], `dtype`.

    `scale` and `offset` are floats here. The affine map is evaluated in float32 and rounded once.
    """
    layout = spec.replace(axis=1).layout(W_q.shape[0], width)
    codes = unpack(W_q, spec.nbits, layout.plane).view(-1, layout.groups, layout.group)
    values = torch.addcmul(offset.float().unsqueeze(-1), codes.float(), scale.float().unsqueeze(-1))
    return values.flatten(1)[:, :width].to(dtype)


def dequantize_matrix(
    W_q: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The whole `[out_features, in_features]` matrix in `dtype`; `scale` and `offset` are floats."""
    out_features, in_features = shape
    if spec.axis == 1:
        return dequantize_rows(W_q, scale, offset, spec, in_features, dtype).contiguous()
    return dequantize_rows(W_q, scale, offset, spec, out_features, dtype).t().contiguous()


@dataclass(frozen=True)
class PackedTensor:
    """A quantized `[out_features, in_features]` matrix.

    `W_q` holds the packed codes [rows, bytes], `scale` and `offset` [rows, 2 groups] the bytes of 16-bit floats: all
    uint8. `rows` is out_features for axis 1 and in_features for axis 0, whose matrix is stored turned.
    """

    W_q: Tensor
    scale: Tensor
    offset: Tensor
    spec: QuantSpec
    shape: tuple[int, int]

    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name; all integers, nothing else is needed beside `spec` and `shape`."""
        return {name: getattr(self, name) for name in STATE_NAMES}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out_features, in_features] in `dtype`."""
        scale, offset = (from_storage(t, self.spec.metadata_dtype) for t in (self.scale, self.offset))
        return dequantize_matrix(self.W_q, scale, offset, self.spec, self.shape, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, offsets, padding) over the number of weights; counted from the tensors."""
        stored = sum(t.numel() * t.element_size() for t in self.state().values())
        return 8 * stored / (self.shape[0] * self.shape[1])

    def nmse(self, weight: Tensor) -> float:
        """||W - Q||^2 / ||W||^2 against the original `weight`; 0 where both are zero."""
        reference = weight.to(torch.float64)
        error = (reference - self.dequantize(torch.float32).to(reference)).square().sum().item()
        energy = reference.square().sum().item()
        return error / energy if energy > 0 else (0.0 if error == 0 else float("inf"))


@torch.no_grad()
def quantize(weight: Tensor, spec: QuantSpec) -> PackedTensor:
    """Quantize `weight` [out_features, in_features] (any float dtype, any device) as `spec` says.

    Raises:
        ValueError: if `weight` is not a matrix of floats, is empty, or holds NaN or infinite values.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a non-empty matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    matrix = weight.detach() if spec.axis == 1 else weight.detach().t().contiguous()
    layout = spec.layout(out_features, in_features)
    solution = solve(matrix, spec)
    codes = torch.nn.functional.pad(solution.codes, (0, layout.padded - layout.width))
    return PackedTensor(
        W_q=pack(codes, spec.nbits, layout.plane),
        scale=to_storage(solution.scale),
        offset=to_storage(solution.offset),
        spec=spec,
        shape=(out_features, in_features),
    )
