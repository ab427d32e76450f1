"""Quantizing a matrix for its inputs: codes and grids that minimise tr(E M E^T), E = W - Q, M = E[x x^T].

That is the mean squared error of the layer's output. Rows do not meet in it, columns do: the error made in one column
can be made up for in others.

1. Error feedback (Frantar et al., 2022, "GPTQ"; Chee et al., 2023, "QuIP", where it is called LDLQ). With
   M = R R^T, R upper triangular, the error is the sum of squares of E R, whose column j is R_jj times
   (e_j + sum over k < j of e_k R_kj / R_jj): so column j is rounded with the errors to its left added. A group of
   columns gets its grid when its turn comes, from our solver, for the weights with those errors added.
2. Within a group what counts is the metric R_g R_g^T (the Schur complement of what lies to its right): scale and
   offset are refitted in it and the group is rounded again, a few times. The best is kept.
3. Descent: each code is chosen anew with all others as they are, by the exact change of the error; and all scales and
   offsets of a row are refitted together, by normal equations of twice as many unknowns as it has groups. In turns.
4. With 8-bit metadata the codes of scales and middles are coordinates like the others: descent goes over them too, so
   that what is stored is what was minimised.

What they leave of tr(E M E^T) / tr(W M W^T), mean over the layers of a Llama of 656K parameters, M from 32,768 tokens,
8-bit metadata, in percent; and on 20,000 tokens of validation data in brackets (they overfit little):

    least squares, plain / weighted with the diagonal    2-bit g64  7.06 / 5.90 (5.88)   1-bit g32  24.6 / 21.3 (21.3)
    steps 1, 2                                                      4.20 (4.22)                     15.7 (15.7)
    with descent over the codes                                     3.80 (3.83)                     13.8 (13.9)
    with all of it                                                  3.71 (3.73)                     13.1 (13.1)

A row whose error is not below that of plain least squares gets the latter (with 8-bit metadata: all the rows whose
metadata share blocks with its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hqqplus.quantization.metadata import decode_values, encode, fit_maps, metadata_dtype, to_storage, too_large
from hqqplus.quantization.packing import pack
from hqqplus.quantization.solver import solve
from hqqplus.quantization.spec import BLOCK, WHOLE_ROW, Layout, QuantSpec, SolverOptions
from hqqplus.quantization.tensor import PackedTensor, Solver, quantize

# Columns between two products with everything to their left.
_COLUMNS = 128
# Weights treated together; each takes about 40 bytes.
_CHUNK_CPU, _CHUNK_GPU = 2**23, 2**26
# Entries of the normal equations of some rows.
_EQUATIONS = 2**24
_GROUP_REFITS = 3
# Held against the current scales and middles, in units of the diagonal: a group of equal codes has no scale.
_RIDGE = 1e-6


@dataclass(frozen=True)
class _Problem:
    """What is the same for all rows.

    Attributes:
        metric: [width, width], the damped moment, in units of the mean of its diagonal.
        factor: [width, width] upper triangular, metric = factor factor^T.
    """

    metric: Tensor
    factor: Tensor
    spec: QuantSpec
    options: SolverOptions
    solver: Solver
    layout: Layout

    @property
    def groups(self) -> list[slice]:
        """The columns of each group; the last may have fewer."""
        width, group = self.layout.width, self.layout.group
        return [slice(start, min(start + group, width)) for start in range(0, width, group)]


class _Grid(NamedTuple):
    """The grid of each group of some rows: scale and offset [groups, rows]."""

    scale: Tensor
    offset: Tensor


@torch.no_grad()
def error_feedback(
    weight: Tensor,
    spec: QuantSpec,
    moment: Tensor,
    options: SolverOptions | None = None,
    *,
    damping: float = 0.01,
    rounds: int = 2,
    sweeps: int = 2,
    solver: Solver = solve,
) -> PackedTensor:
    """Quantize `weight` [out_features, in_features] such that tr(E M E^T) is small.

    Works in float32, or in float64 where the weight is in it; the factor of the moment is found in float64.

    Args:
        moment: [in_features, in_features], M = E[x x^T], symmetric and positive semidefinite; its rank and its scale
            do not matter. A column that is never active is rounded to the nearest.
        options: those of the solver of the groups; the error is one of squares, and no gain is applied.
        damping: this share of the mean of the diagonal is added to it, against what the moment does not know.
        rounds: how often descent over the codes and the refit of all grids take turns.
        sweeps: how often descent goes over the columns each time.
        solver: another implementation of `solve`.

    Raises:
        ValueError: if `weight` cannot be quantized (as `quantize`), the moment has another shape, is not finite or has
            a negative diagonal, the damping is not positive; for axis 0, where a group lies in one column and its grid
            cannot follow the errors to its left; for options with a norm other than 2 or a gain.
    """
    options = options or SolverOptions()
    _check(weight, spec, moment, options, damping, rounds, sweeps)
    out_features, in_features = weight.shape
    matrix = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    moment = moment.to(weight.device, torch.float64)
    # A zero moment says nothing: then all inputs count alike.
    mean = float(moment.diagonal().mean()) or 1.0
    plain = quantize(weight, spec, options, moment.diagonal() / mean, solver)
    layout = spec.layout(out_features, in_features)
    problem = _problem(moment / mean, damping, spec, options, solver, layout, matrix.dtype)
    # Blocks of 8-bit metadata know nothing of each other: rows are treated by whole blocks.
    together = BLOCK // math.gcd(BLOCK, layout.groups) if spec.metadata_bits == 8 else 1
    limit = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK_GPU
    chunk = max(1, limit // (in_features * together)) * together
    parts = [_solve_rows(rows, problem, rounds, sweeps) for rows in matrix.split(chunk)]
    solved = PackedTensor(
        torch.cat([part.W_q for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.offset for part in parts]),
        spec,
        (out_features, in_features),
        torch.cat([part.blocks for part in parts if part.blocks is not None]) if spec.metadata_bits == 8 else None,
    )
    return _better(matrix, (moment / mean).to(matrix.dtype), solved, plain, together)


def output_error(weight: Tensor, packed: PackedTensor, moment: Tensor) -> float:
    """tr(E M E^T) / tr(W M W^T), E = W - Q: the share of the output's energy that is lost; 0 where both are zero."""
    moment = moment.to(weight.device, torch.float64)
    whole = weight.to(torch.float64)
    error = whole - packed.dequantize(torch.float32).to(whole)
    lost, energy = (float(((x @ moment) * x).sum()) for x in (error, whole))
    return lost / energy if energy > 0 else (0.0 if lost <= 0 else math.inf)


