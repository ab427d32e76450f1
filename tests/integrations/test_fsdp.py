"""What is added to accelerate, as far as one process shows it; `tests/recovery/test_processes.py` has two."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from torch import nn

from hqqplus.integrations.fsdp import Announce, allow_on_cpu, in_lockstep, is_requested, settle, streamed


def test_a_streamed_model_computes_elsewhere_and_stays_where_it_is() -> None:
    """On the meta device, which has no memory: what is computed there shows by its device alone."""
    model = (
        nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)).eval().requires_grad_(False)
    )
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = model(x)
        with streamed(model, torch.device("meta")):
            assert model(x).device.type == "meta"
            assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
        assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert all(after[name].data_ptr() == place and after[name].equal(value) for name, (place, value) in before.items())


def test_a_streamed_model_is_whole_again_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    with streamed(model, torch.device("meta")), pytest.raises(RuntimeError):
        model(torch.randn(2, 4))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not model[0]._forward_hooks
    assert not model[1]._forward_pre_hooks


def test_a_model_that_is_there_already_is_not_streamed() -> None:
    model = nn.Linear(4, 4)
    with streamed(model, torch.device("cpu")):
        assert not model._forward_pre_hooks


def test_a_model_that_is_not_sharded_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    with in_lockstep(model):
        assert not hasattr(model, "_is_fsdp_managed_module")
    settle(model)
    kind = PartialState(cpu=True).distributed_type
    allow_on_cpu(requested=True)  # one process has nobody to share with
    assert PartialState().distributed_type == kind
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_requested()


def test_an_announcement_is_made_once() -> None:
    told: list[int] = []
    announce = Announce(lambda: told.append(1))
    announce.now()
    announce.on_train_begin(None, None, None)
    assert told == [1]
    Announce(None).now()
