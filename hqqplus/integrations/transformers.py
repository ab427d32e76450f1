"""transformers: the quantization config and the quantizer behind `from_pretrained`.

While quantizing on the fly the ordinary modules stay in place and one operation per weight swaps the packed layer in,
so no more than one weight is in full precision at a time. For a packed checkpoint the layers are put in up front, and
because their parameters are named as the tensors on disk nothing has to be converted.

Importing this module registers both with transformers and the LoRA layer with PEFT.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hqqplus.errors import UserError
from hqqplus.modules import replace
from hqqplus.modules.experts import PackedStack
from hqqplus.modules.packed import PackedState
from hqqplus.progress import WorkProgress
from hqqplus.quantization.spec import QuantPlan, QuantSpec, SolverOptions
from hqqplus.quantization.tensor import state_names
from hqqplus.untrusted import check_memory

QUANT_METHOD = "hqqplus"
DEVICE_MAP_REFUSED = (
    "a device_map spreads one model over all cards, and with several processes each card belongs to one of them: "
    "leave it out; a model that is too large for one card is shared out by FSDP2 (recipes/accelerate/fsdp2.yaml)"
)


class HqqPlusConfig(QuantizationConfigMixin):
    """How to quantize a model while it loads: `from_pretrained(id, quantization_config=HqqPlusConfig(nbits=2))`.

    Args:
        nbits, group_size, axis, metadata_dtype, metadata_bits: the fields of `QuantSpec`, for every linear layer.
        overrides: name pattern -> the fields that differ there, e.g. `{"lm_head": {"nbits": 8}, "*.down_proj":
            {"nbits": 4}}`. The embedding and the output head stay in full precision unless a pattern names them.
        modules_to_not_convert: name patterns of modules that stay in full precision.
        solver: the fields of `SolverOptions`, for all of them, e.g. `{"gain": 0.5}`.

    Raises:
        ValueError, TypeError: for values out of range, with what is allowed.
    """

    def __init__(
        self,
        nbits: int = 2,
        group_size: int = 32,
        axis: int = 1,
        metadata_dtype: str = "float16",
        metadata_bits: int = 8,
        overrides: Mapping[str, Mapping[str, Any]] | Sequence[tuple[str, Mapping[str, Any]]] | None = None,
        modules_to_not_convert: list[str] | None = None,
        solver: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a plain string is enough
        kwargs.pop("quant_method", None)
        if kwargs:
            raise TypeError(f"HqqPlusConfig has no argument {', '.join(map(repr, sorted(kwargs)))}")
        self.nbits, self.group_size, self.axis = nbits, group_size, axis
        self.metadata_dtype, self.metadata_bits = metadata_dtype, metadata_bits
        # A list, because of two patterns that match a name the last one wins, and transformers sorts the keys of
        # what it writes to config.json.
        self.overrides: list[Any] = [[pattern, dict(changes)] for pattern, changes in dict(overrides or {}).items()]
        self.modules_to_not_convert = list(modules_to_not_convert) if modules_to_not_convert else None
        self.solver = SolverOptions(**solver or {}).to_dict()
        self.plan()

    @classmethod
    def from_plan(cls, plan: QuantPlan) -> HqqPlusConfig:
        return cls(
            **plan.default.to_dict(),
            overrides=dict(plan.overrides),
            modules_to_not_convert=list(plan.skip) or None,
            solver=plan.solver.to_dict(),
        )

    def plan(self) -> QuantPlan:
        """The same as a `QuantPlan`."""
        default = QuantSpec(self.nbits, self.group_size, self.axis, self.metadata_dtype, self.metadata_bits)
        skip = tuple(self.modules_to_not_convert or ())
        overrides = dict(self.overrides)
        return QuantPlan(default, overrides, skip, SolverOptions(**self.solver))


class PackWeight(ConversionOps):
    """Quantizes one weight of the checkpoint and swaps the packed layer in."""

    def __init__(self, quantizer: HqqPlusQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, key, missing_keys = kwargs["model"], kwargs["full_layer_name"], kwargs.get("missing_keys")
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        names = self.quantizer.planned_weights(model)
        packed = self.quantizer.pack(model, names[key], weight)
        if missing_keys is not None:
            missing_keys.difference_update(key for key, name in names.items() if name in packed)
        return {}  # nothing left for transformers to store


_shown: ContextVar[ExitStack | None] = ContextVar("hqqplus_packing_shown", default=None)


@contextmanager
def packing_shown() -> Iterator[None]:
    """Within the block, quantizing while loading shows how far it is, in the place of transformers' own bar."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with ExitStack() as stack:
        token = _shown.set(stack)
        try:
            yield
        finally:
            _shown.reset(token)
            if enabled:
                logging.enable_progress_bar()