def _check(
    weight: Tensor, spec: QuantSpec, moment: Tensor, options: SolverOptions, damping: float, rounds: int, sweeps: int
) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a non-empty matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    if spec.axis != 1:
        raise ValueError("error feedback needs axis 1: with axis 0 a group lies in one input column")
    if options.gain or options.lp_norm != 2:
        raise ValueError("error feedback minimises squares: it takes no gain and no lp_norm other than 2")
    width = weight.shape[1]
    if moment.shape != (width, width) or not moment.is_floating_point():
        raise ValueError(
            f"the moment is {moment.dtype} of shape {tuple(moment.shape)}: it must be floats [{width}, {width}]"
        )
    if not (torch.isfinite(moment).all() and (moment.diagonal() >= 0).all()):
        raise ValueError("the moment must be finite, and its diagonal not negative")
    if not damping > 0:
        raise ValueError(f"damping is {damping}: it must be positive, because a moment may be singular")
    for name, value in (("rounds", rounds), ("sweeps", sweeps)):
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be 0 or more")


def _problem(
    moment: Tensor,
    damping: float,
    spec: QuantSpec,
    options: SolverOptions,
    solver: Solver,
    layout: Layout,
    dtype: torch.dtype,
) -> _Problem:
    """`moment` [width, width] float64 with a mean diagonal of 1 (or 0)."""
    metric = (moment + moment.t()) / 2
    metric.diagonal().add_(damping)
    # Cholesky gives lower times upper: turned about, upper times lower.
    factor = torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)
    return _Problem(metric.to(dtype), factor.to(dtype), spec, options, solver, layout)


