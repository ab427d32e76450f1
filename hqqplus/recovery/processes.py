"""Several processes of one run: how they come up, and what they cannot do, refused before any work.

DDP: every process holds the whole packed model. FSDP2: each holds a share of it, and brings a block together when it
is computed. Which of them it is says the launcher's configuration (`recipes/accelerate/`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn

from hqqplus.errors import UserError
from hqqplus.integrations import fsdp
from hqqplus.integrations.transformers import DEVICE_MAP_REFUSED
from hqqplus.modules import PackedStack
from hqqplus.recipe import Recipe

# What FSDP2 can share out: optimizers of torch's own, which compute with shards as they are.
SHARDABLE_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")
# The first torch whose FSDP2 takes parameters that are integers.
FSDP2_TORCH = (2, 13)
_CONFIGURATIONS = "recipes/accelerate"
# While one process quantizes, calibrates or asks the teacher, the others wait for it; torch gives them ten minutes.
_PATIENCE = timedelta(hours=24)


def start(recipe: Recipe) -> PartialState:
    """The processes of this launch, connected.

    On a machine without any accelerator they are connected by gloo, where accelerate would let each of them run as if
    it were alone (and write to the same folder) unless `ACCELERATE_USE_CPU` is set.

    Raises:
        UserError: if the launch asks for DeepSpeed and it is not installed.
    """
    if _asks_for_deepspeed(recipe.training) and importlib.util.find_spec("deepspeed") is None:
        raise UserError("the launch asks for DeepSpeed, which is not installed: pip install deepspeed")
    cpu = bool(recipe.training.get("use_cpu", False)) or parse_flag_from_env("ACCELERATE_USE_CPU")
    # The group is made here, once: what the trainer's arguments say of it would come too late.
    given = recipe.training.get("ddp_timeout")
    timeout = _PATIENCE if given is None else timedelta(seconds=int(given))
    return PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=timeout)


def is_sharded(settings: Mapping[str, Any], state: PartialState) -> bool:
    """Whether the model of this run will be shared out between the processes by FSDP.

    Args:
        settings: of the trainer.
    """
    return _asks_for_fsdp(settings) and state.distributed_type != DistributedType.NO


def check_processes(settings: Mapping[str, Any], state: PartialState, checkpoint: Path | None = None) -> None:
    """Refuse what cannot work with these processes.

    Args:
        settings: of the trainer, as `trainer_settings` has them.
        checkpoint: folder of the one that the run is to continue from.

    Raises:
        UserError: with what is wrong and what to do instead.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise UserError(f"the launcher started {launched} processes, but only {state.num_processes} are connected")
    device_map = (settings.get("model_init_kwargs") or {}).get("device_map")
    if device_map is not None and state.num_processes > 1:
        raise UserError(f"training.model_init_kwargs: {DEVICE_MAP_REFUSED}")
    sharded = is_sharded(settings, state)
    if sharded:
        _check_fsdp(settings)
    if _asks_for_deepspeed(settings):
        _check_deepspeed(settings)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, state.num_processes, sharded)


