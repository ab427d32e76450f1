"""An adapter's matrices in 8 bits: what is written, and the standard PEFT folder that it becomes again.

    adapter_8bit.json           which tensors are packed: name -> shape, axis, exponent; and how
    adapter_8bit.safetensors    NAME.W_q, NAME.scale, NAME.offset of those, every other tensor as it is, in bf16

A matrix is packed by our own quantizer in groups along its longer side (A [r, in] along its rows, B [out, r] down its
columns), so that the shorter side, the rank, is never padded: 8 + 32 / 64 = 8.5 bits a weight where 64 divides the
longer side. It is first divided by a power of two, so that its largest weight lies between 1/2 and 1: what B holds is
often so small that the steps of its groups would fall below what a float16 has in full precision. Vectors (gains,
norms, the magnitudes of DoRA) stay in bf16.

PEFT does not know the format, and refuses the folder. A reader of this project goes through `standard`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqplus.errors import UserError
from hqqplus.files import replacing_folder, write_json
from hqqplus.model_names import one_sentence
from hqqplus.progress import WorkProgress
from hqqplus.quantization import PackedTensor, QuantSpec, quantize
from hqqplus.quantization.tensor import state_names, state_shapes
from hqqplus.untrusted import check_links, read_object

WEIGHTS, INDEX = "adapter_8bit.safetensors", "adapter_8bit.json"
STANDARD = "adapter_model.safetensors"
GROUP_SIZE = 64
RESTORED_DTYPE = torch.bfloat16
_FORMAT = 1
# Powers of two within which bf16 has its full precision.
_EXPONENTS = range(-120, 121)


def spec_of(shape: tuple[int, ...]) -> QuantSpec | None:
    """How a tensor of `shape` is packed; None where it stays in bf16: no matrix, or smaller that way."""
    if len(shape) != 2 or not all(shape):
        return None
    axis = 1 if shape[1] >= shape[0] else 0
    spec = QuantSpec(8, GROUP_SIZE, axis, "float16", 16)
    return spec if spec.bits_per_weight(shape[0], shape[1]) < 8 * RESTORED_DTYPE.itemsize else None


def stored_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the tensors of these shapes in 8 bits, without the header of the file."""
    total = 0
    for shape in shapes.values():
        spec = spec_of(shape)
        if spec is None:
            total += math.prod(shape) * RESTORED_DTYPE.itemsize
        else:
            forms = state_shapes(spec, shape[0], shape[1]).values()
            total += sum(math.prod(size) * dtype.itemsize for size, dtype in forms)
    return total


