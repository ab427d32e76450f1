"""The fused solver against the one in torch: under Triton's interpreter, as machine code, and on a GPU.

The interpreter has to be chosen before Triton is imported, so it runs in a process of its own: this file as a script,
which solves all cases and prints what came out.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hqqplus.quantization import QuantSpec, SolverOptions, solver
from hqqplus.quantization.solver import Solution
from tests.conftest import load_benchmark
from tests.quantization.exhaustive import best_error
from tests.quantization.test_solver import CONTINUOUS, WITH_TIES, draw

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SIZES = {1: (8, 24, 64, 128, 256), 2: (8, 24, 64, 256), 3: (32,), 4: (16, 64), 8: (8, 64)}
CASES = [(nbits, size) for nbits, sizes in SIZES.items() for size in sizes]
EXHAUSTIVE = [(2, 24), (2, 64), (3, 32), (4, 16)]
# Of the total error, by which the fused solver may be above the one in torch.
SLACK = {1: 1e-5, 2: 0.005, 3: 0.005, 4: 0.005, 8: 0.03}
ROWS, GROUPS = 4, 4


def squares(matrix: Tensor, solution: Solution, group: int, importance: Tensor | None = None) -> Tensor:
    """(Weighted) squared errors [rows, width] in float64."""
    groups = torch.arange(matrix.shape[1], device=matrix.device) // group
    scale, offset = solution.scale.double()[:, groups], solution.offset.double()[:, groups]
    error = (matrix.double() - (solution.codes.double() * scale + offset)).square()
    return error if importance is None else error * importance


def drawn(size: int, names: Any = CONTINUOUS) -> Tensor:
    """`ROWS` rows of `GROUPS` groups of each distribution."""
    return torch.cat([draw(name, (ROWS, GROUPS * size), seed=size) for name in names])


def importance_of(width: int) -> Tensor:
    importance = torch.rand(width, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    importance[::7] = 0
    return importance


# --- under the interpreter ------------------------------------------------------------------------------------------


def _both(matrix: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> list[float]:
    """The total errors of the fused solver and of the one in torch."""
    from hqqplus.kernels import triton_solver

    group = spec.replace(axis=1).layout(*matrix.shape).group
    solutions = (s.solve(matrix, spec, None, importance) for s in (triton_solver, solver))
    return [squares(matrix, solution, group, importance).sum().item() for solution in solutions]


def _quality(nbits: int, size: int) -> dict[str, Any]:
    from hqqplus.kernels import triton_solver

    matrix, spec = drawn(size), QuantSpec(nbits, size)
    ours, theirs = (
        squares(matrix, s.solve(matrix, spec), size).view(len(CONTINUOUS), -1).sum(1).tolist()
        for s in (triton_solver, solver)
    )
    return {"ours": ours, "theirs": theirs}


def _exhaustive(nbits: int, size: int) -> list[float]:
    from hqqplus.kernels import triton_solver

    groups = torch.cat([draw(name, (4, size), seed=nbits) for name in CONTINUOUS])
    error = squares(groups, triton_solver.solve(groups, QuantSpec(nbits, size)), size).sum(1)
    # In units of each group's range, so that all count.
    unit = (groups.amax(1) - groups.amin(1)).double().square()
    least = torch.tensor([best_error(group.numpy().astype(np.float64), 2**nbits - 1) for group in groups])
    return [(error / unit).sum().item(), (least / unit).sum().item()]


def _degenerate(nbits: int) -> dict[str, Any]:
    from hqqplus.kernels import triton_solver

    size = 16
    groups = torch.zeros(6, size)
    groups[1] = 0.3
    groups[2] = -1e-30
    groups[3, 5] = 100.0
    groups[4, :8] = 1.0
    groups[5] = torch.arange(size) % 3 - 1.0
    solution = triton_solver.solve(groups, QuantSpec(nbits, size))
    return {
        "error": squares(groups, solution, size).sum(1).tolist(),
        "scale": solution.scale.flatten().tolist(),
        "offset": solution.offset.flatten().tolist(),
    }


def _same(nbits: int) -> dict[str, bool]:
    """What must not make a difference."""
    from hqqplus.kernels import triton_solver

    spec = QuantSpec(nbits, 16)
    matrix = draw("normal", (6, 40), seed=3).bfloat16()

    def solve(values: Tensor) -> Solution:
        return triton_solver.solve(values, spec)

    def equal(a: Solution, b: Solution) -> bool:
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scale", "offset"))

    base = solve(matrix)
    turned = solve(matrix.t().contiguous().t())
    alone = solve(matrix[2:3])
    large = solve(matrix * 8)
    return {
        "bf16 and float32": equal(base, solve(matrix.float())),
        "bf16 and float16": equal(base, solve(matrix.half())),
        "strides": equal(base, turned),
        "company": equal(Solution(base.codes[2:3], base.scale[2:3], base.offset[2:3]), alone),
        "powers of two": equal(Solution(base.codes, base.scale * 8, base.offset * 8), large),
        "the input is left alone": torch.equal(matrix, draw("normal", (6, 40), seed=3).bfloat16()),
    }


def _refusals() -> Iterator[tuple[str, str]]:
    from hqqplus.kernels import triton_solver

    def message(matrix: Tensor, spec: QuantSpec, *arguments: Any) -> str:
        try:
            triton_solver.solve(matrix, spec, *arguments)
        except ValueError as error:
            return str(error)
        return "nothing was refused"

    for nbits in (1, 2, 8):
        spec = QuantSpec(nbits, 8)
        for value in ("nan", "inf", "-inf") if nbits == 1 else ("nan",):
            matrix = torch.ones(3, 24)
            matrix[1, 9] = float(value)
            yield f"{nbits} bits, {value}", message(matrix, spec)
        yield f"{nbits} bits, large", message(torch.tensor([[-1e30, 1e30] * 4]), spec)
        yield f"{nbits} bits, large constant", message(torch.full((1, 8), 1e30), spec)
    zeros, spec = torch.zeros(2, 8), QuantSpec(1, 8)
    yield "importance, shape", message(zeros, spec, None, torch.ones(9))
    yield "importance, integers", message(zeros, spec, None, torch.ones(8, dtype=torch.int64))
    yield "importance, negative", message(zeros, spec, None, -torch.ones(8))
    yield "importance, nan", message(zeros, spec, None, torch.full((8,), float("nan")))
    yield "unsupported", message(zeros.double(), spec)


def _shapes() -> dict[str, Any]:
    from hqqplus.kernels import triton_solver

    result = {}
    for name, group, dtype in (("tail", 64, "bfloat16"), ("row", -1, "float16")):
        solution = triton_solver.solve(torch.zeros(3, 172), QuantSpec(2, group, metadata_dtype=dtype))
        result[name] = [str([*tensor.shape, tensor.dtype]) for tensor in vars(solution).values()]
    return result


def _supports() -> dict[str, bool]:
    from hqqplus.kernels import triton_solver

    matrix, spec = torch.zeros(2, 512), QuantSpec(2, 64)
    return {
        "float32": triton_solver.supports(matrix, spec, SolverOptions()),
        "float64": triton_solver.supports(matrix.double(), spec, SolverOptions()),
        "robust": triton_solver.supports(matrix, spec, SolverOptions(lp_norm=0.7)),
        "256": triton_solver.supports(matrix, QuantSpec(2, 256), None),
        "a row of 512": triton_solver.supports(matrix, QuantSpec(2, -1), None),
    }


def _measure() -> dict[str, Any]:
    tailed = {1: (64, 172), 2: (64, 172), 4: (128, 172)}
    result: dict[str, Any] = {
        "quality": {f"{nbits}/{size}": _quality(nbits, size) for nbits, size in CASES},
        "exhaustive": {f"{nbits}/{size}": _exhaustive(nbits, size) for nbits, size in EXHAUSTIVE},
        "tail": {n: _both(draw("normal", (24, w), 0), QuantSpec(n, g)) for n, (g, w) in tailed.items()},
        "row": {n: _both(draw("normal", (24, 172), 0), QuantSpec(n, -1)) for n in (1, 2)},
        "bfloat16": {
            n: _both(draw("normal", (24, 128), 0).bfloat16(), QuantSpec(n, 64, metadata_dtype="bfloat16"))
            for n in (1, 8)
        },
        "shifted": {n: _both(draw("normal", (24, 128), 0) + 20, QuantSpec(n, 32)) for n in (1, 2, 8)},
        "importance": {
            n: _both(draw("normal", (24, 172), 0), QuantSpec(n, 64), importance_of(172)) for n in (1, 2, 4)
        },
        "no importance": {
            n: _both(draw("normal", (24, 16), 0), QuantSpec(n, 16), torch.zeros(16, dtype=torch.float64) + 1e-300)
            for n in (1, 2)
        },
        "ties": {n: _both(drawn(16, WITH_TIES), QuantSpec(n, 16)) for n in (1, 2)},
        "degenerate": {n: _degenerate(n) for n in (1, 2, 4)},
        "same": {n: _same(n) for n in (1, 8)},
        "refusals": dict(_refusals()),
        "shapes": _shapes(),
        "supports": _supports(),
    }
    return result


@pytest.fixture(scope="module")
def interpreted(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(run_python("-m", "tests.kernels.test_triton_solver", env=environment).stdout)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("nbits", "size"), CASES)
def test_errors_are_those_of_the_solver_in_torch(nbits: int, size: int, interpreted: dict[str, Any]) -> None:
    errors = interpreted["quality"][f"{nbits}/{size}"]
    # All distributions at once would be all heavy tails: each is in units of itself.
    ratios = [ours / theirs for ours, theirs in zip(errors["ours"], errors["theirs"], strict=True)]
    assert sum(ratios) / len(ratios) < 1 + SLACK[nbits]
    assert max(ratios) < 1 + 3 * SLACK[nbits]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("nbits", "size"), EXHAUSTIVE)
def test_errors_are_close_to_the_optimum(nbits: int, size: int, interpreted: dict[str, Any]) -> None:
    error, least = interpreted["exhaustive"][f"{nbits}/{size}"]
    assert least * (1 - 1e-6) < error < 1.005 * least


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("what", ["tail", "row", "bfloat16", "importance", "no importance", "ties"])
def test_other_weights_and_options_come_out_as_well(what: str, interpreted: dict[str, Any]) -> None:
    for nbits, (ours, theirs) in interpreted[what].items():
        assert ours < (1 + max(SLACK[int(nbits)], 1e-4)) * theirs, nbits


@pytest.mark.slow
@needs_triton
def test_weights_far_from_zero_come_out_as_well(interpreted: dict[str, Any]) -> None:
    # A float16 offset at 20 is off by up to 1/128: what rounding it costs is chance.
    for nbits, (ours, theirs) in interpreted["shifted"].items():
        assert ours < 1.01 * theirs, nbits


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("nbits", ["1", "2", "4"])
def test_groups_of_few_values(nbits: str, interpreted: dict[str, Any]) -> None:
    found = interpreted["degenerate"][nbits]
    assert found["scale"][:3] == [0, 0, 0]
    assert found["offset"][:3] == [0, pytest.approx(0.3, rel=1e-3), 0]
    error = found["error"]
    assert error[0] == error[3] == error[4] == 0  # zeros, one outlier, two values
    assert error[1] < 1e-6
    assert error[2] < 1e-50
    if nbits != "1":
        assert error[5] == 0  # -1, 0, 1


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("nbits", ["1", "8"])
def test_what_makes_no_difference(nbits: str, interpreted: dict[str, Any]) -> None:
    assert {name for name, same in interpreted["same"][nbits].items() if not same} == set()


@pytest.mark.slow
@needs_triton
def test_refusals_are_those_of_the_solver_in_torch(interpreted: dict[str, Any]) -> None:
    for case, message in interpreted["refusals"].items():
        if case.startswith("importance"):
            assert message.startswith("importance"), case
        elif "large" in case:
            assert message == "the weight is too large for scales in float16; bfloat16 has the range of float32", case
        elif case == "unsupported":
            assert message.startswith("no Triton solver for torch.float64")
        else:
            assert message == "the weight holds NaN or infinite values", case


@pytest.mark.slow
@needs_triton
def test_shapes_and_types_are_those_of_the_solver_in_torch(interpreted: dict[str, Any]) -> None:
    for name, group, dtype in (("tail", 64, "bfloat16"), ("row", -1, "float16")):
        solution = solver.solve(torch.zeros(3, 172), QuantSpec(2, group, metadata_dtype=dtype))
        assert interpreted["shapes"][name] == [str([*t.shape, t.dtype]) for t in vars(solution).values()]


@pytest.mark.slow
@needs_triton
def test_what_is_supported(interpreted: dict[str, Any]) -> None:
    assert interpreted["supports"] == {
        "float32": True,
        "float64": False,
        "robust": False,
        "256": True,
        "a row of 512": False,
    }


def test_without_a_gpu_and_the_interpreter_nothing_is_supported() -> None:
    from hqqplus.kernels import triton_solver

    matrix = torch.zeros(2, 64)
    assert not triton_solver.supports(matrix, QuantSpec(2, 64), SolverOptions())
    with pytest.raises(ValueError, match=r"no Triton solver for torch\.float32"):
        triton_solver.solve(matrix, QuantSpec(2, 64))


def test_without_triton_nothing_is_supported(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hqqplus\n"
        "from hqqplus.kernels import triton_solver\n"
        "from hqqplus.quantization import QuantSpec\n"
        "print(triton_solver.supports(torch.zeros(2, 64), QuantSpec(2, 64)))"
    )
    assert run_python("-c", program).stdout.strip() == "False"


# --- as machine code ------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("nbits", "size"), [(nbits, size) for nbits in (1, 2, 4) for size in (32, 64, 128)])
def test_compiles_without_spills(nbits: int, size: int, capability: int) -> None:
    sass = load_benchmark("solver_sass")
    instructions, _, registers = sass.disassemble(sass.compile_solver(nbits, size, capability).asm["cubin"])
    assert sass.spills(instructions) == 0
    assert registers <= 128  # 16 warps or more on an SM


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("nbits", "size", "dtype"), [(1, 256, "fp32"), (2, 44, "fp16"), (4, 256, "bf16"), (8, 8, "bf16")]
)
def test_compiles_with_importance_and_in_other_sizes(nbits: int, size: int, dtype: str) -> None:
    sass = load_benchmark("solver_sass")
    compiled = sass.compile_solver(nbits, size, 90, importance=True, dtype=dtype)
    assert sass.spills(sass.disassemble(compiled.asm["cubin"])[0]) == 0


@needs_triton
def test_a_row_of_one_group_is_compiled_like_any_other() -> None:
    # Triton would make a constant of an argument that is 1. With importance that spilled 35 times, at 255 registers.
    from hqqplus.kernels import triton_solver

    for kernel in (triton_solver.split_kernel, triton_solver.search_kernel):
        assert {p.name for p in kernel.params if p.do_not_specialize} == {"count", "blocks"}


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("nbits", "most"), [(1, 400), (2, 4000), (4, 4000)])
def test_the_search_takes_the_instructions_that_were_counted(nbits: int, most: int) -> None:
    work = load_benchmark("solver_sass").work(nbits, 64, 90)
    assert sum(work.instructions.values()) / work.weights < most


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("nbits", "size"), [*CASES, (2, 32), (2, 128), (3, 64), (4, 128)])
def test_a_gpu_solves_as_well_as_the_cpu(nbits: int, size: int, dtype: torch.dtype) -> None:
    from hqqplus.kernels import triton_solver

    torch.manual_seed(0)
    matrix = (0.02 * torch.randn(512, 4096 + size // 2)).to(dtype)
    spec = QuantSpec(nbits, size)
    ours = squares(matrix, Solution(*(t.cpu() for t in vars(triton_solver.solve(matrix.cuda(), spec)).values())), size)
    theirs = squares(matrix, solver.solve(matrix, spec), size)
    assert ours.sum() < (1 + SLACK[nbits]) * theirs.sum()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_a_gpu_follows_importance(nbits: int) -> None:
    from hqqplus.kernels import triton_solver

    torch.manual_seed(0)
    matrix, spec, importance = 0.02 * torch.randn(256, 1068), QuantSpec(nbits, 64), importance_of(1068)
    solution = triton_solver.solve(matrix.cuda(), spec, None, importance)
    ours = squares(matrix, Solution(*(t.cpu() for t in vars(solution).values())), 64, importance)
    theirs = squares(matrix, solver.solve(matrix, spec, None, importance), 64, importance)
    assert ours.sum() < (1 + max(SLACK[nbits], 1e-4)) * theirs.sum()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("nbits", [1, 2, 4])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gpu_refuses_what_is_not_finite(nbits: int, value: str) -> None:
    from hqqplus.kernels import triton_solver

    matrix = torch.ones(64, 256, device="cuda")
    matrix[3, 77] = float(value)
    with pytest.raises(ValueError, match="NaN or infinite"):
        triton_solver.solve(matrix, QuantSpec(nbits, 64))


@pytest.mark.gpu
@needs_triton
def test_a_gpu_solves_views_and_leaves_them_alone() -> None:
    from hqqplus.kernels import triton_solver

    weight = torch.randn(300, 500, device="cuda")
    kept, spec = weight.clone(), QuantSpec(2, 64)
    turned, copied = triton_solver.solve(weight.t(), spec), triton_solver.solve(weight.t().contiguous(), spec)
    assert all(torch.equal(a, b) for a, b in zip(vars(turned).values(), vars(copied).values(), strict=True))
    assert torch.equal(weight, kept)


if __name__ == "__main__":
    print(json.dumps(_measure()))
