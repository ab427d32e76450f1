from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.quantization import WHOLE_ROW, PackedTensor, QuantSpec, SolverOptions, feedback, quantize
from hqqplus.quantization.feedback import error_feedback, output_error
from hqqplus.quantization.metadata import decode_values, metadata_views
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.solver import Solution
from hqqplus.quantization.spec import BLOCK


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_moment(width: int, seed: int = 0, rank: int | None = None, dead: int = 0) -> Tensor:
    """E[x x^T] of inputs that depend on one another; of the given rank, and with `dead` columns that are never
    active."""
    tokens = normal(rank or 4 * width, width, seed=seed + 1) @ normal(width, width, seed=seed + 2)
    tokens = tokens * torch.logspace(-1, 1, width).double()
    tokens[:, width - dead :] = 0
    return tokens.t() @ tokens / len(tokens)


def lost(weight: Tensor, packed: PackedTensor, moment: Tensor) -> Tensor:
    """The error of each row, e^T M e."""
    error = weight.double() - packed.dequantize().double()
    return ((error @ moment) * error).sum(1)


def codes_of(packed: PackedTensor) -> Tensor:
    layout = packed.spec.layout(*packed.shape)
    return unpack(packed.W_q, packed.spec.nbits, layout.plane)[:, : layout.width]


def problem_of(moment: Tensor, spec: QuantSpec, rows: int, damping: float = 1e-9) -> Any:
    layout = spec.layout(rows, len(moment))
    options = SolverOptions()
    return feedback._problem(moment, damping, spec, options, feedback.solve, layout, torch.float64)


