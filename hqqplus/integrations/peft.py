"""PEFT: LoRA on packed layers.

PEFT has no registry for layers of its own kind, so the one function that chooses a layer's LoRA class is wrapped:
packed linear layers get `PackedLoraLinear`, everything else goes on as before. Then every door of PEFT works:
`get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, a second adapter, TRL's `peft_config`.

PEFT's own forward pass casts x to the adapter's dtype (float32, also where the model computes in bfloat16) and adds
the product in three tensors of the output's size. Plain LoRA therefore has a forward pass of its own here, one node
with the packed product (`kernels/lora.py`); variants (DoRA and others), a bias in the adapter, batches of mixed
adapters and layers that somebody has wrapped or hooked take PEFT's. An adapter may have gains of the packed weight's
rows and columns beside its matrices (`add_gains`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

# From the defining modules: while PEFT itself is being imported, its top level is not there yet.
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.kernels.lora import Adapter, Gains, gained, matmul_lora
from hqqplus.modules import PackedEmbedding, PackedExperts, PackedLinear, PackedStack

if TYPE_CHECKING:
    from peft import LoraConfig

GAINS = ("lora_gain_in", "lora_gain_out")
# In an adapter's configuration: all its layers have gains. PEFT keeps no fields that it does not know, and gives those
# that it keeps to every layer that it makes, whoever loads the adapter.
_HAS_GAINS = "hqqplus_gains"

# Inits that decompose the base weight and write the remainder back into it, which a packed weight cannot take.
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "orthogonal", "mica", "lora_ga")

MERGE_REFUSED = (
    "an adapter cannot be merged into a packed base: re-quantizing to 1-4 bits destroys most of it. Keep the adapter "
    "beside the base (`hqqplus.load(base, adapter)`), or export dequantized weights + adapter in 16 bits "
    "(`hqqplus export BASE OUTPUT --adapter ADAPTER`)"
)

NO_LORA_ON_EXPERTS = (
    "LoRA on packed experts is not supported: name linear layers, such as q_proj, k_proj, v_proj and o_proj"
)
# What parts of experts were called as linear layers, and what they and their router are now. PEFT takes these names in
# a mixture for its experts, also where another linear layer has one.
_OF_EXPERTS = frozenset({"w1", "w2", "w3", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "experts", "gate"})


class PackedLoraLinear(LoraLinear):
    """LoRA, DoRA, rsLoRA and the rest of PEFT's linear layer, over a `PackedLinear`; only merging is refused.

    Beside plain LoRA an adapter may have gains (`add_gains`), factors of the columns and the rows of the packed
    weight: y = r (W (c x)) + bias + LoRA of x. Of several active adapters with gains the factors are multiplied.

    Attributes:
        lora_gain_in, lora_gain_out: adapter name -> c - 1 [in_features] and r - 1 [out_features].
    """

    # PEFT switches, freezes, moves, saves and deletes all that is named here.
    adapter_layer_names = (*LoraLinear.adapter_layer_names, *GAINS)
    lora_gain_in: nn.ParameterDict
    lora_gain_out: nn.ParameterDict

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if GAINS[0] not in self._modules:  # PEFT's constructor comes here with the first adapter
            for gain in GAINS:
                setattr(self, gain, nn.ParameterDict())
            self.register_load_state_dict_pre_hook(_receive_gains)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if (config.auto_mapping or {}).get(_HAS_GAINS):
            self.add_gains(adapter_name)

    def add_gains(self, name: str) -> None:
        """Give adapter `name` gains of 1, which it may already have; like its matrices they are trained or frozen."""
        like, base = cast(Tensor, self.lora_A[name].weight), cast(PackedLinear, self.get_base_layer())
        for gain, size in zip(GAINS, (base.in_features, base.out_features), strict=True):
            if name not in getattr(self, gain):
                zeros = torch.zeros(size, dtype=like.dtype, device=like.device)
                getattr(self, gain)[name] = nn.Parameter(zeros, requires_grad=like.requires_grad)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        # Where activations are rounded is the base layer's own choice.
        direct = isinstance(base, PackedLinear) and _untouched(base, PackedLinear) and not base.takes_int8()
        names = self._fused_adapters() if direct and not args and not kwargs else None
        if not names:
            active = [] if self.disable_adapters or self.merged else self.active_adapters
            if kwargs.get("adapter_names") is None and self._have_gains(active):
                return self._gained_forward(x, active, *args, **kwargs)
            return super().forward(x, *args, **kwargs)
        assert isinstance(base, PackedLinear)
        if torch.is_autocast_enabled(x.device.type):  # as the base layer does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        adapters = [self._adapter(name, x) for name in names]
        return matmul_lora(x, base.op_arguments(), base.bias, adapters, self._gains(names), base.trained_scales())

    def _gained_forward(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass with gains around a base layer that has to be called."""
        inner, outer = self._gains(names)
        y = self.base_layer(gained(x, inner), *args, **kwargs)
        if outer is not None:
            bias = self.get_base_layer().bias
            product = y if bias is None else y - bias.to(y.dtype)
            y = torch.addcmul(y, product, outer.to(y.dtype))
        for name in filter(self.lora_A.__contains__, names):
            if name in self.lora_variant:
                raise ValueError(f"adapter {name!r} is no plain LoRA and cannot be active beside one with gains")
            down, up, dropout = self._parts(name)
            y = y + (up(down(dropout(x.to(down.weight.dtype)))) * self.scaling[name]).to(y.dtype)
        return y

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if not self._have_gains(adapter_names):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT's own, for variants
        parts = [self._gained_forward(x[i : i + 1], [name], *args, **kwargs) for i, name in enumerate(adapter_names)]
        return torch.cat(parts)

    def _have_gains(self, names: Sequence[str]) -> bool:
        return any(name in self.lora_gain_in for name in names)

    def _gains(self, names: Sequence[str]) -> Gains:
        """The gains of these adapters together, of which some may be of other layers or have none."""
        both = []
        for gain in GAINS:
            together: Tensor | None = None
            for own in (getattr(self, gain)[name] for name in names if name in getattr(self, gain)):
                together = own if together is None else together + own + together * own
            both.append(together)
        return Gains(*both)

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


