"""Which backend and which kernel serve a call: by device, architecture, layer and rows of x; and what happens where a
kernel cannot run."""

from __future__ import annotations

import dataclasses
import subprocess
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.kernels import cpu, humming, reference, routes, triton
from hqqplus.kernels.packed import Packed
from hqqplus.kernels.routes import CROSSOVERS, Crossovers
from hqqplus.quantization import QuantSpec
from tests.kernels.triton.harness import meta_packed, needs_triton, random_packed

GPU = torch.device("cuda", 0)
NAMES = [field.name for field in dataclasses.fields(Crossovers)]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(routes.VARIABLE, raising=False)
    monkeypatch.delenv(humming.OPT_IN, raising=False)
    monkeypatch.setattr(routes, "_broken", set())
    routes.for_capability.cache_clear()
    routes.has_triton.cache_clear()
    yield
    routes.for_capability.cache_clear()
    routes.has_triton.cache_clear()


def on(device: torch.device, packed: Packed) -> Packed:
    """`packed` as if it lay on a device that is not there."""
    return packed._replace(W_q=SimpleNamespace(device=device))


def kernel_on(capability: int, spec: QuantSpec, rows: int, dtype: torch.dtype = torch.bfloat16) -> str:
    with mock.patch.object(routes, "_capability", return_value=capability):
        return routes.forward_kernel(meta_packed(spec, (4096, 4096)), rows, dtype, GPU)


# --- which kernel ---------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("capability", CROSSOVERS)
def test_few_rows_some_rows_and_many_have_kernels_of_their_own(capability: int) -> None:
    limits = CROSSOVERS[capability]
    spec = QuantSpec(2, 64)
    if not limits.some:
        assert [kernel_on(capability, spec, rows) for rows in (1, limits.simt, limits.simt + 1)] == [
            "simt",
            "simt",
            "dense",
        ]
        return
    rows = {1: "matmul", limits.few: "matmul", limits.few + 1: "gemm", limits.some: "gemm", limits.some + 1: "dense"}
    for dtype in (torch.bfloat16, torch.float16):
        assert {m: kernel_on(capability, spec, m, dtype) for m in rows} == rows
    assert kernel_on(capability, spec, 8192) == "dense"


@needs_triton
@pytest.mark.parametrize(
    ("spec", "dtype", "first"),
    [
        (QuantSpec(1, 16), torch.bfloat16, "matmul"),
        (QuantSpec(8, 256), torch.float16, "matmul"),
        (QuantSpec(2, -1), torch.bfloat16, "matmul"),
        (QuantSpec(2, 64), torch.float32, "simt"),
        (QuantSpec(2, 8), torch.bfloat16, "simt"),
        (QuantSpec(3, 64), torch.bfloat16, "general"),
        (QuantSpec(2, 64, 0), torch.bfloat16, "general"),
        (QuantSpec(2, 24), torch.bfloat16, "general"),
    ],
    ids=str,
)
def test_each_kind_of_layer_has_a_kernel_for_one_row(spec: QuantSpec, dtype: torch.dtype, first: str) -> None:
    limits = CROSSOVERS[89]
    assert kernel_on(89, spec, 1, dtype) == first
    if first == "simt":
        assert kernel_on(89, spec, limits.simt + 1, dtype) == "general"
    if first != "matmul":
        assert kernel_on(89, spec, limits.general + 1, dtype) == "dense"


@needs_triton
def test_nothing_is_computed_for_no_rows() -> None:
    assert {kernel_on(c, spec, 0) for c in CROSSOVERS for spec in (QuantSpec(2, 64), QuantSpec(3, 64))} == {"dense"}


@needs_triton
def test_a_row_of_the_table_may_do_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.VARIABLE, "sm_89: few=0, simt=0, general=0")
    assert kernel_on(89, QuantSpec(2, 64), 1) == "gemm"
    assert kernel_on(89, QuantSpec(2, 8), 1) == "dense"
    assert kernel_on(89, QuantSpec(3, 64), 1) == "dense"
    # Without `few` and `some` the layers that they serve go where the others go.
    monkeypatch.setenv(routes.VARIABLE, "sm_89: few=0, some=0")
    routes.for_capability.cache_clear()
    assert kernel_on(89, QuantSpec(2, 64), 1) == "simt"


@needs_triton
def test_humming_serves_where_it_was_asked_for_and_can() -> None:
    spec = QuantSpec(2, 64)
    answers = dict.fromkeys(("enabled", "available", "supports"), True)
    for refused in (None, *answers):
        given = {name: mock.Mock(return_value=name != refused) for name in answers}
        with mock.patch.multiple(humming, **given):
            assert kernel_on(90, spec, 1) == ("matmul" if refused else "humming")


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_makes_sense() -> None:
    for row in CROSSOVERS.values():
        assert 0 <= row.few <= row.some
        assert min(dataclasses.astuple(row)) >= 0