def _solve_rows(rows: Tensor, problem: _Problem, rounds: int, sweeps: int) -> PackedTensor:
    """`rows` [rows, width] packed, without a look at plain least squares."""
    # Columns are what is gone through: they are made contiguous. A power of two as unit changes no bit.
    unit = 2.0 ** math.floor(math.log2(float(rows.abs().max()) or 1.0))
    weights = (rows / unit).t().contiguous()  # [width, rows]
    codes, grid = _feedback(weights, problem, unit)
    for _ in range(rounds):
        _descend(weights, codes, grid, problem, sweeps)
        grid = _refit(weights, codes, grid, problem)
    return _stored(weights, codes, grid, problem, unit, rounds, sweeps)


def _feedback(weights: Tensor, problem: _Problem, unit: float) -> tuple[Tensor, _Grid]:
    """Steps 1 and 2: codes [width, rows], in the dtype of `weights` [width, rows], and the grid of each group."""
    codes, errors = torch.zeros_like(weights), torch.zeros_like(weights)
    scales, offsets = [], []
    for group in problem.groups:
        factor = problem.factor[group, group]
        carried = problem.factor[: group.start, group].t() @ errors[: group.start]  # [group, rows]
        # What the group's columns would be to make up for all errors to their left.
        wanted = weights[group] + torch.linalg.solve_triangular(factor.t(), carried, upper=False)
        codes[group], scale, offset = _group(wanted, factor, problem, unit)
        errors[group] = weights[group] - (codes[group] * scale + offset)
        scales.append(scale)
        offsets.append(offset)
    return codes, _Grid(torch.stack(scales), torch.stack(offsets))


