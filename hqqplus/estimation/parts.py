"""The parts of a model by what they are for, and how many bytes each of them has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LINEARS, METADATA, EMBEDDING, HEAD, REST = "linears", "metadata", "embedding", "head", "16 bits"
PARTS = (LINEARS, METADATA, EMBEDDING, HEAD, REST)
"""Codes of the packed layers; their scales, zeros and blocks; embedding and head with all that is theirs; the rest:
norms, biases, and whatever weights stay in the dtype of the model."""


def byte_size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def backbone_parts(model: Any, sixteen_bits: bool = False) -> dict[str, int]:
    """Bytes of the parameters of causal model `model`, without adapters, by part; shared ones once.

    Args:
        sixteen_bits: count floats in 16 bits, as a packed folder in bfloat16 has them.
    """
    roles = {id(model.get_input_embeddings()): EMBEDDING, id(model.get_output_embeddings()): HEAD}
    sizes, seen = dict.fromkeys(PARTS, 0), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part = roles.get(id(module))
            if part is None:
                packed = not parameter.is_floating_point()
                part = REST if not packed else LINEARS if name.endswith("W_q") else METADATA
            floats = parameter.is_floating_point() and sixteen_bits
            sizes[part] += 2 * parameter.numel() if floats else byte_size(parameter)
    return sizes


def trained_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of all that is trained."""
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def trained_bytes(model: nn.Module) -> int:
    return sum(byte_size(p) for p in model.parameters() if p.requires_grad)
