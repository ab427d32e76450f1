"""HQQ+ fine-tuning: language models in 1 or 2 bits, recovered with LoRA.

    import hqqplus
    model = hqqplus.load("runs/llama3_8b_2bit/base", adapter="runs/llama3_8b_2bit/adapter")

`import hqqplus` alone makes transformers and PEFT understand packed models, whichever is imported first, and imports
neither them nor torch: registration happens when they are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hqqplus.integrations import register_when_imported

if TYPE_CHECKING:
    from hqqplus.allocation import allocate, describe_plan, hybrid_plan
    from hqqplus.evaluation.texts import Evaluation, evaluate
    from hqqplus.integrations.transformers import HqqPlusConfig, quantize_model
    from hqqplus.kernels import quantize
    from hqqplus.merging import export
    from hqqplus.models import load
    from hqqplus.modules import PackedEmbedding, PackedLinear
    from hqqplus.quantization import PackedTensor, QuantPlan, QuantSpec, SolverOptions, candidate_specs
    from hqqplus.recipe import Recipe, load_recipe
    from hqqplus.streaming import quantize_checkpoint, quantize_folder

__version__ = "0.1.0"

_HOMES = {
    "Evaluation": "hqqplus.evaluation.texts",
    "HqqPlusConfig": "hqqplus.integrations.transformers",
    "PackedEmbedding": "hqqplus.modules",
    "PackedLinear": "hqqplus.modules",
    "PackedTensor": "hqqplus.quantization",
    "QuantPlan": "hqqplus.quantization",
    "QuantSpec": "hqqplus.quantization",
    "Recipe": "hqqplus.recipe",
    "SolverOptions": "hqqplus.quantization",
    "allocate": "hqqplus.allocation",
    "candidate_specs": "hqqplus.quantization",
    "describe_plan": "hqqplus.allocation",
    "evaluate": "hqqplus.evaluation.texts",
    "export": "hqqplus.merging",
    "hybrid_plan": "hqqplus.allocation",
    "load": "hqqplus.models",
    "load_recipe": "hqqplus.recipe",
    "quantize": "hqqplus.kernels",
    "quantize_checkpoint": "hqqplus.streaming",
    "quantize_folder": "hqqplus.streaming",
    "quantize_model": "hqqplus.integrations.transformers",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hqqplus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register_when_imported()
