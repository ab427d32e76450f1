"""Paged optimizer state of bitsandbytes after a resume.

A paged optimizer keeps its state in memory that the driver moves between GPU and CPU. `load_state_dict` puts ordinary
GPU tensors in its place, so that a resumed run would need more GPU memory than the one it continues.
"""

from __future__ import annotations

from typing import Any

import torch

# Names of the state tensors that bitsandbytes' optimizers page.
_PAGED = ("state1", "state2")


@torch.no_grad()
def page_again(optimizer: Any) -> int:
    """Move the loaded state of `optimizer` back into paged memory; returns how many tensors were moved.

    An optimizer that does not page is left alone, as is state that is not on a CUDA device. Which tensors are large
    enough to be paged is left to bitsandbytes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not getattr(inner, "is_paged", False):
        return 0
    moved = 0
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            for name in _PAGED:
                tensor = state.get(name)
                if tensor is None or not tensor.is_cuda or getattr(tensor, "is_paged", False):
                    continue
                buffer = inner.get_state_buffer(parameter, dtype=tensor.dtype)
                if not getattr(buffer, "is_paged", False):
                    continue  # small tensors stay where they are
                buffer.copy_(tensor)
                state[name] = buffer
                moved += 1
    return moved
