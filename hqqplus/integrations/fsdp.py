"""FSDP2 through accelerate: what its own preparation leaves out for packed models, and for processes on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback

from hqqplus.modules import PackedEmbedding
from hqqplus.modules.sharding import gathered, is_sharded


def is_requested() -> bool:
    """Whether the launcher (`accelerate launch` with an FSDP configuration) or a recipe has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def allow_on_cpu(requested: bool) -> None:
    """Let accelerate shard among processes on a CPU (gloo), where it only knows DDP, if FSDP is `requested`.

    It looks at nothing but the kind of the processes. Call it right before an `Accelerator` is made.
    """
    state = PartialState()
    if requested and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def keep_precision(accelerator: Any) -> None:
    """Let FSDP2 cast nothing: autocast does what it does without FSDP, and gradients are added up in float32.

    accelerate would round each module's output, and so the loss, to 16 bits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def shard_tied(model: Any, accelerator: Any) -> None:
    """Shard a packed embedding and the head on its tensors as one group.

    accelerate tells tied weights by their identity, but a packed layer makes its `weight` anew whenever it is asked,
    and a tensor that two groups share is refused by torch.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding) or isinstance(embedding, FSDPModule):
        return
    if head is None or getattr(head, "W_q", None) is not embedding.W_q:
        return
    plugin = accelerator.state.fsdp_plugin
    fully_shard([embedding, head], reshard_after_forward=False, offload_policy=plugin.cpu_offload)


def settle(model: nn.Module) -> None:
    """Leave every parameter of a sharded model to its shards, as an optimizer sees them.

    After a forward pass without a backward one, some modules stay whole, and would keep what they have.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The trained parameters of a sharded model, whole and on the CPU, in the process that is to `keep` them."""
    return gathered({name: p for name, p in model.named_parameters() if p.requires_grad}, keep)


@contextmanager
def streamed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block a model in CPU memory computes on `device`, with one layer there at a time.

    A forward pass then takes as long as it takes to copy the model to the device once.
    """
    held: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def bring(module: nn.Module, *_: Any) -> None:
        held[module] = dict(module._parameters), dict(module._buffers)
        for name, parameter in held[module][0].items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in held[module][1].items():
            module._buffers[name] = None if buffer is None else buffer.to(device)

    def give_back(module: nn.Module, *_: Any) -> None:
        parameters, buffers = held.pop(module)
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    def bring_inputs(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return send_to_device(inputs, device), send_to_device(named, device)

    if device == next(model.parameters()).device:
        yield
        return
    hooks = [model.register_forward_pre_hook(bring_inputs, with_kwargs=True)]
    for module in model.modules():
        if module._parameters or module._buffers:
            hooks += [
                module.register_forward_pre_hook(bring),
                module.register_forward_hook(give_back, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(held):
            give_back(module)


class Announce(TrainerCallback):
    """Calls `tell` once, when the training begins."""

    def __init__(self, tell: Callable[[], None] | None) -> None:
        self._tell = tell

    def now(self) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now()


@contextmanager
def in_lockstep(model: Any) -> Iterator[None]:
    """Within the block `generate` of a sharded model ends in all processes at once: all call it, or none does.

    Afterwards its parameters are shards again. Nothing happens to any other model.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(base, "_is_fsdp_managed_module", None)
    base._is_fsdp_managed_module = True
    try:
        yield
    finally:
        if before is None:
            del base._is_fsdp_managed_module
        else:
            base._is_fsdp_managed_module = before
        settle(model)