@pytest.mark.parametrize(
    ("capability", "row"), [(75, 75), (80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (110, 100), (121, 120)]
)
def test_an_unknown_architecture_has_the_row_of_the_next_older(capability: int, row: int) -> None:
    assert routes.for_capability(capability) == CROSSOVERS[row]


def test_the_environment_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.VARIABLE, "sm_86: few=3, some=40; sm_90: slice_mib=7")
    assert routes.for_capability(86) == dataclasses.replace(CROSSOVERS[86], few=3, some=40)
    assert routes.for_capability(87) == routes.for_capability(86)
    assert routes.for_capability(90) == dataclasses.replace(CROSSOVERS[90], slice_mib=7)
    assert routes.for_capability(89) == CROSSOVERS[89]
    # An architecture's own changes are all that hold for it.
    monkeypatch.setenv(routes.VARIABLE, "sm_86: few=3; sm_87: some=50")
    routes.for_capability.cache_clear()
    assert routes.for_capability(87) == dataclasses.replace(CROSSOVERS[86], some=50)


@given(
    st.dictionaries(
        st.integers(70, 199), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 10**6), min_size=1), max_size=4
    ),
    st.sampled_from(["", " ", "  "]),
)
def test_what_is_written_is_read(changes: dict[int, dict[str, int]], space: str) -> None:
    def pairs(row: dict[str, int]) -> str:
        return f"{space},{space}".join(f"{name}{space}={space}{number}" for name, number in row.items())

    text = f"{space};{space}".join(
        f"sm_{capability}{space}:{space}{pairs(row)}" for capability, row in changes.items()
    )
    assert routes.parse(text) == changes
    assert routes.parse(f";{text};") == changes


@given(st.builds(Crossovers, *[st.integers(0, 10**6)] * len(NAMES)))
def test_a_row_is_printed_as_it_is_written(row: Crossovers) -> None:
    assert routes.parse(f"sm_89: {row}") == {89: dataclasses.asdict(row)}


