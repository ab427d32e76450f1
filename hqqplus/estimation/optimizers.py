"""What an optimizer remembers of each parameter, by the names that `training.optim` takes."""

from __future__ import annotations

import math
from collections.abc import Iterable

Shape = tuple[int, ...]

# Numbers in float32 a weight. Families whose state has other shapes are not in here.
_NUMBERS = {
    "adamw_torch": 2, "adamw_torch_fused": 2, "adamw_torch_xla": 2, "adamw_torch_npu_fused": 2, "stable_adamw": 2,
    "paged_adamw": 2, "paged_adamw_32bit": 2, "ademamix": 3, "paged_ademamix_32bit": 3, "lion_32bit": 1,
    "paged_lion_32bit": 1, "rmsprop": 1, "rmsprop_bnb": 1, "rmsprop_bnb_32bit": 1, "adagrad": 1, "sgd": 0,
}  # fmt: skip
# bitsandbytes in 8 bits: a byte for each number, and a float32 for 256 of them.
_EIGHT_BIT = {
    "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
    "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1,
}  # fmt: skip
_BLOCK, _SMALLEST = 256, 4096
# bitsandbytes keeps tables of 256 float32 that turn codes into numbers.
_TABLE = 4 * 256


def is_known(optimizer: str) -> bool:
    """Whether `state_bytes` knows the state of `optimizer`; it takes others for AdamW in float32."""
    return optimizer in _NUMBERS or optimizer in _EIGHT_BIT or optimizer == "adafactor"


def state_bytes(optimizer: str, shapes: Iterable[Shape]) -> int:
    """Bytes of the state of `optimizer` for float32 parameters of these shapes, after its first step."""
    shapes = list(shapes)
    if optimizer == "adafactor":  # a row and a column of second moments in the place of a matrix
        return sum(
            4 * (sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else math.prod(shape)) for shape in shapes
        )
    sizes = [math.prod(shape) for shape in shapes]
    numbers = _EIGHT_BIT.get(optimizer)
    if numbers is None:
        return 4 * _NUMBERS.get(optimizer, 2) * sum(sizes)
    small = sum(size for size in sizes if size < _SMALLEST)  # these stay in float32
    large = sum(size + 4 * -(-size // _BLOCK) for size in sizes if size >= _SMALLEST)
    return numbers * (4 * small + large + (_TABLE if large else 0))


def step_bytes(optimizer: str, trained: int) -> int:
    """Bytes that a step takes for a moment: torch's AdamW of many tensors makes a copy of `trained` bytes."""
    return trained if optimizer in ("adamw_torch", "rmsprop", "adagrad") else 0