class HqqPlusQuantizer(HfQuantizer):
    """Loads models with packed layers; the methods are transformers' own hooks."""

    requires_calibration = False
    quantization_config: HqqPlusConfig

    def __init__(self, quantization_config: HqqPlusConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.specs: dict[str, QuantSpec] = {}
        self.options = SolverOptions()
        self.tied: tuple[str, str] | None = None
        self.compute_dtype = torch.get_default_dtype()
        self._progress: WorkProgress | None = None
        self._weights: dict[str, str] | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        refuse_spread(device_map)
        if isinstance(device_map, dict) and not self.pre_quantized and "disk" in device_map.values():
            raise ValueError(
                "a model cannot be quantized onto the disk: quantize without an offload, save it, and load the result"
            )

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and not self.pre_quantized and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}  # the solver belongs on the GPU
        return device_map

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        name = None if self.pre_quantized else self.planned_weights(model).get(param_name)
        if name is not None and param.dim() in (2, 3):
            return self.specs[name].bits_per_weight(*param.shape[-2:]) / 8
        return float(param.element_size())

    def planned_weights(self, model: Any) -> dict[str, str]:
        """Name of each Parameter that is packed -> its name in the plan."""
        if self._weights is None:
            self._weights = {replace.weight_name(model, name): name for name in self.specs}
        return self._weights

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> Any:
        self.compute_dtype = _as_dtype(dtype) or model.dtype
        plan = self.quantization_config.plan()
        self.specs, self.options = plan_of(model, plan), plan.solver
        self.tied = tied_modules(model)
        if self.tied is not None and self.tied[0] not in self.specs:
            self.tied = None
        if self.pre_quantized:
            for name, spec in self.specs.items():
                if self.tied is None or name != self.tied[1]:
                    replace.put_empty(model, name, spec, self.compute_dtype)
            self._tie(model)
            if files := kwargs.get("checkpoint_files"):
                tensors = (*model.parameters(), *model.buffers())  # on the meta device: none has memory yet
                check_memory(sum(tensor.numel() * tensor.element_size() for tensor in tensors), files)
        elif (shown := _shown.get()) is not None:
            packed = (name for name in self.specs if self.tied is None or name != self.tied[1])
            total = sum(replace.weight_of(model, name).numel() for name in packed)
            self._progress = shown.enter_context(WorkProgress(total, what="quantizing"))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self.planned_weights(model)

    def get_quantize_ops(self) -> ConversionOps:
        return PackWeight(self)

    @torch.no_grad()
    def pack(self, model: Any, name: str, weight: Tensor) -> tuple[str, ...]:
        """Pack `weight` into module `name` and return the names packed: of two tied modules, both at once."""
        tied = self.tied if self.tied is not None and name in self.tied else None
        if not isinstance(_found(model, name), PackedState):
            main = tied[0] if tied else name
            mark_loaded(replace.pack_module(model, main, weight, self.specs[main], self.compute_dtype, self.options))
            if self._progress is not None:
                self._progress.advance(weight.numel(), main)
            if tied:
                self._tie(model)
        return tied or (name,)

    def _tie(self, model: Any) -> None:
        if self.tied is None:
            return
        replace.tie_head(model, self.tied)
        mark_loaded(model.get_submodule(self.tied[1]))
        tie_packed_names(model, self.tied)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._progress = None
        missing = [
            f"{name}.{key}"
            for name in self.specs
            for key in _missing_tensors(_found(model, name), f"{name} (not quantized)")
        ]
        if missing:
            raise UserError(f"the checkpoint lacks {len(missing)} tensors of packed layers, the first is {missing[0]}")
        finish(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        tied = tied_modules(model)
        replace.unpack_modules(model, _as_dtype(dtype) or model.dtype, tied)
        if tied is not None:
            model.__dict__.pop("_tied_weights_keys", None)  # back to the class's own
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.hqq_quantized = False
        if "_weight_conversions" in model.__dict__ and not model._weight_conversions:
            del model._weight_conversions  # an ordinary mixture is saved in the form of its family again
        return model


def refuse_spread(device_map: Any) -> None:
    """Refuse a device map (also one that a model was loaded with) that takes more than one device, in one process of
    several.

    Raises:
        UserError: with the reason.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    spread = len(places) > 1 or places & {"auto", "balanced", "balanced_low_0", "sequential"}
    if spread and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(DEVICE_MAP_REFUSED)


def plan_of(model: Any, plan: QuantPlan) -> dict[str, QuantSpec]:
    """Which modules of a transformers model become packed: `modules.replace.plan_modules` with its heads and ties.

    Raises:
        UserError: if nothing would be quantized, or the overrides contradict each other.
    """
    # What transformers itself leaves alone: output embedding, last module, tied weights, modules kept in fp32.
    kept = HfQuantizer.get_modules_to_not_convert(model, None, None)
    in_fp32 = tuple(f"*{name}*" for name in model._keep_in_fp32_modules or ())
    plan = dataclasses.replace(plan, skip=(*plan.skip, *in_fp32))
    try:
        specs = replace.plan_modules(model, plan, frozenset(kept), tied_modules(model))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"quantization.overrides: {error}") from None
    if not specs:
        raise UserError(f"{type(model).__name__} has no linear layer to quantize with these skips")
    return specs


def tied_modules(model: Any) -> tuple[str, str] | None:
    """(embedding, head) by name where the two share one weight, else None."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    if embedding is None or head is None or embedding is head:
        return None
    return names[id(embedding)], names[id(head)]


def tie_packed_names(model: Any, tied: tuple[str, str]) -> None:
    """Tell transformers that the packed tensors of the head are those of the embedding."""
    names = state_names(model.get_submodule(tied[0]).spec)
    model._tied_weights_keys = {f"{tied[1]}.{name}": f"{tied[0]}.{name}" for name in names}
    model.all_tied_weights_keys = dict(model._tied_weights_keys)


def mark_loaded(layer: PackedState) -> None:
    """Keep transformers from initialising what is packed: it would take the layer for a fresh linear one."""
    layer._is_hf_initialized = True  # type: ignore[assignment]
    for parameter in layer.packed_parameters().values():
        if not parameter.is_meta:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def cast_unpacked(model: Any, dtype: torch.dtype) -> None:
    """Bring the parameters that are in the model's dtype to `dtype`; packed layers compute in it from now on.

    Parameters kept in another dtype (fp32 norms of some models) stay as they are.
    """
    before = model.dtype
    for parameter in model.parameters():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(dtype)
    for module in replace.packed_modules(model).values():
        module.compute_dtype = dtype
    for module in model.modules():
        # Gemma's embedding multiplies by a buffer, which is rounded to the dtype that the model was made in.
        if isinstance(factor := getattr(module, "scalar_embed_scale", None), int | float):
            module.embed_scale = torch.full_like(module.embed_scale, factor, dtype=dtype)
    model.config.dtype = dtype


def finish(model: Any) -> None:
    """What every model with packed layers gets, loaded or quantized in memory."""
    from hqqplus.integrations.peft import register_packed_lora

    register_packed_lora()
    if any(isinstance(module, PackedStack) for module in model.modules()):
        # Saved under the names of its parameters: transformers would take the stacks apart as if they were floats.
        model._weight_conversions = []
    # PEFT's `prepare_model_for_kbit_training` upcasts the parameters of quantization methods it does not know.
    model.hqq_quantized = True


def quantize_model(model: Any, spec: QuantSpec | QuantPlan | HqqPlusConfig) -> Any:
    """Replace the linear layers of `model` by packed ones, in place, and return it.

    A transformers model can afterwards be saved, trained with adapters and reloaded as if it had been quantized while
    loading. Any other module works too: its linear layers are packed, embeddings only where a plan names them.

    Raises:
        UserError: if nothing would be quantized.
        ValueError: if a weight holds NaN or infinite values; the message names it.
    """
    from transformers import PreTrainedModel

    config = spec if isinstance(spec, HqqPlusConfig) else None
    plan = config.plan() if config else spec if isinstance(spec, QuantPlan) else QuantPlan(spec)  # type: ignore[arg-type]
    if not isinstance(model, PreTrainedModel):
        for name, module_spec in replace.plan_modules(model, plan).items():
            weight = replace.weight_of(model, name)
            replace.pack_module(model, name, weight, module_spec, weight.dtype, plan.solver)
        return model
    quantizer = HqqPlusQuantizer(config or HqqPlusConfig.from_plan(plan), pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, dtype=model.dtype)
    for name in quantizer.specs:
        if not isinstance(_found(model, name), PackedState):
            quantizer.pack(model, name, replace.weight_of(model, name))
    model.__dict__.update(is_quantized=True, quantization_method=QUANT_METHOD, hf_quantizer=quantizer)
    model.config.quantization_config = quantizer.quantization_config
    finish(model)
    return model


def _found(model: Any, name: str) -> Any:
    """The module, or the Parameter of experts, that a plan calls `name`."""
    home, _, last = name.rpartition(".")
    return getattr(model.get_submodule(home), last)


def _missing_tensors(module: nn.Module, otherwise: str) -> list[str]:
    if not isinstance(module, PackedState):
        return [otherwise]
    return [
        n for n, p in module.packed_parameters().items() if p.is_meta or not getattr(p, "_is_hf_initialized", False)
    ]


def _as_dtype(dtype: Any) -> torch.dtype | None:
    """transformers hands a dtype over as a string once `save_pretrained` has stored it in the config."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(HqqPlusConfig)
    register_quantizer(QUANT_METHOD)(HqqPlusQuantizer)
