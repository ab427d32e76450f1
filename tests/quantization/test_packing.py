from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqqplus.quantization.packing import pack, packed_width, unpack

NBITS = (1, 2, 3, 4, 8)
WIDTHS = st.integers(1, 80).map(lambda n: 8 * n)
PLANES = st.integers(1, 32).map(lambda n: 8 * n)


def random_codes(seed: int, rows: int, width: int, nbits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**nbits, (rows, width), generator=generator).to(torch.uint8)


def naive_bytes(codes: list[int], nbits: int, plane: int) -> list[int]:
    """The layout as it is documented, one code at a time."""
    if nbits == 8:
        return codes
    if nbits == 3:
        return naive_bytes([c & 3 for c in codes], 2, plane) + naive_bytes([c >> 2 for c in codes], 1, plane)
    per = 8 // nbits
    packed = []
    start = 0
    while start < len(codes):
        p = min(plane, (len(codes) - start) // per)
        for j in range(p):
            packed.append(sum(codes[start + j + k * p] << (nbits * k) for k in range(per)))
        start += per * p
    return packed


@given(nbits=st.sampled_from(NBITS), width=WIDTHS, plane=PLANES, rows=st.integers(1, 3), seed=st.integers(0, 2**20))
@settings(deadline=None, derandomize=True)
def test_unpack_inverts_pack(nbits: int, width: int, plane: int, rows: int, seed: int) -> None:
    codes = random_codes(seed, rows, width, nbits)
    packed = pack(codes, nbits, plane)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(width, nbits)) == (rows, width * nbits // 8)
    restored = unpack(packed, nbits, plane)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)


@given(nbits=st.sampled_from(NBITS), width=WIDTHS, plane=PLANES, seed=st.integers(0, 2**20))
@settings(deadline=None, derandomize=True)
def test_layout_is_the_documented_one(nbits: int, width: int, plane: int, seed: int) -> None:
    codes = random_codes(seed, 2, width, nbits)
    expected = [naive_bytes(row, nbits, plane) for row in codes.tolist()]
    assert pack(codes, nbits, plane).tolist() == expected


@given(nbits=st.sampled_from(NBITS), width=WIDTHS, plane=PLANES, seed=st.integers(0, 2**20))
@settings(deadline=None, derandomize=True)
def test_any_bytes_are_some_codes(nbits: int, width: int, plane: int, seed: int) -> None:
    packed = random_codes(seed, 2, packed_width(width, nbits), 8)
    codes = unpack(packed, nbits, plane)
    assert codes.shape == (2, width)
    assert int(codes.max()) < 2**nbits
    assert torch.equal(pack(codes, nbits, plane), packed)


def test_two_bits_by_hand() -> None:
    codes = random_codes(0, 1, 32, 2)
    c = codes[0].tolist()
    assert pack(codes, 2, 8)[0].tolist() == [c[j] | c[j + 8] << 2 | c[j + 16] << 4 | c[j + 24] << 6 for j in range(8)]


@pytest.mark.parametrize("nbits", [1, 2, 4])
@pytest.mark.parametrize("group", [8, 64])
def test_a_bit_plane_of_a_block_is_one_group(nbits: int, group: int) -> None:
    per = 8 // nbits
    for plane in range(per):
        codes = torch.zeros(1, per * group, dtype=torch.uint8)
        codes[:, plane * group : (plane + 1) * group] = 2**nbits - 1
        assert set(pack(codes, nbits, group)[0].tolist()) == {(2**nbits - 1) << (nbits * plane)}


def test_three_bits_are_two_low_bits_then_one_high_bit() -> None:
    codes = random_codes(1, 3, 176, 3)
    packed = pack(codes, 3, 64)
    low, high = packed.split([176 * 2 // 8, 176 // 8], dim=1)
    assert torch.equal(low, pack(codes & 3, 2, 64))
    assert torch.equal(high, pack(codes >> 2, 1, 64))


def test_a_short_last_block_has_narrower_planes() -> None:
    # 1 bit, planes of 8: one whole block of 64 codes, then 16 codes in planes of 2.
    codes = torch.zeros(1, 80, dtype=torch.uint8)
    codes[0, [64, 67, 78]] = 1
    assert pack(codes, 1, 8)[0].tolist() == [0] * 8 + [0b10000001, 0b00000010]


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("width", [1, 5, 12, 60])
def test_widths_that_are_no_multiple_of_8_are_refused(nbits: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 8, not {width} and 64"):
        pack(torch.zeros(2, width, dtype=torch.uint8), nbits, 64)


@pytest.mark.parametrize("nbits", NBITS)
def test_planes_that_are_no_multiple_of_8_are_refused(nbits: int) -> None:
    with pytest.raises(ValueError, match="multiples of 8, not 64 and 12"):
        pack(torch.zeros(2, 64, dtype=torch.uint8), nbits, 12)


@pytest.mark.parametrize("nbits", [2, 4])
def test_unpacking_refuses_what_pack_cannot_have_made(nbits: int) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        unpack(torch.zeros(2, 1, dtype=torch.uint8), nbits, 64)


@pytest.mark.parametrize("nbits", NBITS)
def test_input_may_be_a_view_and_stays_as_it_is(nbits: int) -> None:
    codes = random_codes(2, 48, 3, nbits).t()
    before = codes.clone()
    packed = pack(codes, nbits, 16)
    assert torch.equal(packed, pack(codes.contiguous(), nbits, 16))
    packed.zero_()
    assert torch.equal(codes, before)
