"""Which backend serves a call: by its device, its rows of x and the layer.

    CPU, half a million weights or more   `cpu.py`
    CUDA, few rows of x                   `triton/matmul.py`     the codes themselves on tensor cores
    CUDA, dozens of rows                  `triton/gemm.py`       the same, a plane at a time
    CUDA, one to four, no tensor cores    `triton/simt.py`       sm_75, float32, groups of 8
    CUDA, few rows, any other layer       `triton/general.py`    3 bits, axis 0
    CUDA, many rows; all backward passes  `triton/dense.py`      dequantized in slices, cuBLAS
    CUDA where humming was asked for      `humming.py`           forward only
    anything else, float64                `reference.py`

Where one ends and the next begins is `CROSSOVERS`, a row for each architecture, and what the environment variable
`HQQPLUS_CROSSOVERS` changes in it, such as `sm_89: some=128, slice_mib=8; sm_90: few=8`. `hqqplus env` prints it.
There is no switch for the whole process: each device has its own row, each call its own choice. A kernel that cannot
be compiled or started on a device is reported once and replaced by the reference from then on.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hqqplus.kernels import cpu, humming, reference, triton
from hqqplus.kernels.packed import Packed, shaped

VARIABLE = "HQQPLUS_CROSSOVERS"
OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Crossovers:
    """Up to how many rows of x which kernel is used on an architecture.

    Attributes:
        few: rows up to which `triton/matmul.py` serves.
        some: rows up to which `triton/gemm.py` serves.
        simt: rows up to which `triton/simt.py` serves what these two cannot.
        general: rows up to which `triton/general.py` serves the layers that have no other kernel.
        slice_mib: MiB of dequantized weight that a slice of `triton/dense.py` has; 0: it is not sliced.
    """

    few: int
    some: int
    simt: int
    general: int
    slice_mib: int

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))


# Nothing here is measured yet (benchmarks/kernels.py will). `some`: where bitsandbytes 0.50 found its fused 4-bit
# product to lose, 256 rows on sm_89 and 64 on sm_90; `general`: from instructions counted; `slice_mib`: from the size
# of the L2 cache. Triton has no tensor cores on sm_75.
CROSSOVERS = {
    75: Crossovers(few=0, some=0, simt=4, general=0, slice_mib=0),
    80: Crossovers(few=16, some=128, simt=4, general=16, slice_mib=16),
    86: Crossovers(few=16, some=128, simt=4, general=16, slice_mib=0),
    89: Crossovers(few=16, some=256, simt=4, general=16, slice_mib=16),
    90: Crossovers(few=16, some=64, simt=4, general=0, slice_mib=16),
    100: Crossovers(few=16, some=64, simt=4, general=0, slice_mib=32),
    120: Crossovers(few=16, some=128, simt=4, general=16, slice_mib=32),
}
# Under Triton's interpreter, on CPU tensors: all kernels within reach of small tests.
_INTERPRETED = Crossovers(few=8, some=24, simt=4, general=8, slice_mib=1)


def matmul(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`x` [..., in_features] times the transposed weight, plus `bias`: [..., out_features]."""
    backend = _backend(packed, x.dtype)
    if backend != "triton":
        return (cpu if backend == "cpu" else reference).matmul(x, packed, bias)
    flat = x.reshape(-1, packed.shape[1])
    kernel = forward_kernel(packed, flat.shape[0], x.dtype, x.device)
    y = attempt(kernel, lambda: _forward(kernel, flat, packed, bias), lambda: reference.matmul(flat, packed, bias), x)
    return shaped(y, (*x.shape[:-1], packed.shape[0]))


