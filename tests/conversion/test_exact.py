"""Which scales and zero points 16-bit floats keep, tried with all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqqplus.conversion.exact import as_bytes, dequantized, fit, packed_tensor, unpack_stream
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.metadata import from_storage
from hqqplus.quantization.packing import unpack
from tests.conversion.published import int32, words

EXACT_AT_4_BITS = {0, 1, 2, 4, 7, 8, 11, 13, 14, 15, 16}


def all_floats(dtype: torch.dtype, times: int) -> Tensor:
    """Every 16-bit number that is still finite `times` times as large, [n, 1] float64."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    return values[(values * times).abs() <= torch.finfo(dtype).max].unsqueeze(1)


def in_float64(packed: object) -> Tensor:
    """What a packed tensor stands for, from its bytes and its formula."""
    spec, (rows, width) = packed.spec, packed.shape  # type: ignore[attr-defined]
    layout = spec.layout(rows, width)
    codes = unpack(packed.W_q, spec.nbits, layout.plane).view(rows, layout.groups, layout.group).double()  # type: ignore[attr-defined]
    scale, offset = (
        from_storage(stored, spec.metadata_dtype).double().unsqueeze(-1)
        for stored in (packed.scale, packed.offset)  # type: ignore[attr-defined]
    )
    return (scale * codes + offset).flatten(1)[:, :width]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scales_and_zero_points(bits: int, name: str) -> None:
    spec = QuantSpec(bits, -1, 1, name, 16)
    scale = all_floats(getattr(torch, name), 2**bits)
    kept = set()
    for zero in range(2**bits + 1):
        fitted = fit(scale, -scale * zero, spec, spec.qmax)
        # Of a group that is stored from its other end the code q is Q - q.
        codes = torch.arange(2**bits, dtype=torch.float64)
        codes = torch.where(fitted.mirrored, spec.qmax - codes, codes)
        error = fitted.scale.double() * codes + fitted.offset.double() - scale * (torch.arange(2**bits) - zero)
        assert torch.equal(error.abs().amax(1, keepdim=True), fitted.error)
        if fitted.exact:
            kept.add(zero)
    assert kept == (set(range(2**bits + 1)) if bits < 4 else EXACT_AT_4_BITS)


def test_the_error_of_what_does_not_fit() -> None:
    scale = 0.01 + 0.03 * torch.rand(200, 3, dtype=torch.float64)
    offset = -scale * torch.rand(200, 3, dtype=torch.float64) * 3
    spec = QuantSpec(2, 8, 1, "float16", 16)
    codes = torch.arange(4, dtype=torch.uint8).repeat(200, 6)
    fitted = fit(scale, offset, spec, 3)
    packed = packed_tensor(codes, fitted, spec)
    wanted = scale.repeat_interleave(8, 1) * codes + offset.repeat_interleave(8, 1)
    error = (in_float64(packed) - wanted).abs().view(200, 3, 8).amax(2)
    torch.testing.assert_close(error, fitted.error, rtol=1e-9, atol=0)
    assert 0 < fitted.relative < 2**-10
    assert torch.equal(dequantized(codes, scale, offset, spec), wanted.float())


@pytest.mark.parametrize(("scale", "offset"), [(float("nan"), 0.0), (1.0, float("inf")), (7e4, 0.0)])
def test_numbers_that_are_none(scale: float, offset: float) -> None:
    with pytest.raises(ValueError, match=r"NaN or infinite|too large for scales in float16"):
        fit(torch.tensor([[scale]]).double(), torch.tensor([[offset]]).double(), QuantSpec(2, 8, 1, "float16", 16), 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_out_of_words(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 96))
    stored = int32([words(row, bits) for row in codes.tolist()])
    assert torch.equal(unpack_stream(as_bytes(stored), bits).long(), codes)
