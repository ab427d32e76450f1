"""What the tests of the Triton kernels share: Triton's interpreter, guard bands, cubins, and PTX run by hand.

    interpreted     a test module as a script, in a process whose Triton interprets the kernels: many cases at once,
                    because starting costs seconds
    Guards          buffers between bands of known bytes, poisoned before a call and looked at after it
    random_packed   a packed matrix with every code and every kind of metadata
    run_ptx         what inline PTX does to registers, as its manual says; the interpreter cannot run it

An out-of-bounds write changes a band. An out-of-bounds read changes nothing, but what it reads are NaN (as any float
type) or all ones, which shows where the result depends on it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hqqplus.kernels import triton as backend
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.metadata import metadata_dtype
from hqqplus.quantization.packing import packed_width
from hqqplus.quantization.spec import block_count

needs_triton = pytest.mark.skipif(not backend.available(), reason="triton is not installed")

POISON = 0xFF  # NaN in all float types, -1 in all signed ones
_BAND = 1 << 16
_REAL_EMPTY = torch.empty


# --- the interpreter ------------------------------------------------------------------------------------------------


def interpreted(run_python: Callable[..., subprocess.CompletedProcess[str]], module: str) -> Any:
    """What the test module `module` prints as JSON when it is run as a script, its kernels interpreted."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return json.loads(run_python("-W", "ignore", "-m", module, env=environment).stdout)


def print_outcomes(cases: dict[str, Callable[[], list[str]]]) -> None:
    """Run each case and print its complaints by name as JSON; an exception is one of them."""
    if not backend.interpreted():
        sys.exit("TRITON_INTERPRET=1 has to be set")
    outcomes = {}
    for name, case in cases.items():
        try:
            outcomes[name] = case()
        except Exception as error:
            outcomes[name] = [f"{type(error).__name__}: {error}"]
    print(json.dumps(outcomes))


# --- guard bands ----------------------------------------------------------------------------------------------------


@dataclass
class _Buffer:
    name: str
    memory: Tensor  # bytes: band, interior, band
    view: Tensor
    extent: int  # elements from the first to the last of the view
    before: Tensor | None  # all bytes of an input as they were


