"""The solver against brute force, against the measured figures, and against PyPI hqq."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.quantization import WHOLE_ROW, PackedTensor, QuantSpec, grids, quantize, solver
from hqqplus.quantization.metadata import from_storage
from hqqplus.quantization.solver import SolverOptions


def spec16(*args: Any, **kwargs: Any) -> QuantSpec:
    """A spec with 16-bit metadata: what the solver itself makes. 8 bits are in test_refit."""
    return QuantSpec(*args, metadata_bits=16, **kwargs)


Draw = Callable[[torch.Generator, tuple[int, int]], Tensor]


def student(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    chi2 = torch.randn(3, *shape, generator=generator).square().sum(0)
    return torch.randn(shape, generator=generator) / (chi2 / 3).sqrt()


def laplace(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    uniform = torch.rand(shape, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs() * (1 - 1e-6))


CONTINUOUS: dict[str, Draw] = {
    "normal": lambda g, shape: torch.randn(shape, generator=g),
    "laplace": laplace,
    "student": student,
    "uniform": lambda g, shape: torch.rand(shape, generator=g) - 0.5,
    "exponential": lambda g, shape: -torch.log1p(-torch.rand(shape, generator=g)),
    "outliers": lambda g, shape: torch.randn(shape, generator=g) * (1 + 19 * (torch.rand(shape, generator=g) < 0.02)),
}
WITH_TIES: dict[str, Draw] = {
    "sparse": lambda g, shape: torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.3),
    "integers": lambda g, shape: (3 * torch.randn(shape, generator=g)).round(),
    "ternary": lambda g, shape: torch.randint(-1, 2, shape, generator=g).float(),
    "two values": lambda g, shape: (torch.rand(shape, generator=g) < 0.2).float(),
}
DISTRIBUTIONS = CONTINUOUS | WITH_TIES


def draw(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    return DISTRIBUTIONS[name](torch.Generator().manual_seed(seed), shape)


def normalised(groups: Tensor) -> Tensor:
    """Groups [n, g] in units of their own range, [-1, 1], in float64; constant ones are left out."""
    groups = groups.double()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    varying = (high > low).squeeze(1)
    return ((groups - (low + high) / 2) / ((high - low) / 2))[varying]


def solved_error(x: Tensor, nbits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Squared error [n] of the solver on normalised groups [n, g], before anything is stored, measured in float64."""
    scale, offset = (t.double().t() for t in solver.fit(x.to(dtype).t().contiguous(), None, nbits))
    codes = ((x - offset) / scale).round().clamp(0, 2**nbits - 1)
    return (x - (scale * codes + offset)).square().sum(1)


def stored_error(weight: Tensor, packed: PackedTensor) -> float:
    """||W - Q|| in float64."""
    return (weight.double() - packed.dequantize().double()).norm().item()


def rounding(packed: PackedTensor) -> float:
    """The most that storing scale and offset in 16 bits can add to ||W - Q||: half a unit in the last place each."""
    scale, offset = (from_storage(t, packed.spec.metadata_dtype).double().abs() for t in (packed.scale, packed.offset))
    info = torch.finfo(torch.float16 if packed.spec.metadata_dtype == "float16" else torch.bfloat16)
    half_ulp = [(t * info.eps / 2).clamp_min(info.smallest_normal * info.eps / 2) for t in (scale, offset)]
    group = packed.spec.layout(*packed.shape).group
    return ((packed.spec.qmax * half_ulp[0] + half_ulp[1]).square().sum() * group).sqrt().item() * 1.01


# --- exact optima by brute force ------------------------------------------------------------------------------------


@cache
def assignments(size: int, nbits: int) -> Tensor:
    """All codes [m, size] that can be optimal: any at 1 bit, the monotone ones (for sorted groups) above it."""
    if nbits == 1:
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)), dtype=torch.float64)
    cuts = torch.tensor(list(itertools.combinations_with_replacement(range(size + 1), 2**nbits - 1)))  # [m, qmax]
    return (torch.arange(size) >= cuts[:, :, None]).sum(1).double()


