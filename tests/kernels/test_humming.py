"""What is handed over to humming: its layout, its arithmetic, and the package's own checks of both.

Three kinds of tests. Without the package: the exchange layout, decoded independently and evaluated with humming's
roundings. With the package but no GPU: its own reference decodes the layout, and `convert` and `matmul` go through its
schemas, tuning tables and checks on fake CUDA tensors; the slow one compiles its kernels. With a GPU: the product.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hqqplus.kernels import humming, reference
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec, quantize
from hqqplus.quantization.metadata import decode, metadata_views
from hqqplus.quantization.packing import pack, unpack

HALVES = (torch.float16, torch.bfloat16)
SPECS = [QuantSpec(b, g, metadata_bits=m) for b in (1, 2, 3, 4, 8) for g in (16, 64, 256, -1) for m in (8, 16)]
SERVED = [(spec, dtype) for spec in SPECS for dtype in HALVES if humming.supports(spec, (64, 512), dtype)]


def as_packed(weight: Tensor, spec: QuantSpec) -> Packed:
    made = quantize(weight, spec)
    return Packed(
        made.W_q, *metadata_views(made.scale, made.offset, made.blocks, spec.metadata_dtype), spec, made.shape
    )


def exact(packed: Packed) -> Tensor:
    """The matrix [out, in] in float64, the affine map without any rounding."""
    scale, offset = decode(packed.scale, packed.offset, packed.blocks, packed.spec.qmax)
    layout = packed.layout
    codes = unpack(packed.W_q, packed.spec.nbits, layout.plane).view(layout.rows, layout.groups, layout.group)
    return (codes.double() * scale.double()[..., None] + offset.double()[..., None]).flatten(1)


def read_stream(weight: Tensor, nbits: int) -> Tensor:
    """int32 [rows, words] -> codes [rows, width], bit by bit, straight from the layout's definition."""
    bits = (weight.long()[..., None] >> torch.arange(32)) & 1  # [rows, words, 32]
    return (bits.flatten(1).view(weight.shape[0], -1, nbits) << torch.arange(nbits)).sum(-1)


def as_humming_computes(tensors: dict[str, Tensor], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """W [out, in] in float64, with the roundings of humming's kernels (`mainloop_arith.cuh`): q - z and, with group
    scales, its product with the scale are rounded to `dtype`; a whole row's scale meets the float32 sum."""
    zeros, scales = tensors["zero_point"].unsqueeze(-1), tensors["weight_scale"].unsqueeze(-1)  # [out, groups, 1]
    codes = read_stream(tensors["weight"], spec.nbits).view(*zeros.shape[:2], -1)
    shifted = codes.to(dtype) - zeros
    values = shifted.double() * scales.double() if spec.group_size == -1 else (shifted * scales).double()
    return values.flatten(1)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("spec", "dtype"), SERVED, ids=str)
