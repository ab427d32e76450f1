"""`quantize` by the fastest solver there is for a weight: the fused Triton kernel on a GPU, torch everywhere else."""

from __future__ import annotations

from torch import Tensor

from hqqplus.quantization import PackedTensor, QuantSpec, SolverOptions
from hqqplus.quantization.solver import Solution
from hqqplus.quantization.solver import solve as solve_in_torch
from hqqplus.quantization.tensor import quantize as quantize_with


def solve(matrix: Tensor, spec: QuantSpec, options: SolverOptions, importance: Tensor | None) -> Solution:
    """`quantization.solver.solve` by whichever implementation is faster for `matrix`."""
    if matrix.is_cuda:
        from hqqplus.kernels.triton_solver import solve as solve_fused
        from hqqplus.kernels.triton_solver import supports

        if supports(matrix, spec, options):
            return solve_fused(matrix, spec, options, importance)
    return solve_in_torch(matrix, spec, options, importance)


def quantize(
    weight: Tensor, spec: QuantSpec, options: SolverOptions | None = None, importance: Tensor | None = None
) -> PackedTensor:
    """`quantization.quantize`, with the same arguments and refusals, on a GPU by the fused kernel."""
    return quantize_with(weight, spec, options, importance, solver=solve)
