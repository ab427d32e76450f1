"""The robust norm: shrinkage, what it changes, and that units do not matter."""

from __future__ import annotations

import pytest
import torch

from hqqplus.quantization import QuantSpec, solver
from hqqplus.quantization.robust import shrink
from hqqplus.quantization.solver import SolverOptions


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_shrinkage_starts_at_the_threshold_and_spares_what_is_large(p: float) -> None:
    threshold = 0.5
    beta = threshold ** (p - 2)
    r = torch.tensor([-5.0, -0.49, 0.0, 0.49, 0.51, 5.0], dtype=torch.float64)
    e = shrink(r, beta, p)
    assert (e[[1, 2, 3]] == 0).all()
    assert 0 < e[4] < 0.51
    assert e[5] == -e[0]
    assert e[5] == pytest.approx(5 - 5 ** (p - 1) / beta)


def lp_error(weight: torch.Tensor, solution: solver.Solution, group: int, p: float) -> torch.Tensor:
    q = solution.codes.view(-1, group).float()
    scale, offset = solution.scale.reshape(-1, 1).float(), solution.offset.reshape(-1, 1).float()
    x = weight.view(-1, group)
    return ((x - scale * q - offset) / x.std(1, keepdim=True)).abs().pow(p).sum(1)


@pytest.mark.parametrize("nbits", [1, 2, 3])
def test_it_lowers_its_own_norm_and_changes_codes(nbits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (
        0.02 * torch.randn(64, 256, generator=generator) * (1 + 9 * (torch.rand(64, 256, generator=generator) < 0.02))
    )
    spec = QuantSpec(nbits, 64)
    squares = solver.solve(weight, spec)
    robust = solver.solve(weight, spec, SolverOptions(lp_norm=0.7, threshold=0.3))
    # Weights of a usual size, for which HQQ's own threshold (0.17) never fires: here it does.
    assert (squares.codes != robust.codes).float().mean() > 0.01
    before, after = lp_error(weight, squares, 64, 0.7), lp_error(weight, robust, 64, 0.7)
    assert (after <= before * 1.05).all()  # what rounding to 16 bits may add where errors are all but zero
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize(
    "options", [{"lp_norm": 1.0}, {"lp_norm": 0.0}, {"lp_norm": 3}, {"threshold": 0}, {"gain": 2}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        SolverOptions(**options)
