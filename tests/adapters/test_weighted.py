from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.adapters import apply_residual_start, residual_factors
from hqqplus.adapters import weighted as module
from hqqplus.adapters.weighted import WeightedFactors, residual_energy, weighted_factors
from hqqplus.quantization import QuantSpec, quantize


def random_problem(out: int, width: int, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A residual [out, width] and a moment [width, width] far from white, of the given rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = normal(rank or 3 * width, width) @ normal(width, width) * torch.linspace(0.1, 3, width).double()
    return normal(out, width), tokens.t() @ tokens / len(tokens)


def lost(residual: Tensor, moment: Tensor, factors: WeightedFactors) -> float:
    return residual_energy(residual - factors.b.double() @ factors.a.double(), moment)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99), st.booleans())
def test_nothing_of_that_rank_is_better(out: int, width: int, rank: int, seed: int, singular: bool) -> None:
    residual, moment = random_problem(out, width, seed, rank=max(1, width // 2) if singular else None)
    factors = weighted_factors(residual, moment, rank)
    assert (factors.a.shape, factors.b.shape, factors.energy.shape) == ((rank, width), (out, rank), (rank,))
    assert {factors.a.dtype, factors.b.dtype} == {torch.float32}
    # Eckart & Young for the residual times a root of the moment, found in another way.
    values, vectors = torch.linalg.eigh(moment)
    singular_values = torch.linalg.svdvals(residual @ (vectors * values.clamp_min(0).sqrt()))
    total = residual_energy(residual, moment)
    assert lost(residual, moment, factors) == pytest.approx(
        float(singular_values[rank:].square().sum()), abs=2e-6 * total
    )
    best = torch.nn.functional.pad(singular_values, (0, max(0, rank - len(singular_values)))).square()
    torch.testing.assert_close(factors.energy, best[:rank], atol=1e-9 * total, rtol=1e-6)
    assert float(factors.energy.sum()) == pytest.approx(total - lost(residual, moment, factors), abs=2e-6 * total)


def test_no_descent_from_anywhere_gets_below_it() -> None:
    residual, moment = random_problem(6, 8)
    best = lost(residual, moment, weighted_factors(residual, moment, 2))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        for _ in range(300):  # alternating least squares, in the metric of the moment
            a = torch.linalg.lstsq(b, residual).solution
            b = residual @ moment @ a.t() @ torch.linalg.inv(a @ moment @ a.t())
        found = residual_energy(residual - b @ a, moment)
        assert found >= best * (1 - 1e-6)
        assert found == pytest.approx(best, rel=1e-3)


def test_white_inputs_give_the_plain_start() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 48)
    packed = quantize(weight, QuantSpec(2, 16))
    a, b = residual_factors(weight, packed, 5)
    residual = weight - packed.dequantize()
    for moment in (torch.eye(48), torch.ones(48), 7 * torch.eye(48)):
        factors = weighted_factors(residual, moment, 5)
        torch.testing.assert_close(factors.b @ factors.a, b @ a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(factors.a.norm(dim=1), a.norm(dim=1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(factors.b.norm(dim=0), b.norm(dim=0), atol=1e-5, rtol=1e-4)


def test_a_diagonal_is_a_diagonal_matrix() -> None:
    residual, moment = random_problem(10, 14)
    diagonal = moment.diagonal()
    short, full = weighted_factors(residual, diagonal, 3), weighted_factors(residual, diagonal.diag(), 3)
    torch.testing.assert_close(short.b @ short.a, full.b @ full.a)
    torch.testing.assert_close(short.energy, full.energy)
    assert residual_energy(residual, diagonal) == pytest.approx(residual_energy(residual, diagonal.diag()))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    residual, moment = random_problem(10, 14)
    expected = weighted_factors(residual, moment, 3)
    of_inputs, of_weights = (
        weighted_factors(residual, moment * scale, 3),
        weighted_factors(residual * scale, moment, 3),
    )
    torch.testing.assert_close(of_inputs.b @ of_inputs.a, expected.b @ expected.a)
    torch.testing.assert_close(of_inputs.a.abs(), expected.a.abs())
    torch.testing.assert_close(of_inputs.energy, expected.energy * scale)
    torch.testing.assert_close(of_weights.b @ of_weights.a / scale, expected.b @ expected.a)
    torch.testing.assert_close(of_weights.energy, expected.energy * scale**2)


def test_turned_inputs_turn_the_factors() -> None:
    residual, moment = random_problem(10, 14)
    turn = torch.linalg.qr(torch.randn(14, 14, dtype=torch.float64)).Q
    expected = weighted_factors(residual, moment, 3)
    turned = weighted_factors(residual @ turn, turn.t() @ moment @ turn, 3)
    torch.testing.assert_close(turned.b @ turned.a, expected.b @ expected.a @ turn.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("out", "width"), [(1100, 130), (1040, 1056), (70, 90)], ids=str)
def test_subspace_iteration_finds_nearly_as_much(out: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(out, width, generator=generator)
    tokens = torch.randn(2 * width, width, generator=generator) * torch.linspace(0.3, 2, width)
    moment = tokens.t() @ tokens / len(tokens)
    monkeypatch.setattr(module, "_EXACT_BELOW", 2000)
    best = weighted_factors(residual, moment, 8)
    monkeypatch.setattr(module, "_EXACT_BELOW", 0)
    state = torch.get_rng_state()
    found = weighted_factors(residual, moment, 8)
    assert torch.equal(torch.get_rng_state(), state)
    again = weighted_factors(residual, moment, 8)
    assert torch.equal(found.a, again.a)
    assert torch.equal(found.b, again.b)
    total = residual_energy(residual, moment)
    assert total - lost(residual.double(), moment, found) > 0.97 * float(best.energy.sum())
    assert float(found.energy.sum()) == pytest.approx(total - lost(residual.double(), moment, found), rel=1e-3)


def test_fewer_directions_of_the_same_factors() -> None:
    residual, moment = random_problem(10, 14)
    short, expected = weighted_factors(residual, moment, 6).truncated(2), weighted_factors(residual, moment, 2)
    assert short.rank == 2
    torch.testing.assert_close(short.b @ short.a, expected.b @ expected.a)
    with pytest.raises(ValueError, match="rank 7: these factors have 6"):
        weighted_factors(residual, moment, 6).truncated(7)


def test_nothing_to_correct() -> None:
    factors = weighted_factors(torch.zeros(4, 6), torch.eye(6), 3)
    assert not factors.a.any()
    assert not factors.b.any()
    assert not factors.energy.any()
    silent = weighted_factors(torch.ones(4, 6), torch.zeros(6, 6), 3)
    assert torch.isfinite(silent.a).all()
    assert not silent.energy.any()
    assert residual_energy(torch.ones(4, 6), torch.zeros(6)) == 0


@pytest.mark.parametrize(
    ("residual", "moment", "rank", "message"),
    [
        (torch.ones(2, 3), torch.eye(2), 1, r"floats \[3, 3\], or its diagonal \[3\]"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.int64), 1, "int64"),
        (torch.ones(2, 3), torch.full((3,), torch.nan), 1, "finite"),
        (torch.full((2, 3), torch.inf), torch.eye(3), 1, "finite"),
        (torch.ones(2, 3), -torch.eye(3), 1, "negative"),
        (torch.ones(2, 3), torch.eye(3), 0, "rank is 0"),
        (torch.ones(3), torch.eye(3), 1, "matrix of floats"),
    ],
)
def test_refusals(residual: Tensor, moment: Tensor, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_factors(residual, moment, rank)


def test_the_start_of_a_model(random_model: Callable[..., Path]) -> None:
    """At full rank the parent comes back; at rank 4 the outputs are nearer to the parent's than from plain SVD."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hqqplus import QuantPlan, quantize_model
    from hqqplus.calibration.moments import observe_inputs
    from hqqplus.modules import packed_modules

    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    parent = AutoModelForCausalLM.from_pretrained(random_model("llama"))
    base = AutoModelForCausalLM.from_pretrained(random_model("llama"))
    quantize_model(base, QuantPlan(QuantSpec(2, 32)))
    names = list(packed_modules(base))
    with torch.no_grad(), observe_inputs(parent, names) as moments:
        wanted = parent(ids).logits
    packed = {n: layer.packed() for n, layer in packed_modules(base).items()}
    residuals = {n: parent.get_submodule(n).weight.detach() - packed[n].dequantize() for n in names}
    config = LoraConfig(r=96, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    factors = {n: weighted_factors(residuals[n], moments[n].matrix, 96) for n in names}
    assert apply_residual_start(model, {n: (f.a, f.b) for n, f in factors.items()}) == len(names)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    for name, residual in residuals.items():
        short = factors[name].truncated(4)
        a, b = residual_factors(parent.get_submodule(name).weight, packed[name], 4)
        plain = residual_energy(residual - b @ a, moments[name].matrix)
        assert lost(residual.double(), moments[name].matrix.double(), short) <= plain * (1 + 1e-5)
