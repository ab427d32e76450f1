"""Which solver a weight gets."""

from __future__ import annotations

import pytest
import torch

from hqqplus.kernels import quantize
from hqqplus.quantization import QuantSpec, SolverOptions
from hqqplus.quantization import quantize as in_torch

WEIGHT = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [None, SolverOptions(lp_norm=0.7), SolverOptions(gain=0.5)], ids=str)
@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_on_a_cpu_it_is_the_torch_solver(nbits: int, options: SolverOptions | None) -> None:
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1))
    ours, theirs = (function(WEIGHT, QuantSpec(nbits, 32), options, importance) for function in (quantize, in_torch))
    for name, tensor in ours.state().items():
        assert torch.equal(tensor, theirs.state()[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group_size", [32, -1])  # -1: more than the kernel takes, so torch's
@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
def test_on_a_gpu_it_is_as_good(nbits: int, group_size: int) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2))
    spec = QuantSpec(nbits, group_size)
    on_gpu = quantize(weight.cuda(), spec)
    assert on_gpu.nmse(weight.cuda()) == pytest.approx(in_torch(weight, spec).nmse(weight), rel=5e-3)
