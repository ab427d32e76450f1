"""Memory of a LoRA layer beside a packed product, PEFT's forward pass against ours:
`python benchmarks/lora_memory.py [--output FILE]`.

Counted, not sampled, on a CPU: the bytes of the tensors that torch's operators return and that are still alive. What
an operator uses inside (the dequantized weight of the reference product) is not seen, nor is the packed weight.

    kept       what the graph holds after the forward pass: tensors that are neither x nor parameters
    forward    the most that lived at once during the forward pass, beside x and y
    backward   the most during the backward pass, what was kept included, beside x, y, dy and the gradients

The adapter is float32, as PEFT makes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What x is, and whether autocast to bfloat16 is on.
CASES = {"bf16": (torch.bfloat16, False), "bf16, autocast": (torch.bfloat16, True), "fp32": (torch.float32, False)}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made under this mode and that live: now, and at most so far."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return outputs

    def now(self) -> int:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())


def make_layer(in_features: int, out_features: int, rank: int, **settings: Any) -> Any:
    """A packed linear layer with an adapter, as PEFT builds it."""
    from peft import LoraConfig, get_peft_model

    import hqqplus  # noqa: F401  # registers the layer with PEFT
    from hqqplus import QuantSpec
    from hqqplus.modules import PackedLinear

    linear = nn.Linear(in_features, out_features, bias=False)
    model = nn.Sequential(PackedLinear.from_linear(linear, QuantSpec(2, 64)))
    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False, **settings)
    return get_peft_model(model, config).base_model.model[0]


def measure(layer: Any, forward: Any, tokens: int, dtype: torch.dtype, autocast: bool) -> dict[str, int]:
    """kept, forward and backward, in bytes, of `forward(layer, x)` with x [tokens, in_features] in `dtype`."""
    x = torch.randn(tokens, layer.in_features, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, layer.out_features, dtype=dtype)
    parameters = list(layer.parameters())
    trained = [p for p in parameters if p.requires_grad]
    with LiveBytes(x, *parameters) as live:
        with torch.autocast("cpu", enabled=autocast):
            y = forward(layer, x)
        size = y.untyped_storage().nbytes()
        forward_peak, kept = live.peak - size, live.now() - size
        live.peak = 0
        live.known.add(dy.untyped_storage()._cdata)
        gradients = torch.autograd.grad(y, [x, *trained], dy)
        # y lives on, as it does in a model; the gradients are what the pass is for.
        backward_peak = live.peak - size - sum(g.untyped_storage().nbytes() for g in gradients)
    return {"kept": kept, "forward": forward_peak, "backward": backward_peak}


def compare(layer: Any, tokens: int, dtype: torch.dtype, autocast: bool) -> dict[str, dict[str, int]]:
    """`measure` of PEFT's forward pass and of ours."""
    from peft.tuners.lora.layer import Linear

    forwards = {"peft": Linear.forward, "hqqplus": type(layer).forward}
    return {name: measure(layer, forward, tokens, dtype, autocast) for name, forward in forwards.items()}


def main() -> None:
    from common import write_result

    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layer = make_layer(arguments.width, arguments.width, arguments.rank)
    result = {}
    for name, (dtype, autocast) in CASES.items():
        result[name] = compare(layer, arguments.tokens, dtype, autocast)
        for route, sizes in result[name].items():
            print(name, route, *(f"{what} {size / 1e6:.2f} MB" for what, size in sizes.items()), sep="\t")
    sizes = {"width": arguments.width, "tokens": arguments.tokens, "rank": arguments.rank}
    write_result(arguments.output, {**sizes, "bytes": result})


if __name__ == "__main__":
    main()
