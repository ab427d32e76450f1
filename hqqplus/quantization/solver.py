"""The solver: for each group of weights w, codes q, scale s and offset o that minimise ||w - (s q + o)||^2.

HQQ (Badri & Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models") alternates between rounding
and a closed form for the zero, with the scale left at min-max. Here both are free. For fixed codes the optimum is the
regression of w on q,

    s = cov(q, w) / var(q),    o = mean(w) - s mean(q),

and for fixed (s, o) it is rounding, q = clamp(round((w - o) / s)). Each half-step lowers the error, so the alternation
ends in a local optimum, which depends on the start. So the starts are good ones: for a few widths of the grid,
`_sweep` finds the best of all places for it, exactly, by sorting. One of the widths is the whole range, HQQ's own:
whatever zero HQQ ends with is a place that was looked at, so no group comes out worse than there, but for the rounding
of scale and offset to 16 bits.

At 1 bit the two levels are free, which makes the problem 1-D two-means. It is solved exactly: sort, and try every
split by prefix sums.

The offset o = -s z is what is stored, not the zero z: a constant group is then exact, with s = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqplus.quantization.metadata import metadata_dtype
from hqqplus.quantization.spec import QuantSpec

# Elements solved at once: small enough that a chunk and its temporaries stay in a CPU's cache.
_CHUNK_CPU, _CHUNK_GPU = 2**17, 2**24
# The grids to start from, by their largest code: widths over the group's range, ...
_RATIOS = {3: (0.5, 0.75, 1.0), 7: (0.65, 0.825, 1.0), 15: (0.75, 0.875, 1.0), 255: (1.0,)}
# ... the first of them cut to this many standard deviations each side of the mean, the best grid of a Gaussian: the
# range of a whole row of heavy tails says little.
_DEVIATIONS = {3: 1.5, 7: 2.05}
_ITERATIONS = 6


@dataclass(frozen=True)
class Solution:
    """Codes [rows, width] (uint8), scale and offset [rows, groups] in the storage dtype."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def solve(matrix: Tensor, spec: QuantSpec) -> Solution:
    """Quantize the rows of `matrix` [rows, width] in groups along the row.

    `spec.axis` plays no part here: the caller has turned the matrix so that groups lie along rows. The last group of a
    row is shorter where the group size does not divide the width.

    Raises:
        ValueError: if a value is NaN or infinite, or too large for the type that scales are stored in.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinite values")
    rows, width = matrix.shape
    group = spec.replace(axis=1).layout(rows, width).group
    whole = width // group
    parts = []
    if whole:
        parts.append((matrix[:, : whole * group].reshape(-1, group), whole))
    if width % group:
        parts.append((matrix[:, whole * group :], 1))
    solved = [(_solve_groups(values, spec), count) for values, count in parts]
    return Solution(
        codes=torch.cat([codes.reshape(rows, -1) for (codes, _, _), _ in solved], dim=1),
        scale=torch.cat([scale.reshape(rows, count) for (_, scale, _), count in solved], dim=1),
        offset=torch.cat([offset.reshape(rows, count) for (_, _, offset), count in solved], dim=1),
    )


def _solve_groups(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`groups` [n, g] -> codes [n, g] uint8, scale [n], offset [n] as stored."""
    chunk = max(1, (_CHUNK_CPU if groups.device.type == "cpu" else _CHUNK_GPU) // groups.shape[1])
    pieces = [_solve_chunk(piece, spec) for piece in groups.split(chunk)]
    codes, scale, offset = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    return codes, scale, offset


def _solve_chunk(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    # Sums over a whole row lose too much in float32; their order, and so their last bit, depends on the strides.
    values = groups.to(torch.float64 if groups.shape[1] > 1024 else torch.float32).contiguous()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    centre = low / 2 + high / 2
    spread = high / 2 - low / 2  # half the range; halved first so that it cannot overflow
    # Groups are solved in units of their own range: W and 1000 W give the same codes.
    unit = torch.where(spread > 0, spread, torch.ones_like(spread))
    scaled = (values - centre) / unit  # [n, g] in [-1, 1]
    scale, offset = _two_means(scaled) if spec.nbits == 1 else _search(scaled, spec.qmax)
    scale = scale.masked_fill(spread == 0, 0.0)
    return _store(scaled, scale, offset, centre, unit, spec)


def _two_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact optimum at 1 bit: `x` [n, g] -> scale [n, 1], offset [n, 1].

    With the group centred on its mean, a split after the k smallest values lowers the error by S_k^2 (1/k + 1/(g-k)),
    where S_k is their sum; the levels are the means of the two sides.
    """
    size = x.shape[1]
    mean = x.mean(1, keepdim=True)
    if size == 1:
        return torch.zeros_like(mean), mean
    sums = (x - mean).sort(1).values.cumsum(1)[:, :-1]  # [n, g - 1]: S_1 ... S_(g-1)
    below = torch.arange(1, size, device=x.device, dtype=x.dtype)
    above = size - below
    best = (sums.square() * (1 / below + 1 / above)).argmax(1, keepdim=True)  # [n, 1]
    split_sum, k = sums.gather(1, best), (best + 1).to(x.dtype)
    lower, upper = mean + split_sum / k, mean - split_sum / (size - k)
    return upper - lower, lower


def _search(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Two bits and more: `x` [n, g] in [-1, 1] -> the best scale and offset [n, 1] found for each group."""
    fits = []
    for ratio in _RATIOS[qmax]:
        width, middle = torch.full_like(x[:, :1], ratio), torch.zeros_like(x[:, :1])
        if ratio == _RATIOS[qmax][0] and qmax in _DEVIATIONS:
            width = width.minimum(_DEVIATIONS[qmax] * x.std(1, keepdim=True, correction=0)).clamp_min_(1e-3)
            middle = x.mean(1, keepdim=True)
        # Far enough to reach both ends of the range.
        reach = max(1, math.ceil((1 - ratio) * qmax / (2 * ratio)))
        swept = _sweep(x, 2 * width / qmax, middle - width, qmax, reach)
        fits.append(_descend(x, *swept, qmax))
    error, scale, offset = _best(fits)
    swept = _sweep(x, scale, offset, qmax, reach=1)
    _, scale, offset = _best([(error, scale, offset), _descend(x, *swept, qmax)])
    return scale, offset


def _best(fits: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The (error, scale, offset) of least error, group by group; the first of equals."""
    best: tuple[Tensor, ...] = fits[0]
    for fit in fits[1:]:
        better = fit[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(fit, best, strict=True))
    return best


def _sweep(x: Tensor, scale: Tensor, offset: Tensor, qmax: int, reach: int) -> tuple[Tensor, Tensor]:
    """(scale, offset) [n, 1] of the best regression among all codes that a grid of this scale can give.

    The grid slides over the group [n, g] from `reach` steps above `offset` to `reach` steps below. On its way the
    codes go up by one, one weight at a time, once a step, in an order that is the same for each step; so running sums
    along that order hold cov(q, w) and var(q) of every assignment there is.
    """
    size, half = x.shape[1], qmax / 2
    mean = x.mean(1, keepdim=True)
    position = (x - offset) / scale - reach
    code = (position + 0.5).floor_()
    order = (code - position).sort(1).indices
    code = code.gather(1, order)
    centred = (x - mean).gather(1, order)
    level = code.clamp(0, qmax).sub_(half)  # codes about the middle: smaller sums lose less
    total, squares, product = (t.sum(1, keepdim=True) for t in (level, level * level, level * centred))
    best: tuple[Tensor, ...] = (torch.zeros_like(mean), scale, torch.zeros_like(mean))
    for _ in range(2 * reach):
        code += 1
        after = code.clamp(0, qmax).sub_(half)
        step = after - level
        totals = step.cumsum(1).add_(total)
        squared = (step * (after + level)).cumsum(1).add_(squares)
        products = (step * centred).cumsum(1).add_(product)
        # size * var(q) is at least 1 - 1/size where codes differ at all; where none do, the product is 0.
        variance = squared.addcmul(totals, totals, value=-1 / size).clamp_min_(0.25)
        gain, at = (products * products).div_(variance).max(1, keepdim=True)
        fit = (gain, products.gather(1, at) / variance.gather(1, at), totals.gather(1, at) / size + half)
        better = gain > best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(fit, best, strict=True))
        level, total, squares, product = after, totals[:, -1:], squared[:, -1:], products[:, -1:]
    _, new_scale, code_mean = best
    defined = (best[0] > 0) & (new_scale > 0)
    return torch.where(defined, new_scale, scale), torch.where(defined, mean - new_scale * code_mean, offset)


def _descend(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """(squared error, scale, offset), each [n, 1], after alternating rounding and regression."""
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    for _ in range(_ITERATIONS):
        codes = _round(x, scale, offset, qmax)
        code_mean = codes.mean(1, keepdim=True)
        covariance = (codes * centred).sum(1, keepdim=True)
        variance = codes.sub_(code_mean).square_().sum(1, keepdim=True)
        # All codes equal: the regression is undefined and the grid is left where it is.
        defined = (variance > 0) & (covariance > 0)
        new_scale = torch.where(defined, covariance / variance, scale)
        new_offset = torch.where(defined, mean - new_scale * code_mean, offset)
        settled = torch.equal(new_scale, scale) and torch.equal(new_offset, offset)
        scale, offset = new_scale, new_offset
        if settled:
            break
    codes = _round(x, scale, offset, qmax)
    error = (x - torch.addcmul(offset, codes, scale)).square_().sum(1, keepdim=True)
    return error, scale, offset


def _round(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """The nearest codes [n, g]; all 0 where the scale is 0."""
    usable = torch.where(scale > 0, scale, torch.inf)
    return ((x - offset) / usable).round_().clamp_(0, qmax)


def _store(
    x: Tensor, scale: Tensor, offset: Tensor, centre: Tensor, unit: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Round scale and offset [n, 1] to the storage dtype and refit; -> codes, scale and offset as stored.

    A scale that rounds down may leave the ends of a wide grid uncovered, so both neighbours are tried; and a group far
    from zero has a coarse offset, to which the scale is refitted. Each group keeps the best, measured with the codes
    and metadata as stored, on `x`: in units of the group's range, because squares of the weights may be out of range.
    """
    dtype = metadata_dtype(spec.metadata_dtype)
    mean = x.mean(1, keepdim=True)
    varying = scale > 0

    def measure(stored_scale: Tensor, stored_offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact_scale, exact_offset = stored_scale.to(x.dtype) / unit, (stored_offset.to(x.dtype) - centre) / unit
        codes = _round(x, exact_scale, exact_offset, spec.qmax)
        error = (x - torch.addcmul(exact_offset, codes, exact_scale)).square_().sum(1, keepdim=True)
        return error, codes, stored_scale, stored_offset

    nearest = (scale * unit).to(dtype)
    candidates = [nearest]
    if spec.nbits > 1:
        bits = nearest.view(torch.int16)
        neighbours = ((bits + sign).clamp_min_(0).view(dtype) for sign in (-1, 1))
        candidates += [torch.where(varying, neighbour, nearest) for neighbour in neighbours]
    fits = []
    for stored_scale in candidates:
        exact_scale = stored_scale.to(x.dtype) / unit
        codes = _round(x, exact_scale, offset, spec.qmax)
        refitted = mean - exact_scale * codes.mean(1, keepdim=True)
        fits.append(measure(stored_scale, (refitted * unit + centre).to(dtype)))
    best = _best(fits)
    if spec.nbits > 1:
        _, codes, stored_scale, stored_offset = best
        distance = x - (stored_offset.to(x.dtype) - centre) / unit
        refitted = (codes * distance).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min_(1)
        refitted_scale = torch.where(varying, (refitted * unit).clamp_min_(0).to(dtype), stored_scale)
        best = _best([best, measure(refitted_scale, stored_offset)])
    _, codes, stored_scale, stored_offset = best
    if not (torch.isfinite(stored_scale).all() and torch.isfinite(stored_offset).all()):
        advice = "; bfloat16 has the range of float32" if spec.metadata_dtype == "float16" else ""
        raise ValueError(f"the weight is too large for scales in {spec.metadata_dtype}{advice}")
    return codes.to(torch.uint8), stored_scale.squeeze(1), stored_offset.squeeze(1)
