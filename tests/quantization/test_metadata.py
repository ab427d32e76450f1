from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hqqplus.quantization.metadata import (
    STORAGE_DTYPE,
    decode,
    decode_values,
    encode,
    fit_maps,
    from_storage,
    metadata_dtype,
    metadata_views,
    to_storage,
)
from hqqplus.quantization.spec import BLOCK, METADATA_DTYPES

ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.uint8)


def test_names() -> None:
    assert {name: metadata_dtype(name) for name in METADATA_DTYPES} == {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }


@pytest.mark.parametrize("name", ["float32", "fp16", "", "torch.float16"])
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=f"metadata_dtype is '{name}': .*float16, bfloat16"):
        metadata_dtype(name)
    with pytest.raises(ValueError, match="float16, bfloat16"):
        from_storage(ALL_BITS, name)


@pytest.mark.parametrize("name", METADATA_DTYPES)
def test_every_bit_pattern_survives(name: str) -> None:
    floats = from_storage(ALL_BITS, name)
    assert floats.dtype == metadata_dtype(name)
    assert torch.equal(to_storage(floats), ALL_BITS)


@pytest.mark.parametrize("name", METADATA_DTYPES)
def test_values_and_shape_survive(name: str) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(metadata_dtype(name))
    stored = to_storage(values)
    assert stored.dtype == STORAGE_DTYPE == torch.uint8
    assert stored.shape == (5, 14)
    assert torch.equal(from_storage(stored, name), values)


def test_known_bits() -> None:
    assert to_storage(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float16)).tolist() == [0x00, 0x3C, 0x00, 0xC0, 0, 0]
    assert to_storage(torch.tensor([1.0, 0.0], dtype=torch.bfloat16)).tolist() == [0x80, 0x3F, 0, 0]


def test_a_cast_of_the_module_leaves_stored_metadata_alone() -> None:
    values = torch.tensor([0.1, -3.0], dtype=torch.float16)
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(to_storage(values), requires_grad=False)
    module.to(torch.bfloat16).float().half()
    assert torch.equal(from_storage(module.scale.data, "float16"), values)


