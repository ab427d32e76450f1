from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqqplus.quantization import QuantSpec, candidate_specs, quantize
from hqqplus.quantization.allocation import Option, choose, measure_nmse, sample_rows, stored_bits

OPTION = st.builds(Option, st.integers(0, 40), st.integers(0, 1000).map(lambda value: value / 64))
PROBLEM = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=0, max_size=5)


def cost(problem: list[list[Option]], chosen: list[int]) -> int:
    return sum(options[index].cost for options, index in zip(problem, chosen, strict=True))


def loss(problem: list[list[Option]], chosen: list[int]) -> float:
    return sum(options[index].loss for options, index in zip(problem, chosen, strict=True))


def optimum(problem: list[list[Option]], budget: int) -> float:
    """The least loss within the budget, by trying everything; infinite where nothing fits."""
    every = itertools.product(*(range(len(options)) for options in problem))
    return min((loss(problem, list(c)) for c in every if cost(problem, list(c)) <= budget), default=math.inf)


def cheapest(problem: list[list[Option]]) -> int:
    return sum(min(option.cost for option in options) for options in problem)


class TestChoose:
    @given(PROBLEM, st.integers(0, 220))
    def test_is_the_best_of_all_choices(self, problem: list[list[Option]], budget: int) -> None:
        if budget < cheapest(problem):
            with pytest.raises(ValueError, match="below the smallest possible"):
                choose(problem, budget)
            return
        chosen = choose(problem, budget)
        assert cost(problem, chosen) <= budget
        assert loss(problem, chosen) == pytest.approx(optimum(problem, budget))

    @given(PROBLEM, st.integers(0, 220), st.integers(1, 60))
    def test_a_coarse_table_keeps_the_budget_and_the_stated_bound(
        self, problem: list[list[Option]], extra: int, max_units: int
    ) -> None:
        low, high = cheapest(problem), sum(max(option.cost for option in options) for options in problem)
        budget = low + extra
        chosen = choose(problem, budget, max_units)
        assert cost(problem, chosen) <= budget
        unit = -(-(high - low) // max_units)
        bound = optimum(problem, max(low, budget - len(problem) * unit))
        assert loss(problem, chosen) <= bound + 1e-9

    @given(PROBLEM, st.integers(0, 200), st.integers(0, 30), st.integers(1, 300))
    def test_more_to_spend_never_loses_more(
        self, problem: list[list[Option]], extra: int, more: int, max_units: int
    ) -> None:
        budget = cheapest(problem) + extra
        less, greater = (loss(problem, choose(problem, b, max_units)) for b in (budget, budget + more))
        assert greater <= less + 1e-9

    @given(PROBLEM, st.integers(1, 10**9), st.integers(0, 220))
    def test_the_unit_of_cost_is_no_matter(self, problem: list[list[Option]], factor: int, extra: int) -> None:
        budget = cheapest(problem) + extra
        scaled = [[Option(option.cost * factor, option.loss) for option in options] for options in problem]
        assert choose(scaled, budget * factor) == choose(problem, budget)

    def test_a_large_problem_is_exact(self) -> None:
        # 32 blocks of a Llama-3-8B. All layers of a kind alike, so that the optimum is known: the relaxation's, where
        # the budget is used up by whole steps of equal worth.
        shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336)] * 32
        specs = candidate_specs((2, 3), (64,), metadata_bits=16)
        problem = [
            [Option(stored_bits(s, *shape), 4.0**-s.nbits * math.prod(shape)) for s in specs] for shape in shapes
        ]
        weights = sum(math.prod(shape) for shape in shapes)
        budget = 3 * weights
        chosen = choose(problem, budget)
        assert cost(problem, chosen) == budget
        assert loss(problem, chosen) == pytest.approx(weights * (4.0**-2 + 4.0**-3) / 2)

    def test_the_message_gives_the_range(self) -> None:
        problem = [[Option(10, 1.0), Option(20, 0.0), Option(99, 0.5)], [Option(5, 0.0)]]
        with pytest.raises(ValueError, match=r"a budget of 14 bits is below .* these take 15 to 25"):
            choose(problem, 14)

    @pytest.mark.parametrize(
        ("problem", "message"),
        [
            ([[Option(1, 1.0)], []], "layer 1 has no option"),
            ([[Option(1, float("nan"))]], "layer 0: losses must be finite"),
            ([[Option(-1, 1.0)]], "costs 0 or more"),
        ],
    )
    def test_bad_problems_are_refused(self, problem: list[list[Option]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            choose(problem, 10)


class TestMeasure:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_a_small_matrix_is_measured_whole(self, axis: int) -> None:
        torch.manual_seed(0)
        weight = torch.randn(48, 80)
        specs = candidate_specs((1, 2, 4), (32, 64), axis=axis)
        errors = measure_nmse(weight, specs)
        assert errors == tuple(quantize(weight, spec).nmse(weight) for spec in specs)
        by_spec = dict(zip(specs, errors, strict=True))
        assert all(by_spec[s.replace(nbits=4)] < by_spec[s.replace(nbits=2)] < by_spec[s] for s in specs[:2])

    @pytest.mark.parametrize("axis", [0, 1])
    def test_a_large_matrix_is_judged_by_a_sample(self, axis: int) -> None:
        torch.manual_seed(0)
        # Rows (columns) of rising size: a sample from one end would give another error.
        weight = torch.randn(512, 256) * torch.linspace(0.1, 2, 512)[:, None] + torch.linspace(0, 3, 512)[:, None]
        weight = weight if axis == 1 else weight.t().contiguous()
        specs = [QuantSpec(2, 64, axis)]
        (whole,), (part,) = measure_nmse(weight, specs), measure_nmse(weight, specs, sample=2**14)
        assert part == pytest.approx(whole, rel=0.03)
        assert part != whole
        assert measure_nmse(weight, specs, sample=2**14) == (part,)

    @given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 400), st.sampled_from([0, 1]))
    def test_a_sample_is_evenly_spaced_whole_rows(self, rows: int, width: int, sample: int, axis: int) -> None:
        weight = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
        part = sample_rows(weight if axis == 1 else weight.t(), axis, sample)
        part = part if axis == 1 else part.t()
        assert part.shape[1] == width
        assert len(part) == max(1, min(rows, sample // width))
        places = (part[:, 0] / width).long().tolist()
        assert torch.equal(part, weight[places])
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        # as much is left out before the first as after the last, but for rounding
        assert abs(places[0] - (rows - 1 - places[-1])) <= 1

    def test_bad_weights_are_refused(self) -> None:
        for weight in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(0, 4)):
            with pytest.raises(ValueError, match="expected a non-empty matrix of floats"):
                measure_nmse(weight, [QuantSpec()])
        with pytest.raises(ValueError, match="NaN"):
            measure_nmse(torch.full((4, 8), float("nan")), [QuantSpec()])

    @pytest.mark.parametrize("metadata_bits", [16, 8])
    def test_stored_bits_are_those_of_the_tensors(self, metadata_bits: int) -> None:
        torch.manual_seed(0)
        for spec in candidate_specs((1, 2, 3, 4), (32, 64, 128), metadata_bits=metadata_bits):
            for shape in ((7, 172), (64, 64)):
                packed = quantize(torch.randn(shape), spec)
                stored = sum(8 * t.numel() * t.element_size() for t in packed.state().values())
                assert stored_bits(spec, *shape) == stored

    def test_candidates(self) -> None:
        specs = candidate_specs((1, 2), (32, 64), metadata_dtype="bfloat16")
        assert specs == tuple(
            QuantSpec(bits, group, metadata_dtype="bfloat16") for bits in (1, 2) for group in (32, 64)
        )
        with pytest.raises(ValueError, match="nbits is 5"):
            candidate_specs((5,))
