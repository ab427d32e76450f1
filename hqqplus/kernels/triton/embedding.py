"""Rows of a packed embedding: W[ids], dequantized while they are gathered.

Formula, layout and kernels are those of `dequantize.py`, whose row numbers come from `ids` here; only the rows asked
for are read. Bytes. For each number written nbits / 8 and the share of its group's 4 bytes (2 with 8-bit metadata) are
read, and 8 for each id: at 8 bits in groups of 64 to bfloat16 3.06 bytes in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.kernels.packed import Packed, shaped
from hqqplus.kernels.triton.dequantize import launch


def embedding(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] (integers) of the matrix: [..., in_features] in `dtype` (float32, bfloat16 or float16).

    An id that is no row's gives a row of NaN: nothing outside of the tensors is read, and the device need not wait.

    Raises:
        ValueError: for a matrix with axis 0, whose rows are not rows of the packed one.
    """
    if packed.spec.axis != 1:
        raise ValueError("an embedding is gathered by rows: it needs axis 1")
    width = packed.shape[1]
    rows = ids.reshape(-1).contiguous()
    out = torch.empty(rows.shape[0], width, dtype=dtype, device=packed.W_q.device)
    launch(packed, out, (0, rows.shape[0]), (0, width), rows)
    return shaped(out, (*ids.shape, width))
