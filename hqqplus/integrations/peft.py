"""PEFT: LoRA on packed layers.

PEFT has no registry for layers of its own kind, so the one function that chooses a layer's LoRA class is wrapped:
packed linear layers get `PackedLoraLinear`, everything else goes on as before. Then every door of PEFT works:
`get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, a second adapter, TRL's `peft_config`.

PEFT's own forward pass casts x to the adapter's dtype (float32, also where the model computes in bfloat16) and adds
the product in three tensors of the output's size. Plain LoRA therefore has a forward pass of its own here, one node
with the packed product (`kernels/lora.py`); variants (DoRA and others), a bias in the adapter, batches of mixed
adapters and layers that somebody has wrapped or hooked take PEFT's.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import torch

# From the defining modules: while PEFT itself is being imported, its top level is not there yet.
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from hqqplus.kernels.lora import Adapter, matmul_lora
from hqqplus.modules import PackedEmbedding, PackedLinear

if TYPE_CHECKING:
    from peft import LoraConfig

# Inits that decompose the base weight and write the remainder back into it, which a packed weight cannot take.
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "orthogonal", "mica", "lora_ga")

MERGE_REFUSED = (
    "an adapter cannot be merged into a packed base: re-quantizing to 1-4 bits destroys most of it. Keep the adapter "
    "beside the base (`hqqplus.load(base, adapter)`), or export dequantized weights + adapter in 16 bits "
    "(`hqqplus export BASE OUTPUT --adapter ADAPTER`)"
)


class PackedLoraLinear(LoraLinear):
    """LoRA, DoRA, rsLoRA and the rest of PEFT's linear layer, over a `PackedLinear`; only merging is refused."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        # Where activations are rounded is the base layer's own choice.
        direct = isinstance(base, PackedLinear) and _untouched(base, PackedLinear) and not base.takes_int8()
        names = self._fused_adapters() if direct and not args and not kwargs else None
        if not names:
            return super().forward(x, *args, **kwargs)
        assert isinstance(base, PackedLinear)
        if torch.is_autocast_enabled(x.device.type):  # as the base layer does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return matmul_lora(x, base.op_arguments(), base.bias, [self._adapter(name, x) for name in names])

    def _adapter(self, name: str, x: Tensor) -> Adapter:
        down, up, dropout = self._parts(name)
        # What a dropout leaves of x is a tensor of its own, as in PEFT.
        own = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.training else None
        return Adapter(down.weight, up.weight, self.scaling[name], own)

    def _parts(self, name: str) -> tuple[Any, Any, Any]:
        return self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

    def _fused_adapters(self) -> list[str] | None:
        """The active adapters if `matmul_lora` serves each of them; None if PEFT's forward pass has to."""
        if self.disable_adapters or self.merged:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names if all(self._fusible(name) for name in names) else None

    def _fusible(self, name: str) -> bool:
        down, up, dropout = self._parts(name)
        return (
            name not in self.lora_variant
            and _untouched(down, nn.Linear)
            and _untouched(up, nn.Linear)
            and (_untouched(dropout, nn.Identity) or _untouched(dropout, nn.Dropout))
            and down.bias is None
            and up.bias is None
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _get_base_layer_device_and_dtype(self, *args: Any, **kwargs: Any) -> tuple[torch.device, torch.dtype]:
        base = self.get_base_layer()
        assert isinstance(base, PackedLinear)
        return base.W_q.device, base.compute_dtype


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what a `kind` does and no more, so that its parameters can be used directly.

    FSDP and tensor parallelism change the class, DeepSpeed and offloading hook the call or replace the forward pass:
    then the parameters may be elsewhere until the module is called.
    """
    return (
        type(module) is kind
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
    )


def register_packed_lora() -> None:
    """Wrap `LoraModel._create_new_module`, once."""
    original = LoraModel._create_new_module
    if getattr(original, "handles_packed_layers", False):
        return

    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, PackedEmbedding):
            raise ValueError("LoRA on a packed embedding is not supported: leave it out of target_modules")
        if not isinstance(base, PackedLinear):
            return original(lora_config, adapter_name, target, **kwargs)
        if kwargs.get("parameter_name") is not None:
            raise ValueError("target_parameters cannot name the tensors of a packed layer: use target_modules")
        init = lora_config.init_lora_weights
        if isinstance(init, str) and init.startswith(_REWRITING_INITS):
            raise ValueError(
                f"init_lora_weights={init!r} rewrites the base weight, which a packed layer cannot take: "
                "use True, 'gaussian' or 'eva', or hqqplus' residual start"
            )
        kwargs.pop("device_map", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    create_new_module.handles_packed_layers = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # type: ignore[method-assign]


register_packed_lora()
