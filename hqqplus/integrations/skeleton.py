"""A model without weights, and what transformers would do to each tensor of a checkpoint while loading it.

The same classes, plan and dtypes as `from_pretrained(..., quantization_config=...)`, on the meta device: which tensors
there are, which dtype loading gives them, which of them become packed, and what `save_pretrained` would write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.errors import NotStreamable
from hqqplus.integrations.transformers import HqqPlusConfig, HqqPlusQuantizer, cast_unpacked, tied_modules
from hqqplus.modules import PackedStack, packed_modules, replace
from hqqplus.modules.packed import PackedState
from hqqplus.quantization import PackedTensor
from hqqplus.quantization.spec import QuantSpec, SolverOptions
from hqqplus.shards import Form


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint goes.

    Attributes:
        name: of the tensor of the model.
        expert: (expert, part) where it is one of several that are fused: the parts of an expert come one under the
            other.
    """

    name: str
    expert: tuple[int, int] | None = None


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device with its packed layers in place, and its tensors by name.

    Attributes:
        model: a transformers model; its packed layers are empty.
        specs: module name -> how it is packed. Of two tied modules both are named.
        options: what the solver minimises.
        tied: (embedding, head) where these share one packed weight.
        loaded: name -> (shape, dtype) of every tensor of the full-precision model, as loading would leave it.
        stored: the same of the packed model, as `save_pretrained` would write it: tied tensors once.
        ties: name -> name of the same tensor that is kept, in the full-precision model.
        dtype: the dtype that loading gives to what has no other.
        conversions: transformers' rules for the names of tensors in checkpoints: renamings, and operations.
    """

    model: Any
    specs: dict[str, QuantSpec]
    options: SolverOptions
    tied: tuple[str, str] | None
    loaded: dict[str, Form]
    stored: dict[str, Form]
    ties: dict[str, str]
    dtype: torch.dtype
    conversions: tuple[list[Any], list[Any]]

    def layers(self) -> dict[str, PackedState]:
        """Module name -> empty packed layer, in the order of the model; of two tied ones the embedding."""
        head = self.tied[1] if self.tied else None
        return {name: layer for name, layer in packed_modules(self.model).items() if name != head}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> shape of its full matrix, of `layers`."""
        return {name: layer.matrix_shape for name, layer in self.layers().items()}

    def weights(self) -> dict[str, int]:
        """Module name -> how many weights it packs, of `layers`."""
        return {
            name: layer.weights if isinstance(layer, PackedStack) else math.prod(layer.matrix_shape)
            for name, layer in self.layers().items()
        }

    def stack(self, name: str) -> PackedStack | None:
        """The empty stack `name`; None if that is no stack of experts."""
        layer = self.model.get_submodule(name) if name in self.specs else None
        return layer if isinstance(layer, PackedStack) else None

    def pack_expert(self, name: str, index: int, weight: Tensor) -> PackedTensor:
        """Quantize the matrix of expert `index` of stack `name`, just as while loading.

        Raises:
            ValueError: if it holds NaN or infinite values; the message names it.
        """
        return replace.pack_expert(name, index, weight, self.specs[name], self.options)

    def pack(self, name: str, weight: Tensor) -> PackedTensor:
        """Quantize `weight` as module `name` asks for, just as while loading: observers of packing see it.

        Raises:
            ValueError: if it holds NaN or infinite values or has another shape; the message names it.
        """
        empty = self.model.get_submodule(name)
        try:
            spec, options = self.specs[name], self.options
            layer = replace.pack_module(self.model, name, weight, spec, self.dtype, options)
            return layer.packed()
        finally:
            self.model.set_submodule(name, empty)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint with these tensor names if transformers would rename, split or fuse any of them.

        Raises:
            NotStreamable: if it would.
        """
        for name in names:
            if (renamed := self._rename(name)) != name:
                raise NotStreamable(f"has {name} in its checkpoint, which is loaded as {renamed}")

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Where loading puts the tensors of a checkpoint with these names: name -> place, of those that it takes.

        Raises:
            NotStreamable: if it would rename or split a tensor, or fuse some in another way than it does for experts;
                of a model whose experts are packed, which is saved under the names that it has in memory, tensors may
                be renamed and fused.
        """
        from transformers.core_model_loading import dot_natural_key

        names = list(names)
        if not any(isinstance(layer, PackedStack) for layer in self.layers().values()):
            self.check_names(names)
            return {name: Place(name) for name in names if name in self.loaded}
        places: dict[str, Place] = {}
        seen: dict[tuple[str, int], int] = {}
        for name in sorted(names, key=dot_natural_key):  # which expert it is says its place among them
            target, pattern = self._renamed(name)
            if target not in self.loaded:
                continue
            if pattern is None:
                places[name] = Place(target)
                continue
            rule = next(rule for rule in self.conversions[1] if pattern in rule.source_patterns)
            if not _fuses_experts(rule):
                raise NotStreamable(f"has {name} in its checkpoint, which is loaded as a part of {target}")
            part = rule.source_patterns.index(pattern)
            seen[target, part] = expert = seen.get((target, part), -1) + 1
            places[name] = Place(target, (expert, part))
        return places

    def may_lack(self, name: str) -> bool:
        """Whether loading makes up tensor `name` where the checkpoint lacks it, without a word."""
        patterns = self.model._keys_to_ignore_on_load_missing or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def save(self, folder: Path) -> None:
        """Write what `save_pretrained` writes beside the weights: the configurations, and code that comes along."""
        with no_progress_bars():
            self.model.save_pretrained(folder, state_dict={})

    def _rename(self, name: str) -> str:
        renamed, pattern = self._renamed(name)
        if pattern is not None:
            return f"a part of {renamed}"
        return renamed if renamed in self.loaded else name

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """The name that a tensor is loaded as, and the pattern of the rule by which it is a part of that."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        loaded: Any = self.loaded
        renamed, pattern = rename_source_key(name, *self.conversions, prefix, loaded)
        if renamed not in loaded and name in loaded:
            # As in transformers: a name that is the model's own is not renamed to one that is not.
            renamed, pattern = rename_source_key(name, [], [], prefix, loaded)
        return renamed, pattern


def build_skeleton(
    folder: Path,
    quantization: HqqPlusConfig,
    stored_dtype: torch.dtype,
    cast_to: torch.dtype | None,
    trust_remote_code: bool = False,
    packed_otherwise: bool = False,
) -> Skeleton:
    """The skeleton of the causal language model in `folder`.

    Args:
        folder: with `config.json`, and `generation_config.json` where the model has one.
        quantization: how to pack it.
        stored_dtype: the dtype of the checkpoint, which holds where the configuration names none.
        cast_to: the dtype of what is not packed; None for that of loading.
        packed_otherwise: the checkpoint is packed by another method, whose settings are left out; what it does not
            pack is of `stored_dtype`, whatever the configuration says.

    Raises:
        NotStreamable: if the checkpoint has to be loaded by transformers itself.
        UserError: if nothing would be quantized.
        OSError, ValueError: as transformers raises them for a configuration that it cannot use.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if packed_otherwise:
        for name in ("quantization_config", "quantization"):
            config.__dict__.pop(name, None)
        config.dtype = stored_dtype
    if getattr(config, "quantization_config", None):
        raise NotStreamable("is quantized by another method already")
    if config.sub_configs:
        raise NotStreamable("is composed of several models")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ()):
        raise NotStreamable("keeps weights in files of other names")
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise NotStreamable("runs code of its own")
    dtype = config.dtype if config.dtype is not None else stored_dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config.name_or_path = str(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if not type(model).__module__.startswith("transformers."):
        raise NotStreamable("runs code of its own")
    _add_generation_config(model, folder)
    model.eval()

    ties, heads = dict(model.all_tied_weights_keys), tied_modules(model)
    if ties != ({f"{heads[1]}.weight": f"{heads[0]}.weight"} if heads else {}):
        raise NotStreamable("ties other tensors than the embedding and the head")

    exceptions = model._get_dtype_plan(dtype)  # what is kept in float32
    full = model.state_dict()
    quantizer = HqqPlusQuantizer(quantization, pre_quantized=True)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, exceptions) or parameter.dtype)
    quantizer._process_model_before_weight_loading(model, dtype=dtype)
    weights = {replace.weight_name(model, name) for name in quantizer.specs}
    loaded = {
        name: (tuple(t.shape), dtype_of(name, exceptions) or (dtype if name in weights else t.dtype))
        for name, t in full.items()
    }
    if cast_to is not None:
        cast_unpacked(model, cast_to)
    model.config.quantization_config = quantizer.quantization_config
    buffers = {name for name, _ in model.named_buffers()}
    dropped = {*(model.all_tied_weights_keys if quantizer.tied else ties), *(model._keys_to_ignore_on_save or ())}
    stored = {
        name: loaded[name] if name in buffers else (tuple(t.shape), t.dtype)
        for name, t in model.state_dict().items()
        if name not in dropped
    }
    conversions = _conversions(model)
    return Skeleton(
        model, quantizer.specs, quantization.plan().solver, quantizer.tied, loaded, stored, ties, dtype, conversions
    )


def dtype_of(name: str, exceptions: dict[str, torch.dtype]) -> torch.dtype | None:
    """The dtype that a model keeps tensor `name` in whatever its own dtype is; None for most."""
    found = (dtype for pattern, dtype in exceptions.items() if re.search(pattern.replace("*", ".*"), name))
    return next(found, None)


def _fuses_experts(rule: Any) -> bool:
    """Whether `rule` stacks the matrices of all experts, several parts one under the other, and does nothing else."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    parts = len(rule.source_patterns)
    wanted = [("MergeModulelist", 0), *([("Concatenate", 1)] if parts > 1 else [])]
    return steps == wanted and len(rule.target_patterns) == 1


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """Transformers' rules for the names of tensors in checkpoints of `model`: renamings, and operations.

    Raises:
        NotStreamable: if this transformers has them in another place.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: F401
    except ImportError:
        raise NotStreamable("is loaded by a transformers whose ways are not known") from None

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _add_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        # What older checkpoints have in `config.json`; reading the configuration has dropped it.
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars on stderr."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
