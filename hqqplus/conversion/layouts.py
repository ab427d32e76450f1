"""What a layout is, and which one a checkpoint has: `find_layout`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.errors import UserError
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.spec import GROUP_STEP, LARGEST_GROUP, NBITS, SMALLEST_GROUP, WHOLE_ROW
from hqqplus.shards import StoredTensor
from hqqplus.untrusted import read_object

KNOWN_LAYOUTS = {
    "GPTQ": "quant_method gptq, as AutoGPTQ, GPTQModel and EfficientQAT's export write it, or auto-round's auto_gptq",
    "BitNet": "quant_method bitnet, ternary",
    "MLX": "affine, with scales and biases",
    "binary": "quant_method binary: signs and a scale a group or row",
}
"""Layouts that are read, and how a checkpoint says that it has one."""

_SETTINGS = "config.json: quantization_config"


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found, before anything of it is known to make sense.

    Attributes:
        config: what `config.json` holds.
        settings: its quantization settings; empty where there are none.
        tensors: name -> place of every tensor.
        shapes: name -> shape of every tensor of the model in full precision.
        linears: modules of it that are linear layers and no output head.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    linears: Collection[str] = ()

    def shape_of(self, layer: str, tensor: StoredTensor) -> tuple[int, int]:
        """(rows, columns) of module `layer` in the model.

        Raises:
            UserError: if the model has no matrix of that name.
        """
        shape = self.shapes.get(f"{layer}.weight", ())
        if len(shape) != 2 or 0 in shape:
            raise fault(tensor, f"the model that config.json describes has no layer {layer} (fused experts?)")
        return shape[0], shape[1]

    def part(self, main: StoredTensor, name: str) -> StoredTensor:
        """Tensor `name`, which belongs to `main`.

        Raises:
            UserError: if it is missing.
        """
        if name not in self.tensors:
            raise fault(main, f"there is no {name} with it in the checkpoint")
        return self.tensors[name]

    def number(self, name: str, default: Any = None) -> int:
        """Setting `name`, a whole number.

        Raises:
            UserError: if it is none.
        """
        value = self.settings.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{_SETTINGS}: {name} is {shown(value)}: a whole number is needed")
        return value

    def choice(self, name: str, allowed: Collection[Any], default: Any = None) -> Any:
        """Setting `name`, one of `allowed`.

        Raises:
            UserError: if it is another.
        """
        value = self.settings.get(name, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise UserError(f"{_SETTINGS}: {name} is {shown(value)}: {' or '.join(map(str, allowed))} can be read")
        return value


class Layout(ABC):
    """How one kind of checkpoint stores the matrices of a model.

    A layer's matrix is W = scale q + offset by group, and a layout reads the codes q and the exact scale and offset.
    Making one looks at names, shapes and small tensors; what does not fit is refused then.

    Attributes:
        title: its name, and its version where it has several.
        specs: module name -> how it is stored by us.
        parts: module name -> the tensors that it is read from, the codes first.
        largest: the largest code that there is; None for that of the bits.
        remarks: what a user should know, a sentence each.
    """

    title: str
    largest: int | None = None

    def __init__(self) -> None:
        self.specs: dict[str, QuantSpec] = {}
        self.parts: dict[str, dict[str, StoredTensor]] = {}
        self.remarks: list[str] = []

    @abstractmethod
    def grid(self, layer: str) -> tuple[Tensor, Tensor]:
        """Scale and offset of the groups of `layer` as `specs` cuts them: [rows, groups] float64 both.

        Raises:
            UserError: if they make no sense.
        """

    @abstractmethod
    def codes(self, layer: str) -> Tensor:
        """The codes of `layer`: [rows, columns] uint8.

        Raises:
            UserError: if one of them stands for nothing.
        """

    def largest_of(self, layer: str) -> int:
        return self.specs[layer].qmax if self.largest is None else self.largest


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, its quantization settings, or those in a `quantize_config.json` beside it) of `folder`.

    Raises:
        UserError: if a file cannot be read.
    """
    config = read_object(folder / "config.json")
    settings = config.get("quantization_config")
    if settings is None:
        settings = config.get("quantization")
    if settings is None and (folder / "quantize_config.json").is_file():
        # AutoGPTQ, before transformers knew of it.
        settings = {"quant_method": "gptq", **read_object(folder / "quantize_config.json")}
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{_SETTINGS} is {shown(settings)}: no settings")
    return config, settings or {}