class Guards:
    """Buffers between bands. Make them, call what is to be tested within `allocations()`, then ask `complaints()`."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    def input(self, tensor: Tensor, name: str = "input", shift: int = 0) -> Tensor:
        """A copy of `tensor` with its strides, `shift` elements off its alignment; it must not be written to."""
        extent = _extent(tensor.shape, tensor.stride())
        buffer = self._add(name, tensor, extent, tensor.dtype, tensor.device, shift)
        _interior(buffer.memory, extent, tensor.dtype, shift).copy_(tensor.as_strided((extent,), (1,)))
        buffer.before = buffer.memory.clone()
        return buffer.view

    def packed(self, packed: Packed, shift: int = 0) -> Packed:
        """`packed` with all of its tensors as inputs."""
        tensors = {
            name: self.input(getattr(packed, name), name, shift)
            for name in ("W_q", "scale", "offset", "blocks")
            if getattr(packed, name) is not None
        }
        return packed._replace(**tensors)

    def output(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        strides: tuple[int, ...] | None = None,
        name: str = "output",
    ) -> Tensor:
        """A poisoned tensor, contiguous or of the given strides; what lies between its elements must stay."""
        like = _REAL_EMPTY(shape, device="meta")
        if strides is not None:
            like = torch.empty_strided(shape, strides, device="meta")
        extent = _extent(like.shape, like.stride())
        return self._add(name, like, extent, dtype, torch.device(device)).view

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Give every tensor that hqqplus allocates meanwhile bands and poison (or zeros, where asked for).

        Triton's own allocations are left alone: its interpreter makes empty tensors only to put them elsewhere.
        """

        def sizes(arguments: tuple[Any, ...]) -> tuple[int, ...]:
            single = len(arguments) == 1 and not isinstance(arguments[0], int)
            return tuple(arguments[0] if single else arguments)

        def empty(*size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
            return self.output(sizes(size), dtype or torch.get_default_dtype(), device or "cpu", name="allocated")

        def new_empty(tensor: Tensor, *size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
            return empty(*size, dtype=dtype or tensor.dtype, device=device or tensor.device)

        def like(tensor: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
            return new_empty(tensor, *tensor.shape, dtype=dtype, device=device)

        def zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *arguments, **options: make(*arguments, **options).zero_()

        def ours(real: Callable[..., Tensor], banded: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def chosen(*arguments: Any, **options: Any) -> Tensor:
                caller = str(sys._getframe(1).f_globals.get("__name__"))
                return (banded if caller.startswith("hqqplus") else real)(*arguments, **options)

            return chosen

        functions = {
            (torch, "empty"): empty,
            (torch, "zeros"): zeroed(empty),
            (torch, "empty_like"): like,
            (torch, "zeros_like"): zeroed(like),
            (torch.Tensor, "new_empty"): new_empty,
            (torch.Tensor, "new_zeros"): zeroed(new_empty),
        }
        with ExitStack() as stack:
            for (place, name), banded in functions.items():
                stack.enter_context(mock.patch.object(place, name, ours(getattr(place, name), banded)))
            yield

    def complaints(self) -> list[str]:
        """What was written that must not be, in words; nothing if all is well."""
        found = []
        for buffer in self._buffers:
            expected = buffer.before
            if expected is None:
                # All that is no element of an output is as it was: poison. The elements themselves may be anything.
                expected = torch.full_like(buffer.memory, POISON)
                place = _interior(expected, buffer.extent, buffer.view.dtype)
                place.as_strided(buffer.view.shape, buffer.view.stride()).copy_(buffer.view)
            changed = (buffer.memory != expected).nonzero().flatten()
            if changed.numel():
                first = changed[0].item() - _BAND
                found.append(f"{changed.numel()} bytes changed at {first} of {buffer.name} {tuple(buffer.view.shape)}")
        return found

    def _add(
        self, name: str, like: Tensor, extent: int, dtype: torch.dtype, device: torch.device, shift: int = 0
    ) -> _Buffer:
        """A poisoned buffer for `extent` elements, seen with the shape and strides of `like`."""
        # A view of another type begins and ends at a multiple of its size.
        size = 2 * _BAND + -(-(extent + shift) * dtype.itemsize // 16) * 16
        memory = _REAL_EMPTY(size, dtype=torch.uint8, device=device).fill_(POISON)
        view = _interior(memory, extent, dtype, shift).as_strided(like.shape, like.stride())
        self._buffers.append(_Buffer(name, memory, view, extent, None))
        return self._buffers[-1]


def _interior(memory: Tensor, extent: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """The `extent` elements between the bands."""
    first = _BAND + shift * dtype.itemsize
    return memory[first : first + extent * dtype.itemsize].view(dtype)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def guarded(function: Callable[..., Tensor], *arguments: Any, shift: int = 0) -> tuple[Tensor, list[str]]:
    """`function(*arguments)`, with tensors and packed matrices between bands: (its result, complaints)."""
    guards = Guards()

    def banded(argument: Any) -> Any:
        if isinstance(argument, Packed):
            return guards.packed(argument, shift)
        return guards.input(argument) if isinstance(argument, Tensor) else argument

    given = [banded(argument) for argument in arguments]
    with guards.allocations():
        result = function(*given)
    return result, guards.complaints()


def differences(found: Tensor, expected: Tensor, spec: QuantSpec) -> list[str]:
    """How `found` is not `expected`, bit for bit; nothing if it is.

    With 8 bits for weights and for metadata products are not exact: then the last bits may be others.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype or not found.is_contiguous():
        return [f"{found.dtype} of shape {tuple(found.shape)}, not {expected.dtype} of {tuple(expected.shape)}"]
    if expected.numel() == 0:
        return []
    found = found.to(expected.device)
    wrong = (found != expected) & ~(found.isnan() & expected.isnan())
    if spec.nbits == 8 and spec.metadata_bits == 8:
        # Of the product, which may be larger than the sum: 255 scales.
        within = torch.finfo(expected.dtype).eps * expected.abs() + 1e-6 * expected.abs().max()
        wrong &= ~((found - expected).abs() <= within)
    if not wrong.any():
        return []
    largest = (found.double() - expected.double()).abs()[wrong].max()
    return [f"{int(wrong.sum())} of {wrong.numel()} values differ, by up to {largest}"]


# --- packed matrices ------------------------------------------------------------------------------------------------


def random_packed(
    spec: QuantSpec, shape: tuple[int, int], seed: int = 0, device: torch.device | str = "cpu"
) -> Packed:
    """A packed matrix of any codes, scales and offsets (or codes of them), padding included."""
    generator = torch.Generator(device).manual_seed(seed)
    layout, dtype = spec.layout(*shape), metadata_dtype(spec.metadata_dtype)
    entries = layout.rows, layout.groups

    def codes(*size: int) -> Tensor:
        return torch.randint(0, 256, size, generator=generator, device=device, dtype=torch.uint8)

    def floats(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device) * 0.02

    W_q = codes(layout.rows, packed_width(layout.padded, spec.nbits))
    if spec.metadata_bits == 16:
        return Packed(W_q, floats(*entries).to(dtype), floats(*entries).to(dtype), None, spec, shape)
    count = block_count(layout.rows * layout.groups)
    maps = floats(count, 4).abs_()
    maps[:, 1::2] = codes(count, 2).float()
    return Packed(W_q, codes(*entries), codes(*entries), maps.to(dtype), spec, shape)


def meta_packed(spec: QuantSpec, shape: tuple[int, int]) -> Packed:
    """A packed matrix without memory: enough to know how a kernel would be launched and compiled."""
    layout, dtype = spec.layout(*shape), metadata_dtype(spec.metadata_dtype)
    entries = layout.rows, layout.groups
    blocks = None
    if spec.metadata_bits == 8:
        blocks = torch.empty(block_count(layout.rows * layout.groups), 4, dtype=dtype, device="meta")
        dtype = torch.uint8
    W_q = torch.empty(layout.rows, packed_width(layout.padded, spec.nbits), dtype=torch.uint8, device="meta")
    scale, offset = (torch.empty(entries, dtype=dtype, device="meta") for _ in range(2))
    return Packed(W_q, scale, offset, blocks, spec, shape)


# --- inline PTX -----------------------------------------------------------------------------------------------------


def inline_ptx(compiled: Any) -> list[str]:
    """The inline PTX of a compiled kernel, in the order of the program, each text once."""
    found = re.findall(r'elementwise_inline_asm "(.*?)" \{', compiled.asm["ttir"])
    return list(dict.fromkeys(found))


def run_ptx(text: str, inputs: list[int], outputs: int) -> list[int]:
    """The registers $0 ... $(outputs - 1), 32 bits each, after `text` with `inputs` in those behind them."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    body = re.sub(r"\.reg\s+\.b32[^;]*;", "", text.strip().strip("{}"))

    def value(operand: str) -> int:
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    for line in filter(None, (line.strip() for line in body.split(";"))):
        name, operands = line.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = _instruction(name, [value(source) for source in sources]) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def _instruction(name: str, values: list[int]) -> int:
    a, b, *more = values
    match name:
        case "shr.b32":
            return a >> b
        case "shl.b32":
            return a << b
        case "and.b32":
            return a & b
        case "or.b32":
            return a | b
        case "prmt.b32":  # each nibble of the last operand chooses one of the eight bytes of b:a
            both = (b << 32 | a).to_bytes(8, "little")
            return int.from_bytes(bytes(both[(more[0] >> (4 * i)) & 7] for i in range(4)), "little")
        case "lop3.b32":  # bit by bit a truth table of three operands
            table = more[1]
            bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (more[0] >> i & 1)) & 1 for i in range(32))
            return sum(bit << i for i, bit in enumerate(bits))
        case "sub.f32":
            x, y = (torch.tensor(v).to(torch.int64).to(torch.int32).view(torch.float32) for v in (a, b))
            return (x - y).view(torch.int32).item()
    raise ValueError(f"{name} is not known here")
