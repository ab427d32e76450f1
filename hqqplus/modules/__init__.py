"""What stands in a model where `nn.Linear` and `nn.Embedding` stood."""

from hqqplus.modules.embedding import PackedEmbedding
from hqqplus.modules.experts import PackedExperts, PackedStack
from hqqplus.modules.linear import PackedLinear
from hqqplus.modules.packed import PackedState
from hqqplus.modules.replace import bits_per_weight, model_bytes, observe_packing, packed_modules

__all__ = [
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedStack",
    "PackedState",
    "bits_per_weight",
    "model_bytes",
    "observe_packing",
    "packed_modules",
]