@torch.no_grad()
def pack_state(state: Mapping[str, Tensor], quiet: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write for an adapter's `state`, and the index beside them.

    Args:
        quiet: show no progress.

    Raises:
        UserError: if a tensor holds NaN or infinite values.
    """
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, Any] = {}
    with WorkProgress(sum(tensor.numel() for tensor in state.values()), quiet=quiet) as progress:
        for name, tensor in state.items():
            spec = spec_of(tuple(tensor.shape)) if tensor.is_floating_point() else None
            if spec is None:
                tensors[name] = tensor.to(RESTORED_DTYPE) if tensor.is_floating_point() else tensor
                continue
            matrix = tensor.detach().cpu().float()
            exponent = min(max(math.frexp(float(matrix.abs().max()))[1], _EXPONENTS[0]), _EXPONENTS[-1])
            try:
                # A NaN has the exponent 0 and comes through to the quantizer, which says so.
                packed = quantize(matrix * 2.0**-exponent, spec)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            tensors.update({f"{name}.{key}": value for key, value in packed.state().items()})
            matrices[name] = {"shape": list(matrix.shape), "axis": spec.axis, "exponent": exponent}
            progress.advance(tensor.numel(), name)
    return tensors, {"format": _FORMAT, "nbits": 8, "group_size": GROUP_SIZE, "matrices": matrices}


def write_packed(state: Mapping[str, Tensor], folder: Path, quiet: bool = True) -> None:
    """Write an adapter's `state` in 8 bits into `folder`, which is being filled.

    Raises:
        UserError: as `pack_state`.
    """
    from safetensors.torch import save_file

    tensors, index = pack_state(state, quiet)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / INDEX, index)


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter in 8 bits and no standard one, which would be taken before it."""
    folder = Path(folder)
    return (folder / WEIGHTS).is_file() and not (folder / STANDARD).exists()


@torch.no_grad()
def unpack_state(folder: str | Path) -> dict[str, Tensor]:
    """The adapter in 8-bit folder `folder` by PEFT's names, in bf16 on the CPU.

    Raises:
        UserError: naming the file in the folder and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    check_links(folder)
    matrices = _read_index(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"a weight file is truncated or damaged ({WEIGHTS}: {said})") from None
    state: dict[str, Tensor] = {}
    for name, (shape, spec, exponent) in matrices.items():
        parts: dict[str, Tensor] = {}
        for key, (size, dtype) in state_shapes(spec, *shape).items():
            part = tensors.pop(f"{name}.{key}", None)
            if part is None:
                raise UserError(f"{WEIGHTS} lacks {name}.{key}, which {INDEX} speaks of")
            if (tuple(part.shape), part.dtype) != (size, dtype):
                found = f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
                raise UserError(f"{WEIGHTS}: {name}.{key} is {found}, and {INDEX} asks for uint8 {size}")
            parts[key] = part
        matrix = PackedTensor(**parts, spec=spec, shape=shape).dequantize(torch.float32)
        state[name] = (matrix * 2.0**exponent).to(RESTORED_DTYPE)
    for name, tensor in tensors.items():
        if name in state:
            raise UserError(f"{WEIGHTS}: {name} is there twice, packed and as it is")
        if name.rpartition(".")[2] in state_names(QuantSpec(8, GROUP_SIZE, metadata_bits=16)):
            raise UserError(f"{WEIGHTS}: {name} is a part of a packed tensor, and {INDEX} does not speak of it")
        state[name] = tensor
    return state


def _read_index(folder: Path) -> dict[str, tuple[tuple[int, int], QuantSpec, int]]:
    """Name -> (shape, spec, exponent) of the packed matrices, all of them checked."""
    if not (folder / INDEX).is_file():
        raise UserError(f"this folder holds {WEIGHTS} and no {INDEX}, which says what is in it")
    values = read_object(folder / INDEX)
    if values.get("format") != _FORMAT:
        raise UserError(f"{INDEX}: its format is {values.get('format')!r:.40}, this hqqplus reads {_FORMAT}")
    matrices = values.get("matrices")
    if values.get("nbits") != 8 or values.get("group_size") != GROUP_SIZE or not isinstance(matrices, dict):
        raise UserError(f"{INDEX}: it is not of the form of an adapter in 8 bits in groups of {GROUP_SIZE}")
    found = {}
    for name, entry in matrices.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, axis, exponent = entry.get("shape"), entry.get("axis"), entry.get("exponent")
        sizes = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else []
        if len(sizes) != 2 or axis not in (0, 1) or type(exponent) is not int or exponent not in _EXPONENTS:
            raise UserError(f"{INDEX}: {name!r:.80}: expected a shape of two sizes, an axis and an exponent")
        found[name] = ((sizes[0], sizes[1]), QuantSpec(8, GROUP_SIZE, int(axis), "float16", 16), exponent)
    return found


def restore(folder: str | Path, output: str | Path) -> None:
    """Write 8-bit adapter `folder` as a standard PEFT folder to `output`, all of it or nothing.

    Raises:
        UserError: if `folder` holds no adapter in 8 bits, or a damaged one.
    """
    from hqqplus.adapters.card import without_eight_bit

    folder = Path(folder)
    with one_sentence(str(folder), "adapter"), replacing_folder(output) as temporary:
        if not is_packed(folder):
            raise UserError(f"this folder holds no adapter in 8 bits (no {WEIGHTS})")
        _fill(folder, temporary)
        card = temporary / "README.md"
        if card.is_file():
            card.write_text(without_eight_bit(card.read_text(encoding="utf-8")), encoding="utf-8")


@contextmanager
def standard(folder: str | Path) -> Iterator[Path]:
    """`folder`, or for an adapter in 8 bits a temporary folder with the standard one, gone after the block.

    Raises:
        UserError: if it is in 8 bits and damaged.
    """
    if not is_packed(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hqqplus_adapter_") as temporary:
        _fill(Path(folder), Path(temporary))
        yield Path(temporary)


def _fill(folder: Path, output: Path) -> None:
    from safetensors.torch import save_file

    save_file(unpack_state(folder), output / STANDARD, {"format": "pt"})
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (WEIGHTS, INDEX) and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)