def matmul_dx(dy: Tensor, packed: Packed) -> Tensor:
    """`dy` [..., out_features] times the weight: [..., in_features]."""
    backend = _backend(packed, dy.dtype)
    if backend != "triton":
        return (cpu if backend == "cpu" else reference).matmul_dx(dy, packed)
    flat = dy.reshape(-1, packed.shape[0])

    def dense() -> Tensor:
        from hqqplus.kernels.triton import dense

        return dense.matmul_dx(flat, packed, crossovers(dy.device).slice_mib << 20)

    dx = attempt("dense", dense, lambda: reference.matmul_dx(flat, packed), dy)
    return shaped(dx, (*dy.shape[:-1], packed.shape[1]))


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] in `dtype`."""
    backend = _backend(packed, dtype)
    if backend != "triton":
        return (cpu if backend == "cpu" else reference).dequantize(packed, dtype)

    def kernel() -> Tensor:
        from hqqplus.kernels.triton.dequantize import dequantize

        return dequantize(packed, dtype)

    return attempt("dequantize", kernel, lambda: reference.dequantize(packed, dtype), packed.W_q)


def embedding(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] of the matrix: [..., in_features] in `dtype`."""
    backend = _backend(packed, dtype)
    if backend != "triton":
        return (cpu if backend == "cpu" else reference).embedding(ids, packed, dtype)

    def kernel() -> Tensor:
        from hqqplus.kernels.triton.embedding import embedding

        return embedding(ids, packed, dtype)

    return attempt("embedding", kernel, lambda: reference.embedding(ids, packed, dtype), packed.W_q)


