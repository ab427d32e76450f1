"""Mathematics: tensors in, tensors out. Knows no model, no file and no GPU kernel."""

from hqqplus.quantization.spec import WHOLE_ROW, QuantPlan, QuantSpec
from hqqplus.quantization.tensor import PackedTensor, quantize

__all__ = ["WHOLE_ROW", "PackedTensor", "QuantPlan", "QuantSpec", "quantize"]
