"""Scale and offset as they are stored: 16-bit floats, bit-cast to int16.

Integers are what no part of the stack re-types: `.to(dtype)`, an fp32 upcast before training, a mixed-precision policy
or a reload with another dtype all cast floating tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.quantization.spec import METADATA_DTYPES

STORAGE_DTYPE = torch.int16


def metadata_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` or `"float16"` as a torch dtype.

    Raises:
        ValueError: for any other name.
    """
    if name not in METADATA_DTYPES:
        raise ValueError(f"metadata_dtype is {name!r}: it must be one of {', '.join(METADATA_DTYPES)}")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def to_storage(values: Tensor) -> Tensor:
    """Bit-cast a 16-bit float tensor to int16."""
    return values.view(STORAGE_DTYPE)


def from_storage(stored: Tensor, name: str) -> Tensor:
    """Bit-cast an int16 tensor back to the 16-bit float type called `name`."""
    return stored.view(metadata_dtype(name))
