"""`PackedTensor`: a quantized matrix as three or four tensors, and `quantize`, which makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqplus.quantization.metadata import STORAGE_DTYPE, decode, metadata_views, to_storage, too_large
from hqqplus.quantization.packing import pack, packed_width, unpack
from hqqplus.quantization.refit import store_8bit
from hqqplus.quantization.solver import Solution, check_importance, solve
from hqqplus.quantization.spec import BLOCK_BITS, QuantSpec, SolverOptions, block_count


def state_names(spec: QuantSpec) -> tuple[str, ...]:
    """The names of the stored tensors, which are also the parameter names of packed layers and the keys on disk."""
    names = ("W_q", "scale", "offset")
    return (*names, "blocks") if spec.metadata_bits == 8 else names


def state_shapes(
    spec: QuantSpec, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Name -> (shape, dtype) of the stored tensors of an `[out_features, in_features]` weight."""
    layout = spec.layout(out_features, in_features)
    metadata = layout.rows, layout.groups * spec.metadata_bits // 8
    shapes = {
        "W_q": (layout.rows, packed_width(layout.padded, spec.nbits)),
        "scale": metadata,
        "offset": metadata,
        "blocks": (block_count(layout.rows * layout.groups), BLOCK_BITS // 8),
    }
    return {name: (shapes[name], STORAGE_DTYPE) for name in state_names(spec)}


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
    W_q: Tensor,
    scale: Tensor,
    offset: Tensor,
    blocks: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The whole `[out_features, in_features]` matrix in `dtype`; the metadata as `metadata_views` gives them."""
    out_features, in_features = shape
    scales, offsets = decode(scale, offset, blocks, spec.qmax)
    if spec.axis == 1:
        return dequantize_rows(W_q, scales, offsets, spec, in_features, dtype).contiguous()
    return dequantize_rows(W_q, scales, offsets, spec, out_features, dtype).t().contiguous()


@dataclass(frozen=True)
class PackedTensor:
    """A quantized `[out_features, in_features]` matrix.

    `W_q` holds the packed codes [rows, bytes], `scale` and `offset` [rows, 2 groups] the bytes of 16-bit floats: all
    uint8. With 8-bit metadata `scale` holds the codes of the scales, `offset` those of the middles, [rows, groups]
    both, and `blocks` [blocks, 8] the bytes of the floats that turn them into values (`quantization/metadata.py`).
    `rows` is out_features for axis 1 and in_features for axis 0, whose matrix is stored turned.
    """

    W_q: Tensor
    scale: Tensor
    offset: Tensor
    spec: QuantSpec
    shape: tuple[int, int]
    blocks: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name; all integers, nothing else is needed beside `spec` and `shape`."""
        return {name: getattr(self, name) for name in state_names(self.spec)}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out_features, in_features] in `dtype`."""
        metadata = metadata_views(self.scale, self.offset, self.blocks, self.spec.metadata_dtype)
        return dequantize_matrix(self.W_q, *metadata, self.spec, self.shape, dtype)

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


Solver = Callable[[Tensor, QuantSpec, SolverOptions, Tensor | None], Solution]


@torch.no_grad()
def quantize(
    weight: Tensor,
    spec: QuantSpec,
    options: SolverOptions | None = None,
    importance: Tensor | None = None,
    solver: Solver = solve,
) -> PackedTensor:
    """Quantize `weight` [out_features, in_features] (any float dtype, any device) as `spec` says.

    Args:
        options: what the solver minimises; least squares by default.
        importance: [in_features], a weight >= 0 for the squared errors of each input column, such as the mean square
            of its activations; None for all alike. With axis 0 a group lies in one column and it makes no difference.
        solver: another implementation of `solve`.

    Raises:
        ValueError: if `weight` is not a matrix of floats, is empty, holds NaN or infinite values, or is too large for
            the type of the metadata; if `importance` does not fit; for a gain with axis 0, whose groups run over
            several rows.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a non-empty matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    options = options or SolverOptions()
    if options.gain and spec.axis == 0:
        raise ValueError("a row gain needs axis 1: with axis 0 a group holds weights of several rows")
    out_features, in_features = weight.shape
    if importance is not None:
        importance = check_importance(importance, in_features)
    matrix = weight.detach()
    if spec.axis == 0:
        matrix, importance = matrix.t().contiguous(), None
    layout = spec.layout(out_features, in_features)
    solution = solver(matrix, spec.replace(metadata_bits=16), options, importance)
    if options.gain:
        matrix, solution = _gained(matrix, solution, layout.group, options.gain, spec.metadata_dtype)
    if spec.metadata_bits == 8:
        codes, scale, offset, maps = store_8bit(
            matrix, solution.codes, solution.scale, solution.offset, spec, importance
        )
        blocks = to_storage(maps)
    else:
        codes, scale, offset = solution.codes, to_storage(solution.scale), to_storage(solution.offset)
        blocks = None
    codes = torch.nn.functional.pad(codes, (0, layout.padded - layout.width))
    packed = pack(codes, spec.nbits, layout.plane)
    return PackedTensor(packed, scale, offset, spec, (out_features, in_features), blocks)


def _gained(matrix: Tensor, solution: Solution, group: int, exponent: float, dtype: str) -> tuple[Tensor, Solution]:
    """The matrix [rows, width] and its solution, each row of both times (<W, W> / <W, Q>)^exponent.

    The codes are those of the solution; the gained matrix is what they now stand for.
    """
    width = matrix.shape[1]
    values = matrix.float()

    def spread(metadata: Tensor) -> Tensor:
        return metadata.float().repeat_interleave(group, 1)[:, :width]

    approximation = torch.addcmul(spread(solution.offset), solution.codes.float(), spread(solution.scale))
    unit = values.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values, approximation = values / unit, approximation / unit
    energy, overlap = (values * values).sum(1, keepdim=True), (values * approximation).sum(1, keepdim=True)
    usable = (energy > 0) & (overlap > 0)
    gain = torch.where(usable, energy / torch.where(usable, overlap, 1.0), 1.0).pow(exponent)  # [rows, 1]
    scale, offset = ((metadata.float() * gain).to(metadata.dtype) for metadata in (solution.scale, solution.offset))
    if not (torch.isfinite(scale).all() and torch.isfinite(offset).all()):
        raise too_large(dtype)
    return matrix.float() * gain, Solution(solution.codes, scale, offset)