def optimum(x: Tensor, nbits: int) -> Tensor:
    """The least squared error [n] of groups [n, g] over all codes, each with its regression."""
    codes = assignments(x.shape[1], nbits)
    centred_codes = codes - codes.mean(1, keepdim=True)
    norms = centred_codes.norm(dim=1, keepdim=True)
    directions = (centred_codes / norms)[norms.squeeze(1) > 1e-9]
    centred = x.double().sort(1).values if nbits > 1 else x.double()
    centred = centred - centred.mean(1, keepdim=True)
    if len(directions) == 0:
        return centred.square().sum(1)
    return centred.square().sum(1) - (centred @ directions.t()).amax(1).clamp_min(0).square()


@pytest.mark.parametrize("size", [*range(2, 9), 11])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_bit_is_the_optimum(name: str, size: int) -> None:
    x = normalised(draw(name, (60, size), seed=size))
    torch.testing.assert_close(solved_error(x, 1), optimum(x, 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solved_error(x, 1, torch.float32), optimum(x, 1), rtol=1e-5, atol=1e-10)


@given(values=st.lists(st.integers(-4, 4), min_size=2, max_size=10).filter(lambda v: len(set(v)) > 1))
@settings(deadline=None, derandomize=True)
def test_one_bit_is_the_optimum_with_ties(values: list[int]) -> None:
    x = normalised(torch.tensor([values]))
    torch.testing.assert_close(solved_error(x, 1), optimum(x, 1), rtol=1e-9, atol=1e-12)


@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=10).filter(lambda v: max(v) - min(v) > 1e-3),
)
@settings(deadline=None, derandomize=True)
def test_one_bit_is_the_optimum_for_any_numbers(values: list[float]) -> None:
    x = normalised(torch.tensor([values]))
    torch.testing.assert_close(solved_error(x, 1), optimum(x, 1), rtol=1e-9, atol=1e-12)


def test_one_bit_levels_are_the_means_of_the_two_sides() -> None:
    scale, offset = solver.fit(torch.tensor([[5.0, -1.0, 1.0, 7.0]], dtype=torch.float64).t(), None, 1)
    assert (scale.item(), offset.item()) == (6.0, 0.0)


@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    size=st.sampled_from([3, 8]),
    sigma=st.sampled_from([0.003, 0.02, 1.0, 100.0]),
    metadata_dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_one_bit_as_stored_is_the_optimum_but_for_rounding(
    name: str, size: int, sigma: float, metadata_dtype: str, seed: int
) -> None:
    weight = sigma * draw(name, (8, size), seed)
    packed = quantize(weight, spec16(1, 8, metadata_dtype=metadata_dtype))
    assert stored_error(weight, packed) <= optimum(weight, 1).clamp_min(0).sum().sqrt().item() + rounding(packed)


# Gaps to the exact optimum that were measured on 2,000 groups: 0.00 % in the mean and 3 % at worst for continuous
# values. Groups with many zeros, where the best grid may be wider than the range: 0.3 % in the mean, 2x at worst.
@pytest.mark.parametrize("size", [8, 11, 16, 24])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_two_bits_are_all_but_the_optimum(name: str, size: int) -> None:
    x = normalised(draw(name, (100, size), seed=size))
    error, least = solved_error(x, 2, torch.float32), optimum(x, 2)
    assert (error >= least - 1e-9).all()
    assert error.sum() <= 1.001 * least.sum()
    assert (error <= 1.05 * least + 1e-9).all()


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", WITH_TIES)
def test_two_bits_with_ties_are_within_one_per_cent_in_the_mean(name: str, size: int) -> None:
    x = normalised(draw(name, (300, size), seed=size))
    error, least = solved_error(x, 2, torch.float32), optimum(x, 2).clamp_min(0)
    assert error.sum() <= 1.01 * least.sum() + 1e-6
    assert (error <= 2.5 * least + 1e-6).all()


