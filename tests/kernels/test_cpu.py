"""The CPU's backend against float64 products with the exactly dequantized weight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqplus.kernels import cpu, reference
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.packing import packed_width
from hqqplus.quantization.spec import block_count

SPECS = [
    QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
    for nbits in (1, 2, 3, 4, 8)
    for group_size in (8, 32, 64, 256, -1)
    for axis in (1, 0)
    for metadata_bits in (16, 8)
]
# Odd rows; a width that is padded and one of whole blocks, a shorter one and padding for most specs.
SHAPES = [(37, 72), (40, 172), (131, 2060)]
ROWS = (1, 2, 16, 33)


def random_packed(spec: QuantSpec, out_features: int, in_features: int, seed: int = 0) -> Packed:
    """A packed matrix of random codes whose weights have mean 0."""
    generator = torch.Generator().manual_seed(seed)
    layout = spec.layout(out_features, in_features)
    shape = layout.rows, layout.groups

    def codes(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    W_q = codes(layout.rows, packed_width(layout.padded, spec.nbits))
    if spec.metadata_bits == 8:
        maps = torch.rand(block_count(shape[0] * shape[1]), 4, generator=generator).mul_(0.02).half()
        maps[:, 1], maps[:, 3] = 20, 128
        return Packed(W_q, codes(*shape), codes(*shape), maps, spec, (out_features, in_features))
    scale = torch.rand(shape, generator=generator).mul_(0.02)
    offset = 0.01 * torch.randn(shape, generator=generator) - scale * spec.qmax / 2
    return Packed(W_q, scale.half(), offset.half(), None, spec, (out_features, in_features))


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error in float64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def allowed(dtype: torch.dtype, other: float) -> float:
    """What is allowed where the reference is off by `other`."""
    return 1e-5 if dtype == torch.float32 else 1.2 * other + 1e-12


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_equal_those_with_the_dense_weight(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        packed = random_packed(spec, *shape)
        weight = reference.dequantize(packed, torch.float64)
        for count in ROWS:
            for dtype in (torch.float32, torch.bfloat16):
                x, dy = torch.randn(count, shape[1], dtype=dtype), torch.randn(count, shape[0], dtype=dtype)
                bias = torch.randn(shape[0], dtype=dtype)
                y, expected = cpu.matmul(x, packed, bias), x.double() @ weight.t() + bias.double()
                assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, expected.shape, True)
                assert error(y, expected) <= allowed(dtype, error(reference.matmul(x, packed, bias), expected))
                dx, expected = cpu.matmul_dx(dy, packed), dy.double() @ weight
                assert (dx.dtype, dx.shape, dx.is_contiguous()) == (dtype, expected.shape, True)
                assert error(dx, expected) <= allowed(dtype, error(reference.matmul_dx(dy, packed), expected))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_is_the_references_to_the_bit(spec: QuantSpec) -> None:
    for shape in SHAPES:
        packed = random_packed(spec, *shape)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found = cpu.dequantize(packed, dtype)
            assert torch.equal(found, reference.dequantize(packed, dtype))
            assert found.is_contiguous()


@settings(max_examples=60)
@given(
    nbits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([8, 24, 32, 64, 104, 128, 256, -1]),
    axis=st.sampled_from([0, 1]),
    metadata_bits=st.sampled_from([8, 16]),
    out_features=st.integers(1, 300),
    in_features=st.integers(1, 1200),
    count=st.sampled_from([0, 1, 2, 3, 4, 5, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 9),
)
def test_any_layer(
    nbits: int,
    group_size: int,
    axis: int,
    metadata_bits: int,
    out_features: int,
    in_features: int,
    count: int,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    packed = random_packed(
        QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits), out_features, in_features, seed
    )
    torch.manual_seed(seed)
    x = (scale * torch.randn(count, in_features)).to(dtype)
    weight = reference.dequantize(packed, torch.float64)
    y, expected = cpu.matmul(x, packed), x.double() @ weight.t()
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    # Relative to what is summed: a sum itself may be as small as it likes. Weight and result are both rounded.
    bound = (x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)) + 1e-300
    precision = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}[dtype]
    assert ((y.double() - expected).abs() <= precision * bound + 1e-6 * (dtype == torch.float16)).all()


def with_few_rows() -> list[QuantSpec]:
    return [QuantSpec(2, 64, metadata_bits=16), QuantSpec(2, 32), QuantSpec(1, 64), QuantSpec(3, 32), QuantSpec(8, 32)]


@pytest.mark.parametrize("spec", with_few_rows(), ids=str)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_x_may_have_any_strides_and_shape(spec: QuantSpec, count: int) -> None:
    torch.manual_seed(0)
    packed = random_packed(spec, 37, 1100)
    x = torch.randn(1100, 3, count).permute(2, 1, 0)[:, ::2]  # [count, 2, 1100]
    y = cpu.matmul(x, packed)
    assert y.shape == (count, 2, 37)
    torch.testing.assert_close(y, cpu.matmul(x.contiguous(), packed), rtol=0, atol=0)
    dy = torch.randn(37, count).t()
    torch.testing.assert_close(cpu.matmul_dx(dy, packed), cpu.matmul_dx(dy.contiguous(), packed), rtol=0, atol=0)
    with_gradient = x.clone().requires_grad_()
    assert torch.equal(cpu.matmul(with_gradient, packed), y)
    assert cpu.matmul(x[:, :0], packed).shape == (count, 0, 37)
    assert cpu.matmul_dx(dy[:0], packed).shape == (0, 1100)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_several_slices_of_rows_and_of_columns(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for spec in (QuantSpec(2, 32), QuantSpec(1, 8), QuantSpec(3, 64), QuantSpec(4, -1, metadata_bits=16)):
        packed = random_packed(spec, 300, 1100)
        x, dy = torch.randn(count, 1100), torch.randn(count, 300)
        whole = cpu.matmul(x, packed), cpu.matmul_dx(dy, packed), cpu.dequantize(packed, torch.float32)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_INTEGER_CODES", 1)
            patch.setattr(cpu, "_FLOAT_CODES", 1)
            assert len(cpu._row_slices(packed, 1)) == 3
            for found, expected in zip(
                (cpu.matmul(x, packed), cpu.matmul_dx(dy, packed), cpu.dequantize(packed, torch.float32)),
                whole,
                strict=True,
            ):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", with_few_rows(), ids=str)
def test_few_rows_are_not_dequantized(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu._fast_int_mm():
        pytest.skip("this processor has no fast integer product")
    packed = random_packed(spec, 40, 4 * cpu._unit(random_packed(spec, 8, 8)))

    def refuse(*_: object) -> None:
        raise AssertionError("dequantized")

    for name in ("_fill_columns", "_fill"):
        monkeypatch.setattr(cpu, name, refuse)
    assert cpu.matmul(torch.randn(1, packed.shape[1]), packed).shape == (1, 40)
    with pytest.raises(AssertionError, match="dequantized"):
        cpu.matmul(torch.randn(500, packed.shape[1]), packed)


@pytest.mark.parametrize("few", [True, False])
def test_without_fast_16_bit_and_integer_products(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an old processor does: products in float32, rounded once."""
    torch.manual_seed(0)
    packed = random_packed(QuantSpec(2, 64), 130, 600)
    x, bias = torch.randn(1 if few else 50, 600).bfloat16(), torch.randn(130).bfloat16()
    expected = x.double() @ reference.dequantize(packed, torch.float64).t() + bias.double()
    monkeypatch.setattr(cpu, "_fast_int_mm", lambda: False)
    monkeypatch.setattr(cpu, "_product_dtype", lambda dtype: torch.float32)
    assert error(cpu.matmul(x, packed, bias), expected) < 2e-3
    assert error(cpu.matmul_dx(expected, packed), expected @ reference.dequantize(packed, torch.float64)) < 1e-12


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_the_integer_sums_cannot_saturate(nbits: int) -> None:
    """The largest codes and digits there are, and what is most unlike in one row."""
    spec = QuantSpec(nbits, 256, metadata_bits=16)
    packed = random_packed(spec, 16, 4096)
    packed.W_q[:8] = 255
    packed.W_q[8] = 0
    weight = reference.dequantize(packed, torch.float64)
    alternating = torch.ones(1, 4096).index_fill_(1, torch.arange(0, 4096, 2), -1)
    for x in (torch.ones(1, 4096), -torch.ones(1, 4096), alternating, -64 / 63 * torch.ones(1, 4096)):
        for scale in (1e-30, 1.0, 1e30):
            found = cpu.matmul(scale * x, packed)
            expected = (scale * x).double() @ weight.t()
            assert (found.double() - expected).abs().max() <= 1e-6 * scale * weight.abs().sum(1).max()


def test_zeros_infinities_and_nan() -> None:
    packed = random_packed(QuantSpec(2, 64), 20, 1024)
    bias = torch.randn(20)
    assert torch.equal(cpu.matmul(torch.zeros(1, 1024), packed, bias)[0], bias)
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 1024)
        x[0, 70] = value
        assert not torch.isfinite(cpu.matmul(x, packed)).any()


def test_the_same_call_gives_the_same_bits_from_several_threads() -> None:
    torch.manual_seed(0)
    packed = random_packed(QuantSpec(2, 32), 260, 1100)
    for count in (1, 40):
        x = torch.randn(count, 1100).bfloat16()
        expected = cpu.matmul(x, packed)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _, x=x: cpu.matmul(x, packed), range(16)):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("metadata_bits", [8, 16])
def test_embedding_reads_rows(metadata_bits: int) -> None:
    packed = random_packed(QuantSpec(4, 64, metadata_bits=metadata_bits), 50, 100)
    ids = torch.tensor([[0, 49], [7, 7]])
    assert torch.equal(cpu.embedding(ids, packed, torch.float32), cpu.dequantize(packed, torch.float32)[ids])