def _receive_gains(layer: PackedLoraLinear, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Make the gains that `state_dict` brings, where the configuration has not announced them.

    PEFT 0.21 completes the names of those tensors alone that it finds in the model; then the adapter that is being
    loaded is the one whose matrices come along.
    """
    for gain in GAINS:
        bare = f"{prefix}{gain}"
        matrices = [key.removeprefix(f"{prefix}lora_A.") for key in state_dict if key.startswith(f"{prefix}lora_A.")]
        loaded = {name.removesuffix(".weight") for name in matrices}
        if bare in state_dict and len(loaded) == 1:
            state_dict[f"{bare}.{loaded.pop()}"] = state_dict.pop(bare)
        for name in [key.removeprefix(f"{bare}.") for key in state_dict if key.startswith(f"{bare}.")]:
            if name in layer.lora_A:
                layer.add_gains(name)


def add_gains(model: Any, adapter_name: str = "default") -> int:
    """Give adapter `adapter_name` of PEFT model `model` gains over its packed layers; returns their number.

    They start at 1, are trained with the adapter, and saved and loaded with it: in_features + out_features values a
    layer, 2.6 million for Llama-3-8B.

    Raises:
        UserError: if the model has no such adapter over packed layers, or it is another than plain LoRA.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLoraLinear) and adapter_name in m.lora_A]
    if not layers:
        raise UserError(f"gains: the model has no adapter {adapter_name!r} over packed layers")
    if any(adapter_name in layer.lora_variant for layer in layers):
        raise UserError(f"gains: adapter {adapter_name!r} has to be plain LoRA or rsLoRA, such as without use_dora")
    for layer in layers:
        layer.add_gains(adapter_name)
    config = model.peft_config[adapter_name]
    config.auto_mapping = {**(config.auto_mapping or {}), _HAS_GAINS: True}
    return len(layers)


def gain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gains of all adapters of `model`."""
    layers = [module for module in model.modules() if isinstance(module, PackedLoraLinear)]
    return [gains for layer in layers for name in GAINS for gains in getattr(layer, name).values()]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the base model computes by itself, with the norms that it came with.

    PEFT's own `disable_adapter` freezes the adapter meanwhile; a model that is being trained by FSDP2 would take note.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def norm_modules(model: nn.Module) -> list[str]:
    """What to give to `LoraConfig(modules_to_save=...)` so that all norms of `model` are trained, and nothing else.

    A norm is a module whose class name ends in Norm and that has a weight [width] and at most a bias beside it. The
    last parts of their names, or the whole names where PEFT, which compares the ends of names, would take more.

    Raises:
        UserError: if PEFT would take more even so.
    """
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if _is_norm(module)]
    for names in (sorted({name.rpartition(".")[2] for name in norms}), norms):
        if sum(name.endswith(tuple(names)) for name in modules) == len(norms):
            return names
    raise UserError("norms: the names of other modules end in those of norms, so PEFT cannot tell them apart")


def targets_beside_experts(model: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """`targets` as PEFT is to have them: for a model with packed experts "all-linear" is every packed linear layer but
    the head, of those that PEFT does not take for experts.

    Raises:
        UserError: if they name the experts.
    """
    if not any(isinstance(module, PackedStack) for module in model.modules()):
        return targets if isinstance(targets, str) else list(targets)
    head = cast(Any, model).get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and module is not head
    }
    if targets == "all-linear":
        return sorted(linear - _OF_EXPERTS)
    if isinstance(targets, str):
        return targets
    if named := [target for target in targets if target.rpartition(".")[2] in _OF_EXPERTS]:
        raise UserError(f"adapter.target_modules: {', '.join(named)}: {NO_LORA_ON_EXPERTS}")
    return list(targets)


def train_in_float32(model: nn.Module) -> int:
    """Bring the trained norms and biases of PEFT model `model` from 16 bits to float32; returns how many tensors.

    A bfloat16 weight near 1 is 0.004 or 0.008 from its neighbours: the steps of an optimizer are lost on it. What a
    norm returns stays in the dtype that its weight had. Call it before the optimizer is made.
    """
    count = 0
    for module in model.modules():
        if not (_is_norm(module) or isinstance(module, PackedLinear)):
            continue
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype.itemsize == 2]
        if trained and _is_norm(module):
            module.register_forward_hook(partial(_returned_in, trained[0].dtype))
            if isinstance(module, nn.LayerNorm):  # which, other than those of transformers, wants one dtype
                module.register_forward_pre_hook(_in_float32)
        for parameter in trained:
            parameter.data = parameter.data.float()
        count += len(trained)
    return count


def _returned_in(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(dtype)


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].float(), *inputs[1:]


def _is_norm(module: nn.Module) -> bool:
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    return type(module).__name__.endswith("Norm") and shapes in ({"weight": 1}, {"weight": 1, "bias": 1})


def register_packed_lora() -> None:
    """Wrap `LoraModel._create_new_module`, once."""
    original = LoraModel._create_new_module
    if getattr(original, "handles_packed_layers", False):
        return

    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, PackedEmbedding):
            raise ValueError("LoRA on a packed embedding is not supported: leave it out of target_modules")
        if isinstance(base, PackedExperts | PackedStack):
            raise ValueError(NO_LORA_ON_EXPERTS)
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