@given(
    nbits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([8, 16, 64, WHOLE_ROW]),
    rows=st.integers(1, 12),
    width=st.integers(1, 40),
    metadata_bits=st.sampled_from([8, 16]),
    rank=st.sampled_from([1, 5, None]),
    dead=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_never_worse_than_weighted_least_squares(
    nbits: int,
    group_size: int,
    rows: int,
    width: int,
    metadata_bits: int,
    rank: int | None,
    dead: int,
    scale: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = (normal(rows, width, seed=seed) * scale).to(dtype)
    moment = random_moment(width, seed, rank, min(dead, width)) / scale
    spec = QuantSpec(nbits, group_size, metadata_bits=metadata_bits)
    packed = error_feedback(weight, spec, moment)
    plain = quantize(weight, spec, importance=moment.diagonal())
    assert (packed.spec, packed.shape) == (spec, (rows, width))
    for name, tensor in plain.state().items():
        assert (packed.state()[name].shape, packed.state()[name].dtype) == (tensor.shape, tensor.dtype)
    before, after = lost(weight, plain, moment), lost(weight, packed, moment)
    if metadata_bits == 8:  # rows that share blocks of metadata share their fate
        before, after = before.sum(), after.sum()
    # In float32 an error is known no better than that.
    noise = 1e-5 * ((weight.double() @ moment) * weight.double()).sum() + 1e-30
    assert (after <= before * (1 + 1e-4) + noise).all()


@pytest.mark.parametrize("nbits", [1, 2, 3])
def test_without_correlations_it_is_plain_rounding_to_the_solvers_grid(nbits: int) -> None:
    weight, spec = normal(12, 40), QuantSpec(nbits, 16, metadata_bits=16)
    moment = 3 * torch.eye(40, dtype=torch.float64)
    plain = quantize(weight, spec)
    rounded = error_feedback(weight, spec, moment, rounds=0, sweeps=0)
    # The refit within a group finds nothing better than the last bits of the solver's grid.
    torch.testing.assert_close(rounded.nmse(weight), plain.nmse(weight), rtol=2e-4, atol=0)
    assert (codes_of(rounded) != codes_of(plain)).float().mean() < 0.01
    full = error_feedback(weight, spec, moment)
    torch.testing.assert_close(full.nmse(weight), plain.nmse(weight), rtol=2e-3, atol=0)


@pytest.mark.parametrize("moment", [torch.zeros(24, 24), torch.eye(24)], ids=["zero", "eye"])
def test_a_moment_that_says_nothing(moment: Tensor) -> None:
    weight = normal(5, 24)
    packed = error_feedback(weight, QuantSpec(2, 8, metadata_bits=16), moment)
    assert packed.nmse(weight) == pytest.approx(quantize(weight, packed.spec).nmse(weight), rel=2e-3)


@pytest.mark.parametrize("nbits", [1, 2])
def test_between_the_optimum_and_least_squares(nbits: int) -> None:
    """Six columns in one group: every choice of codes can be tried, each with the best grid for it."""
    width, rows = 6, 40
    weight, moment = normal(rows, width), random_moment(width)
    codes = torch.tensor(list(itertools.product(range(2**nbits), repeat=width)), dtype=torch.float64)
    scale, offset = feedback._line(
        weight.t().repeat_interleave(len(codes), 1), codes.t().repeat(1, rows).contiguous(), moment
    )
    values = (codes.repeat(rows, 1) * scale[:, None] + offset[:, None]).view(rows, len(codes), width)
    errors = weight[:, None] - values
    best = ((errors @ moment) * errors).sum(2).amin(1)  # [rows]
    spec = QuantSpec(nbits, 8, metadata_bits=16)
    found = lost(weight, error_feedback(weight, spec, moment, damping=1e-6), moment)
    plain = lost(weight, quantize(weight, spec, importance=moment.diagonal()), moment)
    assert (found >= best * (1 - 1e-2) - 1e-4 * plain).all()  # stored grids are rounded to 11 bits
    excess, room = float((found - best).sum()), float((plain - best).sum())
    assert excess < 0.2 * room


def test_each_step_lowers_the_error() -> None:
    weight, moment = normal(64, 160), random_moment(160)
    for spec in (QuantSpec(1, 32), QuantSpec(2, 64), QuantSpec(3, 32, metadata_bits=16)):
        errors = [
            output_error(weight, packed, moment)
            for packed in (
                quantize(weight, spec),
                quantize(weight, spec, importance=moment.diagonal()),
                error_feedback(weight, spec, moment, rounds=0, sweeps=1),
                error_feedback(weight, spec, moment, rounds=1, sweeps=1),
                error_feedback(weight, spec, moment, rounds=3),
            )
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.6 * errors[1]


def gptq(wanted: Tensor, scale: Tensor, offset: Tensor, metric: Tensor, qmax: int) -> Tensor:
    """Codes [rows, width] the way the paper tells it: round a column, move all others to make up for it, go on with
    the inverse of what is left of the metric."""
    now, inverse, codes = wanted.clone(), torch.linalg.inv(metric), torch.zeros_like(wanted)
    for column in range(wanted.shape[1]):
        codes[:, column] = ((now[:, column] - offset) / scale).round().clamp(0, qmax)
        error = (now[:, column] - (codes[:, column] * scale + offset)) / inverse[0, 0]
        now[:, column:] -= error[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes


@pytest.mark.parametrize("columns", [3, 128])
def test_feedback_is_that_of_gptq(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "_COLUMNS", columns)
    wanted, metric = normal(30, 17), random_moment(17)
    problem = problem_of(metric, QuantSpec(2, 8), 30)
    scale, offset = normal(30, seed=5).abs() + 0.3, normal(30, seed=6)
    codes = feedback._round_columns(wanted.t().contiguous(), scale, offset, problem.factor, 3)
    assert torch.equal(codes.t(), gptq(wanted, scale, offset, problem.metric, 3))


def test_errors_reach_the_groups_to_the_right() -> None:
    """With grids that do not depend on the weights, groups make no difference to feedback."""

    def fixed(matrix: Tensor, spec: QuantSpec, options: SolverOptions, importance: Tensor | None) -> Solution:
        grid = torch.ones(len(matrix), 1, dtype=torch.float16)
        return Solution(torch.zeros_like(matrix, dtype=torch.uint8), grid, -1.5 * grid)

    weight, moment = normal(30, 40), random_moment(40)
    spec = QuantSpec(2, 8, metadata_bits=16)
    problem = feedback._problem(moment, 0.01, spec, SolverOptions(), fixed, spec.layout(30, 40), torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "_GROUP_REFITS", 0)
        codes, _ = feedback._feedback(weight.t().contiguous(), problem, 1.0)
    one = torch.ones(30, dtype=torch.float64)
    assert torch.equal(codes.t(), gptq(weight, one, -1.5 * one, problem.metric, 3))


def state_of(seed: int, nbits: int, rows: int, width: int, group: int) -> tuple[Any, Tensor, Tensor, Any]:
    problem = problem_of(random_moment(width, seed), QuantSpec(nbits, group), rows)
    groups = problem.layout.groups
    codes = torch.randint(0, 2**nbits, (width, rows), generator=torch.Generator().manual_seed(seed)).double()
    grid = feedback._Grid(normal(groups, rows, seed=seed).abs() / 2, normal(groups, rows, seed=seed + 1))
    return problem, normal(rows, width, seed=seed + 2).t().contiguous(), codes, grid


def total(problem: Any, weights: Tensor, codes: Tensor, grid: Any) -> Tensor:
    errors = feedback._errors(weights, codes, grid, problem.layout)
    return ((problem.metric @ errors) * errors).sum(0)


@given(st.sampled_from([1, 2, 3]), st.integers(1, 6), st.integers(1, 20), st.sampled_from([8, 16]), st.integers(0, 99))
@settings(max_examples=15)
def test_descent_ends_where_no_single_code_helps(nbits: int, rows: int, width: int, group: int, seed: int) -> None:
    problem, weights, codes, grid = state_of(seed, nbits, rows, width, group)
    before = total(problem, weights, codes, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "_COLUMNS", 5)
        feedback._descend(weights, codes, grid, problem, sweeps=40)
    after = total(problem, weights, codes, grid)
    assert (after <= before * (1 + 1e-12)).all()
    for column, code in itertools.product(range(width), range(2**nbits)):
        changed = codes.clone()
        changed[column] = code
        assert (total(problem, weights, changed, grid) >= after * (1 - 1e-9)).all()


@given(st.sampled_from([1, 2, 3]), st.integers(1, 6), st.integers(2, 30), st.sampled_from([8, 16]), st.integers(0, 99))
@settings(max_examples=15)
def test_refit_solves_least_squares(nbits: int, rows: int, width: int, group: int, seed: int) -> None:
    problem, weights, codes, grid = state_of(seed, nbits, rows, width, group)
    root = torch.linalg.cholesky(problem.metric)  # L L^T: the error is |L^T e|^2
    columns = torch.arange(width) // group
    best = []
    for row in range(rows):
        design = torch.zeros(width, 2 * problem.layout.groups, dtype=torch.float64)
        design[range(width), columns] = codes[:, row]
        design[range(width), columns + problem.layout.groups] = 1
        solution = torch.linalg.lstsq(root.t() @ design, root.t() @ weights[:, row : row + 1], driver="gelsd").solution
        best.append((root.t() @ (weights[:, row : row + 1] - design @ solution)).square().sum())
    before, given_codes = total(problem, weights, codes, grid), codes.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "_EQUATIONS", 100)  # a few rows at a time
        fitted = feedback._refit(weights, codes, grid, problem)
    assert (fitted.scale >= 0).all()
    turned = (codes != given_codes).any(1)
    assert torch.equal(torch.where(turned[:, None] & (codes != given_codes), 2**nbits - 1 - codes, codes), given_codes)
    torch.testing.assert_close(
        total(problem, weights, codes, fitted) / before, torch.stack(best) / before, atol=1e-4, rtol=1e-3
    )


def test_metadata_are_coordinates_too() -> None:
    """What is stored in the end cannot be bettered by another code of a single scale, middle or weight."""
    weight, moment, spec = normal(4, 24), random_moment(24), QuantSpec(2, 8)
    packed = error_feedback(weight, spec, moment, rounds=12, sweeps=12, damping=1e-9)
    best = lost(weight, packed, moment).sum()
    for name in ("scale", "offset", "W_q"):
        tensor = getattr(packed, name)
        for index in itertools.product(*map(range, tensor.shape)):
            for change in (-1, 1) if name != "W_q" else (1, -1, 4, -4, 16, -16, 64, -64):
                old = int(tensor[index])
                field = (3, 12, 48, 192)[(1, 4, 16, 64).index(abs(change))] if name == "W_q" else 255
                new = (old & field) + change
                if not 0 <= new <= field or new & ~field:
                    continue
                tensor[index] = (old & ~field) | new
                assert lost(weight, packed, moment).sum() >= best * (1 - 1e-6)
                tensor[index] = old


@pytest.mark.parametrize("metadata_bits", [8, 16])
def test_chunks_change_nothing(metadata_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = normal(150, 24), random_moment(24)
    spec = QuantSpec(2, 8, metadata_bits=metadata_bits)  # three groups a row: 128 rows share their blocks
    whole = error_feedback(weight, spec, moment)
    monkeypatch.setattr(feedback, "_CHUNK_CPU", 24 * 40)
    cut = error_feedback(weight, spec, moment)
    torch.testing.assert_close(cut.dequantize(), whole.dequantize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "groups"), [(3, 192), (5, 96), (130, 3), (2, 128), (7, 1)])
def test_rows_fall_back_with_the_blocks_that_they_share(rows: int, groups: int) -> None:
    weight = normal(rows, groups * 8)
    spec = QuantSpec(2, 8)
    good, bad = quantize(weight, spec), quantize(torch.zeros_like(weight), spec)
    together = BLOCK // torch.gcd(torch.tensor(BLOCK), torch.tensor(groups)).item()
    moment = torch.eye(groups * 8, dtype=torch.float64)
    for pair in ((good, bad), (bad, good)):
        chosen = feedback._better(weight, moment, *pair, int(together))
        assert all(torch.equal(tensor, good.state()[name]) for name, tensor in chosen.state().items())
    # One set of rows is better here, all others there.
    half = weight.clone()
    half[together:] = 0
    mixed = feedback._better(weight, moment, quantize(half, spec), bad, int(together))
    torch.testing.assert_close(mixed.dequantize()[:together], good.dequantize()[:together])
    assert not mixed.dequantize()[together:].any()


def test_columns_that_are_never_active_are_rounded_to_the_nearest() -> None:
    weight, moment = normal(8, 40), random_moment(40, dead=6)
    packed = error_feedback(weight, QuantSpec(2, 16), moment, sweeps=30)
    scale, middle, blocks = metadata_views(packed.scale, packed.offset, packed.blocks, "float16")
    assert blocks is not None
    scale, middle = decode_values(scale, blocks[:, :2]), decode_values(middle, blocks[:, 2:])
    levels = middle[:, 2, None] + scale[:, 2, None] * (torch.arange(4) - 1.5)  # of the last group
    distance = (weight[:, 34:, None] - levels[:, None]).abs()
    chosen = distance.gather(2, codes_of(packed)[:, 34:, None].long())[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2))


@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_units_do_not_matter(scale: float) -> None:
    weight, moment = normal(16, 32), random_moment(32)
    spec = QuantSpec(2, 16, metadata_dtype="bfloat16")
    expected = output_error(weight, error_feedback(weight, spec, moment), moment)
    assert output_error(weight * scale, error_feedback(weight * scale, spec, moment / 7), moment) == pytest.approx(
        expected, rel=0.05
    )


def test_degenerate_weights() -> None:
    moment = random_moment(24)
    for weight in (torch.zeros(3, 24), torch.full((3, 24), 0.5), torch.eye(24)[:3], torch.ones(1, 24) * 1e-20):
        packed = error_feedback(weight, QuantSpec(2, 8), moment)
        assert torch.isfinite(packed.dequantize()).all()
        assert output_error(weight, packed, moment) <= 1e-3 or weight.abs().max() < 1e-10
    assert error_feedback(torch.ones(1, 1), QuantSpec(1, 8), torch.ones(1, 1)).dequantize().item() == pytest.approx(
        1, rel=2e-3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": QuantSpec(2, 8, axis=0)}, "axis 1"),
        ({"moment": torch.eye(7)}, r"it must be floats \[8, 8\]"),
        ({"moment": torch.ones(8)}, r"it must be floats \[8, 8\]"),
        ({"moment": torch.full((8, 8), torch.nan)}, "finite"),
        ({"moment": -torch.eye(8)}, "not negative"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"options": SolverOptions(gain=1.0)}, "no gain"),
        ({"options": SolverOptions(lp_norm=0.7)}, "lp_norm"),
        ({"weight": torch.full((2, 8), torch.inf)}, "NaN or infinite"),
        ({"weight": torch.full((2, 8), 1e9)}, "too large for scales in float16"),
        ({"weight": torch.ones(8)}, "matrix of floats"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"weight": torch.rand(2, 8), "spec": QuantSpec(2, 8), "moment": torch.eye(8), **change}
    with pytest.raises(ValueError, match=message):
        error_feedback(**arguments)


def test_a_real_layer_on_text_that_it_was_not_calibrated_on(shared: Path) -> None:
    """On the inputs that a layer of a real model has, a third of the error goes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hqqplus.calibration.moments import observe_inputs
    from hqqplus.data import load_rows

    folder = shared / "models" / "tinystories-656K"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    moments = []
    for file in ("train_v2", "validation"):
        texts = load_rows(str(shared / "data" / "tinystories" / f"{file}.jsonl"), "train[:40]")["text"]
        with torch.no_grad(), observe_inputs(model, names) as seen:
            for text in texts:
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:256]]))
        moments.append(seen)
    for name in names:
        weight, spec = model.get_submodule(name).weight.detach(), QuantSpec(2, 64)
        known, unseen = (seen[name].matrix for seen in moments)
        plain = quantize(weight, spec, importance=known.diagonal())
        found = error_feedback(weight, spec, known)
        assert output_error(weight, found, unseen) < 0.75 * output_error(weight, plain, unseen)