@given(values=st.lists(st.integers(-6, 6), min_size=2, max_size=10).filter(lambda v: len(set(v)) > 1))
@settings(deadline=None, derandomize=True)
def test_two_bits_never_beat_the_optimum(values: list[int]) -> None:
    x = normalised(torch.tensor([values]))
    assert solved_error(x, 2).item() >= optimum(x, 2).item() - 1e-9


def test_three_bits_in_small_groups() -> None:
    x = normalised(draw("normal", (60, 8), seed=0))
    assert solved_error(x, 3, torch.float32).sum() <= 1.06 * optimum(x, 3).sum()


@given(
    levels=st.lists(st.integers(0, 3), min_size=8, max_size=64),
    scale=st.sampled_from([0.5, 0.01, 3.0]),
    offset=st.sampled_from([0.0, -1.0, 0.25]),
)
@settings(deadline=None, derandomize=True)
def test_what_is_on_a_two_bit_grid_comes_back(levels: list[int], scale: float, offset: float) -> None:
    weight = scale * torch.tensor([levels]).float() + offset
    packed = quantize(weight, spec16(2, 64))
    assert stored_error(weight, packed) <= rounding(packed) + 1e-6


@given(levels=st.lists(st.integers(-1, 1), min_size=8, max_size=64), scale=st.sampled_from([1.0, 0.02, 0.37]))
@settings(deadline=None, derandomize=True)
def test_ternary_weights_are_exact_at_two_bits(levels: list[int], scale: float) -> None:
    weight = scale * torch.tensor([levels]).float()
    packed = quantize(weight, spec16(2, 64))
    assert stored_error(weight, packed) <= rounding(packed) + 1e-6


# --- measured figures ------------------------------------------------------------------------------------------------


# NMSE on Gaussian weights: of PyPI hqq 0.2.8, of least squares from a few starts, of this solver.
@pytest.mark.parametrize(
    ("nbits", "group_size", "hqq", "least_squares", "solver_here"),
    [
        (1, 8, 0.50, 0.21, 0.2117),
        (1, 32, 1.07, 0.32, 0.3224),
        (1, 64, 1.11, 0.34, 0.3428),
        (2, 16, 0.091, 0.066, 0.06503),
        (2, 32, 0.137, 0.088, 0.08699),
        (2, 64, 0.186, 0.102, 0.1013),
        (2, 128, 0.236, 0.110, 0.1093),
        (3, 64, 0.034, 0.027, 0.02670),
        (4, 64, 0.0074, 0.0066, 0.006514),
    ],
)
def test_nmse_on_gaussian_weights(
    nbits: int, group_size: int, hqq: float, least_squares: float, solver_here: float
) -> None:
    weight = 0.02 * draw("normal", (512, 1024), seed=0)
    nmse = quantize(weight, spec16(nbits, group_size)).nmse(weight)
    assert nmse == pytest.approx(least_squares, rel=0.02)
    assert nmse < 1.001 * solver_here
    assert nmse < {1: 0.5, 2: 0.75, 3: 0.8, 4: 0.9}[nbits] * hqq


@pytest.mark.parametrize(
    ("nbits", "group_size", "name", "shift", "cost"),
    [
        (2, 64, "normal", 0, 1.0001),
        (4, 64, "normal", 0, 1.001),
        (8, 64, "normal", 0, 1.015),
        # An offset far from zero is coarse: at shift 50 a float16 one is off by up to 1/64 of a deviation.
        (8, 64, "normal", 10, 1.025),
        (4, 16, "normal", 50, 1.012),
        (4, 8, "uniform", 50, 1.4),
    ],
)
def test_what_storing_in_16_bits_costs(nbits: int, group_size: int, name: str, shift: float, cost: float) -> None:
    weight = draw(name, (256, 512), seed=0) + shift
    groups = weight.view(-1, group_size)
    half_range = (groups.amax(1) - groups.amin(1)).double() / 2
    solved = (solved_error(normalised(groups), nbits, torch.float32) * half_range.square()).sum().item()
    assert stored_error(weight, quantize(weight, spec16(nbits, group_size))) ** 2 < cost * solved


