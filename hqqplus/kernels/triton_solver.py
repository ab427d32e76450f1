"""The solver as one Triton kernel a bit width: the same search as `quantization/solver.py`, on a GPU.

Formula. For each group w of a row, codes q in 0..Q, scale s and offset o of least sum_i h_i (w_i - s q_i - o)^2, all
in units of (a power of two near) the group's range and about the group's mean: y = (w - c) / u - m, so sum h y = 0.

    one bit    each weight in turn is the threshold t: H = sum h [y <= t], S = sum h y [y <= t] explain
               S^2 M / (H (M - H)) of the squares (M = sum h). All g thresholds are tried: the exact optimum.
    2..8 bits  a grid (a, b) gives the codes q = round(clamp(a y + b, 0, Q)), and these a regression, which explains
               cov^2 / var with cov = sum h q y, var = sum h q^2 - (sum h q)^2 / M. Of each width of `grids._grids` the
               place that explains most is where a descent starts, s = cov / var and o = -s (sum h q) / M by turns with
               the rounding; the best of all descents is looked around once more. Storing is as in `solver._store`.

Layout. One thread has one group: a tile is [GROUP, BLOCK], its weights down the registers of a lane, its groups across
the 32 lanes of the only warp of a program; from 33 weights on, groups are split between 2, 4 or 8 lanes. Sums over a
group are then additions in registers, with a shuffle or two where it is split, but without shared memory or barriers.
The price is that neighbouring lanes load a group apart; the lines stay in L1 until all of them is used, and thousands
of instructions come on each load. `benchmarks/solver_sass.py` counts them.

Bytes. For each weight 2 (bf16) read and 1 (a code, unpacked) written, for each group 4 written (scale and offset). At
2 bits in groups of 64: 3.06 bytes a weight.

The interpreter (TRITON_INTERPRET=1) runs these same lines: nothing here is PTX. Rounding is by adding and subtracting
1.5 * 2^23, halves to the even code.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hqqplus.quantization import grids
from hqqplus.quantization.metadata import metadata_dtype, too_large
from hqqplus.quantization.solver import Solution, check_importance
from hqqplus.quantization.spec import LARGEST_GROUP, QuantSpec, SolverOptions

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or a platform without it: `supports` says no
    triton = None

_LANES = 32
_PLAIN = ((1.0, -1.0), (2 / 3, -1.0), (0.5, -0.75), (1.0, -2.0), (2.0, -1.0))
_TERNARY = ((1.0, -1.0),)
# Weights of a group in the registers of one lane: twice as many take 5 % fewer instructions and half the warps.
_IN_REGISTERS = 32
_INTERPRETED_BLOCK = 512
# The look around the best grid: widths (a fifth of a step apart, none in the middle), and places of each.
NEAR_WIDTHS, NEAR_PLACES = 4, 3
_OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def supports(matrix: Tensor, spec: QuantSpec, options: SolverOptions | None = None) -> bool:
    """Whether `solve` takes this matrix [rows, width]: on a CUDA device (or any under the interpreter), of float32,
    float16 or bfloat16, in groups of at most 256 weights, by least squares and not thoroughly. Raises nothing."""
    if triton is None or matrix.dim() != 2 or (options is not None and (options.lp_norm != 2 or options.thorough)):
        return False
    if matrix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    on_cuda = matrix.is_cuda and torch.version.hip is None
    return (on_cuda or _interpreted()) and _group(matrix, spec) <= LARGEST_GROUP


def solve(
    matrix: Tensor, spec: QuantSpec, options: SolverOptions | None = None, importance: Tensor | None = None
) -> Solution:
    """Quantize the rows of `matrix` [rows, width] in groups along the row; the contract of `solver.solve`.

    Nothing is written to `matrix`, which may be a view of any strides. The device waits once, at the end.

    Args:
        importance: [width], a weight >= 0 for the squared error of each column; None for all alike.

    Raises:
        ValueError: if a value is NaN or infinite, or too large for the type that scales are stored in; if
            `importance` has another shape, or values that are negative or not finite; or for what `supports` refuses.
    """
    if not supports(matrix, spec, options):
        raise ValueError(
            f"no Triton solver for {matrix.dtype} of shape {tuple(matrix.shape)} on {matrix.device} with {spec} and "
            f"{options}: see triton_solver.supports"
        )
    matrix = matrix.detach()
    rows, width = matrix.shape
    group = _group(matrix, spec)
    if importance is not None:
        importance = check_importance(importance, width).to(matrix.device)
    dtype, device = metadata_dtype(spec.metadata_dtype), matrix.device
    count = -(-width // group)
    codes = torch.empty(rows, width, dtype=torch.uint8, device=device)
    scale, offset = (torch.empty(rows, count, dtype=dtype, device=device) for _ in range(2))
    whole = width // group
    # The last group of a row may be shorter: it is another kernel's.
    with torch.cuda.device(device) if matrix.is_cuda else nullcontext():
        for first, last, size in ((0, whole, group), (whole, count, width - whole * group)):
            if last > first and rows > 0:
                columns, entries = slice(first * group, first * group + (last - first) * size), slice(first, last)
                weights = None if importance is None else _relative(importance[columns], size)
                results = codes[:, columns], scale[:, entries], offset[:, entries]
                _launch(matrix[:, columns], weights, results, size, spec)
    # The kernels make NaN or infinity of what they cannot solve, so that the weight need not be read for it.
    if not (torch.isfinite(scale).all() and torch.isfinite(offset).all()):
        if not torch.isfinite(matrix).all():
            raise ValueError("the weight holds NaN or infinite values")
        raise too_large(spec.metadata_dtype)
    return Solution(codes, scale, offset)


def _group(matrix: Tensor, spec: QuantSpec) -> int:
    return spec.replace(axis=1).layout(matrix.shape[0], matrix.shape[1]).group


def _interpreted() -> bool:
    return triton is not None and not isinstance(search_kernel, triton.JITFunction)


def _relative(importance: Tensor, size: int) -> Tensor:
    """Importance [n size] (float64) over its average by group, float32; all 1 where a group has none."""
    weights = importance.view(-1, size)
    average = weights.mean(1, keepdim=True)
    return torch.where(average > 0, weights / average, torch.ones_like(weights)).float().flatten()


def _launch(
    matrix: Tensor, weights: Tensor | None, results: tuple[Tensor, Tensor, Tensor], size: int, spec: QuantSpec
) -> None:
    """Solve `matrix` [rows, n size] into `results`: codes [rows, n size], scale and offset [rows, n]."""
    codes, scale, offset = results
    rows, blocks = scale.shape
    constants: dict[str, Any] = tile(size, weights is not None)
    if _interpreted():
        constants["BLOCK"] = min(_INTERPRETED_BLOCK, triton.next_power_of_2(rows * blocks))
    tensors = [matrix, matrix if weights is None else weights, codes, scale, offset]
    sizes = [rows * blocks, blocks, matrix.stride(0), matrix.stride(1), codes.stride(0), scale.stride(0)]
    launches = (triton.cdiv(rows * blocks, constants["BLOCK"]),)
    if spec.nbits == 1:
        split_kernel[launches](*tensors, *sizes, **constants, **_OPTIONS)
    else:
        tables = _tables(size, spec.qmax, matrix.device)
        constants |= {"QMAX": spec.qmax, "ITERATIONS": grids._ITERATIONS}
        search_kernel[launches](*tensors, *tables, *sizes, len(tables[1]), **constants, **_OPTIONS)


def tile(size: int, has_importance: bool) -> dict[str, Any]:
    """The constants that a kernel for groups of `size` weights is compiled with."""
    group = 1 << (size - 1).bit_length()
    lanes = -(-group // _IN_REGISTERS)
    return {"SIZE": size, "GROUP": group, "BLOCK": _LANES // lanes, "HAS_IMPORTANCE": has_importance}


def grid_table(size: int, qmax: int) -> list[tuple[float, bool, list[float]]]:
    """The grids tried for groups of `size`: (scale, whether about the mean, offsets), in units of half the range.

    A grid about the middle of the range has the levels offset + scale k.
    """
    # Plain grids first: among grids that fit values in lumps equally well, 16 bits hold the scales of these best.
    plain = _PLAIN if qmax == 3 else _TERNARY
    return [(scale, False, [offset]) for scale, offset in plain] + [
        (2 * width / qmax, width < grids._TAILS, [shift - width for shift in shifts])
        for width, shifts in grids._grids(size, qmax)
    ]


@lru_cache(maxsize=256)
def _tables(size: int, qmax: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`grid_table` as (first places [widths + 1] int32, scale and flag [widths, 2], offsets [places]) on `device`."""
    table = grid_table(size, qmax)
    first = [0]
    for _, _, offsets in table:
        first.append(first[-1] + len(offsets))
    return (
        torch.tensor(first, dtype=torch.int32, device=device),
        torch.tensor([[scale, float(tails)] for scale, tails, _ in table], dtype=torch.float32, device=device),
        torch.tensor([offset for _, _, offsets in table for offset in offsets], dtype=torch.float32, device=device),
    )