def _group(wanted: Tensor, factor: Tensor, problem: _Problem, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """One group: `wanted` [group, rows], `factor` [group, group] -> codes [group, rows], scale and offset [rows]."""
    spec = problem.spec.replace(group_size=WHOLE_ROW, metadata_bits=16)
    metric = factor @ factor.t()
    start = problem.solver((wanted * unit).t().contiguous(), spec, problem.options, metric.diagonal().clone())
    scale, offset = (metadata.flatten().to(wanted.dtype) / unit for metadata in (start.scale, start.offset))
    codes = _round_columns(wanted, scale, offset, factor, spec.qmax)

    def lost(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return (factor.t() @ (wanted - (codes * scale + offset))).square_().sum(0)  # [rows]

    best, trial = (lost(codes, scale, offset), codes, scale, offset), codes
    for _ in range(_GROUP_REFITS):
        new_scale, new_offset = _line(wanted, trial, metric)
        usable = new_scale > 0
        new_scale, new_offset = torch.where(usable, new_scale, best[2]), torch.where(usable, new_offset, best[3])
        trial = _round_columns(wanted, new_scale, new_offset, factor, spec.qmax)
        new = lost(trial, new_scale, new_offset), trial, new_scale, new_offset
        better = new[0] < best[0]
        best = tuple(torch.where(better, x, y) for x, y in zip(new, best, strict=True))  # type: ignore[assignment]
    return best[1:]


def _round_columns(wanted: Tensor, scale: Tensor, offset: Tensor, factor: Tensor, qmax: int) -> Tensor:
    """Round the columns of a group one after another, each with the errors of those before it added.

    `wanted` [group, rows], scale and offset [rows], `factor` [group, group] -> codes [group, rows].
    """
    share = factor / factor.diagonal()  # column k of row j: how much of the error of j goes to k
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    size = len(wanted)
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        block = torch.addmm(wanted[start:stop], share[:start, start:stop].t(), errors[:start])
        for column in range(start, stop):
            target = block[column - start]
            if column > start:
                target = torch.addmv(target, errors[start:column].t(), share[start:column, column])
            codes[column] = _nearest(target, scale, offset, qmax)
            errors[column] = wanted[column] - (codes[column] * scale + offset)
    return codes


def _nearest(target: Tensor, scale: Tensor, offset: Tensor, qmax: int) -> Tensor:
    """The codes nearest to `target`, 0 where the scale is 0; floats, all of one shape."""
    return ((target - offset) / torch.where(scale > 0, scale, torch.inf)).round_().clamp_(0, qmax)


def _line(wanted: Tensor, codes: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset [rows] that fit a group with given codes best in `metric`; a scale of 0 where any would."""
    weighted = metric @ codes
    one = metric.sum(0)  # [group]
    total = one.sum()
    by_code, by_one = (weighted * wanted).sum(0), one @ wanted
    codes_one, codes_codes = one @ codes, (weighted * codes).sum(0)
    spread = codes_codes * total - codes_one.square()
    # Codes that are all alike have none.
    usable = spread > 1e-6 * codes_codes * total
    scale = torch.where(usable, (by_code * total - codes_one * by_one) / torch.where(usable, spread, 1.0), 0.0)
    return scale, (by_one - scale * codes_one) / total


def _spread(values: Tensor, layout: Layout) -> Tensor:
    """A value of each group for each of its columns: [groups, rows] -> [width, rows]."""
    return values.repeat_interleave(layout.group, 0)[: layout.width]


def _sums(values: Tensor, layout: Layout) -> Tensor:
    """The sum over the columns of each group: [width, rows] -> [groups, rows]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, layout.padded - layout.width))
    return padded.view(layout.groups, layout.group, -1).sum(1)


def _errors(weights: Tensor, codes: Tensor, grid: _Grid, layout: Layout) -> Tensor:
    """W - Q, [width, rows]."""
    return weights - (codes * _spread(grid.scale, layout) + _spread(grid.offset, layout))


def _descend(weights: Tensor, codes: Tensor, grid: _Grid, problem: _Problem, sweeps: int) -> None:
    """Choose each code anew with all others as they are, column by column, in place: no change makes the error larger.

    The error of a row is e^T M e; moving one of its weights by d changes it by -2 d (M e)_j + d^2 M_jj.
    """
    layout, metric = problem.layout, problem.metric
    group, width = layout.group, layout.width
    for _ in range(sweeps):
        slope = metric @ _errors(weights, codes, grid, layout)  # [width, rows]: M e
        for start in range(0, width, _COLUMNS):
            stop = min(start + _COLUMNS, width)
            here = slope[start:stop]
            moved = torch.empty_like(here)
            for column in range(start, stop):
                scale = grid.scale[column // group]
                # In units of the scale: the best place for the code; where there is no scale, where it is.
                change = here[column - start] / (torch.where(scale > 0, scale, torch.inf) * metric[column, column])
                new = (codes[column] + change).round_().clamp_(0, problem.spec.qmax)
                moved[column - start] = (new - codes[column]) * scale
                codes[column] = new
                if column + 1 < stop:
                    here[column - start + 1 :].addr_(
                        metric[column + 1 : stop, column], moved[column - start], alpha=-1
                    )
            slope[stop:].addmm_(metric[stop:, start:stop], moved, alpha=-1)


def _refit(weights: Tensor, codes: Tensor, grid: _Grid, problem: _Problem) -> _Grid:
    """The scales and offsets of all groups of a row that together fit its codes best, row by row.

    A scale that comes out negative is turned about, together with the codes (in place). A row that gains nothing
    keeps its grid.
    """
    layout, metric, half = problem.layout, problem.metric, problem.spec.qmax / 2
    groups, rows = layout.groups, weights.shape[1]
    # Sum over the columns of two groups of the metric: what couples their middles.
    between = _sums(_sums(metric, layout).t().contiguous(), layout).double()  # [groups, groups]
    middle = grid.offset + grid.scale * half
    fitted = torch.empty(2, groups, rows, dtype=weights.dtype, device=weights.device)
    step = max(1, _EQUATIONS // (4 * groups * groups))
    for first in range(0, rows, step):
        here = slice(first, min(first + step, rows))
        levels = (codes[:, here] - half).contiguous()  # [width, n]
        pull = metric @ weights[:, here]
        right = torch.cat([_sums(pull * levels, layout), _sums(pull, layout)]).t().double()  # [n, 2 groups]
        left = torch.empty(len(right), 2 * groups, 2 * groups, dtype=torch.float64, device=weights.device)
        for index, columns in enumerate(problem.groups):
            product = metric[:, columns] @ levels[columns]  # [width, n]
            left[:, index, :groups] = _sums(product * levels, layout).t().double()
            left[:, index, groups:] = left[:, groups:, index] = _sums(product, layout).t().double()
        left[:, groups:, groups:] = between
        now = torch.cat([grid.scale[:, here], middle[:, here]]).t().double()
        ridge = _RIDGE * left.diagonal(dim1=1, dim2=2) + torch.finfo(torch.float32).tiny
        # What is solved for is the change: it is small, and so is what rounding does to it.
        rest = right - (left @ now.unsqueeze(2)).squeeze(2)
        left.diagonal(dim1=1, dim2=2).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(left)
        change = torch.cholesky_solve(rest.unsqueeze(2), factor).squeeze(2)
        change = torch.where(((failed == 0) & torch.isfinite(change).all(1))[:, None], change, 0.0)
        fitted[:, :, here] = (now + change).t().view(2, groups, -1).to(weights.dtype)
    new_scale, new_middle = fitted
    lost, before = (
        (problem.metric @ errors).mul_(errors).sum(0)
        for errors in (
            _errors(weights, codes, _Grid(new_scale, new_middle - new_scale * half), layout),
            _errors(weights, codes, grid, layout),
        )
    )
    better = lost < before
    scale, middle = torch.where(better, new_scale, grid.scale), torch.where(better, new_middle, middle)
    turned = _spread(scale < 0, layout)
    codes.copy_(torch.where(turned, problem.spec.qmax - codes, codes))
    scale = scale.abs()
    return _Grid(scale, middle - scale * half)


def _stored(
    weights: Tensor, codes: Tensor, grid: _Grid, problem: _Problem, unit: float, rounds: int, sweeps: int
) -> PackedTensor:
    """Round the grid to what is stored, descend from there, and pack."""
    spec, layout, half = problem.spec, problem.layout, problem.spec.qmax / 2
    blocks = None
    if spec.metadata_bits == 8:
        scale, offset, blocks = _to_8bit(weights, codes, grid, problem, unit, rounds, sweeps)
    else:
        dtype = metadata_dtype(spec.metadata_dtype)
        exact = (grid.scale * unit).to(dtype)
        # The middle is what was fitted: the offset follows the scale as it is stored.
        middle = grid.offset + grid.scale * half
        low = ((middle - exact.to(weights.dtype) / unit * half) * unit).to(dtype)
        if not (torch.isfinite(exact).all() and torch.isfinite(low).all()):
            raise too_large(spec.metadata_dtype)
        kept = _Grid(exact.to(weights.dtype) / unit, low.to(weights.dtype) / unit)
        if sweeps:
            _descend(weights, codes, kept, problem, sweeps)
        # Flat in between: what is one group wide would stay with the strides of what it was turned from.
        scale, offset = (to_storage(metadata.t().flatten().view(-1, layout.groups)) for metadata in (exact, low))
    filled = torch.nn.functional.pad(codes.t().to(torch.uint8), (0, layout.padded - layout.width))
    packed = pack(filled.contiguous(), spec.nbits, layout.plane)
    return PackedTensor(packed, scale, offset, spec, (weights.shape[1], layout.width), blocks)


def _to_8bit(
    weights: Tensor, codes: Tensor, grid: _Grid, problem: _Problem, unit: float, rounds: int, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit metadata of the grid, and descent over them and the codes (in place) in turns.

    Returns scale codes and middle codes [rows, groups] and the bytes of the maps [blocks, 8].
    """
    spec, layout, half = problem.spec, problem.layout, problem.spec.qmax / 2
    maps, metadata, steps = [], [], []
    for values in (grid.scale, grid.offset + grid.scale * half):
        entries = (values * unit).t().flatten()
        maps.append(fit_maps(entries, spec.metadata_dtype))
        metadata.append(encode(entries, maps[-1]))
        ones = decode_values(torch.ones_like(metadata[-1]), maps[-1]) - decode_values(
            torch.zeros_like(metadata[-1]), maps[-1]
        )
        steps.append(_turned(ones, layout).to(weights.dtype) / unit)

    def decoded() -> _Grid:
        scale, middle = (
            _turned(decode_values(stored, its), layout).to(weights.dtype) / unit
            for stored, its in zip(metadata, maps, strict=True)
        )
        return _Grid(scale, middle - scale * half)

    for _ in range(max(rounds, 1)):
        if sweeps:
            _descend(weights, codes, decoded(), problem, sweeps)
        if rounds:
            metadata = [
                m.t().flatten() for m in _descend_metadata(weights, codes, decoded(), problem, metadata, steps)
            ]
    if sweeps:
        _descend(weights, codes, decoded(), problem, sweeps)
    scale, middle = (stored.view(-1, layout.groups) for stored in metadata)
    return scale, middle, to_storage(torch.cat(maps, dim=1))


def _turned(entries: Tensor, layout: Layout) -> Tensor:
    """[rows groups] -> [groups, rows]"""
    return entries.view(-1, layout.groups).t().contiguous()


def _descend_metadata(
    weights: Tensor, codes: Tensor, grid: _Grid, problem: _Problem, metadata: list[Tensor], steps: list[Tensor]
) -> list[Tensor]:
    """Choose the code of each scale and each middle anew with all else as it is, group by group.

    `metadata` are their codes [rows groups], `steps` what one is worth [groups, rows]. Returns new codes
    [groups, rows]. Along the line that a scale or a middle moves its row, the error is a parabola.
    """
    layout, metric = problem.layout, problem.metric
    errors = _errors(weights, codes, grid, layout)
    stored = [_turned(m, layout).to(weights.dtype) for m in metadata]
    slope = metric @ errors  # [width, rows]
    for index, columns in enumerate(problem.groups):
        levels = codes[columns] - problem.spec.qmax / 2
        for which, direction in ((0, levels), (1, torch.ones_like(levels))):
            pushed = metric[:, columns] @ direction  # [width, rows]
            bend = (pushed[columns] * direction).sum(0)
            step = steps[which][index]
            usable = (step > 0) & (bend > 0)
            best = (slope[columns] * direction).sum(0) / torch.where(usable, step * bend, torch.inf)
            new = (stored[which][index] + best).round_().clamp_(0, 255)
            moved = (new - stored[which][index]) * step
            stored[which][index] = new
            slope -= pushed * moved
    return [codes.to(torch.uint8) for codes in stored]


def _better(matrix: Tensor, moment: Tensor, solved: PackedTensor, plain: PackedTensor, together: int) -> PackedTensor:
    """Of each `together` rows the packed tensor whose tr(E M E^T) is smaller."""

    def lost(packed: PackedTensor) -> Tensor:
        by_row = torch.zeros(-(-len(matrix) // together) * together, dtype=torch.float64, device=matrix.device)
        error = matrix - packed.dequantize(torch.float32).to(matrix)
        by_row[: len(matrix)] = ((error @ moment) * error).sum(1)
        return by_row.view(-1, together).sum(1)

    better = lost(solved) < lost(plain)  # [sets of rows]
    groups = solved.spec.layout(*solved.shape).groups

    def chosen(name: str) -> Tensor:
        new, old = getattr(solved, name), getattr(plain, name)
        each = together * groups // BLOCK if name == "blocks" else together
        return torch.where(better.repeat_interleave(each)[: len(new), None], new, old)

    return PackedTensor(**{name: chosen(name) for name in solved.state()}, spec=solved.spec, shape=solved.shape)