@pytest.mark.parametrize("nbits", [2, 3])
@pytest.mark.parametrize("name", ["normal", "spikes", "student"])
def test_the_range_of_a_whole_row_does_not_mislead(name: str, nbits: int) -> None:
    # The best grid of a long row is a few deviations wide, whatever its range: 30 widths are tried on each.
    if name == "spikes":
        generator = torch.Generator().manual_seed(0)
        spikes = torch.rand(24, 4096, generator=generator) < 0.003
        weight = torch.randn(24, 4096, generator=generator) * (1 + 19 * spikes)
    else:
        weight = draw(name, (24, 4096), seed=0)
    x, qmax = normalised(weight), 2**nbits - 1
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    fit = grids._Fit(x.t().contiguous(), None, qmax)
    starts = [(2 * width * deviation / qmax, mean - width * deviation) for width in torch.linspace(0.8, 12, 30)]
    best = torch.stack([fit.descend(scale.t(), offset.t())[0] for scale, offset in starts]).amin(0).squeeze(0)
    assert (solved_error(x, nbits) <= 1.02 * best).all()


# --- never worse than PyPI hqq ---------------------------------------------------------------------------------------


def hqq_dequantized(weight: Tensor, nbits: int, group_size: int, axis: int) -> Tensor:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight.clone(),
        nbits=nbits,
        group_size=group_size,
        axis=axis,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    return quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})


def hqq_on_the_same_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """What hqq makes of `weight` with the groups of `spec`.

    On axis 0 its own groups are other ones, every (out_features / group_size)-th row and not consecutive rows; the
    rows are reordered for it.
    """
    if spec.axis == 1:
        return hqq_dequantized(weight, spec.nbits, spec.group_size, axis=1)
    out_features, in_features = weight.shape
    turned = weight.view(-1, spec.group_size, in_features).transpose(0, 1).reshape(out_features, in_features)
    result = hqq_dequantized(turned, spec.nbits, spec.group_size, axis=0)
    return result.view(spec.group_size, -1, in_features).transpose(0, 1).reshape(out_features, in_features)


NBITS = st.sampled_from([1, 2, 3, 4, 8])
GROUP_SIZES = st.sampled_from([8, 16, 32, 64, 128])
# hqq isn't scale-equivariant: its shrinkage acts on errors above 0.17.
SIGMAS = st.sampled_from([0.003, 0.02, 0.3, 1.0, 30.0])
SEEDS = st.integers(0, 2**20)


@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    nbits=NBITS,
    group_size=GROUP_SIZES,
    sigma=SIGMAS,
    shift=st.sampled_from([0, 1, 5]),
    seed=SEEDS,
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_groups_are_not_solved_worse_than_by_hqq(
    name: str, nbits: int, group_size: int, sigma: float, shift: int, seed: int
) -> None:
    groups = sigma * (draw(name, (32, group_size), seed) + shift)
    half_range = (groups.amax(1) - groups.amin(1)).double() / 2
    # Below these ranges hqq replaces its min-max scale, by 1 or by 1 / 20,000.
    min_max = (half_range > 0.5e-4) & (half_range > 0.5 * (2**nbits - 1) / 2e4)
    groups, half_range = groups[min_max], half_range[min_max]
    assume(len(groups) > 0)
    theirs = (groups - hqq_dequantized(groups, nbits, group_size, axis=1)).double().norm(dim=1)
    ours = solved_error(normalised(groups), nbits).sqrt() * half_range
    # Up to two bits the search is all but exact: no slack but hqq's own float32 arithmetic. Above, a group may miss
    # the optimum by some per cent, and hqq be lucky there; on all of them it never is.
    slack = 1e-6 * groups.double().norm(dim=1)
    assert (ours <= (1 if nbits <= 2 else 1.05) * theirs + slack).all()
    assert ours.norm() <= theirs.norm() + slack.norm()