if triton is not None:
    _WIDTHS, _PLACES = tl.constexpr(NEAR_WIDTHS), tl.constexpr(NEAR_PLACES)
    _MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: between 2^23 and 2^24 float32 has the whole numbers only

    @triton.jit
    def _positions(groups, blocks, SIZE: tl.constexpr, GROUP: tl.constexpr):
        """Group numbers [BLOCK] -> row and first column [1, BLOCK], both int64, and weights' numbers [GROUP, 1]."""
        row, column = (groups // blocks).to(tl.int64), (groups % blocks).to(tl.int64) * SIZE
        return row[None, :], column[None, :], tl.arange(0, GROUP)[:, None]

    @triton.jit
    def _read(
        weight, importance, row, column, index, stride_row, stride_column,
        SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ):  # fmt: skip
        """Groups in units: y [GROUP, BLOCK] = (w - centre) / unit - mean, and weights h (y itself if there are none).

        Behind them, [BLOCK] each: centre, unit, 1 / unit, mean, half the range in units, 1 / sum h.
        """
        inside = index < SIZE
        places = row * stride_row + (column + index) * stride_column
        # Told that nothing is contiguous, the compiler spreads groups, not weights, over the lanes.
        places = tl.max_contiguous(places, [1, 1])
        x = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
        low = tl.min(tl.where(inside, x, float("inf")), axis=0)
        high = tl.max(tl.where(inside, x, float("-inf")), axis=0)
        centre = low * 0.5 + high * 0.5
        spread = high * 0.5 - low * 0.5
        # The power of two at or below half the range: multiplying by it rounds nothing.
        exponent = tl.minimum(tl.maximum(spread.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
        unit = exponent.to(tl.float32, bitcast=True)
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        y = (x - centre[None, :]) * inverse[None, :]
        h = y
        if HAS_IMPORTANCE:
            h = tl.load(importance + tl.max_contiguous(column + index, [1, 1]), mask=inside, other=0.0)
            part = 1.0 / tl.maximum(tl.sum(h, axis=0), 1e-30)
            mean = tl.sum(tl.where(inside, h * y, 0.0), axis=0) * part
        else:
            part = tl.full([BLOCK], 1.0 / SIZE, tl.float32)
            mean = tl.sum(tl.where(inside, y, 0.0), axis=0) * part
        y = tl.where(inside, y - mean[None, :], 0.0)
        return y, h, centre, unit, inverse, mean, spread * inverse, part

    @triton.jit
    def _weighted(q, h, index, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr):
        """q times its weights, 0 in the padding."""
        if HAS_IMPORTANCE:
            q = q * h
        elif GROUP != SIZE:
            q = tl.where(index < SIZE, q, 0.0)
        return q

    @triton.jit
    def _better(condition, new_a, new_b, new_c, a, b, c):
        return tl.where(condition, new_a, a), tl.where(condition, new_b, b), tl.where(condition, new_c, c)

    @triton.jit
    def _round(y, a, b, QMAX: tl.constexpr):
        """Codes less (QMAX + 1) / 2 of weights y [GROUP, BLOCK] on the grids a y + b [BLOCK], in shares of QMAX."""
        share = tl.minimum(tl.maximum(tl.fma(y, a[None, :], b[None, :]), 0.0), 1.0)
        return (share * QMAX + _MAGIC) - (_MAGIC + (QMAX + 1) // 2)

    @triton.jit
    def _regress(
        y, h, a, b, part, index,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ):  # fmt: skip
        """Of the codes of grids (a, b): their mean, cov and var, [BLOCK]."""
        q = _round(y, a, b, QMAX)
        hq = _weighted(q, h, index, SIZE, GROUP, HAS_IMPORTANCE)
        total = tl.sum(hq, axis=0)
        square = tl.sum(hq * q, axis=0)
        product = tl.sum(hq * y, axis=0)
        average = total * part
        # Codes that differ at all have at least this variance, times the mass, where all weights count alike.
        least = 1e-5 * SIZE if HAS_IMPORTANCE else 0.2
        return average, product, tl.maximum(square - total * average, least)

    @triton.jit
    def _descend(
        y, h, average, product, variance, part, index,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
        ITERATIONS: tl.constexpr,
    ):  # fmt: skip
        """(error, scale, mean code) [BLOCK] after regression and rounding by turns, from a first regression on."""
        MIDDLE: tl.constexpr = (QMAX + 1) // 2
        scale = tl.maximum(product / variance, 1e-6)
        for _ in range(ITERATIONS - 1):
            a, b = 1.0 / (scale * QMAX), (average + MIDDLE) * (1.0 / QMAX)
            average, product, variance = _regress(y, h, a, b, part, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE)
            scale = tl.maximum(product / variance, 1e-6)
        # By the weights themselves: what is left of all squares has too few digits at 8 bits.
        q = _round(y, 1.0 / (scale * QMAX), (average + MIDDLE) * (1.0 / QMAX), QMAX)
        left = (y + (scale * average)[None, :]) - scale[None, :] * q
        error = tl.sum(_weighted(left, h, index, SIZE, GROUP, HAS_IMPORTANCE) * left, axis=0)
        return error, scale, average

    @triton.jit
    def _try_grid(
        y, h, a, b, part, index, best_average, best_product, best_variance,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ):  # fmt: skip
        """The regression on the codes of grids (a, b) where it explains more than the best so far, else that one."""
        average, product, variance = _regress(y, h, a, b, part, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE)
        return _better(
            product * product * best_variance > best_product * best_product * variance,
            average, product, variance, best_average, best_product, best_variance,
        )  # fmt: skip

    @triton.jit
    def _try_start(
        y, h, start_average, start_product, start_variance, part, index, least, scale, average,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
        ITERATIONS: tl.constexpr, NOISE: tl.constexpr,
    ):  # fmt: skip
        """(error, scale, mean code) of the descent from a regression where that ends lower, else those so far."""
        error, new_scale, new_average = _descend(
            y, h, start_average, start_product, start_variance, part, index,
            QMAX, SIZE, GROUP, HAS_IMPORTANCE, ITERATIONS,
        )  # fmt: skip
        return _better(error + NOISE < least, error, new_scale, new_average, least, scale, average)

    @triton.jit
    def _inverse(s, QMAX: tl.constexpr):
        """1 / (s QMAX), 0 where s = 0: then all codes are 0."""
        return tl.where(s > 0, 1.0 / (tl.where(s > 0, s, 1.0) * QMAX), 0.0)

    @triton.jit
    def _measure(
        y, h, scale, offset, inverse, centre, mean, index,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ):  # fmt: skip
        """The error [BLOCK] of stored scales and offsets, both as float32, and the weights' codes, 0 where s = 0."""
        s, o = scale * inverse, (offset - centre) * inverse - mean
        a = _inverse(s, QMAX)
        q = _round(y, a, -o * a, QMAX) + (QMAX + 1) // 2
        left = (y - o[None, :]) - s[None, :] * q
        return tl.sum(_weighted(left, h, index, SIZE, GROUP, HAS_IMPORTANCE) * left, axis=0), q

    @triton.jit
    def _place(
        y, h, s, o, stored, unit, inverse, centre, mean, part, index,
        QMAX: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
        DTYPE: tl.constexpr,
    ):  # fmt: skip
        """The offset [BLOCK], as stored, of least error for the codes of grid (s, o) and a stored scale."""
        a = _inverse(s, QMAX)
        q = _round(y, a, -o * a, QMAX) + (QMAX + 1) // 2
        average = tl.sum(_weighted(q, h, index, SIZE, GROUP, HAS_IMPORTANCE), axis=0) * part
        return ((mean - stored * inverse * average) * unit + centre).to(DTYPE).to(tl.float32), q

    @triton.jit
    def _write(
        q, scale, offset, codes, scales, offsets, row, column, index, groups, count, blocks, codes_stride, stride,
        SIZE: tl.constexpr,
    ):  # fmt: skip
        """Store codes [GROUP, BLOCK], scales and offsets [BLOCK]."""
        inside = groups < count
        places = row * codes_stride + column + index
        tl.store(codes + places, q.to(tl.int32).to(tl.uint8), mask=(index < SIZE) & inside[None, :])
        entries = (groups // blocks).to(tl.int64) * stride + groups % blocks
        tl.store(scales + entries, scale.to(scales.dtype.element_ty), mask=inside)
        tl.store(offsets + entries, offset.to(offsets.dtype.element_ty), mask=inside)

    # A row of one group is no special case: folded in, it leads the compiler to layouts that are no good.
    @triton.jit(do_not_specialize=["count", "blocks"])
    def split_kernel(
        weight, importance, codes, scales, offsets,
        count, blocks, stride_row, stride_column, codes_stride, stride,
        SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
    ):  # fmt: skip
        """One bit: `count` groups of `SIZE` weights, `blocks` a row, in `BLOCK`s."""
        groups = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        solved = tl.minimum(groups, count - 1)
        row, column, index = _positions(solved, blocks, SIZE, GROUP)
        y, h, centre, unit, inverse, mean, _, part = _read(
            weight, importance, row, column, index, stride_row, stride_column, SIZE, GROUP, BLOCK, HAS_IMPORTANCE
        )
        first = tl.sum(row, axis=0) * stride_row + tl.sum(column, axis=0) * stride_column
        product = tl.zeros([BLOCK], tl.float32)
        variance = tl.full([BLOCK], 1.0, tl.float32)
        below = tl.full([BLOCK], 1.0, tl.float32)
        for j in range(SIZE):
            # Read again (from L1) rather than picked out of the registers, by the same steps to the same bits.
            threshold = tl.load(weight + first + j * stride_column).to(tl.float32)
            threshold = (threshold - centre) * inverse - mean
            low = y <= threshold[None, :]
            taken = tl.where(low, h, 0.0) if HAS_IMPORTANCE else tl.where(low & (index < SIZE), 1.0, 0.0)
            total = tl.sum(taken * y, axis=0)
            mass_low = tl.sum(taken, axis=0)
            spread = mass_low * (1.0 - mass_low * part)
            better = (total * total * variance > product * product * spread) & (spread > 1e-5 * SIZE)
            product, variance, below = _better(better, total, spread, mass_low, product, variance, below)
        # -product is cov, so the levels are product / H and that plus the scale.
        s = tl.where(product < 0, -product / variance, 0.0)
        o = -s * (1.0 - below * part)
        DTYPE: tl.constexpr = scales.dtype.element_ty
        scale = (s * unit).to(DTYPE).to(tl.float32)
        # A scale that rounds to zero leaves the codes without a meaning.
        s = tl.where(scale > 0, s, 0.0)
        offset, q = _place(
            y, h, s, o, scale, unit, inverse, centre, mean, part, index, 1, SIZE, GROUP, HAS_IMPORTANCE, DTYPE
        )
        _write(
            q, scale, offset, codes, scales, offsets, row, column, index, groups, count, blocks, codes_stride, stride,
            SIZE,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["count", "blocks"])
    def search_kernel(
        weight, importance, codes, scales, offsets, first_places, widths, shifts,
        count, blocks, stride_row, stride_column, codes_stride, stride, width_count,
        SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
        QMAX: tl.constexpr, ITERATIONS: tl.constexpr,
    ):  # fmt: skip
        """2, 3, 4 and 8 bits: `count` groups of `SIZE` weights, `blocks` a row, in `BLOCK`s."""
        groups = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        solved = tl.minimum(groups, count - 1)
        row, column, index = _positions(solved, blocks, SIZE, GROUP)
        y, h, centre, unit, inverse, mean, half, part = _read(
            weight, importance, row, column, index, stride_row, stride_column, SIZE, GROUP, BLOCK, HAS_IMPORTANCE
        )
        MIDDLE: tl.constexpr = (QMAX + 1) // 2
        # Errors closer than this are equal: a few parts in 100,000 even at 8 bits.
        NOISE: tl.constexpr = 1e-10 * SIZE
        spread = half > 0
        wide = 1.0 / tl.where(spread, half, 1.0)
        least = tl.full([BLOCK], float("inf"), tl.float32)
        scale = tl.full([BLOCK], 1.0, tl.float32)
        average = tl.zeros([BLOCK], tl.float32)
        for i in range(width_count):
            steps = 1.0 / (tl.load(widths + 2 * i) * QMAX)
            tails = tl.load(widths + 2 * i + 1) > 0
            a = wide * steps
            from_mean = tl.where(tails, 0.0, mean * a)
            best_average = tl.zeros([BLOCK], tl.float32)
            best_product = tl.zeros([BLOCK], tl.float32)
            best_variance = tl.full([BLOCK], 1.0, tl.float32)
            for k in range(tl.load(first_places + i), tl.load(first_places + i + 1)):
                b = from_mean - tl.load(shifts + k) * steps
                best_average, best_product, best_variance = _try_grid(
                    y, h, a, b, part, index, best_average, best_product, best_variance,
                    QMAX, SIZE, GROUP, HAS_IMPORTANCE,
                )  # fmt: skip
            least, scale, average = _try_start(
                y, h, best_average, best_product, best_variance, part, index, least, scale, average,
                QMAX, SIZE, GROUP, HAS_IMPORTANCE, ITERATIONS, NOISE,
            )  # fmt: skip

        # Around the best: a little wider and narrower, each in three places.
        near, middle = scale, average + (MIDDLE - QMAX / 2)
        for i in range(_WIDTHS):
            factor = 1.0 + tl.where(i < _WIDTHS // 2, i - _WIDTHS // 2, i - _WIDTHS // 2 + 1) * (0.2 / QMAX)
            a = 1.0 / (near * factor * QMAX)
            best_average = tl.zeros([BLOCK], tl.float32)
            best_product = tl.zeros([BLOCK], tl.float32)
            best_variance = tl.full([BLOCK], 1.0, tl.float32)
            for k in range(_PLACES):
                b = (middle - (k - _PLACES // 2) * 0.33) / (factor * QMAX) + 0.5
                best_average, best_product, best_variance = _try_grid(
                    y, h, a, b, part, index, best_average, best_product, best_variance,
                    QMAX, SIZE, GROUP, HAS_IMPORTANCE,
                )  # fmt: skip
            least, scale, average = _try_start(
                y, h, best_average, best_product, best_variance, part, index, least, scale, average,
                QMAX, SIZE, GROUP, HAS_IMPORTANCE, ITERATIONS, NOISE,
            )  # fmt: skip

        DTYPE: tl.constexpr = scales.dtype.element_ty
        s = tl.where(spread, scale, 0.0)
        o = -s * (average + MIDDLE)
        stored = (s * unit).to(DTYPE).to(tl.float32)
        if QMAX == 3:
            s = tl.where(stored > 0, s, 0.0)
            offset, q = _place(
                y, h, s, o, stored, unit, inverse, centre, mean, part, index,
                QMAX, SIZE, GROUP, HAS_IMPORTANCE, DTYPE,
            )  # fmt: skip
        else:
            # A scale that rounds down may leave the ends of a wide grid uncovered: its neighbours are tried too.
            nearest = stored
            offset = centre
            least = tl.full([BLOCK], float("inf"), tl.float32)
            for k in range(3):
                bits = nearest.to(DTYPE).to(tl.int16, bitcast=True) + tl.where(k == 2, -1, k).to(tl.int16)
                tried = tl.maximum(bits, 0).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
                tried = tl.where(spread, tried, nearest)
                placed, _ = _place(
                    y, h, tried * inverse, o, tried, unit, inverse, centre, mean, part, index,
                    QMAX, SIZE, GROUP, HAS_IMPORTANCE, DTYPE,
                )  # fmt: skip
                error, _ = _measure(
                    y, h, tried, placed, inverse, centre, mean, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE
                )
                # The first is taken as it is, NaN or not: what does not fit is refused, not moved until it does.
                better = (error < least) | (k == 0)
                least, stored, offset = _better(better, error, tried, placed, least, stored, offset)
            # A group far from zero has a coarse offset, to which the scale is fitted once more.
            _, q = _measure(y, h, stored, offset, inverse, centre, mean, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE)
            hq = _weighted(q, h, index, SIZE, GROUP, HAS_IMPORTANCE)
            o = (offset - centre) * inverse - mean
            refitted = tl.sum(hq * (y - o[None, :]), axis=0) / tl.maximum(tl.sum(hq * q, axis=0), 1e-12)
            tried = (tl.maximum(refitted, 0.0) * unit).to(DTYPE).to(tl.float32)
            error, _ = _measure(y, h, tried, offset, inverse, centre, mean, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE)
            stored = tl.where(spread & (error < least), tried, stored)
            _, q = _measure(y, h, stored, offset, inverse, centre, mean, index, QMAX, SIZE, GROUP, HAS_IMPORTANCE)
        _write(
            q, stored, offset, codes, scales, offsets, row, column, index, groups, count, blocks, codes_stride, stride,
            SIZE,
        )  # fmt: skip
