"""From a solution with exact scales and offsets to one with 8-bit metadata.

Rounding a scale or a middle (`quantization/metadata.py`) moves a group's grid under its weights. What is stored first
is therefore made up for by what comes after it: the scales are rounded, codes and middles refitted to them, the
middles rounded, and the codes rounded anew to the grid as stored. Each group tries the scale codes beside the nearest
one too and keeps the best, measured with everything as stored.

What it costs: squared error over that with 16-bit metadata (float16), in percent more, at groups of 8 / 32 / 128, for
256 x 512 weights and the linear layers of two small Llamas.

    bits         1                    2                    3                    4                    8
    Gaussian     0.01 / 0.00 / 0.00   0.03 / 0.01 / 0.00   0.17 / 0.04 / 0.01   0.84 / 0.15 / 0.05   90 / 18 /  6
    Laplace      0.02 / 0.01 / 0.00   0.07 / 0.02 / 0.00   0.33 / 0.08 / 0.03   1.61 / 0.33 / 0.11  100 / 24 /  8
    Student t5   0.02 / 0.02 / 0.02   0.08 / 0.03 / 0.01   0.42 / 0.13 / 0.06   2.07 / 0.55 / 0.22  110 / 28 / 10
    260K         0.01 / 0.00 / 0.00   0.05 / 0.02 / 0.01   0.24 / 0.06 / 0.03   1.21 / 0.26 / 0.13   90 / 21 / 10
    656K         0.01 / 0.00 / 0.00   0.04 / 0.01 / 0.00   0.18 / 0.04 / 0.02   0.90 / 0.17 / 0.06   90 / 18 /  6

So it is for 1 to 3 bits, and for 4 in groups of 16 and more. The steps of 8-bit metadata are as coarse as those of
8-bit codes, whose error (some 2e-5 of the energy) is small enough to bear it. Blocks that hold a few groups of far
larger weights have coarser steps: one input channel thirty times larger than the others costs 0.4 to 0.7 % at 1 bit,
0.6 to 1.6 % at 2, 0.7 to 5 % at 3; a thousandth of all weights being twenty times larger 0.1 to 0.4, 0.5, 0.8 to 2 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.quantization.metadata import decode_values, encode, fit_maps
from hqqplus.quantization.spec import BLOCK, Layout, QuantSpec

# Weights treated at once: a chunk and its temporaries stay in a CPU's cache.
_CHUNK_CPU, _CHUNK_GPU = 2**17, 2**24
# What is added to the nearest scale code; the first of equals wins. Wider rather than narrower: a grid that is too
# narrow cuts off the ends of its group, and a middle that is off makes a wider one needed.
_SCALE_STEPS = (0, 1, -1, 2)


def store_8bit(
    matrix: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round the metadata of a solution to 8 bits, and the codes anew to what is stored.

    Args:
        matrix: [rows, width], finite; the last group of a row may be shorter than the others.
        codes: [rows, width], uint8, and
        scale, offset: [rows, groups], floats, what a solver found for it; a scale of 0 stands for a constant group.
        spec: bits, group size and metadata type; groups lie along the rows whatever its axis.
        importance: [width], a weight >= 0 for the squared error of each column; None for all alike.

    Returns:
        codes [rows, width], scale codes and middle codes [rows, groups], all uint8, and the maps of the blocks
        [blocks, 4], 16-bit floats.

    Raises:
        ValueError: if the metadata are too large for the 16-bit type.
    """
    rows, width = matrix.shape
    layout = spec.replace(axis=1).layout(rows, width)
    groups, group, padding = layout.groups, layout.group, layout.padded - width
    # Sums over a whole row lose too much in float32.
    dtype = torch.float64 if group > 1024 else torch.float32
    if importance is None:
        importance = torch.ones(width, dtype=dtype, device=matrix.device)
    weights = _weights(importance, padding, group).to(dtype)  # [groups, group]
    scales, offsets = scale.flatten().to(dtype), offset.flatten().to(dtype)
    stored = torch.empty((rows * groups, group), dtype=torch.uint8, device=matrix.device)
    # Blocks know nothing of each other, so a chunk is whole blocks.
    limit = _CHUNK_CPU if matrix.device.type == "cpu" else _CHUNK_GPU
    chunk = max(1, limit // (group * BLOCK)) * BLOCK
    pieces = []
    for start in range(0, rows * groups, chunk):
        here = slice(start, min(start + chunk, rows * groups))
        columns = torch.arange(here.start, here.stop, device=matrix.device) % groups
        values, given = (_groups(t, here, layout) for t in (matrix, codes))
        grid = _narrowest(given, weights[columns] > 0, scales[here], offsets[here], spec.qmax)
        stored[here], *metadata = _store_chunk(values.to(dtype), weights[columns], *grid, spec)
        pieces.append(metadata)
    scale_codes, middle_codes, maps = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    return (
        stored.view(rows, layout.padded)[:, :width],
        scale_codes.view(rows, groups),
        middle_codes.view(rows, groups),
        maps,
    )


def _groups(matrix: Tensor, here: slice, layout: Layout) -> Tensor:
    """The groups `here` of the rows of `matrix` [rows, width], filled up with zeros: [n, group]."""
    first, last = here.start // layout.groups, -(-here.stop // layout.groups)  # the rows that hold them
    rows = torch.nn.functional.pad(matrix[first:last], (0, layout.padded - layout.width)).reshape(-1, layout.group)
    return rows[here.start - first * layout.groups : here.stop - first * layout.groups].contiguous()


def _weights(importance: Tensor, padding: int, group: int) -> Tensor:
    """`importance` [width] by group: [groups, group], 1 in sum, 0 for the padding."""

    def by_group(columns: Tensor) -> Tensor:
        return torch.nn.functional.pad(columns, (0, padding)).view(-1, group)

    weights = by_group(importance.double())
    # A group without any importance is treated as if all its weights had the same.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, by_group(torch.ones_like(importance).double()))
    return weights / weights.sum(1, keepdim=True)


def _narrowest(codes: Tensor, inside: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Of all grids that hold the levels in use, the one of least scale, and with its middle nearest to zero.

    A group of one outlier and many small weights uses two levels, and whether they are codes 0 and 1 or 0 and qmax is
    all the same to a solver. Here it is not: the wider grid, and its middle far off, would widen the steps of a block.

    Codes [n, g], of which those `inside` count, scale and offset [n] -> scale and middle [n].
    """
    # With 8 bits a group uses nearly all codes, and a few to spare at the ends make up for a middle that is off.
    if qmax == 255:
        return scale, offset + scale * (qmax / 2)
    low = codes.masked_fill(~inside, qmax).amin(1, keepdim=True)
    high = codes.masked_fill(~inside, 0).amax(1, keepdim=True)
    two_levels = ((codes == low) | (codes == high) | ~inside).all(1)
    base, span = offset + scale * low.squeeze(1), (high - low).squeeze(1).to(scale.dtype)
    stretch = qmax / span.clamp_min(1)
    stretch = torch.where(two_levels, stretch, stretch.floor())
    step = torch.where(span > 0, scale / stretch, 0.0)
    # Codes that are left over may be below the levels in use or above.
    below = (base / torch.where(step > 0, step, torch.inf) + qmax / 2).round_()
    below = below.clamp_min_(0).minimum((qmax - span * stretch).round_())
    return step, base + step * (qmax / 2 - below)


def _store_chunk(
    values: Tensor, weights: Tensor, scale: Tensor, middle: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole blocks of groups: `values` [n, g], weights of their errors [n, g], scale and middle [n].

    Returns codes [n, g], scale codes [n] and middle codes [n], all uint8, and the maps [blocks, 4].
    """
    half = spec.qmax / 2
    # Errors are compared in units of the group: squares of the weights may be out of range.
    unit = values.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)  # [n, 1]
    x = values / unit
    mean = (x * weights).sum(1, keepdim=True)
    solved = middle[:, None] / unit

    def decoded(codes: Tensor, maps: Tensor) -> Tensor:
        return decode_values(codes, maps).to(x.dtype)[:, None] / unit

    def levels(step: Tensor, middle: Tensor) -> Tensor:
        """The nearest codes, less `half`; the lowest where the step is 0."""
        codes = ((x - middle) / torch.where(step > 0, step, torch.inf)).add_(half).round_().clamp_(0, spec.qmax)
        return torch.where(step > 0, codes, 0.0).sub_(half)

    def refitted(step: Tensor) -> Tensor:
        """The middles [n] that fit best with the codes that this step gives, in units of the weights."""
        middle = mean - step * (levels(step, solved) * weights).sum(1, keepdim=True)
        return (middle * unit).squeeze(1)

    scale_maps = fit_maps(scale, spec.metadata_dtype)
    nearest = encode(scale, scale_maps)
    middle_maps = fit_maps(refitted(decoded(nearest, scale_maps)), spec.metadata_dtype)
    least = torch.full_like(scale, torch.inf)
    scale_codes, middle_codes = torch.zeros_like(nearest), torch.zeros_like(nearest)
    for change in _SCALE_STEPS:
        near = torch.where(scale > 0, nearest.short() + change, 0).clamp_(0, 255).to(torch.uint8)
        step = decoded(near, scale_maps)
        middles = encode(refitted(step), middle_maps)
        centre = decoded(middles, middle_maps)
        error = (x - centre - step * levels(step, centre)).square_().mul_(weights).sum(1)  # [n]
        better = error < least
        least = torch.where(better, error, least)
        scale_codes = torch.where(better, near, scale_codes)
        middle_codes = torch.where(better, middles, middle_codes)
    level = levels(decoded(scale_codes, scale_maps), decoded(middle_codes, middle_maps))
    maps = torch.cat([scale_maps, middle_maps], dim=1)
    return level.add_(half).to(torch.uint8), scale_codes, middle_codes, maps
