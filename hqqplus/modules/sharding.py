"""Parameters that are shared out between processes, by FSDP2 or by DeepSpeed's ZeRO-3.

Inside the forward pass of a sharded module its parameters are whole, and nobody has to know. Outside of it (a fused
loss that reads the head's weight, what is written to disk) this process holds a share of them: `whole` brings one
together, in all processes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

Key = TypeVar("Key")


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this process holds a share of `tensor` only."""
    return hasattr(tensor, "full_tensor") or _is_partitioned(tensor)


@overload
def whole(tensor: Tensor) -> Tensor: ...
@overload
def whole(tensor: None) -> None: ...
def whole(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself; of a sharded one all of it, for which every process has to call."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    if not _is_partitioned(tensor):
        return sharded.full_tensor()
    import deepspeed

    with deepspeed.zero.GatheredParameters([sharded]):
        return sharded.data.clone()


@torch.no_grad()
def gathered(tensors: Mapping[Key, Tensor], keep: bool = True) -> dict[Key, Tensor]:
    """`tensors` with the sharded ones whole and on the CPU, brought together one after the other by all processes.

    A process that does not `keep` them gets an empty dict. What stands there under two names stays one tensor.
    """
    found: dict[Key, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            all_of_it = whole(tensor).detach().cpu() if is_sharded(tensor) else tensor.detach()
            seen[id(tensor)] = all_of_it if keep else tensor
        if keep:
            found[name] = seen[id(tensor)]
    return found


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Write `value`, which every process has, into `parameter`, of which this process may hold a share only."""
    sharded: Any = parameter
    if not is_sharded(parameter):
        parameter.copy_(value)
    elif _is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([sharded], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                sharded.data.copy_(value)
    else:
        from torch.distributed.tensor import distribute_tensor

        own = value.to(device=sharded.to_local().device, dtype=sharded.dtype)
        sharded.copy_(distribute_tensor(own, sharded.device_mesh, sharded.placements))


def _is_partitioned(tensor: Tensor | None) -> bool:
    """Whether ZeRO-3 holds `tensor`, and has it not together now."""
    return hasattr(tensor, "ds_tensor") and getattr(tensor, "ds_status", None) != _available(tensor)


def _available(parameter: Any) -> Any:
    return type(parameter.ds_status).AVAILABLE
