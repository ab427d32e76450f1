"""A packed model and its adapter as one ordinary 16-bit checkpoint: `export`, verified before the folder is there.

What is written is read again by transformers alone, and its logits on some tokens are compared with those of the
packed model and its adapter. How far they may differ is measured: the weights of the reloaded model are moved at
random within their rounding (half a unit in the last place each way), and what that changes of the logits is what one
rounding to 16 bits changes. The logits may be `TOLERANCE` times as far apart, in the root mean square.

Both are computed in float32 (`in_float32`), a module at a time: neither weights nor activations are rounded further,
and no model is ever in memory in float32 as a whole. An 8B needs its packed folder and 16 GB.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.files import check_output, full_disk, replacing_folder
from hqqplus.model_names import one_sentence
from hqqplus.models import load_unadapted, put_adapter
from hqqplus.modules import packed_modules
from hqqplus.progress import WorkProgress

TOLERANCE = 3.0
"""How many times as far as by another rounding the logits may differ. Both are one rounding away from the export, so
about 1 is to be expected; a few dozen tokens of a small model leave some scatter."""
_FLOAT32 = 1e-5  # what the order of additions in float32 makes of logits, relative to them
_TOKENS, _SLICE = 64, 2**24
_TEXT = "The merged model has to say what the packed model and its adapter say, word by word. In 1 or 2 bits: "


@dataclass(frozen=True)
class Agreement:
    """How far the logits of an export are from those of the packed model and its adapter, root mean squares.

    Attributes:
        difference: between the two.
        rounding: between the export and itself with its weights moved at random within their rounding.
        logits: of the logits themselves.
    """

    difference: float
    rounding: float
    logits: float

    @property
    def allowed(self) -> float:
        return TOLERANCE * self.rounding + _FLOAT32 * self.logits

    def holds(self) -> bool:
        return self.difference <= self.allowed  # not for NaN

    def describe(self) -> str:
        return (
            f"logits differ by {self.difference:.3g} (root mean square) from those of the packed model, "
            f"{self.logits:.3g} in size; rounding alone makes {self.rounding:.3g}, allowed are {self.allowed:.3g}"
        )


def export(
    name: str,
    adapter: str | Path | None,
    output: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_mismatch: bool = False,
    verify: bool = True,
    quiet: bool = True,
) -> Agreement | None:
    """Write dequantized base + adapter as an ordinary 16-bit checkpoint, for tools that know nothing of packed layers.

    The size is the parent's again; the quality is that of the recovered model, up to the rounding to `dtype`.

    Args:
        allow_mismatch: warn instead of refusing what does not belong together.
        verify: reload what was written, and compare its logits, before it is put in place.
        quiet: show no progress.

    Returns:
        How far the logits are apart; None if they were not compared.

    Raises:
        UserError: if base or adapter are missing, damaged, or do not belong together; if the checkpoint cannot be
            read by transformers, or its logits are others. Then nothing is left behind.
    """
    check_output(output, "output")
    base, adapter, model, tokenizer = load_unadapted(
        name,
        adapter,
        revision=revision,
        dtype="checkpoint",
        device="cpu",
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
    )
    if adapter is not None:
        model = put_adapter(model, adapter, check=False)
    tokens = _tokens(tokenizer, model.config) if verify else None
    expected = None
    if tokens is not None:
        with in_float32(model):
            expected = _logits(model, tokens)
    model = _merged(model, adapter is not None, dtype, quiet)
    where = "export"
    with full_disk(output, where), replacing_folder(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del model
        gc.collect()
        if tokens is None or expected is None:
            return None
        with one_sentence(str(name), where):
            agreement = _agreement(temporary, dtype, trust_remote_code, tokens, expected)
        if not agreement.holds():
            raise UserError(
                f"{where}: {base}: what was written does not say what the packed model says: {agreement.describe()}; "
                "nothing was kept"
            )
    return agreement


@torch.no_grad()
def _merged(model: Any, adapted: bool, dtype: torch.dtype, quiet: bool) -> Any:
    """The ordinary model in `dtype`; `model` is used up."""
    from hqqplus.integrations.merge import merge_and_unload

    weights = sum(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in packed_modules(model).values())
    with WorkProgress(weights, quiet=quiet) as progress:
        if adapted:
            # Dequantized only now, in full precision: nothing is quantized a second time.
            model = merge_and_unload(model, dtype, progress.advance)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype)
    model = model.to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = True  # which training switches off
    return model


# Comparing -----------------------------------------------------------------------------------------------------------


def _agreement(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool, tokens: Tensor, expected: Tensor
) -> Agreement:
    model = _reload(folder, dtype, trust_remote_code)
    with in_float32(model):
        found = _logits(model, tokens)
    with in_float32(model, within_rounding):
        moved = _logits(model, tokens)
    return Agreement(_rms(found - expected), _rms(moved - found), _rms(expected))


def _reload(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The checkpoint as anybody reads it."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(what) or ())):
            raise UserError(f"transformers would not read what was written: {what.replace('_', ' ')}: {names[0]}")
    if getattr(model.config, "quantization_config", None) is not None or packed_modules(model):
        raise UserError("what was written still says that it is quantized")
    return model.eval()


def _tokens(tokenizer: Any, config: Any) -> Tensor:
    """Two sequences of ids [2, length]: a text, and ids from all over the vocabulary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    words = tokenizer(_TEXT)["input_ids"] or [0]
    words = (words * (length // len(words) + 1))[:length]
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(min(text.vocab_size, len(tokenizer)), (length,), generator=generator)
    return torch.stack([torch.tensor(words), anywhere])


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens, use_cache=False).logits.float()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def within_rounding(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`values` (float32, all of them `dtype`'s) moved at random by up to half a unit in the last place of `dtype`."""
    found = torch.finfo(dtype)
    exponents = torch.frexp(values).exponent.float()
    unit = torch.exp2(exponents).mul_(found.eps / 2).clamp_min_(found.smallest_normal * found.eps)
    moved = values + unit * (torch.rand(values.shape, generator=generator) - 0.5)
    return torch.where(values == 0, values, moved)


Change = Callable[[Tensor, torch.dtype, torch.Generator], Tensor]


@contextmanager
def in_float32(model: nn.Module, change: Change | None = None) -> Iterator[None]:
    """Within the block `model` computes in float32: vectors are in float32, matrices while their module is called.

    Packed layers return float32. Afterwards everything is as it was, to the bit.

    Args:
        change: what each parameter in 16 bits is taken for, given in float32, its dtype and a generator of its own.
    """
    kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
    hooks: list[Any] = []
    seeds = {id(parameter): seed for seed, parameter in enumerate(model.parameters())}

    def up(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) not in kept:  # else it is shared with another module
                kept[id(parameter)] = parameter, parameter.data
                parameter.data = _raised(parameter.data, change, seeds[id(parameter)])

    def down(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) in kept:
                _, parameter.data = kept.pop(id(parameter))

    def around(module: nn.Module, matrices: list[nn.Parameter]) -> None:
        def before_call(*_: Any) -> None:
            up(matrices)

        def after_call(*_: Any) -> None:
            down(matrices)

        hooks.extend((module.register_forward_pre_hook(before_call), module.register_forward_hook(after_call)))

    packed = packed_modules(model)
    before = {name: layer.compute_dtype for name, layer in packed.items()}
    try:
        for layer in packed.values():
            layer.compute_dtype = torch.float32
        for module in model.modules():
            own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and p.dtype.itemsize == 2]
            up(p for p in own if p.dim() <= 1)
            if matrices := [p for p in own if p.dim() > 1]:
                around(module, matrices)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        down([parameter for parameter, _ in kept.values()])
        for name, layer in packed.items():
            layer.compute_dtype = before[name]


def _raised(values: Tensor, change: Change | None, seed: int) -> Tensor:
    """`values` in float32, changed a slice at a time: an embedding has a billion of them."""
    raised = values.float()
    if change is not None:
        generator = torch.Generator().manual_seed(seed)
        flat = raised.view(-1)
        for piece in flat.split(_SLICE):
            piece.copy_(change(piece, values.dtype, generator))
    return raised
