"""Mathematics: tensors in, tensors out. Knows no model, no file and no GPU kernel."""

from hqqplus.quantization.allocation import candidate_specs
from hqqplus.quantization.spec import WHOLE_ROW, QuantPlan, QuantSpec, SolverOptions
from hqqplus.quantization.tensor import PackedTensor, quantize

__all__ = ["WHOLE_ROW", "PackedTensor", "QuantPlan", "QuantSpec", "SolverOptions", "candidate_specs", "quantize"]
