"""A LoRA start from what quantization lost: B A = the best rank-r approximation of W - Q.

PEFT's own start has B = 0, so training begins at the quantized model. Here it begins at the quantized model plus the
leading singular directions of its error (the idea of LoftQ, Li et al. 2023, arXiv:2310.08659, without its
alternation). The gain is large where r is not small beside the width, and shrinks as 4 r / width of the residual's
energy for wide layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.modules import PackedEmbedding, PackedLinear
from hqqplus.quantization import PackedTensor

Factors = tuple[Tensor, Tensor]  # A [r, in_features], B [out_features, r], float32

_EXACT_BELOW = 1024  # widths up to which the full decomposition is affordable
# A quantization residual has a nearly flat spectrum, which takes more of both than usual.
_POWER_ITERATIONS, _OVERSAMPLING = 6, 3


@torch.no_grad()
def residual_factors(weight: Tensor, packed: PackedTensor, rank: int) -> Factors:
    """A [rank, in] and B [out, rank] with B A the best rank-`rank` approximation of `weight` - dequantized `packed`.

    The singular values are shared out evenly. Where `rank` exceeds the smaller side of the matrix the rest is zero.
    Deterministic; the global random state is left alone.
    """
    residual = weight.float() - packed.dequantize(torch.float32).to(weight.device)
    smaller = min(residual.shape)
    kept = min(rank, smaller)
    if smaller <= _EXACT_BELOW:
        u, s, vt = torch.linalg.svd(residual, full_matrices=False)
        v = vt.t()
    else:
        devices = [residual.device] if residual.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            width = min(kept * _OVERSAMPLING, smaller)
            u, s, v = torch.svd_lowrank(residual, q=width, niter=_POWER_ITERATIONS)
    root = s[:kept].sqrt()
    a, b = (v[:, :kept] * root).t(), u[:, :kept] * root
    pad = rank - kept
    return nn.functional.pad(a, (0, 0, 0, pad)).contiguous(), nn.functional.pad(b, (0, pad)).contiguous()


class ResidualCollector:
    """Keeps the residual factors of every linear weight that is packed while it observes.

        collector = ResidualCollector(rank)
        with observe_packing(collector):
            model = AutoModelForCausalLM.from_pretrained(id, quantization_config=...)

    Holds 2 rank (in + out) floats a layer on the CPU: 168 MB for Llama-3-8B at rank 16.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.factors: dict[str, Factors] = {}

    def __call__(self, name: str, weight: Tensor, packed: PackedTensor) -> None:
        a, b = residual_factors(weight, packed, self.rank)
        self.factors[name] = a.cpu(), b.cpu()


def residuals_from_parent(model: nn.Module, parent_weight: Callable[[str], Tensor], rank: int) -> dict[str, Factors]:
    """The factors for a model that was packed earlier: name of each packed linear layer -> (A, B).

    `parent_weight(name)` gives the full-precision weight of module `name`. A head on the tensors of an embedding has
    none of its own, and gets no LoRA.
    """
    tied = {id(module.W_q) for module in model.modules() if isinstance(module, PackedEmbedding)}
    return {
        name: residual_factors(parent_weight(name).to(module.W_q.device), module.packed(), rank)
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and id(module.W_q) not in tied
    }


@torch.no_grad()
def apply_residual_start(model: Any, factors: Mapping[str, Factors], adapter_name: str = "default") -> int:
    """Set the LoRA weights of PEFT model `model` so that scaling * B A is the residual's approximation.

    Returns the number of layers set. A DoRA magnitude is set anew to the row norms of the result.

    Raises:
        KeyError: if a LoRA layer over a packed linear layer has no factors.
    """
    prefix, count = "base_model.model.", 0
    for name, module in model.named_modules():
        if adapter_name not in getattr(module, "lora_A", {}):
            continue
        base = module.get_base_layer()
        if not isinstance(base, PackedLinear):
            continue
        a, b = factors[name.removeprefix(prefix)]
        share = 1 / math.sqrt(module.scaling[adapter_name])
        lora_a, lora_b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        # Directions come best first. A layer of a rank of its own takes as many as it has; more start as PEFT's do.
        shared = min(len(a), len(lora_a))
        lora_b.zero_()
        lora_a[:shared] = a[:shared] * share
        lora_b[:, :shared] = b[:, :shared] * share
        if module.use_dora.get(adapter_name, False):
            module.lora_magnitude_vector[adapter_name].update_layer(
                base_layer=base, lora_A=lora_a, lora_B=lora_b, scaling=module.scaling[adapter_name]
            )
        count += 1
    return count
