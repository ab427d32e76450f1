"""The solver gives what it gave: whoever changes that is told to raise `SOLVER_VERSION`.

Adapters and checkpoints note the version, and are refused where their parent would be quantized to something else. The
weights are made of integers, and such that no code hangs on the last bits of a sum: all of them stay when each weight
is changed by up to a ten-thousandth of itself, so that they are the same on any machine. At 4 and 8 bits grids that
are equally good lie too close together for that: there the error alone is compared.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.quantization import PackedTensor, QuantSpec, SolverOptions, quantize
from hqqplus.quantization.feedback import error_feedback, output_error
from hqqplus.quantization.solver import SOLVER_VERSION

PINNED = 1
ADVICE = (
    f"the solver gives other weights than version {PINNED} did: if that is meant, raise SOLVER_VERSION in "
    "hqqplus/quantization/solver.py and put the new values here"
)
# Case -> sha256 (its beginning) of the packed codes, and the NMSE, of version `PINNED`.
CODES = {
    "1g32m16": ("ee53f74a5b878671", 0.31781),
    "1g64m8": ("844843ede910aa80", 0.32718),
    "2g32m16": ("0e1d98f7f0a9ce95", 0.089167),
    "2g32m8": ("0e1d98f7f0a9ce95", 0.089169),
    "2g64m8": ("e84d666ad5751258", 0.095826),
    "3g64m8": ("623f778406702d3d", 0.025865),
    "2g32m8+robust": ("872c950bac97ce65", 0.089716),
    "2g64m8+gain": ("e84d666ad5751258", 0.10608),
    "2g64m8+thorough": ("e84d666ad5751258", 0.095826),
    "2g32m8+importance": ("2c818d43c840d730", 0.097332),
}
ERRORS = {"4g64m16": 0.006017, "4g64m8": 0.006018, "8g64m16": 1.876e-05, "8g64m8": 1.97e-05}
FEEDBACK = ("f783435e65e1e929", 0.00038563)


def weight() -> Tensor:
    """[8, 128] in float32: sums of three numbers that go round at three speeds."""
    index = torch.arange(8 * 128, dtype=torch.int64)
    turns = [(index * step % 65537).double() / 65537 for step in (40503, 12289, 7919)]
    return (turns[0] + turns[1] + 0.7 * turns[2] - 1.35).view(8, 128).float()


def importance() -> Tensor:
    return torch.arange(128).double() % 7 + 1


def solved(case: str, of: Tensor) -> PackedTensor:
    """`case` is BITSgGROUPmMETADATA and, behind a +, an option or `importance`."""
    spec, _, option = case.partition("+")
    nbits, _, rest = spec.partition("g")
    group, _, metadata = rest.partition("m")
    changes: dict[str, Any] = {"": {}, "importance": {}, "robust": {"lp_norm": 0.7}, "gain": {"gain": 1.0}}.get(
        option, {"thorough": True}
    )
    return quantize(
        of,
        QuantSpec(int(nbits), int(group), metadata_bits=int(metadata)),
        SolverOptions(**changes),
        importance() if option == "importance" else None,
    )


def codes(packed: PackedTensor) -> str:
    return hashlib.sha256(packed.W_q.numpy().tobytes()).hexdigest()[:16]


def test_the_version_is_that_of_the_values_here() -> None:
    assert SOLVER_VERSION == PINNED


@pytest.mark.parametrize("case", CODES)
def test_codes_and_errors_are_those_of_the_version(case: str) -> None:
    packed = solved(case, weight())
    expected, error = CODES[case]
    assert codes(packed) == expected, ADVICE
    assert packed.nmse(weight()) == pytest.approx(error, rel=1e-3), ADVICE


@pytest.mark.parametrize("case", CODES)
def test_no_code_hangs_on_the_last_bits(case: str) -> None:
    noise = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert codes(solved(case, weight() * (1 + 1e-4 * noise))) == CODES[case][0]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_fine_grids_are_those_of_the_version(case: str) -> None:
    assert solved(case, weight()).nmse(weight()) == pytest.approx(ERRORS[case], rel=1e-2), ADVICE


def test_error_feedback_is_that_of_the_version() -> None:
    inputs = weight().double().view(16, 64).repeat(1, 2) + torch.eye(16, 128).double()
    moment = inputs.t() @ inputs + torch.eye(128).double() / 8
    packed = error_feedback(weight().double(), QuantSpec(2, 32), moment)
    expected, error = FEEDBACK
    assert codes(packed) == expected, ADVICE
    assert output_error(weight().double(), packed, moment) == pytest.approx(error, rel=1e-3), ADVICE