@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    nbits=NBITS,
    group_size=GROUP_SIZES,
    axis=st.sampled_from([0, 1]),
    sigma=SIGMAS,
    shift=st.sampled_from([0, 1, 5, 50]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 3)),
    metadata_dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=SEEDS,
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_matrix_is_stored_worse_than_by_hqq_but_for_rounding(
    name: str,
    nbits: int,
    group_size: int,
    axis: int,
    sigma: float,
    shift: int,
    size: tuple[int, int],
    metadata_dtype: str,
    seed: int,
) -> None:
    rows, groups = size
    shape = (rows, groups * group_size) if axis == 1 else (groups * group_size, rows)
    weight = sigma * (draw(name, shape, seed) + shift)
    packed = quantize(weight, spec16(nbits, group_size, axis, metadata_dtype))
    theirs = (weight - hqq_on_the_same_groups(weight, packed.spec)).double().norm().item()
    # hqq keeps float32 scales and zeros here; ours are 16 bits wide, whose rounding is all that may be lost.
    assert stored_error(weight, packed) <= theirs + rounding(packed) + 1e-6 * weight.norm().item()


@given(
    name=st.sampled_from(sorted(CONTINUOUS)),
    nbits=NBITS,
    group_size=GROUP_SIZES,
    axis=st.sampled_from([0, 1]),
    sigma=SIGMAS,
    shift=st.sampled_from([0, 1]),
    seed=SEEDS,
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_matrix_is_stored_worse_than_by_hqq(
    name: str, nbits: int, group_size: int, axis: int, sigma: float, shift: int, seed: int
) -> None:
    weight = sigma * (draw(name, (128, 128), seed) + shift)
    spec = spec16(nbits, group_size, axis)
    theirs = (weight - hqq_on_the_same_groups(weight, spec)).double().norm().item()
    # Rounding of the metadata included, no slack at all.
    assert stored_error(weight, quantize(weight, spec)) < theirs


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_no_layer_of_a_real_model_is_stored_worse_than_by_hqq(story_model: Path, nbits: int) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(story_model / "model.safetensors")
    compared = 0
    for name, weight in weights.items():
        if ".layers.1." not in name or weight.dim() != 2:
            continue
        for group_size, axis in itertools.product((8, 32, 64), (0, 1)):
            if weight.shape[axis] % group_size:
                continue
            spec = spec16(nbits, group_size, axis)
            theirs = (weight - hqq_on_the_same_groups(weight.float(), spec)).double().norm().item()
            assert stored_error(weight, quantize(weight, spec)) < theirs, (name, spec)
            compared += 1
    assert compared >= 20


# --- invariances -----------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    nbits=NBITS,
    group_size=st.sampled_from([8, 64, WHOLE_ROW]),
    exponent=st.integers(-60, 60),
    seed=SEEDS,
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_powers_of_two_change_only_the_exponents(
    name: str, nbits: int, group_size: int, exponent: int, seed: int
) -> None:
    weight = draw(name, (4, 128), seed)
    spec = spec16(nbits, group_size, metadata_dtype="bfloat16")  # float16 has subnormals nearby
    packed, scaled = quantize(weight, spec), quantize(weight * 2.0**exponent, spec)
    assert torch.equal(scaled.W_q, packed.W_q)
    assert torch.equal(scaled.dequantize(), packed.dequantize() * 2.0**exponent)


@pytest.mark.parametrize(("nbits", "group_size"), [(1, 32), (2, 64), (2, 8), (1, WHOLE_ROW)])
@pytest.mark.parametrize("options", [SolverOptions(), SolverOptions(lp_norm=0.7)], ids=str)
def test_a_weight_and_a_thousand_times_it_have_the_same_codes(
    nbits: int, group_size: int, options: SolverOptions
) -> None:
    # Of these weights the product is exact, and so is each difference; otherwise rounding may turn a tie.
    weight = (50 * draw("student", (64, 1024), seed=1)).round() / 1024
    spec = spec16(nbits, group_size)
    packed, scaled = (solver.solve(w, spec, options) for w in (weight, 1000 * weight))
    assert torch.equal(packed.codes, scaled.codes)
    torch.testing.assert_close(scaled.scale.float(), 1000 * packed.scale.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1000.0, 0.003])
