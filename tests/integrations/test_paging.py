"""State that was paged before a checkpoint is paged after it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from hqqplus.integrations.paging import page_again


class Memory:
    """A tensor that claims to be somewhere."""

    def __init__(self, values: Tensor, is_cuda: bool = True, is_paged: bool = False) -> None:
        self.values, self.is_cuda, self.is_paged, self.dtype = values, is_cuda, is_paged, values.dtype

    def copy_(self, other: Memory) -> None:
        self.values.copy_(other.values)


class Paging:
    """An optimizer that pages what has at least 100 elements, as bitsandbytes' do from 100,000 on."""

    is_paged = True

    def __init__(self, sizes: list[int]) -> None:
        self.param_groups = [{"params": [nn.Parameter(torch.zeros(size)) for size in sizes]}]
        self.state: dict[Any, Any] = {
            p: {"step": 3, "state1": Memory(torch.ones(len(p))), "state2": Memory(torch.full((len(p),), 2.0))}
            for p in self.param_groups[0]["params"]
        }

    def get_state_buffer(self, parameter: Tensor, dtype: torch.dtype) -> Memory:
        return Memory(torch.zeros(len(parameter), dtype=dtype), is_paged=len(parameter) >= 100)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_large_is_paged_with_its_values(wrapped: bool) -> None:
    optimizer = Paging([200, 50, 100])
    before = copy.copy(optimizer.state[optimizer.param_groups[0]["params"][1]])
    assert page_again(SimpleNamespace(optimizer=optimizer) if wrapped else optimizer) == 4
    large, small, least = optimizer.param_groups[0]["params"]
    for parameter in (large, least):
        state = optimizer.state[parameter]
        assert state["state1"].is_paged
        assert state["state2"].is_paged
        assert state["state1"].values.tolist() == [1.0] * len(parameter)
        assert state["state2"].values.tolist() == [2.0] * len(parameter)
    assert optimizer.state[small] == before
    assert page_again(optimizer) == 0, "what is paged stays"


def test_what_does_not_page_is_left_alone() -> None:
    optimizer = Paging([200])
    optimizer.is_paged = False
    assert page_again(optimizer) == 0
    optimizer.is_paged = True
    for entry in optimizer.state.values():
        entry["state1"].is_cuda = entry["state2"].is_cuda = False
    assert page_again(optimizer) == 0
    parameter = nn.Parameter(torch.zeros(4))
    assert page_again(torch.optim.AdamW([parameter])) == 0


def trained(device: str, steps: int, state: Any = None) -> tuple[Any, nn.Parameter]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(512, 512, device=device))
    optimizer = bitsandbytes.optim.PagedAdamW8bit([parameter], lr=1e-2)
    if state is not None:
        values, kept = state
        with torch.no_grad():
            parameter.copy_(values)
        optimizer.load_state_dict(kept)
        page_again(optimizer)
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, 0.1 * (step + 1 + (2 if state is not None else 0)))
        optimizer.step()
    return optimizer, parameter


def continued(device: str) -> tuple[Any, nn.Parameter, nn.Parameter]:
    _, whole = trained(device, 4)
    first, parameter = trained(device, 2)
    second, resumed = trained(device, 2, (parameter.detach().clone(), copy.deepcopy(first.state_dict())))
    return second, resumed, whole


def test_on_a_cpu_a_resumed_optimizer_continues() -> None:
    _, resumed, whole = continued("cpu")
    assert torch.equal(resumed, whole)


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_optimizer_pages_and_continues() -> None:
    optimizer, resumed, whole = continued("cuda")
    assert torch.equal(resumed, whole)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state["state1"].is_paged
    assert state["state2"].is_paged