def random_values(count: int, kind: str, sigma: float, seed: int) -> torch.Tensor:
    """[count] float32: what scales and middles look like, and what they should not."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    made = {
        "scales": noise.abs() + 0.5,
        "middles": noise,
        "heavy": noise**5,
        "negative": -noise.abs() - 3,
        "sparse": noise * (torch.arange(count) % 5 == 0),
        "constant": torch.ones(count),
        "zero": torch.zeros(count),
    }[kind]
    return (made * sigma).clamp(-3e4, 3e4)  # what float16 holds a range of


VALUES = {
    "count": st.integers(1, 3 * BLOCK + 5),
    "kind": st.sampled_from(["scales", "middles", "heavy", "negative", "sparse", "constant", "zero"]),
    "sigma": st.sampled_from([1e-4, 0.02, 1.0, 50.0]),
    "name": st.sampled_from(METADATA_DTYPES),
    "seed": st.integers(0, 2**16),
}


class TestEightBits:
    @given(**VALUES)
    def test_no_value_is_further_off_than_half_a_step(
        self, count: int, kind: str, sigma: float, name: str, seed: int
    ) -> None:
        values = random_values(count, kind, sigma, seed)
        maps = fit_maps(values, name)
        codes = encode(values, maps)
        assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
        assert (maps.dtype, maps.shape) == (metadata_dtype(name), (-(-count // BLOCK), 2))
        step = maps[:, 0].float().repeat_interleave(BLOCK)[:count] / 256
        off = (decode_values(codes, maps) - values).abs()
        assert (off <= 0.5 * step + 1e-6 * values.abs()).all()

    @given(**VALUES)
    def test_zero_is_exact_and_a_whole_code(self, count: int, kind: str, sigma: float, name: str, seed: int) -> None:
        values = random_values(count, kind, sigma, seed)
        values[::3] = 0
        maps = fit_maps(values, name)
        zero = maps[:, 1].float()
        assert torch.equal(zero, zero.round())
        assert zero.min() >= 0
        assert zero.max() <= 255
        decoded = decode_values(encode(values, maps), maps)
        assert not decoded[values == 0].any()

    @given(**VALUES)
    def test_the_step_is_as_small_as_it_can_be(
        self, count: int, kind: str, sigma: float, name: str, seed: int
    ) -> None:
        values = random_values(count, kind, sigma, seed)
        stored = fit_maps(values, name)[:, 0].double()
        for block, step in zip(values.split(BLOCK), stored / 256, strict=True):
            needed = (block.max().clamp_min(0) - block.min().clamp_max(0)).double() / 255
            info = torch.finfo(metadata_dtype(name))
            assert (
                needed * (1 - 1e-6) <= step <= max(needed * (1 + info.eps), needed + info.smallest_normal * info.eps)
            )

    @given(**VALUES, other=st.integers(0, 2**16))
    def test_blocks_know_nothing_of_each_other(
        self, count: int, kind: str, sigma: float, name: str, seed: int, other: int
    ) -> None:
        values = random_values(count, kind, sigma, seed)
        together = torch.cat([100 * random_values(BLOCK, "heavy", sigma, other), values])
        maps, alone = fit_maps(together, "bfloat16"), fit_maps(values, "bfloat16")
        assert torch.equal(maps[1:], alone)
        assert torch.equal(encode(together, maps)[BLOCK:], encode(values, alone))

    @given(**VALUES, power=st.integers(-4, 4))
    def test_a_power_of_two_changes_the_step_alone(
        self, count: int, kind: str, sigma: float, name: str, seed: int, power: int
    ) -> None:
        values = random_values(count, kind, sigma, seed)
        maps = fit_maps(values, name)
        stored = maps[:, 0].float()
        used = stored[stored > 0] * min(1.0, 2.0**power)
        # Where floats are evenly spaced there are fewer digits.
        assume(not used.numel() or used.min() >= torch.finfo(maps.dtype).smallest_normal)
        assume(2.0**power * stored.max() <= torch.finfo(maps.dtype).max)
        scaled = fit_maps(values * 2.0**power, name)
        assert torch.equal(scaled[:, 0].float(), stored * 2.0**power)
        assert torch.equal(scaled[:, 1], maps[:, 1])
        assert torch.equal(encode(values * 2.0**power, scaled), encode(values, maps))

    def test_what_is_never_negative_starts_at_code_0(self) -> None:
        maps = fit_maps(random_values(300, "scales", 1.0, 0), "float16")
        assert maps[:, 1].tolist() == [0, 0, 0]
        assert not torch.signbit(maps[:, 1]).any()

    @pytest.mark.parametrize(
        ("name", "values", "advice"),
        [
            ("float16", [-40000.0, 40000.0], "; bfloat16 has the range of float32"),
            ("float16", [1e30], "; bfloat16 has the range of float32"),
            ("bfloat16", [-3e38, 3e38], ""),
        ],
    )
    def test_a_range_that_does_not_fit_is_refused(self, name: str, values: list[float], advice: str) -> None:
        with pytest.raises(ValueError, match=f"the weight is too large for scales in {name}{advice}$"):
            fit_maps(torch.tensor(values), name)


class TestDecode:
    def make(self, rows: int, groups: int, name: str = "float16") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """scale codes, middle codes [rows, groups] and blocks [blocks, 4]: any codes, any maps."""
        generator = torch.Generator().manual_seed(rows * groups)
        codes = torch.randint(0, 256, (2, rows, groups), generator=generator, dtype=torch.uint8)
        count = -(-rows * groups // BLOCK)
        steps = torch.rand(count, 4, generator=generator) + 0.1
        steps[:, 1], steps[:, 3] = 0, torch.randint(0, 256, (count,), generator=generator)
        return codes[0], codes[1], steps.to(metadata_dtype(name))

    @pytest.mark.parametrize("name", METADATA_DTYPES)
    @pytest.mark.parametrize("qmax", [1, 3, 7, 15])
    @pytest.mark.parametrize(("rows", "groups"), [(1, 1), (5, 3), (7, 55), (3, 128), (2, 300)])
    def test_up_to_four_bits_it_is_the_formula_rounded_once(
        self, rows: int, groups: int, qmax: int, name: str
    ) -> None:
        scale_codes, middle_codes, blocks = self.make(rows, groups, name)
        scale, offset = decode(scale_codes, middle_codes, blocks, qmax)
        assert scale.dtype == offset.dtype == torch.float32
        for row in range(rows):
            for group in range(groups):
                maps = [Fraction(value) for value in blocks[(row * groups + group) // BLOCK].tolist()]
                exact = maps[0] / 256 * (int(scale_codes[row, group]) - maps[1])
                middle = maps[2] / 256 * (int(middle_codes[row, group]) - maps[3])
                assert Fraction(scale[row, group].item()) == exact
                rounded = torch.tensor(float(middle - exact * qmax / 2), dtype=torch.float32)
                assert offset[row, group] == rounded

    @given(rows=st.integers(1, 40), groups=st.integers(1, 150), seed=st.integers(0, 2**16))
    def test_rows_are_what_they_are_in_the_whole(self, rows: int, groups: int, seed: int) -> None:
        scale, middle, blocks = self.make(rows, groups)
        part = torch.randint(0, rows, (5,), generator=torch.Generator().manual_seed(seed))
        whole = decode(scale, middle, blocks, 15)
        for some, every in zip(decode(scale[part], middle[part], blocks, 15, part), whole, strict=True):
            assert torch.equal(some, every[part])

    @pytest.mark.parametrize("name", METADATA_DTYPES)
    def test_sixteen_bits_are_the_values_themselves(self, name: str) -> None:
        values = torch.randn(2, 3, 5).to(metadata_dtype(name))
        scale, offset = decode(values[0], values[1], None, 3)
        assert torch.equal(scale, values[0].float())
        assert torch.equal(offset, values[1].float())


@pytest.mark.parametrize("name", METADATA_DTYPES)
def test_views_copy_nothing(name: str) -> None:
    scale, offset, blocks = (torch.zeros(3, 8, dtype=torch.uint8) for _ in range(3))
    dtype = metadata_dtype(name)
    wide = metadata_views(scale, offset, None, name)
    assert wide[2] is None
    assert [(t.dtype, t.shape, t.data_ptr()) for t in wide[:2] if t is not None] == [
        (dtype, (3, 4), scale.data_ptr()),
        (dtype, (3, 4), offset.data_ptr()),
    ]
    narrow = metadata_views(scale, offset, blocks, name)
    assert narrow[0] is scale
    assert narrow[1] is offset
    assert narrow[2] is not None
    assert (narrow[2].dtype, narrow[2].shape, narrow[2].data_ptr()) == (dtype, (3, 4), blocks.data_ptr())
