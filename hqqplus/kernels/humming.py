"""humming (the package `humming-kernels`, Apache-2.0) as a backend of the forward product, opt-in and never needed.

    W = s q + o = s (q - z),  z = -o / s        y = x W^T + bias        x [..., in] float16 or bfloat16

humming is a family of CUDA C++ kernels, compiled on the user's machine by NVRTC or nvcc. They multiply 16-bit
activations by weights of 1 to 8 bits, each group of which has a scale and a *float zero point*. They have no backward.
The layer is handed over in humming's exchange layout (`exchange`); humming repacks that on the GPU to the order of an
MMA's registers. None of it is written to disk: what humming caches there (`HUMMING_CACHE_DIR`) is compiled code.

Bytes of a converted layer: out * in * nbits / 8 + 4 * out * groups + 8192, with the rows padded to a multiple of 128.
The packed tensors stay where they are, because the backward, and every shape that another backend serves, read them:
the packed memory doubles. `Converted.nbytes` says what was added.

Its arithmetic is not the reference's. There, s q + o is evaluated in float32 and rounded once to 16 bits. Here scale
and zero point are rounded to the dtype of x, and q - z and its product with s are each rounded again. Relative error
of W against float64, Gaussian weights (`tests/kernels/test_humming.py` holds it to these; codes themselves are exact):

                            1 bit g32   2 bits g64   4 bits g64   8 bits g64   quantization itself: 57, 32, 8, 0.5 %
    reference, bfloat16       0.17 %       0.17 %       0.17 %       0.17 %
    humming, bfloat16         0.33 %       0.35 %       0.46 %       0.49 %
    reference, float16        0.02 %       0.02 %       0.02 %       0.02 %
    humming, float16          0.04 %       0.04 %       0.06 %       0.06 %

At 8 bits in bfloat16 that is as much as 8 bits leave at all (z near 128 is rounded to whole halves): not supported.
Where s is 0, or |z| so large that rounding z costs more than dropping the codes, the group is stored as the constant
that it is, or nearly is: codes 0, z = -1, scale = the middle of its range.

What was verified and what was not (version 0.1.19): no GPU was at hand. Run on a CPU: `exchange`, decoded by humming's
own reference; `convert` and `matmul` on fake tensors through humming's own checks and schemas up to the launch; its
tuning tables for all supported layouts and seven architectures; and NVRTC 13.5 over 120 of the kernels that they
choose, to cubins of sm_75, 80, 86, 89, 90, 100 and 120. The repacking and the product have NOT been executed: the
tests marked `gpu` do that. Nor is it measured whether it is faster, so no route leads here unless it is asked for:
`enabled`, or an entry in the table of routes.

A first call is slow: 6 to 33 kernels (one for a range of rows each) are compiled per shape of a layer, each of them
some 2 to 20 s of a core, and kept on disk. It needs NVRTC or nvcc with the CUDA headers, e.g. from
`pip install "humming-kernels[cu13]"`. Capture CUDA graphs after it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hqqplus.kernels.packed import Packed, shaped
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.spec import WHOLE_ROW, QuantSpec

OPT_IN = "HQQPLUS_HUMMING"
ROW_MULTIPLE = 128
"""Rows of a tile on sm_90 at the least; other architectures need 64."""
WIDTH_MULTIPLE = 32
SMALLEST_GROUP = 16
"""An MMA takes 16 columns of W at once, and one scale has to do for them."""
LOCKS = 2048
"""int32 counters by which the blocks that share an output tile take turns. Each layer has its own, as in humming's own
layer: two layers may run on two streams. They are zero before and after each product."""
MANTISSA = {torch.float16: 11, torch.bfloat16: 8}  # bits, the hidden one included
_LARGEST_ZERO = 2.0**15  # in float16, whose largest number is 65504


@dataclass(frozen=True, eq=False)
class Converted:
    """A layer in humming's order, on one GPU.

    Attributes:
        config: humming's `LayerConfig`: shape with padding, dtypes, group size.
        tensors: `weight` int32 [in / 16, out * nbits / 2], `weight_scale` and `zero_point` [groups, out].
        locks: int32 [LOCKS].
        dtype: of the activations, the scales, the zero points and the result.
        out_features: without the padding.
    """

    config: Any
    tensors: dict[str, Tensor]
    locks: Tensor
    dtype: torch.dtype
    out_features: int

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory beside the packed tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors.values(), self.locks))


def enabled() -> bool:
    """Whether the user asked for this backend wherever it can be had: `HQQPLUS_HUMMING=1`."""
    return os.environ.get(OPT_IN) == "1"


def available(device: torch.device | int | None = None) -> bool:
    """Whether humming can be imported and has kernels for `device` (default: the current GPU).

    A package that is there but fails to import is reported once, as a warning.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None or not _package():
        return False
    return _serves(torch.cuda.current_device() if device is None else device)


