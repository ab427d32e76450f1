"""What quantization did to one matrix, and what the matrix was like, in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqplus.quantization.metadata import decode, metadata_views
from hqqplus.quantization.tensor import PackedTensor, dequantize_rows

OUTLIER_DEVIATIONS = 6
"""A weight this many standard deviations from the mean of its matrix, or further, is an outlier. Of 10^9 Gaussian
weights two are; a matrix with a few in 10^4 has columns that want to be treated apart."""

_CHUNK = 2**20  # weights looked at together: 8 MB in float64


@dataclass(frozen=True)
class LayerStatistics:
    """One packed matrix, or the packed matrices of one projection of all experts.

    Attributes:
        shape: (out_features, in_features), or (experts, out_features, in_features).
        nbits, group_size, axis, metadata_bits: as in its `QuantSpec`.
        nmse: ||W - Q||^2 / ||W||^2; 0 where both are zero.
        bits_per_weight: everything stored, over the number of weights.
        kurtosis: excess kurtosis of the weights, E[(w - mean)^4] / var^2 - 3, population moments: 0 for Gaussian
            ones, 3 for Laplacian ones, large where few weights carry the variance. NaN where all weights are equal.
        outlier_share: share of the weights that are `OUTLIER_DEVIATIONS` standard deviations from the mean or further.
            Of experts this and the kurtosis are means over the experts, each of which has a variance of its own.
    """

    shape: tuple[int, ...]
    nbits: int
    group_size: int
    axis: int
    metadata_bits: int
    nmse: float
    bits_per_weight: float
    kurtosis: float
    outlier_share: float

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerStatistics:
        """What `to_dict` gave, also after a way through JSON.

        Raises:
            TypeError, KeyError: if a field is missing, unknown or no number.
        """
        made = cls(**{**values, "shape": tuple(values["shape"])})
        numbers = [value for name, value in made.__dict__.items() if name != "shape"]
        if len(made.shape) not in (2, 3) or not all(isinstance(n, int | float) for n in (*made.shape, *numbers)):
            raise TypeError("the statistics of a layer are numbers, and its shape has two or three")
        return made


def layer_statistics(weight: Tensor, packed: PackedTensor) -> LayerStatistics:
    """Compare `weight` [out_features, in_features] (any float dtype) with what it was packed to.

    A few megabytes are dequantized at a time, all sums are in float64.

    Raises:
        ValueError: if `weight` has another shape than what was packed.
    """
    return _compare(weight, packed)[0]


class ExpertStatistics:
    """Statistics of the experts of one projection, which are compared one after the other."""

    def __init__(self) -> None:
        self._experts: list[tuple[LayerStatistics, float, float]] = []  # and its error and energy

    def add(self, weight: Tensor, packed: PackedTensor) -> None:
        """Compare the next expert.

        Raises:
            ValueError: as `layer_statistics`.
        """
        self._experts.append(_compare(weight, packed))

    def together(self) -> LayerStatistics:
        """Of all of them; what was packed alike must be added first."""
        first, count = self._experts[0][0], len(self._experts)
        parts = [statistics for statistics, _, _ in self._experts]
        error, energy = (math.fsum(sums) for sums in list(zip(*self._experts, strict=True))[1:])
        return dataclasses.replace(
            first,
            shape=(count, *first.shape),
            nmse=_ratio(error, energy),
            bits_per_weight=math.fsum(part.bits_per_weight for part in parts) / count,
            kurtosis=math.fsum(part.kurtosis for part in parts) / count,
            outlier_share=math.fsum(part.outlier_share for part in parts) / count,
        )


@torch.no_grad()
def _compare(weight: Tensor, packed: PackedTensor) -> tuple[LayerStatistics, float, float]:
    """The statistics, ||W - Q||^2 and ||W||^2."""
    if tuple(weight.shape) != packed.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, what was packed is {packed.shape}")
    spec = packed.spec
    count, mean, variance = 0, 0.0, 0.0
    error, energy = 0.0, 0.0
    for original, restored in _chunks(weight, packed):
        error += (original - restored).square_().sum().item()
        energy += original.square().sum().item()
        # Chan et al.: moments of the parts give those of the whole without cancellation.
        size, part = original.numel(), original.mean().item()
        sum_of_squares = (original - part).square_().sum().item()
        step = part - mean
        variance += sum_of_squares + step**2 * count * size / (count + size)
        mean += step * size / (count + size)
        count += size
    variance /= count
    fourth, outliers = 0.0, 0
    if variance > 0:
        for original, _ in _chunks(weight, None):
            squares = original.sub_(mean).square_()
            outliers += int((squares >= OUTLIER_DEVIATIONS**2 * variance).sum())
            # In units of the variance: of small weights the fourth power underflows.
            fourth += squares.div_(variance).square_().sum().item()
    statistics = LayerStatistics(
        shape=packed.shape,
        nbits=spec.nbits,
        group_size=spec.group_size,
        axis=spec.axis,
        metadata_bits=spec.metadata_bits,
        nmse=_ratio(error, energy),
        bits_per_weight=packed.bits_per_weight,
        kurtosis=fourth / count - 3 if variance > 0 else math.nan,
        outlier_share=outliers / count,
    )
    return statistics, error, energy


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy > 0 else (0.0 if error == 0 else math.inf)


def _chunks(weight: Tensor, packed: PackedTensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of `weight` and the same rows of `packed`, float64 both (twice the former without `packed`).

    Of a matrix with axis 0 the rows are its columns, as it is stored.
    """
    matrix = weight.detach() if packed is None or packed.spec.axis == 1 else weight.detach().t()
    rows, width = matrix.shape
    step = max(1, _CHUNK // width)
    if packed is not None:
        spec = packed.spec
        views = metadata_views(packed.scale, packed.offset, packed.blocks, spec.metadata_dtype)
        scale, offset = decode(*views, spec.qmax)  # [rows, groups]
    for first in range(0, rows, step):
        here = slice(first, first + step)
        original = matrix[here].to(torch.float64, copy=True)
        if packed is None:
            yield original, original
        else:
            restored = dequantize_rows(packed.W_q[here], scale[here], offset[here], spec, width, torch.float32)
            yield original, restored.to(torch.float64)