def check_experts(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse to train a model with packed experts by DeepSpeed's ZeRO-3.

    Raises:
        UserError: with what to do instead.
    """
    third = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if _asks_for_deepspeed(settings) and third and any(isinstance(module, PackedStack) for module in model.modules()):
        raise UserError(
            "DeepSpeed's ZeRO-3 has not been tried with packed experts: share the model out by FSDP2 "
            f"({_CONFIGURATIONS}/fsdp2.yaml), or use {_CONFIGURATIONS}/deepspeed_zero2.yaml"
        )


def default_optimizer(settings: Mapping[str, Any], state: PartialState) -> str | None:
    """The optimizer for a sharded model, where the recipe names none."""
    return SHARDABLE_OPTIMIZERS[0] if is_sharded(settings, state) else None


def _asks_for_fsdp(settings: Mapping[str, Any]) -> bool:
    return fsdp.is_requested() or bool(settings.get("fsdp"))


def _asks_for_deepspeed(settings: Mapping[str, Any]) -> bool:
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or bool(settings.get("deepspeed"))


def _check_fsdp(settings: Mapping[str, Any]) -> None:
    options = _fsdp_options(settings)
    if str(options["version"]) != "2":
        raise UserError(
            "FSDP version 1 copies all parameters of a block into one tensor of floats, which cannot hold packed "
            f"integers: set fsdp_version: 2, as {_CONFIGURATIONS}/fsdp2.yaml does"
        )
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < FSDP2_TORCH:
        raise UserError(
            f"FSDP2 shares out packed integers only with torch {'.'.join(map(str, FSDP2_TORCH))} or newer, and this "
            f"is {torch.__version__}: update torch, or train without FSDP"
        )
    optimizer = str(settings.get("optim", SHARDABLE_OPTIMIZERS[0]))
    if optimizer not in SHARDABLE_OPTIMIZERS:
        raise UserError(
            f"training.optim: {optimizer} cannot compute with the shards of FSDP2: use "
            f"{', '.join(SHARDABLE_OPTIMIZERS)}"
        )
    if options["auto_wrap_policy"] == "size_based_wrap":
        raise UserError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP wraps the list of the blocks too, which torch refuses: set it to "
            "TRANSFORMER_BASED_WRAP"
        )
    if options["state_dict_type"] != "full_state_dict":
        raise UserError(
            "fsdp_state_dict_type: sharded checkpoints are read with pickle, which runs what a foreign file says; set "
            "it to FULL_STATE_DICT: what is trained is small"
        )
    if options["cpu_ram_efficient_loading"] == "true":
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: would leave every process but the first with an empty parent or teacher, "
            "and saves nothing: packed files are mapped, not copied; set it to false"
        )
    if options["activation_checkpointing"] == "true":
        raise UserError(
            "fsdp_activation_checkpointing: renames the modules that an adapter is saved by: set it to false, and "
            "training.gradient_checkpointing to true"
        )
    if options["offload_params"] == "true":
        raise UserError(
            "fsdp_offload_params: a packed model is small, and what is trained of it is smaller: set it to false"
        )


def _check_deepspeed(settings: Mapping[str, Any]) -> None:
    if settings.get("deepspeed"):
        raise UserError(
            "training.deepspeed: give the configuration to accelerate instead, as "
            f"{_CONFIGURATIONS}/deepspeed_zero2.yaml does"
        )
    if parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise UserError(
            "zero3_init_flag: would take apart every model while it is read, the parent too; set it to false: a "
            "packed model is taken apart once it is there"
        )


def _fsdp_options(settings: Mapping[str, Any]) -> dict[str, str]:
    """The options of FSDP that matter here, from the recipe where it turns FSDP on, else from the launcher."""
    names = {
        "version": "1",
        "cpu_ram_efficient_loading": "false",
        "activation_checkpointing": "false",
        "offload_params": "false",
        "auto_wrap_policy": "transformer_based_wrap",
        "state_dict_type": "sharded_state_dict",  # accelerate's own default for version 2
    }
    if not settings.get("fsdp"):
        return {name: os.environ.get(f"FSDP_{name.upper()}", default).lower() for name, default in names.items()}
    given = settings.get("fsdp_config") or {}
    if not isinstance(given, Mapping):
        raise UserError("training.fsdp_config: write its fields out, not the name of a file")
    names |= {"version": "2", "state_dict_type": "full_state_dict"}  # transformers' own defaults
    own = {str(key).removeprefix("fsdp_"): value for key, value in given.items()}
    own["offload_params"] = own.get("cpu_offload", own.get("offload_params", "false"))
    return {name: str(own.get(name, default)).lower() for name, default in names.items()}


def _check_checkpoint(folder: Path, processes: int, sharded: bool) -> None:
    """A checkpoint belongs to a number of processes: their batches make its steps, their random states its rows."""
    states = len(list(folder.glob("rng_state*.pth")))
    if states and states != processes:
        raise UserError(
            f"{folder}: was written by {states} process{'es' if states > 1 else ''}, and this run has {processes}: "
            f"continue with {states}, or give this run its own output_dir"
        )
    was_sharded = (folder / "optimizer.bin").is_file() or (folder / "optimizer_0").is_dir()
    if was_sharded != sharded and states:
        kinds = {True: "with FSDP", False: "without FSDP"}
        raise UserError(
            f"{folder}: was written {kinds[was_sharded]}, and this run is {kinds[sharded]}: launch it as it was, or "
            "give this run its own output_dir"
        )