def supports(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | int | None = None
) -> bool:
    """Whether a layer of `shape` (out_features, in_features) can be converted for activations in `dtype`.

    Metadata of either kind are decoded, so they are not asked for. `device` matters for bfloat16 (sm_80 and later).
    """
    out_features, in_features = shape
    group = spec.group_size
    return (
        spec.axis == 1
        and dtype in MANTISSA
        and (spec.nbits < 8 or dtype == torch.float16)
        and (group == WHOLE_ROW or (group >= SMALLEST_GROUP and group & (group - 1) == 0 and in_features % group == 0))
        and in_features % WIDTH_MULTIPLE == 0
        and out_features % 8 == 0
        and (dtype != torch.bfloat16 or not torch.cuda.is_available() or _capability(device) >= (8, 0))
    )


def exchange(packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer as humming takes it from a checkpoint, on the device of `packed`.

    Returns:
        `weight` int32 [out, in * nbits / 32]: the codes of a row one after the other, the lowest bits of a word
        first, a code of 3 bits across two words where it falls so; `weight_scale` and `zero_point` [out, groups] in
        `dtype`: W = weight_scale * (code - zero_point).
    """
    spec, layout = packed.spec, packed.layout
    codes = unpack(packed.W_q, spec.nbits, layout.plane).view(layout.rows, layout.groups, layout.group)
    decoded = decode(packed.scale, packed.offset, packed.blocks, spec.qmax)
    scales, offsets = (t.double() for t in decoded)  # [out, groups] both
    middles = offsets + scales * (spec.qmax / 2)
    stored = scales.to(dtype).double()
    # From the rounded scale and the middle: what is lost with the scale is lost about the middle of the grid.
    zeros = spec.qmax / 2 - middles / stored
    # Rounding z is an error of |z| / 2^mantissa / 2 of a step, dropping the codes one of qmax / 2 steps.
    largest = float(spec.qmax << MANTISSA[dtype])
    if dtype == torch.float16:
        largest = min(largest, _LARGEST_ZERO)
    constant = ~(zeros.abs() <= largest)  # also where the scale is 0 and z infinite or no number
    codes = codes.masked_fill(constant.unsqueeze(-1), 0)
    return {
        "weight": _bit_stream(codes.flatten(1), spec.nbits),
        "weight_scale": torch.where(constant, middles, scales).to(dtype),
        "zero_point": zeros.masked_fill(constant, -1.0).to(dtype),
    }


def convert(packed: Packed, dtype: torch.dtype) -> Converted:
    """`packed` in humming's order, for activations in `dtype`, beside it in the memory of its GPU.

    Raises:
        ValueError: if the layer is not one that `supports` allows.
    """
    spec, shape, device = packed.spec, packed.shape, packed.W_q.device
    if not supports(spec, shape, dtype, device):
        raise ValueError(f"humming has no kernel for {spec} of {shape} with activations in {dtype}")
    schema = importlib.import_module("humming.schema").HummingWeightSchema(
        b_dtype=f"uint{spec.nbits}",
        weight_scale_group_size=0 if spec.group_size == WHOLE_ROW else spec.group_size,
        has_zero_point=True,
        is_fp_zero_point=True,
    )
    with torch.no_grad(), torch.cuda.device(device):
        config, tensors = importlib.import_module("humming.transform").prepare_and_transform_humming_tensors(
            exchange(packed, dtype),
            shape_n=shape[0],
            shape_k=shape[1],
            weight_schema=schema,
            pad_n_to_multiple=ROW_MULTIPLE,
            torch_dtype=dtype,
            device=device,
        )
        locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
    return Converted(config, tensors, locks, dtype, shape[0])


def matmul(x: Tensor, converted: Converted, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in], in the dtype of `converted`, any strides -> fresh [..., out].

    Raises:
        ValueError: if `x` has another dtype.
    """
    if x.dtype != converted.dtype:
        raise ValueError(f"the layer was converted for {converted.dtype}, not for {x.dtype}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], converted.out_features)
    if rows.data_ptr() % 16:  # a view that starts inside a line; humming refuses it
        rows = rows.clone()
    forward = importlib.import_module("humming.forward").humming_forward
    y = forward(converted.config, rows, **converted.tensors, locks=converted.locks)
    if bias is not None:
        y += bias.to(y.dtype)
    return shaped(y, (*x.shape[:-1], converted.out_features))


@dataclass
class _Cache:
    """The converted layers, each for as long as its `W_q` lives, and while its packed tensors are unchanged."""

    layers: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def get(self, packed: Packed, dtype: torch.dtype) -> Converted:
        stamp = _stamp(packed)
        found = self.layers.get(packed.W_q)
        if found is None or found[0] != stamp:
            found = (stamp, {})
            self.layers[packed.W_q] = found
        if dtype not in found[1]:
            found[1][dtype] = convert(packed, dtype)
        return found[1][dtype]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for _, by_dtype in self.layers.values() for layer in by_dtype.values())


_CACHE = _Cache()


def cached(packed: Packed, dtype: torch.dtype) -> Converted:
    """`convert`, once per layer and dtype; again only after a packed tensor was moved, replaced or written to.

    For a model whose packed parameters stay: under FSDP they are gathered anew for each use, and converted anew.
    """
    return _CACHE.get(packed, dtype)


def cached_bytes() -> int:
    """Bytes of GPU memory that the layers converted by `cached` take beside their packed tensors."""
    return _CACHE.nbytes


def _stamp(packed: Packed) -> tuple[Any, ...]:
    """Where the packed tensors lie and how often they were written to. Tensors of inference mode do not count that."""
    tensors = (packed.W_q, packed.scale, packed.offset, packed.blocks)
    return packed.spec, packed.shape, *((t.data_ptr(), _version(t)) for t in tensors if t is not None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _bit_stream(codes: Tensor, nbits: int) -> Tensor:
    """`codes` [rows, width] (uint8, width a multiple of 32) one behind the other: int32 [rows, width * nbits / 32]."""
    eights = codes.view(codes.shape[0], -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64, device=codes.device)
    for position in range(8):
        words |= eights[..., position].long() << (position * nbits)
    # The low `nbits` bytes of a word are 8 codes; both the CPU and the GPU store low bytes first.
    low = words.view(torch.uint8).view(*words.shape, 8)[..., :nbits].contiguous()
    return low.view(codes.shape[0], -1).view(torch.int32)


@functools.cache
def _package() -> bool:
    """Whether humming is installed and can be imported. Importing it needs no GPU, but takes seconds."""
    if importlib.util.find_spec("humming") is None:
        return False
    try:
        for name in ("humming.schema", "humming.transform", "humming.forward", "humming.tune"):
            importlib.import_module(name)
    except Exception as error:  # whatever a third party's import may raise: the other backends go on
        warnings.warn(f"humming-kernels is installed but cannot be imported ({error}): not used", stacklevel=3)
        return False
    return True


@functools.cache
def _serves(device: torch.device | int) -> bool:
    """Whether humming has tuning tables for the architecture of `device` and finds a compiler for it."""
    try:
        importlib.import_module("humming.tune").get_heuristics_class(device)
        compiler = importlib.import_module("humming.jit").KernelRuntime._get_compiler()
        compiler.signature()  # finds the compiler
        compiler.get_flags("80")  # finds its headers
    except KeyError:  # an architecture that it does not know
        return False
    except Exception as error:  # as in `_package`
        warnings.warn(f"humming-kernels is installed but cannot compile ({error}): not used", stacklevel=3)
        return False
    return _capability(device) >= (7, 5)


def _capability(device: torch.device | int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