@pytest.mark.parametrize(("nbits", "group_size"), [(3, 32), (4, 64)])
def test_other_factors_change_only_the_rounding_of_the_metadata(nbits: int, group_size: int, factor: float) -> None:
    weight = 0.5 * draw("normal", (64, 1024), seed=1)
    spec = spec16(nbits, group_size)
    packed, scaled = quantize(weight, spec), quantize(factor * weight, spec)
    codes, scaled_codes = (solver.solve(w, spec).codes for w in (weight, factor * weight))
    assert (codes != scaled_codes).double().mean() < 1e-3 * spec.qmax
    assert scaled.nmse(factor * weight) == pytest.approx(packed.nmse(weight), rel=1e-4)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 64, WHOLE_ROW])
def test_solving_is_deterministic_and_chunks_do_not_matter(
    nbits: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw("student", (9, 200), seed=3)
    spec = spec16(nbits, group_size)
    reference = quantize(weight, spec).state()
    for chunk in (solver._CHUNK_CPU, 1, 300, 1024):
        monkeypatch.setattr(solver, "_CHUNK_CPU", chunk)
        for name, tensor in quantize(weight, spec).state().items():
            assert torch.equal(tensor, reference[name]), (chunk, name)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_rows_are_solved_independently(nbits: int) -> None:
    weight = draw("normal", (6, 172), seed=4)
    spec = spec16(nbits, 64)
    reference = quantize(weight, spec).dequantize()
    for row in range(len(weight)):
        assert torch.equal(quantize(weight[row : row + 1], spec).dequantize(), reference[row : row + 1])


@pytest.mark.parametrize("nbits", [1, 2])
def test_order_within_a_group_does_not_matter(nbits: int) -> None:
    weight = draw("normal", (16, 64), seed=5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    spec = spec16(nbits, 64)
    turned = quantize(weight[:, order], spec)
    assert turned.nmse(weight[:, order]) == pytest.approx(quantize(weight, spec).nmse(weight), rel=1e-5)


# --- degenerate groups -----------------------------------------------------------------------------------------------

EVERY_SPEC = [spec16(nbits, group) for nbits in (1, 2, 3, 4, 8) for group in (8, 64, WHOLE_ROW)]


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1.0009765625, 2.0**-24])
def test_constant_groups_are_exact_where_representable(spec: QuantSpec, value: float) -> None:
    weight = torch.full((3, 72), value)
    solution = solver.solve(weight, spec)
    assert not solution.scale.any()
    assert not solution.codes.any()
    assert torch.equal(quantize(weight, spec).dequantize(), weight)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_constant_groups_are_rounded_where_not_representable(spec: QuantSpec) -> None:
    weight = torch.full((3, 72), 0.1)
    assert torch.equal(quantize(weight, spec).dequantize(), weight.half().float())


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("value", [1.0, -7.0])
def test_one_outlier_in_zeros_is_exact(spec: QuantSpec, value: float) -> None:
    weight = torch.zeros(2, 64)
    weight[0, 5] = value
    packed = quantize(weight, spec)
    assert stored_error(weight, packed) <= rounding(packed)
    assert not packed.dequantize()[1].any()


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_subnormal_weights_come_out_finite_and_no_worse_than_zero(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-7, 1e-20, 1e-39, 1e-44):
        weight = scale * torch.randn(4, 64, generator=generator)
        for metadata_dtype in ("float16", "bfloat16"):
            result = quantize(weight, spec.replace(metadata_dtype=metadata_dtype)).dequantize()
            assert torch.isfinite(result).all()
            assert (weight.double() - result.double()).norm() <= weight.double().norm()


