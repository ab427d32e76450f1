"""`torch.ops.hqqplus.*` and the backends behind them. Importing this package registers the ops."""

from hqqplus.kernels.ops import dequantize, embedding, matmul, matmul_dx
from hqqplus.kernels.solve import quantize

__all__ = ["dequantize", "embedding", "matmul", "matmul_dx", "quantize"]
