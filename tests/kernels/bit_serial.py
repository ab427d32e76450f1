"""The 8-bit product of a one-bit layer as it is defined: bits, AND, popcount, then floats in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.quantization.metadata import decode, metadata_dtype
from hqqplus.quantization.packing import unpack
from hqqplus.quantization.spec import QuantSpec
from tests.kernels.triton.harness import random_packed


def group_products(xi: Tensor, codes: Tensor, group: int) -> Tensor:
    """P [M, N, groups], int64, of xi [M, K] (int8) and codes [N, K] (0 or 1)."""
    product = torch.zeros(xi.shape[0], codes.shape[0], codes.shape[1] // group, dtype=torch.int64)
    for bit in range(8):
        plane = (xi.view(torch.uint8) >> bit) & 1  # of the two's complement
        ones = (plane[:, None] & codes[None]).unflatten(2, (-1, group)).sum(3)  # a popcount of the AND
        product += ones * (-128 if bit == 7 else 2**bit)
    return product


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(xi [M, K] int8, a [M] float32) of x [M, K], finite, a row at a time."""
    steps = [max(abs(value) for value in row.tolist()) for row in x.float()]
    step = (torch.tensor(steps, dtype=torch.float32) / 127).clamp_min(2.0**-126)
    return torch.stack([(row / a).round() for row, a in zip(x.float(), step, strict=True)]).to(torch.int8), step


def product(xi: Tensor, step: Tensor, packed: Packed, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y, sum of the sizes of its terms), [M, N] both, float64, of rounded activations."""
    layout = packed.layout
    xi = torch.nn.functional.pad(xi, (0, layout.padded - layout.width))
    codes = unpack(packed.W_q, 1, layout.plane)
    scale, offset = (m.double() for m in decode(packed.scale, packed.offset, packed.blocks, 1))  # [N, groups]
    products = group_products(xi, codes, layout.group).double()
    sums = xi.unflatten(1, (-1, layout.group)).long().sum(2).double()[:, None]  # [M, 1, groups]
    terms = torch.stack([scale * products, offset * sums])
    y, size = terms.sum((0, 3)) * step.double()[:, None], terms.abs().sum((0, 3)) * step.double()[:, None]
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size


def differences(found: Tensor, expected: Tensor, size: Tensor) -> list[str]:
    """How `found` is not `expected` up to the rounding of float32 sums and of its own dtype; nothing if it is."""
    if found.shape != expected.shape or not found.is_contiguous():
        return [f"{tuple(found.shape)}, strides {found.stride()}, not {tuple(expected.shape)}"]
    allowed = 2.0**-20 * size + torch.finfo(found.dtype).eps * expected.abs()
    if found.dtype == torch.float16:
        allowed += 2.0**-25
    wrong = ~((found.double() - expected).abs() <= allowed)
    if not wrong.any():
        return []
    return [f"{int(wrong.sum())} of {wrong.numel()} differ by up to {(found.double() - expected).abs().max()}"]


def integer_case(
    spec: QuantSpec, shape: tuple[int, int], tokens: int, seed: int = 0
) -> tuple[Tensor, Packed, Tensor, Tensor]:
    """(x, packed, bias, y) of which every sum is a whole number below 2^24: float32 has to find y to the last bit.

    Activations are whole, and one of each row is 127, so that their step is 1. Scales and offsets are small whole
    numbers; with 8-bit metadata too (steps of 1, and scales that are even, because the offset is middle - scale / 2).
    """
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed(spec, shape, seed)
    dtype = metadata_dtype(spec.metadata_dtype)

    def whole(like: Tensor, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, like.shape, generator=generator)

    if packed.blocks is None:
        packed = packed._replace(
            scale=whole(packed.scale, -3, 3).to(dtype), offset=whole(packed.offset, -2, 2).to(dtype)
        )
    else:
        blocks = torch.tensor([256.0, 4.0, 256.0, 3.0]).expand(packed.blocks.shape).to(dtype).contiguous()
        packed = packed._replace(
            scale=(2 * whole(packed.scale, 0, 4)).to(torch.uint8),
            offset=whole(packed.offset, 0, 6).to(torch.uint8),
            blocks=blocks,
        )
    x = torch.randint(-127, 128, (tokens, shape[1]), generator=generator)
    x[:, int(x.shape[1] * 0.7)] = 127
    bias = torch.randint(-50, 51, (shape[0],), generator=generator).float()
    y, size = product(x.to(torch.int8), torch.ones(tokens), packed, bias)
    assert y.numel() == 0 or size.max() < 2**24
    return x.float(), packed, bias, y
