from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hqqplus.quantization import WHOLE_ROW, PackedTensor, QuantSpec, SolverOptions, quantize
from hqqplus.quantization.metadata import decode, metadata_views
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.tensor import dequantize_rows, state_names, state_shapes

NBITS = (1, 2, 3, 4, 8)
SHAPES = [(96, 128), (64, 172), (3, 5), (13, 1), (1, 300)]
GROUP_SIZES = [8, 64, WHOLE_ROW]


def decoded(packed: PackedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and offset of each group, float32 [rows, groups]."""
    spec = packed.spec
    return decode(*metadata_views(packed.scale, packed.offset, packed.blocks, spec.metadata_dtype), spec.qmax)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestEveryShape:
    def test_state_is_what_was_announced_and_integers_only(
        self, nbits: int, group_size: int, axis: int, metadata_bits: int, shape: tuple[int, int]
    ) -> None:
        spec = QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
        packed = quantize(gaussian(*shape), spec)
        state = packed.state()
        assert tuple(state) == state_names(spec) == ("W_q", "scale", "offset", "blocks")[: 3 + (metadata_bits == 8)]
        assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == state_shapes(spec, *shape)
        assert not any(t.is_floating_point() or t.is_complex() for t in state.values())
        assert all(t.is_contiguous() and not t.requires_grad for t in state.values())

    def test_bits_per_weight_counted_and_computed_agree(
        self, nbits: int, group_size: int, axis: int, metadata_bits: int, shape: tuple[int, int]
    ) -> None:
        spec = QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
        assert quantize(gaussian(*shape), spec).bits_per_weight == spec.bits_per_weight(*shape)

    def test_axis_0_is_axis_1_of_the_transposed_matrix(
        self, nbits: int, group_size: int, axis: int, metadata_bits: int, shape: tuple[int, int]
    ) -> None:
        weight = gaussian(*shape)
        spec = QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
        packed, turned = quantize(weight, spec), quantize(weight.t(), spec.replace(axis=1 - axis))
        for name, tensor in packed.state().items():
            assert torch.equal(tensor, turned.state()[name])
        assert packed.shape == shape
        assert torch.equal(packed.dequantize(), turned.dequantize().t())

    def test_dequantize_is_scale_times_code_plus_offset(
        self, nbits: int, group_size: int, axis: int, metadata_bits: int, shape: tuple[int, int]
    ) -> None:
        spec = QuantSpec(nbits, group_size, axis, metadata_bits=metadata_bits)
        packed = quantize(gaussian(*shape), spec)
        layout = spec.layout(*shape)
        codes = unpack(packed.W_q, nbits, layout.plane)[:, : layout.width].double()  # [rows, width]
        scale, offset = (t.double().repeat_interleave(layout.group, 1)[:, : layout.width] for t in decoded(packed))
        expected = scale * codes + offset
        result = packed.dequantize()
        assert result.is_contiguous()
        torch.testing.assert_close(result if axis == 1 else result.t(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("group_size", [8, 32, 64, 128])
def test_bits_per_weight_is_the_formula(nbits: int, group_size: int) -> None:
    packed = quantize(gaussian(128, 256), QuantSpec(nbits, group_size, metadata_bits=16))
    assert packed.bits_per_weight == nbits + 32 / group_size


@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_padding_codes_are_zero(nbits: int, axis: int, metadata_bits: int) -> None:
    spec = QuantSpec(nbits, 64, axis, metadata_bits=metadata_bits)
    packed = quantize(gaussian(*((5, 172) if axis == 1 else (172, 5))) - 10, spec)
    codes = unpack(packed.W_q, nbits, 64)
    assert codes.shape == (5, 192)
    assert not codes[:, 172:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("nbits", NBITS)
def test_any_float_input_gives_the_same_and_stays_as_it_is(nbits: int, dtype: torch.dtype) -> None:
    weight = gaussian(16, 128).bfloat16().to(dtype)
    before = weight.clone()
    packed, reference = (quantize(w, QuantSpec(nbits, 64, metadata_bits=16)) for w in (weight, weight.float()))
    assert weight.dtype == dtype
    assert torch.equal(weight, before)
    for name, tensor in packed.state().items():
        assert torch.equal(tensor, reference.state()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize_rounds_once_to_the_dtype_asked_for(axis: int, dtype: torch.dtype) -> None:
    packed = quantize(gaussian(16, 128), QuantSpec(4, 64, axis, metadata_bits=16))
    result = packed.dequantize(dtype)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result, packed.dequantize(torch.float32).to(dtype))


def test_float32_is_what_dequantize_gives_unasked() -> None:
    assert quantize(gaussian(8, 64).half(), QuantSpec()).dequantize().dtype == torch.float32


@pytest.mark.parametrize("metadata_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("nbits", [1, 2])
def test_either_metadata_dtype_serves_low_bits(nbits: int, metadata_dtype: str) -> None:
    weight = 0.02 * gaussian(64, 256)
    packed = quantize(weight, QuantSpec(nbits, 64, metadata_dtype=metadata_dtype, metadata_bits=16))
    assert packed.nmse(weight) == pytest.approx(
        quantize(weight, QuantSpec(nbits, 64, metadata_bits=16)).nmse(weight), rel=1e-3
    )


def test_float16_metadata_is_what_eight_bits_need() -> None:
    weight = 0.02 * gaussian(64, 256)
    fine, coarse = (
        quantize(weight, QuantSpec(8, 64, metadata_dtype=name, metadata_bits=16)) for name in ("float16", "bfloat16")
    )
    assert 1.05 * fine.nmse(weight) < coarse.nmse(weight)


@pytest.mark.parametrize("nbits", NBITS)
def test_views_and_parameters_are_taken(nbits: int) -> None:
    weight = torch.nn.Parameter(gaussian(128, 32))
    spec = QuantSpec(nbits, 32, metadata_bits=16)
    packed = quantize(weight.t()[::2], spec)
    assert torch.equal(packed.dequantize(), quantize(weight.detach().t()[::2].contiguous(), spec).dequantize())
    assert not packed.dequantize().requires_grad


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_what_is_not_float_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"matrix of floats, not {dtype} of shape"):
        quantize(torch.ones(8, 64, dtype=dtype), QuantSpec())


@pytest.mark.parametrize("shape", [(), (64,), (2, 8, 64), (0, 64), (64, 0)])
def test_what_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"non-empty matrix of floats, not torch.float32 of shape"):
        quantize(torch.ones(shape), QuantSpec())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused_on_either_axis(axis: int, metadata_bits: int, value: float) -> None:
    weight = gaussian(32, 72)
    weight[31, 71] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, QuantSpec(axis=axis, metadata_bits=metadata_bits))


def test_a_part_of_the_rows_can_be_dequantized_alone() -> None:
    spec = QuantSpec(3, 64, metadata_bits=16)
    packed = quantize(gaussian(16, 172), spec)
    scale, offset = decoded(packed)
    part = torch.tensor([3, 3, 15])
    rows = dequantize_rows(packed.W_q[part], scale[part], offset[part], spec, 172, torch.float32)
    assert torch.equal(rows, packed.dequantize()[part])


@pytest.mark.parametrize("metadata_bits", [16, 8])
def test_a_packed_tensor_is_rebuilt_from_its_state(metadata_bits: int) -> None:
    packed = quantize(gaussian(16, 172), QuantSpec(2, 64, metadata_bits=metadata_bits))
    again = PackedTensor(**packed.state(), spec=QuantSpec(**packed.spec.to_dict()), shape=packed.shape)
    assert torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("nbits", NBITS)
def test_a_file_holds_the_bits_that_are_counted_and_no_more(
    tmp_path: Path, nbits: int, group_size: int, metadata_bits: int
) -> None:
    packed = quantize(gaussian(64, 172), QuantSpec(nbits, group_size, metadata_bits=metadata_bits))
    save_file(packed.state(), tmp_path / "packed.safetensors")
    content = (tmp_path / "packed.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert 8 * (len(content) - header) / (64 * 172) == packed.spec.bits_per_weight(64, 172)


def test_the_metadata_that_are_solved_for_do_not_depend_on_how_they_are_stored() -> None:
    # 8-bit metadata are made from a 16-bit solution: its codes and levels are close to it.
    weight = gaussian(64, 256)
    fine, coarse = (quantize(weight, QuantSpec(2, 32, metadata_bits=bits)) for bits in (16, 8))
    for exact, stored in zip(decoded(fine), decoded(coarse), strict=True):
        assert (exact - stored).abs().max() < 0.01 * weight.abs().max()
    codes = [unpack(packed.W_q, 2, 32) for packed in (fine, coarse)]
    assert (codes[0] != codes[1]).float().mean() < 0.01


class TestNmse:
    def test_it_is_the_squared_error_over_the_energy(self) -> None:
        weight = gaussian(16, 128)
        packed = quantize(weight, QuantSpec(2, 64, metadata_bits=16))
        expected = (weight - packed.dequantize()).square().sum() / weight.square().sum()
        assert packed.nmse(weight) == pytest.approx(expected.item(), rel=1e-5)
        assert packed.nmse(weight.bfloat16()) == pytest.approx(expected.item(), rel=1e-2)

    def test_zero_is_zero(self) -> None:
        packed = quantize(torch.zeros(4, 64), QuantSpec())
        assert packed.nmse(torch.zeros(4, 64)) == 0.0

    def test_something_for_nothing_is_infinite(self) -> None:
        assert quantize(torch.ones(4, 64), QuantSpec()).nmse(torch.zeros(4, 64)) == float("inf")

    def test_more_bits_and_smaller_groups_are_better(self) -> None:
        weight = gaussian(64, 256)
        by_bits = [quantize(weight, QuantSpec(nbits, 64, metadata_bits=16)).nmse(weight) for nbits in NBITS]
        assert by_bits == sorted(by_bits, reverse=True)
        by_group = [
            quantize(weight, QuantSpec(2, group, metadata_bits=16)).nmse(weight) for group in (8, 16, 32, 64, 128, 256)
        ]
        assert by_group == sorted(by_group)

    def test_least_squares_shrinks(self) -> None:
        # <W, Q> = ||Q||^2 = (1 - NMSE) ||W||^2 where scale and offset are a regression.
        weight = gaussian(64, 256)
        for nbits in (1, 2):
            packed = quantize(weight, QuantSpec(nbits, 64, metadata_bits=16))
            result = packed.dequantize()
            kept = 1 - packed.nmse(weight)
            for energy in ((weight * result).sum(), result.square().sum()):
                assert (energy / weight.square().sum()).item() == pytest.approx(kept, rel=1e-3)


# --- what the solver minimises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", [1, 2, 4])
@pytest.mark.parametrize("metadata_bits", [8, 16])
def test_a_gain_of_one_undoes_the_shrinkage_of_each_row(nbits: int, metadata_bits: int) -> None:
    weight = gaussian(32, 256) * torch.logspace(-2, 1, 32)[:, None]
    spec = QuantSpec(nbits, 32, metadata_bits=metadata_bits)
    plain = quantize(weight, spec).dequantize()
    shares = (weight * plain).sum(1) / weight.square().sum(1)
    # Least squares: <W, Q> = (1 - NMSE) <W, W>.
    nmse = (weight - plain).square().sum(1) / weight.square().sum(1)
    torch.testing.assert_close(shares, 1 - nmse, rtol=0, atol=2e-3 if metadata_bits == 16 else 3e-2)
    gained = quantize(weight, spec, SolverOptions(gain=1.0))
    shares = (weight * gained.dequantize()).sum(1) / weight.square().sum(1)
    torch.testing.assert_close(shares, torch.ones(32), rtol=0, atol=2e-3 if metadata_bits == 16 else 3e-2)
    half = quantize(weight, spec, SolverOptions(gain=0.5)).dequantize()
    ratio = half.norm(dim=1) / plain.norm(dim=1)
    torch.testing.assert_close(ratio, (1 - nmse) ** -0.5, rtol=3e-2, atol=0)
    if metadata_bits == 16:
        assert torch.equal(gained.W_q, quantize(weight, spec).W_q)


def test_a_gain_with_axis_0_is_refused() -> None:
    with pytest.raises(ValueError, match="row gain needs axis 1"):
        quantize(gaussian(64, 64), QuantSpec(2, 32, axis=0), SolverOptions(gain=0.5))


@pytest.mark.parametrize("metadata_bits", [8, 16])
@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
def test_importance_lowers_the_weighted_error(nbits: int, metadata_bits: int) -> None:
    weight = gaussian(64, 200)
    importance = torch.randn(200, generator=torch.Generator().manual_seed(1)).exp()
    spec = QuantSpec(nbits, 64, metadata_bits=metadata_bits)

    def weighted(result: torch.Tensor) -> float:
        return ((weight - result).square() * importance).sum().item()

    plain, weighed = quantize(weight, spec), quantize(weight, spec, importance=importance)
    assert weighted(weighed.dequantize()) < 0.97 * weighted(plain.dequantize())
    assert weighed.nmse(weight) > plain.nmse(weight)
    twice = quantize(weight, spec, importance=1000 * importance)
    assert twice.nmse(weight) == pytest.approx(weighed.nmse(weight), rel=1e-3)


def test_importance_makes_no_difference_where_groups_lie_in_a_column() -> None:
    weight, spec = gaussian(64, 32), QuantSpec(2, 32, axis=0)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize(weight, spec, importance=importance).W_q, quantize(weight, spec).W_q)


@pytest.mark.parametrize(
    ("importance", "said"),
    [
        (torch.ones(31), "must be 32 floats"),
        (torch.ones(32, dtype=torch.long), "must be 32 floats"),
        (torch.full((32,), -1.0), "not negative"),
        (torch.full((32,), float("nan")), "finite"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_bad_importance_is_refused(importance: torch.Tensor, said: str, axis: int) -> None:
    with pytest.raises(ValueError, match=said):
        quantize(gaussian(64, 32), QuantSpec(2, 32, axis=axis), importance=importance)
