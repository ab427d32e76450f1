"""Scale and offset as they are stored: the bytes of 16-bit floats.

Integers are what no part of the stack re-types: `.to(dtype)`, an fp32 upcast before training, a mixed-precision policy
or a reload with another dtype all cast floating tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.quantization.spec import METADATA_DTYPES

# Bytes, not int16: neither NCCL nor gloo can send an int16, so DDP could not start.
STORAGE_DTYPE = torch.uint8


def metadata_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` or `"float16"` as a torch dtype.

    Raises:
        ValueError: for any other name.
    """
    if name not in METADATA_DTYPES:
        raise ValueError(f"metadata_dtype is {name!r}: it must be one of {', '.join(METADATA_DTYPES)}")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def to_storage(values: Tensor) -> Tensor:
    """The bytes of a 16-bit float tensor [..., n]: [..., 2 n] uint8."""
    return values.contiguous().view(STORAGE_DTYPE)


def from_storage(stored: Tensor, name: str) -> Tensor:
    """Bytes [..., 2 n] seen as the 16-bit float type called `name`: [..., n]."""
    return stored.view(metadata_dtype(name))
