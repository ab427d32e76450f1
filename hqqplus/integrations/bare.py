"""A model of the right shapes and dtypes from its configuration alone: on the meta device, without memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from hqqplus.errors import UserError
from hqqplus.integrations.skeleton import dtype_of
from hqqplus.integrations.transformers import QUANT_METHOD, HqqPlusConfig, HqqPlusQuantizer
from hqqplus.model_names import is_local, one_sentence, resolve_name
from hqqplus.quantization.spec import QuantPlan


def read_configuration(
    name: str, revision: str | None = None, trust_remote_code: bool = False, file: str | Path | None = None
) -> Any:
    """The configuration of model `name`, a folder or a hub id, of which no more than `config.json` is downloaded.

    Args:
        file: a `config.json`, or a folder with one, to read instead.

    Raises:
        UserError: if there is none, or none that transformers knows.
    """
    from transformers import AutoConfig

    if file is not None:
        if not Path(file).exists():
            raise UserError(f"--config: {file}: no such file")
        with one_sentence(str(file), "--config"):
            return AutoConfig.from_pretrained(str(file), trust_remote_code=trust_remote_code)
    where = "model.name_or_path"
    local = is_local(name, where)
    if local and not (Path(resolve_name(name)) / "config.json").is_file():
        raise UserError(f"{where}: {name}: this folder holds no model (no config.json)")
    arguments = {"revision": revision} if revision is not None and not local else {}
    try:
        with one_sentence(name, where):
            return AutoConfig.from_pretrained(resolve_name(name), trust_remote_code=trust_remote_code, **arguments)
    except UserError as error:
        if local:
            raise
        raise UserError(f"{str(error).rstrip('.')}; give the model's config.json with --config FILE") from None


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype of the checkpoint, as far as its configuration says; else bfloat16."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def bare_model(config: Any, plan: QuantPlan | None, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The causal language model of `config` in `dtype` with packed layers where `plan` has them, frozen.

    A configuration of a packed model brings its own plan.

    Raises:
        UserError: if it is quantized by another method, or nothing would be quantized.
    """
    from transformers import AutoModelForCausalLM

    config = type(config).from_dict(config.to_dict()) if not trust_remote_code else config
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        values = dict(packed if isinstance(packed, dict) else packed.to_dict())
        if values.pop("quant_method", None) != QUANT_METHOD:
            raise UserError("model.name_or_path: this model is quantized by another method already")
        plan = HqqPlusConfig(**values).plan()
        del config.quantization_config
    with one_sentence(type(config).__name__, "model.name_or_path"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    exceptions = model._get_dtype_plan(dtype)  # what is kept in float32
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, exceptions) or parameter.dtype)
    if plan is not None:
        quantizer = HqqPlusQuantizer(HqqPlusConfig.from_plan(plan), pre_quantized=True)
        quantizer._process_model_before_weight_loading(model, dtype=dtype)
    model.tie_weights()
    return model.requires_grad_(False)


def parameter_count(config: Any, trust_remote_code: bool = False) -> int:
    """Parameters of the full-precision model, shared ones once."""
    return sum(p.numel() for p in bare_model(config, None, torch.bfloat16, trust_remote_code).parameters())


def checkpoint_blocks(model: nn.Module, enabled: bool) -> None:
    """Switch gradient checkpointing of a transformers model, which has been renamed on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if enabled:
            # Without a random state there is nothing that tensors without data cannot do.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def without_masks() -> Iterator[None]:
    """Within the block transformers makes no mask for a batch of whole sequences without padding.

    It asks the position ids whether documents are packed, and where there is no data to answer takes them for packed.
    """
    from transformers import masking_utils

    original = getattr(masking_utils, "find_packed_sequence_indices", None)
    if original is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def use_fused_loss(model: Any) -> None:
    """Give a causal model the head that TRL's SFTTrainer gives it: called with `fused_lm_head=True` it returns
    log-probabilities of the labels, and never holds the logits."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def repeats(model: Any, blocks: list[str]) -> tuple[list[str], int]:
    """What tells the blocks of `model` apart (a text each), and after how many they repeat; their number if never."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    kinds = []
    for index, path in enumerate(blocks):
        shapes = {name: (tuple(p.shape), str(p.dtype)) for name, p in model.get_submodule(path).named_parameters()}
        kinds.append(json.dumps([layer_types[index : index + 1], shapes], sort_keys=True))
    count = len(kinds)
    period = next(n for n in range(1, count + 1) if kinds[n:] == kinds[: count - n])
    return kinds, period