@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_tiny_weights_lose_nothing_with_bfloat16_metadata(nbits: int) -> None:
    # Squares of such weights underflow in float32: errors have to be compared in other units.
    weight = draw("normal", (16, 64), seed=6)
    spec = spec16(nbits, 64, metadata_dtype="bfloat16")
    assert quantize(weight * 2.0**-100, spec).nmse(weight * 2.0**-100) == quantize(weight, spec).nmse(weight)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (3, 5), (2, 13), (5, 172), (1, 300)])
def test_odd_widths(spec: QuantSpec, shape: tuple[int, int]) -> None:
    weight = draw("normal", shape, seed=7)
    packed = quantize(weight, spec)
    result = packed.dequantize()
    assert result.shape == weight.shape
    assert packed.nmse(weight) < {1: 0.5, 2: 0.2, 3: 0.06, 4: 0.02, 8: 1e-3}[spec.nbits]
    if shape[1] == 1:
        assert torch.equal(result, weight.half().float())


@pytest.mark.parametrize("nbits", [1, 2])
def test_a_tail_group_is_solved_on_its_own_weights(nbits: int) -> None:
    # 172 = 2 * 64 + 44: padding takes no part in the fit.
    weight = draw("normal", (8, 172), seed=8) + 3
    tail = weight[:, 128:]
    spec = spec16(nbits, 64)
    assert torch.equal(quantize(weight, spec).dequantize()[:, 128:], quantize(tail, spec).dequantize())


def test_long_rows_far_from_zero() -> None:
    weight = 100 + draw("normal", (2, 20000), seed=9)
    packed = quantize(weight, spec16(1, WHOLE_ROW))
    assert stored_error(weight, packed) ** 2 / weight.numel() == pytest.approx(1 - 2 / torch.pi, rel=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_refused(value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 64, dtype=dtype)
    weight[3, 63] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, QuantSpec())


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_weights_beyond_float16_are_refused_and_fit_bfloat16(nbits: int) -> None:
    weight = 1e6 * draw("normal", (8, 64), seed=10)
    with pytest.raises(ValueError, match="too large for scales in float16; bfloat16 has the range"):
        quantize(weight, spec16(nbits, 64))
    packed = quantize(weight, spec16(nbits, 64, metadata_dtype="bfloat16"))
    small = quantize(weight / 1e6, spec16(nbits, 64, metadata_dtype="bfloat16"))
    assert packed.nmse(weight) == pytest.approx(small.nmse(weight / 1e6), rel=0.05, abs=1e-5)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_weights_near_the_end_of_float32_fit_bfloat16(nbits: int) -> None:
    weight = 2.0**124 * draw("uniform", (8, 64), seed=11)
    spec = spec16(nbits, 64, metadata_dtype="bfloat16")
    result = quantize(weight, spec).dequantize() * 2.0**-124
    assert torch.equal(result, quantize(weight * 2.0**-124, spec).dequantize())


@pytest.mark.parametrize("metadata_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("nbits", [1, 2])
@pytest.mark.parametrize("one_sided", [False, True])
def test_float64_weights_beyond_float32_are_refused(nbits: int, metadata_dtype: str, one_sided: bool) -> None:
    weight = 1e300 * draw("normal", (4, 64), seed=12).double()
    with pytest.raises(ValueError, match=f"too large for scales in {metadata_dtype}"):
        quantize(weight.abs() if one_sided else weight, spec16(nbits, 64, metadata_dtype=metadata_dtype))
