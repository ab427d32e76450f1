"""The solver: for each group of weights w, codes q, scale s and offset o that minimise ||w - (s q + o)||^2.

HQQ (Badri & Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models") alternates between rounding
and a closed form for the zero, with the scale left at min-max. Here both are free, and the search does not hang on one
start: at one bit it is exact, at two bits it goes over the cuts of the sorted group (`cuts`), above over many grids
(`grids`). What is left to do here: units, rounding to what is stored, and the options.

Options (`SolverOptions`): the squares can be weighted by column; a robust norm p < 1 in the place of squares, by HQQ's
half-quadratic splitting but with thresholds in units of each group's own spread; and a gain that undoes, by row, some
of the shrinkage of least squares.

The offset o = -s z is what is stored, not the zero z: a constant group is then exact, with s = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqplus.quantization.cuts import EXACT_GROUP, best_cuts
from hqqplus.quantization.grids import QUICK, THOROUGH, best_grid
from hqqplus.quantization.metadata import metadata_dtype, too_large
from hqqplus.quantization.robust import robust_fit
from hqqplus.quantization.spec import QuantSpec, SolverOptions

SOLVER_VERSION = 1
"""Which codes, scales and offsets come out for a weight. Raise it with any change after which the same weight, spec
and options give others (here, in the search, in 8-bit metadata, in error feedback): adapters and checkpoints note it,
and are refused where their parent would be quantized to something else. `tests/quantization/test_solver_version.py`
notices such a change."""

# Elements solved at once: small enough that a chunk and its temporaries stay in a CPU's cache.
_CHUNK_CPU, _CHUNK_GPU = 2**17, 2**24
_COLUMNS = 64

_Stored = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Solution:
    """Codes [rows, width] (uint8), scale and offset [rows, groups] in the 16-bit storage dtype."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def solve(
    matrix: Tensor, spec: QuantSpec, options: SolverOptions | None = None, importance: Tensor | None = None
) -> Solution:
    """Quantize the rows of `matrix` [rows, width] in groups along the row.

    `spec.axis` plays no part here: the caller has turned the matrix so that groups lie along rows. The last group of a
    row is shorter where the group size does not divide the width. The options' gain is left to the caller, who knows
    the rows of the weight.

    Args:
        importance: [width], a weight >= 0 for the squared error of each column; None for all alike.

    Raises:
        ValueError: if a value is NaN or infinite, or too large for the type that scales are stored in; if
            `importance` has another shape, or values that are negative or not finite.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight holds NaN or infinite values")
    rows, width = matrix.shape
    if importance is not None:
        importance = check_importance(importance, width).to(matrix.device)
    group = spec.replace(axis=1).layout(rows, width).group
    whole = width // group * group
    parts = [slice(0, whole)] if whole else []
    if whole < width:
        parts.append(slice(whole, width))
    solved = []
    for part in parts:
        size = min(group, part.stop - part.start)
        weights = None if importance is None else importance[part].view(-1, size)  # [groups, size]
        solved.append(_solve_part(matrix[:, part], size, weights, spec, options or SolverOptions()))
    return Solution(*(torch.cat(tensors, dim=1) for tensors in zip(*solved, strict=True)))


def check_importance(importance: Tensor, width: int) -> Tensor:
    """`importance` [width] in float64.

    Raises:
        ValueError: if it has another shape, or values that are negative or not finite.
    """
    if importance.shape != (width,) or not importance.is_floating_point():
        raise ValueError(
            f"importance is {importance.dtype} of shape {tuple(importance.shape)}: it must be {width} floats, "
            "one for each input column"
        )
    if not (torch.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance must be finite and not negative")
    return importance.to(torch.float64)


def _solve_part(
    matrix: Tensor, size: int, importance: Tensor | None, spec: QuantSpec, options: SolverOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix` [rows, n size] in groups of `size`; `importance` [n, size] -> codes, scale and offset as stored."""
    rows, blocks = matrix.shape[0], matrix.shape[1] // size
    groups = matrix.reshape(-1, size)
    chunk = max(_COLUMNS, (_CHUNK_CPU if matrix.device.type == "cpu" else _CHUNK_GPU) // size)

    @torch.no_grad()
    def solve_from(start: int) -> tuple[Tensor, Tensor, Tensor]:
        piece, weights = groups[start : start + chunk], None
        if importance is not None:
            weights = importance[torch.arange(start, start + len(piece), device=matrix.device) % blocks]
        return _solve_chunk(piece, weights, spec, options)

    pieces = _in_threads(solve_from, range(0, len(groups), chunk), matrix.device.type)
    codes, scale, offset = (torch.cat(tensors) for tensors in zip(*pieces, strict=True))
    return codes.view(rows, -1), scale.view(rows, -1), offset.view(rows, -1)


def _in_threads(work: Callable[[int], _Stored], starts: Sequence[int], device: str) -> list[_Stored]:
    """`work` done for each of `starts`, on a CPU by as many threads as torch would use.

    A chunk is thousands of small operations. Threads that share each of them spend their time waiting for one another;
    threads with a chunk each do not. What comes out is the same.
    """
    own = torch.get_num_threads()
    threads = min(own, len(starts))
    if device != "cpu" or threads < 2:
        return [work(start) for start in starts]
    try:
        # What a new thread sets for itself is also what threads after it begin with: it is set back below.
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            return list(pool.map(work, starts))
    finally:
        torch.set_num_threads(own)


def _solve_chunk(
    groups: Tensor, importance: Tensor | None, spec: QuantSpec, options: SolverOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`groups` [n, g], `importance` [n, g] -> codes [n, g] uint8, scale [n], offset [n] as stored."""
    count = len(groups)
    if count % _COLUMNS:
        # torch sums what is left over of a row of vectors in another order, whose last bit may differ: a group must
        # come out the same in whatever company it is solved.
        filled = torch.arange(-(-count // _COLUMNS) * _COLUMNS, device=groups.device).clamp_max_(count - 1)
        groups, importance = groups[filled], None if importance is None else importance[filled]
    # Sums over a whole row lose too much in float32. Groups become columns.
    dtype = torch.float64 if groups.shape[1] > 1024 else torch.float32
    values = groups.to(dtype).t().contiguous()  # [g, n]
    low, high = values.amin(0, keepdim=True), values.amax(0, keepdim=True)
    centre = low / 2 + high / 2
    spread = high / 2 - low / 2  # half the range; halved first so that it cannot overflow
    # Groups are solved in units of their own range: W and 1000 W give the same codes.
    unit = torch.where(spread > 0, spread, torch.ones_like(spread))
    scaled = torch.sub(values, centre).div_(unit)  # in [-1, 1]
    weights = None
    if importance is not None:
        # Scaled to 1 on average; a group without any importance is solved as if all its weights had the same.
        weights = importance.t()
        average = weights.mean(0, keepdim=True)
        weights = torch.where(average > 0, weights / average, torch.ones_like(weights)).to(dtype).contiguous()
    scale, offset = fit(scaled, weights, spec.nbits, options.thorough)
    if options.lp_norm != 2:
        scale, offset = robust_fit(scaled, weights, scale, offset, spec.qmax, options.lp_norm, options.threshold)
    scale = scale.masked_fill(spread == 0, 0.0)
    codes, scale, offset = _store(scaled, weights, scale, offset, centre, unit, spec)
    return codes[:count], scale[:count], offset[:count]


def fit(scaled: Tensor, weights: Tensor | None, nbits: int, thorough: bool = False) -> tuple[Tensor, Tensor]:
    """The least-squares scale and offset [1, n] of groups `scaled` [g, n] in [-1, 1], in columns."""
    qmax = 2**nbits - 1
    if nbits > 2:
        _, scale, offset = best_grid(scaled, weights, qmax, THOROUGH if thorough else QUICK)
        return scale, offset
    scale, offset = best_cuts(scaled, weights, nbits)
    if thorough and nbits == 2 and scaled.shape[0] > EXACT_GROUP:
        error = (scaled - offset - scale * _round(scaled, scale, offset, qmax)).square_()
        error = (error if weights is None else error * weights).sum(0, keepdim=True)
        _, scale, offset = _best([(error, scale, offset), best_grid(scaled, weights, qmax, THOROUGH)])
    return scale, offset


def _round(x: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """The nearest codes [g, n]; all 0 where the scale is 0."""
    usable = torch.where(scale > 0, scale, torch.inf)
    return torch.sub(x, offset).div_(usable).round_().clamp_(0, qmax)


def _average(x: Tensor, weights: Tensor | None) -> Tensor:
    """(Weighted) mean over each column [g, n] -> [1, n]."""
    if weights is None:
        return x.mean(0, keepdim=True)
    return (x * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True)


def _store(
    x: Tensor, weights: Tensor | None, scale: Tensor, offset: Tensor, centre: Tensor, unit: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Round scale and offset [1, n] to the storage dtype and refit; -> codes [n, g], scale and offset [n] as stored.

    At one and two bits rounding means little: the codes stay those of the exact grid and the offset is refitted to
    them. Where levels are finer, the codes follow what is stored; a scale that rounds down may leave the ends of a
    wide grid uncovered, so both neighbours are tried; and a group far from zero has a coarse offset, to which the
    scale is refitted. All of it in units of the group's range, because squares of the weights may be out of range.
    """
    dtype = metadata_dtype(spec.metadata_dtype)
    mean = _average(x, weights)

    def exact(stored_scale: Tensor, stored_offset: Tensor) -> tuple[Tensor, Tensor]:
        return stored_scale.to(x.dtype) / unit, (stored_offset.to(x.dtype) - centre) / unit

    def refit_offset(stored_scale: Tensor, codes: Tensor) -> Tensor:
        exact_scale = stored_scale.to(x.dtype) / unit
        return ((mean - exact_scale * _average(codes, weights)) * unit + centre).to(dtype)

    def measure(stored_scale: Tensor, stored_offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact_scale, exact_offset = exact(stored_scale, stored_offset)
        codes = _round(x, exact_scale, exact_offset, spec.qmax)
        error = torch.addcmul(x - exact_offset, codes, exact_scale, value=-1).square_()
        error = error.sum(0, keepdim=True) if weights is None else (error * weights).sum(0, keepdim=True)
        return error, codes, stored_scale, stored_offset

    nearest = (scale * unit).to(dtype)
    if spec.nbits <= 2:
        codes = _round(x, scale, offset, spec.qmax)
        # A scale that rounds to zero leaves the codes without a meaning.
        codes.masked_fill_(nearest == 0, 0.0)
        stored_scale, stored_offset = nearest, refit_offset(nearest, codes)
    else:
        bits, varying = nearest.view(torch.int16), scale > 0
        neighbours = ((bits + sign).clamp_min_(0).view(dtype) for sign in (-1, 1))
        candidates = [nearest, *(torch.where(varying, neighbour, nearest) for neighbour in neighbours)]
        rounded = [_round(x, candidate.to(x.dtype) / unit, offset, spec.qmax) for candidate in candidates]
        best = _best([measure(s, refit_offset(s, codes)) for s, codes in zip(candidates, rounded, strict=True)])
        _, codes, stored_scale, stored_offset = best
        _, exact_offset = exact(stored_scale, stored_offset)
        refitted = _average(codes * (x - exact_offset), weights) / _average(codes.square(), weights).clamp_min(1e-12)
        refitted_scale = torch.where(varying, (refitted * unit).clamp_min_(0).to(dtype), stored_scale)
        _, codes, stored_scale, stored_offset = _best([best, measure(refitted_scale, stored_offset)])
    if not (torch.isfinite(stored_scale).all() and torch.isfinite(stored_offset).all()):
        raise too_large(spec.metadata_dtype)
    return codes.to(torch.uint8).t().contiguous(), stored_scale.squeeze(0), stored_offset.squeeze(0)


def _best(fits: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The (error, ...) of least error, group by group; the first of equals."""
    best: tuple[Tensor, ...] = fits[0]
    for fit in fits[1:]:
        better = fit[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(fit, best, strict=True))
    return best