def find_layout(source: Source) -> Layout:
    """The layout of a checkpoint, by its settings and the names of its tensors.

    Raises:
        UserError: if it is none of those that are known, or cannot be told in our format; with the reason.
    """
    from hqqplus.conversion.binary import BinaryLayout
    from hqqplus.conversion.bitnet import BitNetLayout
    from hqqplus.conversion.gptq import GPTQLayout
    from hqqplus.conversion.mlx import MLXLayout

    kinds: dict[str, Callable[[Source], Layout]] = {
        "gptq": GPTQLayout,
        "bitnet": BitNetLayout,
        "binary": BinaryLayout,
        "mlx": MLXLayout,
    }
    return kinds[layout_name(source)](source)


def layout_name(source: Source) -> str:
    """Which layout it is, `gptq`, `bitnet`, `binary` or `mlx`; the model's shapes are not needed.

    Raises:
        UserError: as `find_layout`.
    """
    refuse_two_scales(source)
    method = source.settings.get("quant_method")
    if method in ("gptq", "bitnet", "binary"):
        return str(method)
    if method == "auto-round":
        source.choice("packing_format", ("auto_round:auto_gptq",))
        return "gptq"
    if method is None and {"bits", "group_size"} <= source.settings.keys():
        return "mlx"  # which names no method
    known = "; ".join(f"{name} ({how})" for name, how in KNOWN_LAYOUTS.items())
    if method is not None:
        raise UserError(f"{_SETTINGS}: quant_method is {shown(method)}: what can be read is {known}")
    what = "is not packed" if not source.settings else "says neither quant_method nor MLX's bits and group_size"
    packed = next((name for name in source.tensors if name.endswith((".qweight", ".weight_scale", ".scales"))), None)
    if packed is not None and not source.settings:
        what = f"has {packed}, but no quantization_config in config.json that says what it means"
    raise UserError(
        f"this checkpoint {what}: what can be read is {known}; what is not packed goes to hqqplus quantize"
    )


def refuse_two_scales(source: Source) -> None:
    """Refuse models whose inputs are scaled one by one: OneBit, BinaryMoS.

    Raises:
        UserError: with the reason.
    """
    for name, tensor in source.tensors.items():
        if name.endswith((".input_factor", ".in_channel_scale", ".in_channel_scales")):
            raise fault(
                tensor,
                "a model with a factor for every input of a layer (OneBit, BinaryMoS) cannot be told in our format: "
                "there a scale belongs to a group of consecutive inputs of one output",
            )


def fault(tensor: StoredTensor, text: str) -> UserError:
    """What is wrong with a tensor, with its file and its name."""
    return UserError(f"{tensor.path.name}: {tensor.name}: {text}")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_form(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], why: str = "") -> None:
    """Refuse a tensor of another shape or type than its layer asks for.

    Raises:
        UserError: with both.
    """
    if tensor.shape != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(_name(dtype) for dtype in dtypes)
        found = f"{_name(tensor.dtype)} {list(tensor.shape)}"
        raise fault(tensor, f"it is {found}, {wanted} {list(shape)} is needed{why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_bits(bits: int, tensor: StoredTensor | None = None) -> None:
    if bits not in NBITS:
        text = f"bits is {bits}: {', '.join(map(str, NBITS))} can be read"
        raise fault(tensor, text) if tensor else UserError(f"{_SETTINGS}: {text}")


def our_group(group: int, width: int, tensor: StoredTensor) -> tuple[int, int]:
    """The group size of ours for groups of `group` inputs (-1: a row of `width`), and how many of ours make one.

    Larger groups than ours are cut into equal ones.

    Raises:
        UserError: if `group` has no such part.
    """
    if group == WHOLE_ROW or group >= width > 0:
        return (group if _ours(group) and group == width else WHOLE_ROW), 1
    size = next((size for size in range(LARGEST_GROUP, 0, -GROUP_STEP) if group > 0 and group % size == 0), None)
    if size is None:
        raise fault(
            tensor,
            f"groups of {group}: they need to be a multiple of {GROUP_STEP}, or a whole row",
        )
    return size, group // size


def _ours(group: int) -> bool:
    return SMALLEST_GROUP <= group <= LARGEST_GROUP and group % GROUP_STEP == 0


def type_for(scales: StoredTensor) -> str:
    """The 16-bit type that keeps the scales: their own, or of 32-bit ones that which holds them all.

    Raises:
        UserError: if they are of another type.
    """
    if scales.dtype == torch.float16:
        return "float16"
    if scales.dtype == torch.bfloat16:
        return "bfloat16"
    if scales.dtype != torch.float32:
        raise fault(scales, f"scales are float16, bfloat16 or float32, these are {_name(scales.dtype)}")
    values = scales.read()
    return "bfloat16" if torch.equal(values.bfloat16().float(), values) else "float16"