@pytest.mark.parametrize(
    "text",
    [
        "few=8",
        "sm_89",
        "sm_89:",
        "sm_89: few",
        "sm_89: few=",
        "sm_89: few=-1",
        "sm_89: few=1.5",
        "sm_89: few=8,",
        "sm_89: rows=8",
        "sm_89: few=8; some=9",
        "sm_90a: few=8",
        "89: few=8",
        "sm_89: few=8 some=9",
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"HQQPLUS_CROSSOVERS: .* NAME one of few, some") as caught:
        routes.parse(text)
    assert text.split(";")[-1].strip() in str(caught.value)


# --- which backend --------------------------------------------------------------------------------------------------


def test_a_cpu_has_its_own_backend() -> None:
    small, large = (random_packed(QuantSpec(2, 64), (rows, 1024)) for rows in (8, -(-cpu.SMALLEST // 1024)))
    x = torch.randn(2, 1024)
    for packed, backend in ((small, "reference"), (large, "cpu")):
        assert routes._backend(packed, torch.float32) == backend
        module: Any = {"reference": reference, "cpu": cpu}[backend]
        for name, call in {
            "matmul": lambda packed=packed: routes.matmul(x, packed, None),
            "matmul_dx": lambda packed=packed: routes.matmul_dx(torch.randn(2, packed.shape[0]), packed),
            "dequantize": lambda packed=packed: routes.dequantize(packed, torch.float32),
            "embedding": lambda packed=packed: routes.embedding(torch.tensor([1]), packed, torch.float32),
        }.items():
            with mock.patch.object(module, name, side_effect=getattr(module, name)) as served:
                call()
            assert served.call_count == 1, (backend, name)


def test_the_backend_is_a_matter_of_device_and_type() -> None:
    packed = meta_packed(QuantSpec(2, 64), (64, 256))
    assert routes._backend(packed, torch.bfloat16) == "reference"  # on meta
    assert routes._backend(on(torch.device("mps"), packed), torch.bfloat16) == "reference"
    with mock.patch.object(routes, "has_triton", return_value=True):
        gpu = on(GPU, packed)
        dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        assert [routes._backend(gpu, dtype) for dtype in dtypes] == ["triton"] * 3 + ["reference"]
    with mock.patch.object(routes, "has_triton", return_value=False):
        assert routes._backend(gpu, torch.bfloat16) == "reference"
    with mock.patch.object(triton, "interpreted", return_value=True):
        on_cpu = random_packed(QuantSpec(2, 64), (64, 256))
        assert routes._backend(on_cpu, torch.bfloat16) == "triton"
        assert routes._backend(on_cpu, torch.float64) == "reference"


@pytest.mark.parametrize(
    ("capability", "hip", "available", "version", "reason"),
    [
        (89, None, True, (3, 6), None),
        (75, None, True, (4, 0), None),
        (70, None, True, (3, 6), "need compute capability 7.5, this card has 7.0"),
        (89, "6.4", True, (3, 6), "written for CUDA"),
        (89, None, False, (3, 6), "Triton is not installed"),
        (89, None, True, (3, 5), "need Triton 3.6, this is 3.5"),
    ],
)
def test_why_a_gpu_has_no_triton_is_said_once(
    capability: int,
    hip: str | None,
    available: bool,
    version: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "available", lambda: available)
    monkeypatch.setattr(routes, "_triton_version", lambda: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [routes.has_triton(GPU) for _ in range(3)]
    assert found == [reason is None] * 3
    assert len(caught) == (reason is not None)
    if reason:
        assert reason in str(caught[0].message)
        assert str(caught[0].message).startswith("cuda:0: packed layers run on the slow torch reference")


# --- what cannot run ------------------------------------------------------------------------------------------------


def _errors() -> dict[str, Exception]:
    """What Triton raises where a kernel cannot be built or started."""
    if not triton.available():
        return {}
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "compilation": CompilationError("def f(): pass", SimpleNamespace(lineno=1, col_offset=0), "not in Triton"),
        "shared memory": OutOfResources(200_000, 100_000, "shared memory"),
        "ptxas": PTXASError("Internal Triton PTX codegen error"),
        "ptxas exits": subprocess.CalledProcessError(255, "ptxas"),
        "no ptxas": FileNotFoundError(2, "No such file or directory", "ptxas"),
        "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    }


def _attempt(kernel: str, error: Exception | None, x: Tensor) -> tuple[str, list[str]]:
    """(which of both ran, warnings)."""

    def run() -> Any:
        if error:
            raise error
        return "kernel"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ran = routes.attempt(kernel, run, lambda: "reference", x)
    return ran, [str(warning.message) for warning in caught]


@needs_triton
@pytest.mark.parametrize("name", _errors())
def test_a_kernel_that_cannot_run_is_replaced_from_then_on_with_one_warning(name: str) -> None:
    error, x = _errors()[name], torch.zeros(1)
    ran, said = _attempt("matmul", error, x)
    assert ran == "reference"
    assert len(said) == 1
    assert said[0].startswith("cpu: the kernel 'matmul' cannot run here, the slow torch reference does instead: ")
    assert type(error).__name__ in said[0]
    # From then on it is not even tried; other kernels, and other devices, are.
    assert _attempt("matmul", None, x) == ("reference", [])
    assert _attempt("gemm", None, x) == ("kernel", [])
    assert _attempt("matmul", None, torch.zeros(1, device="meta")) == ("kernel", [])


@needs_triton
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("a wrong argument"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        AssertionError("a fault of ours"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_goes_wrong_in_a_kernel_is_no_reason_to_replace_it(error: Exception) -> None:
    x = torch.zeros(1)
    with pytest.raises(type(error)) as caught:
        _attempt("matmul", error, x)
    assert caught.value is error
    assert _attempt("matmul", None, x) == ("kernel", [])


@needs_triton
def test_the_ops_give_the_reference_where_no_kernel_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from hqqplus.kernels.triton import dense, dequantize, embedding

    packed = random_packed(QuantSpec(2, 64), (40, 256))
    monkeypatch.setattr(routes, "_backend", lambda packed, dtype: "triton")
    failing = mock.Mock(side_effect=_errors()["shared memory"])
    monkeypatch.setattr(routes, "_forward", failing)
    for module, name in ((dense, "matmul_dx"), (dequantize, "dequantize"), (embedding, "embedding")):
        monkeypatch.setattr(module, name, failing)
    x, dy, ids = torch.randn(2, 3, 256), torch.randn(2, 3, 40), torch.tensor([[1, 2]])
    calls = {
        "gemm": (lambda: routes.matmul(x, packed, None), reference.matmul(x, packed)),
        "dense": (lambda: routes.matmul_dx(dy, packed), reference.matmul_dx(dy, packed)),
        "dequantize": (lambda: routes.dequantize(packed, torch.float16), reference.dequantize(packed, torch.float16)),
        "embedding": (
            lambda: routes.embedding(ids, packed, torch.float32),
            reference.embedding(ids, packed, torch.float32),
        ),
    }
    monkeypatch.setattr(routes, "forward_kernel", lambda *_: "gemm")
    for name, (call, expected) in calls.items():
        failing.reset_mock()
        with pytest.warns(UserWarning, match=f"the kernel '{name}' cannot run here"):
            first = call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = call()
        assert failing.call_count == 1
        for found in (first, again):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected)
