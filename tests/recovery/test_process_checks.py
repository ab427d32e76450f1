"""What several processes cannot do is refused before any work, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from hqqplus.errors import UserError
from hqqplus.recipe import load_recipe
from hqqplus.recovery import processes
from hqqplus.recovery.processes import check_processes, default_optimizer, is_sharded, start
from tests.recipes import SMALLEST, write

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def state(count: int = 2) -> Any:
    kind = DistributedType.MULTI_CPU if count > 1 else DistributedType.NO
    return SimpleNamespace(num_processes=count, distributed_type=kind)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def refusal(settings: dict[str, Any], checkpoint: Path | None = None, count: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        check_processes(settings, state(count), checkpoint)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({"FSDP_VERSION": "1"}, {}, "cannot hold packed integers: set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "training.gradient_checkpointing to true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "FULL_STATE_DICT"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({}, {"optim": "paged_adamw_8bit"}, "training.optim: paged_adamw_8bit .* use adamw_torch_fused"),
        ({}, {"optim": "adamw_bnb_8bit"}, "cannot compute with the shards of FSDP2"),
    ],
)
def test_fsdp(changes: dict[str, str], settings: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert is_sharded({}, state())
    check_processes({"optim": "adamw_torch_fused"}, state())
    assert default_optimizer({}, state()) == "adamw_torch_fused"
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        check_processes({"optim": "adamw_torch_fused", **settings}, state())


def test_fsdp_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes({"fsdp": True, "optim": "sgd"}, state())  # transformers' defaults are version 2 and whole states
    assert "version 1" in refusal({"fsdp": True, "fsdp_config": {"fsdp_version": 1}})
    assert "name of a file" in refusal({"fsdp": True, "fsdp_config": "fsdp.json"})
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu128")
    assert "torch 2.13 or newer, and this is 2.12.1+cu128" in refusal({"fsdp": True})


def test_one_process_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_sharded({}, state(1))
    check_processes({"optim": "paged_adamw_8bit"}, state(1))
    assert default_optimizer({}, state(1)) is None


def test_processes_that_found_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "started 2 processes, but only 1 are connected" in refusal({}, count=1)


def test_a_model_over_all_cards() -> None:
    text = refusal({"model_init_kwargs": {"device_map": "auto"}})
    assert "each card belongs to one of them" in text


def test_a_model_is_not_loaded_over_all_cards(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import hqqplus
    from hqqplus import models
    from hqqplus.integrations.transformers import quantize_model
    from hqqplus.integrations.trl import RecoveryTrainer
    from hqqplus.quantization import QuantSpec

    parent = str(random_model("llama"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    packed = quantize_model(models.load_causal_lm(parent, device="cpu"), QuantSpec(2, 32))
    packed.save_pretrained(tmp_path / "packed")
    assert hqqplus.load(tmp_path / "packed", device_map={"": "cpu"}).device.type == "cpu"

    monkeypatch.setenv("WORLD_SIZE", "2")
    hqqplus.load(tmp_path / "packed", device_map={"": "cpu"})
    for name in (parent, tmp_path / "packed"):
        with pytest.raises(UserError, match="each card belongs to one of them"):
            hqqplus.load(name, device_map="auto")
    # Not through us either.
    with pytest.raises(UserError, match="each card belongs to one of them"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="auto")
    packed.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(UserError, match="each card belongs to one of them"):
        RecoveryTrainer(model=packed, args=None, evaluator=None, on_checkpoint=None)  # type: ignore[arg-type]


def test_deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "deepspeed_zero2.yaml" in refusal({"deepspeed": "zero.json"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_processes({}, state())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true")
    assert "zero3_init_flag" in refusal({})
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        start(load_recipe(write(tmp_path, SMALLEST)))


def checkpoint(folder: Path, count: int, optimizer: str = "optimizer.pt") -> Path:
    folder.mkdir()
    names = ["rng_state.pth"] if count == 1 else [f"rng_state_{i}.pth" for i in range(count)]
    for name in (*names, optimizer):
        (folder / name).write_text("")
    return folder


def test_checkpoints_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four, two, one = (checkpoint(tmp_path / f"checkpoint-{i}", i) for i in (4, 2, 1))
    sharded = checkpoint(tmp_path / "sharded", 2, "optimizer.bin")
    check_processes({}, state(), two)
    assert "written by 4 processes, and this run has 2: continue with 4" in refusal({}, four)
    assert "written by 1 process, and this run has 2" in refusal({}, one)
    assert "written with FSDP, and this run is without FSDP" in refusal({}, sharded)
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    check_processes({}, state(), sharded)
    assert "written without FSDP, and this run is with FSDP" in refusal({}, two)


def test_a_machine_without_accelerators_needs_no_word_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(processes, "PartialState", lambda **settings: made.update(settings) or "made")
    recipe = load_recipe(write(tmp_path, SMALLEST + "training:\n  ddp_timeout: 60\n"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for available in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=available: found)
        assert start(recipe) == "made"
        assert made["cpu"] is not available
    assert made["timeout"].total_seconds() == 60
    start(load_recipe(write(tmp_path, SMALLEST)))
    assert made["timeout"].total_seconds() > 3600, "one process may quantize for all"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    start(recipe)
    assert made["cpu"] is True


def test_the_real_state_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_processes({}, PartialState(cpu=True))
