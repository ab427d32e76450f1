"""The Triton backend, an op or two a module. Importing this package does not import Triton; its modules do.

What the kernels share:

    metadata     scale and offset of groups, from 16-bit floats or 8-bit codes
    convert      bytes to codes as float32, float32 to the type of the output
    codes        bytes to what a tensor core takes
    product      sums of x, middles, the end of a row, sums of shares

The ops:

    dequantize   packed -> a matrix of floats, or a window of it
    embedding    rows of a packed embedding
    matmul       the product for few rows of x; gemm for dozens; dense for many, and dx; simt for one to four rows
                 without tensor cores; general for any layer
    bitserial    the product of one-bit weights and 8-bit activations
"""

from __future__ import annotations

import importlib.util
import os

_TRUE = ("1", "true", "yes", "on", "y")


def available() -> bool:
    """Whether Triton is installed, so that the modules of this package can be imported. Does not import it."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a mere folder of this name has no origin


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes CPU tensors.

    `TRITON_INTERPRET=1` must be in the environment before Triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in _TRUE
