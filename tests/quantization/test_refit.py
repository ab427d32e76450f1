from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hqqplus.quantization import WHOLE_ROW, QuantSpec, quantize, refit
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.solver import solve
from hqqplus.quantization.spec import BLOCK


def random_weight(kind: str, rows: int, width: int, seed: int = 0, sigma: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, width, generator=generator)
    if kind == "laplace":
        normal = normal.sign() * torch.rand(rows, width, generator=generator).clamp_min(1e-6).log()
    if kind == "t5":
        normal = normal / (torch.randn(5, rows, width, generator=generator).square().mean(0)).sqrt()
    if kind == "shifted":
        normal = normal + 2
    if kind == "channel":
        normal[:, width // 2] *= 30
    return normal * sigma


def store(weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, ...]:
    """Codes [rows, width], scale codes, middle codes, maps: what `quantize` stores, before it is packed."""
    solution = solve(weight, spec.replace(metadata_bits=16))
    return refit.store_8bit(weight, solution.codes, solution.scale, solution.offset, spec)


def loss(weights: list[torch.Tensor], spec: QuantSpec) -> float:
    """The relative increase of the squared error by 8-bit metadata."""
    errors = [
        sum((w - quantize(w, spec.replace(metadata_bits=bits)).dequantize()).square().sum().item() for w in weights)
        for bits in (8, 16)
    ]
    return errors[0] / errors[1] - 1


CASES = {
    "nbits": st.sampled_from([1, 2, 3, 4, 8]),
    "group_size": st.sampled_from([8, 32, 64, WHOLE_ROW]),
    "rows": st.integers(1, 40),
    "width": st.integers(1, 200),
    "kind": st.sampled_from(["gaussian", "laplace", "t5", "shifted", "channel"]),
    "metadata_dtype": st.sampled_from(["float16", "bfloat16"]),
    "seed": st.integers(0, 2**16),
}


class TestWhatIsStored:
    @given(**CASES)
    @settings(max_examples=150)
    def test_each_code_is_the_nearest_to_its_weight(
        self, nbits: int, group_size: int, rows: int, width: int, kind: str, metadata_dtype: str, seed: int
    ) -> None:
        weight = random_weight(kind, rows, width, seed)
        spec = QuantSpec(nbits, group_size, metadata_dtype=metadata_dtype, metadata_bits=8)
        codes, scale_codes, middle_codes, maps = store(weight, spec)
        assert codes.shape == weight.shape
        assert {codes.dtype, scale_codes.dtype, middle_codes.dtype} == {torch.uint8}
        group = spec.layout(rows, width).group
        scale, offset = (
            t.double().repeat_interleave(group, 1)[:, :width]
            for t in decode(scale_codes, middle_codes, maps, spec.qmax)
        )
        levels = offset[..., None] + scale[..., None] * torch.arange(spec.qmax + 1)  # [rows, width, levels]
        distances = (levels - weight.double()[..., None]).abs()
        chosen = distances.gather(2, codes.long()[..., None])[..., 0]
        assert (chosen <= distances.amin(2) + 1e-5 * weight.abs().max()).all()

    @pytest.mark.parametrize("shape", [(40, 8 * BLOCK), (3, 2000), (700, 12)], ids=str)
    @pytest.mark.parametrize("group_size", [8, 40, WHOLE_ROW])
    def test_chunks_change_nothing(
        self, monkeypatch: pytest.MonkeyPatch, group_size: int, shape: tuple[int, int]
    ) -> None:
        weight, spec = random_weight("t5", *shape), QuantSpec(2, group_size, metadata_bits=8)
        whole = store(weight, spec)
        monkeypatch.setattr(refit, "_CHUNK_CPU", 1)  # a block at a time
        for part, all_at_once in zip(store(weight, spec), whole, strict=True):
            assert torch.equal(part, all_at_once)

    def test_blocks_know_nothing_of_each_other(self) -> None:
        upper, lower = random_weight("gaussian", 16, 64), random_weight("laplace", 16, 64, sigma=7.0)
        spec = QuantSpec(2, 8, metadata_bits=8)  # 16 rows of 8 groups: a block
        together, parts = store(torch.cat([upper, lower]), spec), (store(upper, spec), store(lower, spec))
        for whole, above, below in zip(together, *parts, strict=True):
            assert torch.equal(whole, torch.cat([above, below]))

    def test_the_last_group_of_a_row_is_fitted_to_its_own_weights_only(self) -> None:
        # Rows of 40 with groups of 32: the last 8 weights are a group of their own, as if in a row of 8.
        weight, spec = random_weight("gaussian", BLOCK, 40), QuantSpec(3, 32, metadata_bits=8)
        result = quantize(weight, spec).dequantize()[:, 32:]
        error = (result - weight[:, 32:]).square().sum()
        alone = (
            (quantize(weight[:, 32:].contiguous(), QuantSpec(3, 8, metadata_bits=16)).dequantize() - weight[:, 32:])
            .square()
            .sum()
        )
        assert error < 1.01 * alone


class TestLoss:
    @pytest.mark.parametrize("metadata_dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("group_size", [8, 32, 128])
    @pytest.mark.parametrize("nbits", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["gaussian", "laplace", "t5"])
    def test_it_is_below_half_a_percent_up_to_three_bits(
        self, kind: str, nbits: int, group_size: int, metadata_dtype: str
    ) -> None:
        weight = random_weight(kind, 128, 512)
        assert loss([weight], QuantSpec(nbits, group_size, metadata_dtype=metadata_dtype, metadata_bits=16)) < 0.005

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("group_size", [8, 64])
    @pytest.mark.parametrize("nbits", [1, 2, 3])
    def test_real_weights_lose_below_half_a_percent(
        self, story_model: Path, nbits: int, group_size: int, axis: int
    ) -> None:
        tensors = load_file(story_model / "model.safetensors")
        weights = [tensor.float() for name, tensor in tensors.items() if "_proj" in name]
        assert len(weights) > 10
        assert loss(weights, QuantSpec(nbits, group_size, axis, metadata_bits=16)) < 0.005

    @pytest.mark.parametrize("nbits", [4, 8])
    def test_finer_codes_lose_what_the_table_says(self, nbits: int) -> None:
        bound = {4: (0.03, 0.01, 0.005), 8: (1.3, 0.35, 0.15)}[nbits]
        for group_size, most in zip((8, 32, 128), bound, strict=True):
            assert loss([random_weight("t5", 128, 512)], QuantSpec(nbits, group_size, metadata_bits=16)) < most

    @pytest.mark.parametrize("nbits", [1, 2])
    @pytest.mark.parametrize("kind", ["gaussian", "laplace", "t5", "channel"])
    def test_smaller_groups_are_the_better_use_of_the_bits(self, kind: str, nbits: int) -> None:
        weight = random_weight(kind, 128, 512)
        small, large = (
            quantize(weight, QuantSpec(nbits, 32, metadata_bits=8)),
            quantize(weight, QuantSpec(nbits, 64, metadata_bits=16)),
        )
        assert small.bits_per_weight < large.bits_per_weight + 0.02
        assert small.nmse(weight) < 0.95 * large.nmse(weight)

    @pytest.mark.parametrize("group_size", [8, 32, 128])
    @pytest.mark.parametrize(("nbits", "most"), [(1, 0.01), (2, 0.03)])
    def test_outliers_cost_their_block_little(self, nbits: int, most: float, group_size: int) -> None:
        assert loss([random_weight("channel", 128, 512)], QuantSpec(nbits, group_size, metadata_bits=16)) < most


class TestNarrowest:
    @given(
        nbits=st.sampled_from([1, 2, 3, 4]),
        used=st.lists(st.integers(0, 15), min_size=1, max_size=8),
        scale=st.floats(0.01, 10),
        offset=st.floats(-50, 50),
    )
    def test_the_levels_in_use_stay(self, nbits: int, used: list[int], scale: float, offset: float) -> None:
        qmax = 2**nbits - 1
        codes = torch.tensor([[code % (qmax + 1) for code in used]], dtype=torch.uint8)
        inside = torch.ones_like(codes, dtype=torch.bool)
        before = torch.tensor([scale], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64)
        step, middle = refit._narrowest(codes, inside, *before, qmax)
        assert 0 <= step.item() <= scale
        new = middle + step * (torch.arange(qmax + 1) - qmax / 2)
        for level in offset + scale * codes[0].double():
            assert (new - level).abs().min() < 1e-9 * (abs(offset) + 16 * scale)
        # Of the grids with this step that hold them, none has its middle nearer to zero.
        low, high = offset + scale * codes.min().item(), offset + scale * codes.max().item()
        for other in (middle - step, middle + step):
            holds = other - step * qmax / 2 <= low + 1e-9 and other + step * qmax / 2 >= high - 1e-9
            assert not holds or step.item() == 0 or other.abs() >= middle.abs() - 1e-9

    def test_two_levels_become_the_ends(self) -> None:
        codes = torch.tensor([[1, 2, 1, 9], [0, 2, 2, 9], [2, 2, 2, 9], [0, 1, 2, 9]], dtype=torch.uint8)
        inside = torch.tensor([True, True, True, False]).expand(4, 4)
        step, middle = refit._narrowest(codes, inside, torch.full((4,), 3.0), torch.zeros(4), 3)
        assert step.tolist() == [1, 2, 0, 3]
        assert middle.tolist() == [4.5, 3, 6, 1.5]


class TestImportance:
    @pytest.mark.parametrize("nbits", [1, 2, 3, 4])
    @pytest.mark.parametrize("width", [172, 192])
    def test_it_weighs_the_errors(self, nbits: int, width: int) -> None:
        weight, spec = random_weight("gaussian", 64, width), QuantSpec(nbits, 32, metadata_bits=8)
        importance = 100.0 ** (torch.arange(width) % 2)
        solution = solve(weight, spec.replace(metadata_bits=16), importance=importance)
        errors = []
        for weights in (None, importance):
            result = refit.store_8bit(weight, solution.codes, solution.scale, solution.offset, spec, weights)
            scale, offset = decode(*result[1:], spec.qmax)
            wide = [t.repeat_interleave(32, 1)[:, :width] for t in (scale, offset)]
            errors.append((weight - wide[1] - wide[0] * result[0]).square().mul(importance).sum().item())
        solved = solution.offset.float().repeat_interleave(32, 1)[:, :width]
        solved = solved + solution.scale.float().repeat_interleave(32, 1)[:, :width] * solution.codes
        best = (weight - solved).square().mul(importance).sum().item()
        assert errors[1] < 1.005 * best
        assert errors[1] < errors[0]

    @pytest.mark.parametrize("value", [0.0, 1.0, 7.0])
    def test_all_alike_is_none(self, value: float) -> None:
        weight, spec = random_weight("gaussian", 16, 172), QuantSpec(2, 32, metadata_bits=8)
        solution = solve(weight, spec.replace(metadata_bits=16))
        arguments = weight, solution.codes, solution.scale, solution.offset, spec
        plain, weighted = refit.store_8bit(*arguments), refit.store_8bit(*arguments, torch.full((172,), value))
        for one, other in zip(plain, weighted, strict=True):
            assert torch.equal(one, other)


class TestSpecialWeights:
    @pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("metadata_dtype", ["float16", "bfloat16"])
    def test_zeros_are_exact_wherever_they_are_a_group(self, nbits: int, metadata_dtype: str) -> None:
        weight = random_weight("shifted", 24, 172)
        weight[3], weight[:, 64:128] = 0, 0
        result = quantize(weight, QuantSpec(nbits, 64, metadata_dtype=metadata_dtype, metadata_bits=8)).dequantize()
        assert not result[3].any()
        assert not result[:, 64:128].any()
        assert not quantize(torch.zeros(5, 20), QuantSpec(nbits, 8, metadata_bits=8)).dequantize().any()

    @pytest.mark.parametrize("nbits", [1, 2, 8])
    @pytest.mark.parametrize("value", [1.0, -0.3, 1e-3])
    def test_a_constant_is_kept_to_half_a_step(self, nbits: int, value: float) -> None:
        result = quantize(torch.full((4, 64), value), QuantSpec(nbits, 8, metadata_bits=8)).dequantize()
        torch.testing.assert_close(result, torch.full((4, 64), value), rtol=2**-9, atol=0)

    @pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("metadata_dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("power", [-3, 2, 6])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_a_power_of_two_changes_no_code(self, nbits: int, metadata_dtype: str, power: int, axis: int) -> None:
        weight = random_weight("t5", 48, 172, sigma=1.0)  # float16 has fewer digits for scales below 6e-5
        spec = QuantSpec(nbits, 32, axis, metadata_dtype, 8)
        packed, scaled = quantize(weight, spec), quantize(weight * 2.0**power, spec)
        for name in ("W_q", "scale", "offset"):
            assert torch.equal(getattr(packed, name), getattr(scaled, name))
        assert torch.equal(packed.dequantize() * 2.0**power, scaled.dequantize())

    @pytest.mark.parametrize("nbits", [1, 2, 4])
    def test_very_small_and_very_large_weights_in_bfloat16(self, nbits: int) -> None:
        weight, spec = (
            random_weight("gaussian", 16, 256, sigma=1.0),
            QuantSpec(nbits, 32, 1, "bfloat16", 8),
        )
        wanted = quantize(weight, spec).nmse(weight)
        for sigma in (1e-30, 1e30):
            assert quantize(weight * sigma, spec).nmse(weight * sigma) == pytest.approx(wanted, rel=1e-2)

    @pytest.mark.parametrize("nbits", [1, 2])
    @pytest.mark.parametrize(("metadata_dtype", "large"), [("float16", 5e4), ("bfloat16", 3e38)])
    def test_a_block_too_wide_for_its_map_is_refused(self, nbits: int, metadata_dtype: str, large: float) -> None:
        # Each of these fits into 16 bits, but not their distance.
        weight = torch.full((2, 64), large)
        weight[1] *= -1
        spec = QuantSpec(nbits, 32, 1, metadata_dtype, metadata_bits=16)
        torch.testing.assert_close(quantize(weight, spec).dequantize(), weight, rtol=1e-2, atol=0)
        with pytest.raises(ValueError, match=f"too large for scales in {metadata_dtype}"):
            quantize(weight, spec.replace(metadata_bits=8))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_float_input_gives_the_same(self, dtype: torch.dtype) -> None:
        weight = random_weight("gaussian", 16, 172).bfloat16().to(dtype)
        packed, reference = (quantize(w, QuantSpec(2, 32, metadata_bits=8)) for w in (weight, weight.float()))
        for name, tensor in packed.state().items():
            assert torch.equal(tensor, reference.state()[name])

    def test_long_rows(self) -> None:
        weight = random_weight("gaussian", 3, 5000) + 0.01
        assert loss([weight], QuantSpec(2, WHOLE_ROW, metadata_bits=16)) < 0.005