def test_the_exchanged_layer_stands_for_the_same_matrix(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = as_packed(torch.randn(64, 512) * 0.02 + 0.002, spec)
    tensors = humming.exchange(packed, dtype)
    assert tensors["weight"].shape == (64, 512 * spec.nbits // 32)
    assert tensors["weight"].dtype == torch.int32
    assert tensors["weight_scale"].dtype == tensors["zero_point"].dtype == dtype
    codes = unpack(packed.W_q, spec.nbits, packed.layout.plane)
    assert torch.equal(read_stream(tensors["weight"], spec.nbits), codes.long())
    # In units of the rounding 2^-mantissa of one number: about 1 to 2 of them; the reference is at 1/sqrt(12) to 0.5.
    assert relative(as_humming_computes(tensors, spec, dtype), exact(packed)) < 2.0 ** -humming.MANTISSA[dtype] * 1.8


@pytest.mark.parametrize(
    ("nbits", "group_size", "dtype", "low", "high"),
    [
        (1, 32, torch.bfloat16, 0.0031, 0.0036),
        (2, 64, torch.bfloat16, 0.0033, 0.0038),
        (4, 64, torch.bfloat16, 0.0043, 0.0049),
        (8, 64, torch.bfloat16, 0.0045, 0.0053),
        (1, 32, torch.float16, 0.0002, 0.0005),
        (2, 64, torch.float16, 0.0003, 0.0006),
        (4, 64, torch.float16, 0.0004, 0.0007),
        (8, 64, torch.float16, 0.0004, 0.0007),
    ],
)
def test_the_errors_in_the_documentation(
    nbits: int, group_size: int, dtype: torch.dtype, low: float, high: float
) -> None:
    torch.manual_seed(0)
    packed = as_packed(torch.randn(256, 1024) * 0.02, QuantSpec(nbits, group_size))
    matrix = exact(packed)
    found = relative(as_humming_computes(humming.exchange(packed, dtype), packed.spec, dtype), matrix)
    assert low < found < high
    assert relative(reference.dequantize(packed, dtype), matrix) < found


def made_of(codes: Tensor, scale: list[list[float]], offset: list[list[float]], spec: QuantSpec) -> Packed:
    layout = spec.layout(*codes.shape)
    return Packed(
        pack(codes, spec.nbits, layout.plane),
        torch.tensor(scale, dtype=torch.float16),
        torch.tensor(offset, dtype=torch.float16),
        None,
        spec,
        tuple(codes.shape),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_constant_and_nearly_constant_groups(nbits: int, dtype: torch.dtype) -> None:
    spec = QuantSpec(nbits, 32, metadata_bits=16)
    torch.manual_seed(0)
    codes = torch.randint(0, 2**nbits, (1, 192), dtype=torch.uint8)
    tiny = 6e-8  # the smallest float16 there is
    #      constant   all zero   a scale that has no zero point in 16 bits        far from zero   as usual
    scale = [[0.0, 0.0, tiny, tiny, 2.0**-10, 0.1]]
    offset = [[0.75, 0.0, -0.5, 3.0, 1.0, -0.1]]
    packed = made_of(codes, scale, offset, spec)
    tensors = humming.exchange(packed, dtype)
    assert all(torch.isfinite(tensors[name]).all() for name in ("weight_scale", "zero_point"))
    found = as_humming_computes(tensors, spec, dtype).view(6, 32)
    expected = exact(packed).view(6, 32)
    assert torch.equal(found[:2], expected[:2])
    step = 2.0 ** (1 - humming.MANTISSA[dtype])
    for group in range(2, 6):
        torch.testing.assert_close(found[group], expected[group], rtol=1.6 * step, atol=1.6 * step * 0.1)


def test_a_zero_point_beyond_float16_becomes_the_middle_of_its_group() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    packed = made_of(codes, [[2.0**-10]], [[100.0]], QuantSpec(8, 256, metadata_bits=16))  # z = -102,400
    found = as_humming_computes(humming.exchange(packed, torch.float16), packed.spec, torch.float16)
    rounding = 2.0**-5  # half a step of float16 at 100
    assert (found - exact(packed)).abs().max() <= 127.5 * 2.0**-10 + rounding


def test_what_is_supported() -> None:
    shape, half, brain = (4096, 14336), torch.float16, torch.bfloat16
    for spec in (QuantSpec(2, 64), QuantSpec(1, 32), QuantSpec(3, 16), QuantSpec(4, 256), QuantSpec(2, -1)):
        assert humming.supports(spec, shape, half)
        assert humming.supports(spec, shape, brain) or torch.cuda.is_available()
        assert not humming.supports(spec, shape, torch.float32)
        assert not humming.supports(spec.replace(axis=0), shape, half)
        assert not humming.supports(spec, (4097, 14336), half)
        assert not humming.supports(spec, (4096, 14344), half)
    assert humming.supports(QuantSpec(8, 64), shape, half)
    assert not humming.supports(QuantSpec(8, 64), shape, brain)
    for group_size in (8, 24, 48, 192):
        assert not humming.supports(QuantSpec(2, group_size), shape, half)
    assert not humming.supports(QuantSpec(2, 256), (64, 384), half)


def test_a_layer_that_is_not_supported_is_refused() -> None:
    packed = as_packed(torch.randn(16, 64), QuantSpec(2, 8))
    with pytest.raises(ValueError, match="no kernel for"):
        humming.convert(packed, torch.float16)


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(humming.OPT_IN, raising=False)
    assert not humming.enabled()
    monkeypatch.setenv(humming.OPT_IN, "0")
    assert not humming.enabled()
    monkeypatch.setenv(humming.OPT_IN, "1")
    assert humming.enabled()


def test_a_broken_package_is_unavailable_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: object())

    def broken(name: str) -> None:
        raise OSError("no libcuda here")

    monkeypatch.setattr(humming.importlib, "import_module", broken)
    humming._package.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no libcuda here"):
            assert not humming.available()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not humming.available()
    finally:
        humming._package.cache_clear()


def test_unavailable_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(humming.importlib.util, "find_spec", lambda name: None)
    humming._package.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not humming.available()
    finally:
        humming._package.cache_clear()


def test_a_layer_is_converted_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []

    def counted(packed: Packed, dtype: torch.dtype) -> humming.Converted:
        made.append(dtype)
        return humming.Converted(None, {"weight": packed.W_q.clone()}, torch.zeros(2), dtype, packed.shape[0])

    monkeypatch.setattr(humming, "convert", counted)
    packed = as_packed(torch.randn(16, 64), QuantSpec(2, 16))
    before = humming.cached_bytes()
    first = humming.cached(packed, torch.float16)
    # The metadata come as new views of the stored bytes at each call.
    viewed = packed._replace(scale=packed.scale.view_as(packed.scale))
    assert humming.cached(viewed, torch.float16) is first
    with torch.inference_mode():
        assert humming.cached(packed, torch.float16) is first
    assert humming.cached(packed, torch.bfloat16) is not first
    assert made == [torch.float16, torch.bfloat16]
    assert humming.cached_bytes() - before == 2 * first.nbytes
    packed.scale.copy_(packed.scale.flip(0))
    assert humming.cached(packed, torch.float16) is not first
    assert made == [torch.float16, torch.bfloat16, torch.float16]
    assert humming.cached_bytes() - before == first.nbytes  # what it replaces is dropped in both dtypes
    del viewed, packed
    gc.collect()
    assert humming.cached_bytes() == before


# With the package, without a GPU: its Python code runs as it would, on a made-up GPU and on tensors without values.

CARDS = {  # architecture: multiprocessors, shared memory in KiB, kHz, dense float16 operations per clock and SM
    75: (40, 64, 1590000, 1024),
    80: (108, 163, 1410000, 2048),
    86: (72, 99, 1695000, 1024),
    89: (58, 99, 2040000, 1024),
    90: (132, 227, 1980000, 4096),
    100: (148, 227, 1965000, 8192),
    120: (188, 99, 2617000, 1024),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`pretend(89)`: humming believes that this machine has a GPU of sm_89."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    pytest.importorskip("humming", reason="humming-kernels is not installed")
    device = importlib.import_module("humming.device")
    tune = importlib.import_module("humming.tune")
    runtime = importlib.import_module("humming.jit.runtime").KernelRuntime

    def forget() -> None:
        device.DeviceInfo._instances.clear()
        tune._get_heuristics_config.cache_clear()
        runtime._instances.clear()

    def install(sm: int) -> None:
        forget()
        count, shared, clock, operations = CARDS[sm]
        tops = count * operations * clock / 1e9
        facts: dict[str, Any] = {
            "index": 0,
            "name": f"sm_{sm}",
            "is_ppu": False,
            "sm_count": count,
            "sm_major": sm // 10,
            "sm_minor": sm % 10,
            "sm_version": sm,
            "max_registers_per_sm": 65536,
            "max_smem_size": shared * 1024,
            "sm_clock_khz": clock,
            "l2_cache_size": 48 << 20,
            "memory_bandwidth_gbps": 300.0 if sm < 90 else 4000.0,
            "tensorcore_tops": {"float16": tops} | ({"bfloat16": tops} if sm >= 80 else {}),
        }
        module = types.ModuleType("humming._device_info")
        module._DeviceInfo = lambda index: types.SimpleNamespace(**facts)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "humming._device_info", module)
        monkeypatch.setattr("humming.utils.device._extension", module)
        monkeypatch.setattr(device.current_device, "_value", None)

    monkeypatch.setattr(torch.cuda, "device", lambda which=None: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    yield install
    forget()


def layer_config(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """The `LayerConfig` that `convert` makes."""
    schema = importlib.import_module("humming.schema").HummingWeightSchema(
        b_dtype=f"uint{spec.nbits}",
        weight_scale_group_size=max(spec.group_size, 0),
        has_zero_point=True,
        is_fp_zero_point=True,
    )
    return importlib.import_module("humming.transform").prepare_layer_config(
        *shape, schema, pad_n_to_multiple=humming.ROW_MULTIPLE, torch_dtype=dtype, device=torch.device("cuda", 0)
    )


def test_available_where_there_are_a_package_a_gpu_and_a_compiler(
    pretend: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(89)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for compilers in ("NVRTCCompiler", "NVCCCompiler"):
        compiler = f"humming.jit.compiler.{compilers}"
        monkeypatch.setattr(f"{compiler}.signature", classmethod(lambda cls: "nvrtc+13.0"))
        monkeypatch.setattr(f"{compiler}.get_flags", classmethod(lambda cls, sm: []))
    humming._serves.cache_clear()
    try:
        assert humming.available()

        def missing(cls: type) -> str:
            raise RuntimeError("no NVRTC")

        for compilers in ("NVRTCCompiler", "NVCCCompiler"):
            monkeypatch.setattr(f"humming.jit.compiler.{compilers}.signature", classmethod(missing))
        humming._serves.cache_clear()
        with pytest.warns(UserWarning, match="no NVRTC"):
            assert not humming.available()
    finally:
        humming._serves.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("sm", CARDS)
def test_humming_has_a_tuned_kernel_for_all_that_is_supported(
    pretend: Callable[[int], None], sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(sm)
    kernel = importlib.import_module("humming.kernel.humming").HummingKernel
    monkeypatch.setattr(kernel, "prepare", lambda self: None)  # does not compile
    monkeypatch.setattr(kernel, "register_kernel", lambda self: None)
    compilers = importlib.import_module("humming.jit.compiler")
    for name in ("NVRTCCompiler", "NVCCCompiler"):
        monkeypatch.setattr(getattr(compilers, name), "signature", classmethod(lambda cls: "nvrtc+13.0"))
    heuristics = importlib.import_module("humming.tune").get_heuristics_config
    checked = 0
    for spec, dtype in SERVED:
        if spec.metadata_bits == 8 or (dtype == torch.bfloat16 and sm < 80):
            continue
        for shape in [(200, 512), (4096, 14336)]:
            config = layer_config(spec, shape, dtype)
            for least, most, tuning in heuristics(config):
                assert least < most
                # Runs all of humming's own checks of the combination.
                kernel(**(config.to_dict() | {k: v for k, v in tuning.items() if k != "num_sms"}))
                checked += 1
    assert checked > 200


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments that reach humming's C++ launcher; the library itself needs a driver, its schema does not."""
    gemm = importlib.import_module("humming.ops.gemm")
    monkeypatch.setattr(gemm, "init_humming_launcher", lambda: None)
    source = Path(gemm.__file__).parents[1] / "csrc" / "launcher" / "launcher.cpp"
    texts = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", source.read_text())
    schemas = ["".join(re.findall(r'"([^"]*)"', text)) for text in texts]
    (schema,) = (text for text in schemas if text.startswith("launch_kernel.out("))
    # Fake tensors of a CUDA device cannot be indexed by a torch that was built without CUDA: they are of the CPU here.
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    device = importlib.import_module("humming.device")
    monkeypatch.setattr("humming.transform.DeviceInfo", lambda which: device.current_device)
    found: list[tuple[Any, ...]] = []
    library = torch.library.Library("humming", "FRAGMENT")
    library.define(schema)
    library.impl("launch_kernel.out", lambda *arguments: found.append(arguments), "Meta")
    yield found
    library._destroy()


@pytest.mark.parametrize(("spec", "dtype"), [case for case in SERVED if case[0].metadata_bits == 8], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_convert_and_matmul_pass_hummings_checks(
    pretend: Callable[[int], None], launches: list[tuple[Any, ...]], spec: QuantSpec, dtype: torch.dtype
) -> None:
    pretend(89)
    out, width = 200, 512
    with FakeTensorMode():
        layout = spec.layout(out, width)
        packed = Packed(
            torch.empty(out, layout.padded * spec.nbits // 8, dtype=torch.uint8),
            torch.empty(out, layout.groups, dtype=torch.uint8),
            torch.empty(out, layout.groups, dtype=torch.uint8),
            torch.empty(-(-out * layout.groups // 128), 4, dtype=torch.float16),
            spec,
            (out, width),
        )
        converted = humming.convert(packed, dtype)
        x = torch.empty(width, 3, 5, dtype=dtype).permute(2, 1, 0)
        y = humming.matmul(x, converted, torch.empty(out, dtype=torch.float32))
        assert (y.shape, y.dtype, y.is_contiguous()) == ((5, 3, out), dtype, True)
        assert humming.matmul(x[:0], converted).shape == (0, 3, out)
    # What `csrc/launcher/tensor.h` demands of each argument: shape, dtype, contiguity.
    (arguments,) = launches
    _, a, b, bs, bs2, as_, as2, bzp, bias, c, *_, locks, _top_k, _valid = arguments
    padded = 256
    expected = [
        (a, (15, width), dtype),
        (b, (width // 16, padded * 16 * spec.nbits // 32), torch.int32),
        (bs, (layout.groups, padded), dtype),
        (bzp, (layout.groups, padded), dtype),
        (c, (15, out), dtype),
        (locks, (humming.LOCKS,), torch.int32),
    ]
    for tensor, shape, kind in expected:
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, kind, True)
    assert (bs2, as_, as2, bias) == (None, None, None, None)
    weights = padded * width * spec.nbits // 8
    assert converted.nbytes == weights + 4 * padded * layout.groups + 4 * humming.LOCKS
    config = converted.config
    assert (config.shape_n, config.pad_shape_n, config.shape_k, config.pad_shape_k) == (padded, 56, width, 0)


UNPACKER = """
#include <cstddef>
#include <cstdint>
#define CUDA_INLINE static inline
#define PRAGMA_UNROLL
#define PRAGMA_UNROLL_COUNT(n)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define __global__ static
static struct { uint32_t x; } blockIdx, threadIdx;
#include "KERNEL"
template <uint32_t kBits> void run(const uint32_t *in, uint32_t *out, int64_t n) {
  for (blockIdx.x = 0; blockIdx.x < (n + 1023) / 1024; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < 32; threadIdx.x++) unpack_weight_kernel<kBits>(in, out, n);
}
extern "C" void unpack(int bits, const uint32_t *in, uint32_t *out, int64_t n) {
  if (bits == 1) run<1>(in, out, n);
  if (bits == 2) run<2>(in, out, n);
  if (bits == 3) run<3>(in, out, n);
  if (bits == 4) run<4>(in, out, n);
  if (bits == 8) run<8>(in, out, n);
}
"""


@pytest.fixture(scope="module")
def unpacker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, int], Tensor]:
    """humming's `unpack_weight` kernel, its own source compiled for the CPU."""
    package = pytest.importorskip("humming", reason="humming-kernels is not installed")
    compiler = shutil.which("g++") or pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("unpacker")
    (folder / "humming" / "utils").mkdir(parents=True)
    (folder / "humming" / "utils" / "all.cuh").write_text("")
    kernel = Path(package.__file__).parent / "include" / "humming" / "kernel" / "pack_weight.cuh"
    (folder / "unpack.cpp").write_text(UNPACKER.replace("KERNEL", str(kernel)))
    command = [compiler, "-O1", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{folder}", "unpack.cpp", "-o", "unpack.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "unpack.so"))

    def run(inputs: Tensor, nbits: int) -> Tensor:
        output = torch.empty(*inputs.shape[:-1], inputs.shape[-1] * 32 // nbits, dtype=torch.int32)
        pointers = (ctypes.c_void_p(t.contiguous().data_ptr()) for t in (inputs, output))
        library.unpack(nbits, *pointers, ctypes.c_int64(output.numel()))
        return output

    return run


@pytest.mark.parametrize(("spec", "dtype"), SERVED, ids=str)
def test_hummings_own_reference_decodes_the_layer(
    unpacker: Callable[[Tensor, int], Tensor], spec: QuantSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = importlib.import_module("humming.utils.weight")
    monkeypatch.setattr(weight.ops, "unpack_weight", unpacker)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    torch.manual_seed(0)
    packed = as_packed(torch.randn(40, 512) * 0.02 + 0.002, spec)
    tensors = humming.exchange(packed, dtype)
    kind = importlib.import_module("humming.dtypes").DataType.from_str(f"uint{spec.nbits}")
    found = weight.dequantize_weight(
        tensors["weight"], tensors["weight_scale"], tensors["zero_point"], None, kind, packed=True
    )
    assert relative(found, exact(packed)) < 2.0 ** -humming.MANTISSA[dtype] * 1.8


@pytest.mark.slow
@pytest.mark.parametrize("sm", CARDS)
def test_hummings_kernels_compile(
    pretend: Callable[[int], None], sm: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernels of one row and of many, to cubins, by the compiler that humming finds."""
    pretend(sm)
    jit = importlib.import_module("humming.jit").KernelRuntime
    try:
        jit._get_compiler().signature()
    except Exception as error:
        pytest.skip(f"humming finds no CUDA compiler: {error}")
    monkeypatch.setattr("humming.utils.jit.get_humming_cache_dir", lambda: str(tmp_path))
    kernel = importlib.import_module("humming.kernel.humming").HummingKernel
    monkeypatch.setattr(kernel, "register_kernel", lambda self: None)
    heuristics = importlib.import_module("humming.tune").get_heuristics_config
    dtype = torch.float16 if sm < 80 else torch.bfloat16
    for spec in (QuantSpec(2, 64), QuantSpec(1, 32)):
        config = layer_config(spec, (4096, 4096), dtype)
        tunings = heuristics(config)
        for _, _, tuning in (tunings[0], tunings[-1]):
            made = kernel(**(config.to_dict() | {k: v for k, v in tuning.items() if k != "num_sms"}))
            assert Path(made.kernel_filename).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 100, 1030])
@pytest.mark.parametrize(("spec", "dtype"), SERVED[::3], ids=str)
def test_the_product_on_a_gpu(spec: QuantSpec, dtype: torch.dtype, rows: int) -> None:
    if not humming.available():
        pytest.skip("humming-kernels is not installed, or has no kernels for this GPU")
    if not humming.supports(spec, (200, 512), dtype):
        pytest.skip(f"no {dtype} on this GPU")
    torch.manual_seed(0)
    on_cpu = as_packed(torch.randn(200, 512) * 0.02 + 0.002, spec)
    tensors = (t if t is None else t.cuda() for t in on_cpu[:4])
    packed = Packed(*tensors, spec, on_cpu.shape)
    converted = humming.cached(packed, dtype)
    bias = torch.randn(200, device="cuda", dtype=dtype)
    weights = as_humming_computes(humming.exchange(on_cpu, dtype), spec, dtype).cuda()
    for layout in (torch.randn(rows, 512, device="cuda"), torch.randn(512, rows, device="cuda").t()):
        x = layout.to(dtype)
        found = humming.matmul(x, converted, bias)
        expected = x.double() @ weights.t() + bias.double()
        # One rounding of the sum, one of the bias, and the order of a float32 sum.
        assert relative(found, expected) < 2.0 ** -humming.MANTISSA[dtype]
        ours = reference.matmul(x, packed, bias)
        assert relative(found, ours.double()) < 2.0 ** -humming.MANTISSA[dtype] * 3