def forward_kernel(packed: Packed, rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel for a forward product of `rows` rows on a device that Triton serves: a name of the list above."""
    if humming.enabled() and humming.available(device) and humming.supports(packed.spec, packed.shape, dtype, device):
        return "humming"
    limits = crossovers(device)
    from hqqplus.kernels.triton import general, product, simt

    if rows == 0:
        return "dense"
    if product.supports(packed, dtype) and rows <= limits.some:
        return "matmul" if rows <= limits.few else "gemm"
    if product.supports(packed, dtype) and limits.some:
        return "dense"
    if rows <= limits.simt and simt.supports(packed, dtype):
        return "simt"
    return "general" if rows <= limits.general and general.supports(packed, dtype) else "dense"


def _forward(kernel: str, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if kernel == "humming":
        return humming.matmul(x, humming.cached(packed, x.dtype), bias)
    from hqqplus.kernels.triton import dense, gemm, general, matmul, simt

    if kernel == "dense":
        return dense.matmul(x, packed, bias, crossovers(x.device).slice_mib << 20)
    module = {"matmul": matmul, "gemm": gemm, "simt": simt, "general": general}[kernel]
    return module.matmul(x, packed, bias, processors(x.device))


def _backend(packed: Packed, dtype: torch.dtype) -> str:
    """`triton`, `cpu` or `reference`, for a layer and a type of x."""
    device = packed.W_q.device
    served = dtype in (torch.float32, torch.float16, torch.bfloat16)
    if device.type == "cpu":
        small = packed.shape[0] * packed.shape[1] < cpu.SMALLEST
        return "triton" if triton.interpreted() and served else "reference" if small else "cpu"
    return "triton" if device.type == "cuda" and served and has_triton(device) else "reference"


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a GPU; the reason why not is reported once."""
    capability = _capability(device)
    if torch.version.hip is not None:
        reason = "the kernels are written for CUDA"
    elif capability < min(CROSSOVERS):
        reason = f"they need compute capability {min(CROSSOVERS) / 10:.1f}, this card has {capability / 10:.1f}"
    elif not triton.available():
        reason = "Triton is not installed"
    elif (version := _triton_version()) < OLDEST_TRITON:
        reason = f"they need Triton {'.'.join(map(str, OLDEST_TRITON))}, this is {'.'.join(map(str, version))}"
    else:
        return True
    warnings.warn(f"{device}: packed layers run on the slow torch reference: {reason}", stacklevel=2)
    return False


def _triton_version() -> tuple[int, ...]:
    import triton as package

    return tuple(int(number) for number in package.__version__.split(".")[:2])


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """SMs of a GPU; of the interpreter 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def crossovers(device: torch.device) -> Crossovers:
    """The row of the table that holds for a device."""
    return _INTERPRETED if device.type == "cpu" else for_capability(_capability(device))


@cache
def for_capability(capability: int) -> Crossovers:
    """The row for compute capability `capability` (89 is 8.9): its own, or the next older architecture's.

    Raises:
        ValueError: if `HQQPLUS_CROSSOVERS` cannot be read.
    """
    known = max((listed for listed in CROSSOVERS if listed <= capability), default=min(CROSSOVERS))
    changes = parse(os.environ.get(VARIABLE, ""))
    return dataclasses.replace(CROSSOVERS[known], **changes.get(capability, changes.get(known, {})))


def describe() -> dict[str, str]:
    """What serves the packed layers here, name by name, for people to read."""
    lines = {"packed layers": "CPU: torch, in slices and integers (kernels/cpu.py)"}
    used = set()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        served = has_triton(device)
        used |= {_capability(device)} if served else set()
        lines[f"packed cuda:{index}"] = f"Triton, {crossovers(device)}" if served else "torch reference"
    lines["crossovers"] = (
        "rows of x up to which a kernel serves (kernels/routes.py), by architecture; none measured yet"
    )
    for capability in sorted({*CROSSOVERS, *parse(os.environ.get(VARIABLE, "")), *used}):
        changed = for_capability(capability) != CROSSOVERS.get(capability)
        lines[f"  sm_{capability}"] = f"{for_capability(capability)}{f' (changed by {VARIABLE})' if changed else ''}"
    try:
        lines["humming"] = f"{importlib.metadata.version('humming-kernels')}, used if {humming.OPT_IN}=1"
    except importlib.metadata.PackageNotFoundError:
        lines["humming"] = f"not installed (pip install humming-kernels; used if {humming.OPT_IN}=1)"
    return lines


def parse(text: str) -> dict[int, dict[str, int]]:
    """`sm_89: some=128, slice_mib=8; sm_90: few=8` -> the changes by compute capability.

    Raises:
        ValueError: for anything else, with what is allowed.
    """
    names = [field.name for field in dataclasses.fields(Crossovers)]
    changes: dict[int, dict[str, int]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"sm_(\d+)\s*:\s*(.+)", part)
        pairs = [re.fullmatch(r"(\w+)\s*=\s*(\d+)", pair.strip()) for pair in match[2].split(",")] if match else [None]
        for pair in pairs:
            if match is None or pair is None or pair[1] not in names:
                form = f"'sm_89: NAME=NUMBER, ...' with NAME one of {', '.join(names)}"
                raise ValueError(f"{VARIABLE}: {part!r} is not of the form {form}")
            changes.setdefault(int(match[1]), {})[pair[1]] = int(pair[2])
    return changes


_broken: set[tuple[str, torch.device]] = set()


def attempt(kernel: str, run: Callable[[], Tensor], instead: Callable[[], Tensor], x: Tensor) -> Tensor:
    """`run()`; where that kernel cannot be compiled or started on the device of `x`, `instead()`, from then on."""
    if (kernel, x.device) in _broken:
        return instead()
    current: AbstractContextManager[object] = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    try:
        with current:
            return run()
    except (torch.OutOfMemoryError, ValueError):
        raise
    except Exception as error:
        if not _cannot_run(error):
            raise
        _broken.add((kernel, x.device))
        said = str(_root(error)).strip().splitlines() or [""]
        warnings.warn(
            f"{x.device}: the kernel {kernel!r} cannot run here, the slow torch reference does instead: "
            f"{type(error).__name__}: {said[0]}",
            stacklevel=2,
        )
        return instead()


def _cannot_run(error: Exception) -> bool:
    """Whether an error says that a kernel could not be built or started, rather than that it went wrong."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, CompilationError | OutOfResources | PTXASError | subprocess.CalledProcessError | OSError):
        return True
    return isinstance(error, RuntimeError) and "C compiler" in str(error)


def _root(error: BaseException) -> BaseException:
    """What an error came from first: Triton's own say only where they are."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
