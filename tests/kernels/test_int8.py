"""8-bit activations on one-bit layers: the rounding, the integers of each route, and the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqplus.kernels import int8, reference
from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec
from tests.kernels.bit_serial import differences, group_products, integer_case, product, rounded
from tests.kernels.triton.harness import random_packed

ROUTES = {"floats": int8._float_sums, "integers": int8._integer_sums, "tables": int8._table_sums}
# (group, width): whole blocks, a shorter block behind them, padding, rows of one group, groups longer than a plane.
LAYOUTS = [
    (8, 128),
    (32, 512),
    (64, 1024),
    (256, 2048),
    (32, 320),
    (64, 172),
    (24, 72),
    (128, 1000),
    (-1, 72),
    (-1, 520),
]
TOKENS = (1, 2, 4, 5, 32, 33)


def arguments(packed: Packed) -> tuple[Any, ...]:
    spec = packed.spec
    return *packed[:4], spec.nbits, spec.group_size, spec.axis, *packed.shape


# The definition itself -----------------------------------------------------------------------------------------------


def test_bits_and_counts_are_a_product_of_integers() -> None:
    """The reference of this file, against an ordinary product; -128 is no activation, but a number of 8 bits."""
    xi = torch.randint(-128, 128, (5, 96)).to(torch.int8)
    xi[0, :3] = torch.tensor([-128, 127, -1], dtype=torch.int8)
    codes = torch.randint(0, 2, (7, 96), dtype=torch.uint8)
    expected = torch.einsum("mgk,ngk->mng", xi.long().view(5, 3, 32), codes.long().view(7, 3, 32))
    assert torch.equal(group_products(xi, codes, 32), expected)


# Rounding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_each_row_has_a_step_of_its_own(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 300) * torch.logspace(-4, 3, 7)[:, None]).to(dtype)
    xi, step = int8.round_activations(x)
    expected, steps = rounded(x)
    assert (xi.dtype, step.dtype) == (torch.int8, torch.float32)
    assert torch.equal(xi, expected)
    assert torch.equal(step, steps)
    assert (xi.abs().amax(1) == 127).all()
    error = (xi.double() * step.double()[:, None] - x.double()).abs()
    assert (error <= 0.50001 * step.double()[:, None]).all()


def test_halves_go_to_the_even_number() -> None:
    xi, step = int8.round_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]))
    assert step.item() == 1
    assert xi.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_rows_without_numbers_to_round() -> None:
    x = torch.zeros(6, 64)
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = torch.nan, torch.inf, -torch.inf, 1e-45
    x[1:4, 7] = 2
    xi, step = int8.round_activations(x)
    assert not xi.any()
    assert step[[0, 4, 5]].tolist() == [2.0**-126] * 3
    assert step[1:4].isnan().all()
    packed, bias = random_packed(QuantSpec(1, 32), (9, 64)), torch.randn(9)
    y = int8.matmul(x, packed, bias)
    assert torch.equal(y[[0, 4, 5]], bias.expand(3, 9))
    assert y[1:4].isnan().all()


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_has_the_integers(route: str, layout: tuple[int, int], tokens: int) -> None:
    group, width = layout
    x, packed, _, _ = integer_case(QuantSpec(1, group, metadata_bits=16), (133, width), tokens)
    packed = packed._replace(offset=torch.zeros_like(packed.offset))
    sizes = packed.layout
    if route == "tables" and (sizes.plane != sizes.group or sizes.padded % (8 * sizes.group)):
        pytest.skip("tables are for whole blocks")
    xi = x.to(torch.int8)
    found = ROUTES[route](torch.nn.functional.pad(xi, (0, sizes.padded - width)), packed, packed.scale.float())
    assert torch.equal(found.double(), product(xi, torch.ones(tokens), packed)[0])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_whole_numbers_are_exact(layout: tuple[int, int], bits: int, tokens: int) -> None:
    group, width = layout
    x, packed, bias, y = integer_case(QuantSpec(1, group, metadata_bits=bits), (37, width), tokens)
    assert torch.equal(int8.matmul(x, packed, bias).double(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_numbers_come_out_as_defined(layout: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    group, width = layout
    packed = random_packed(QuantSpec(1, group), (37, width))
    torch.manual_seed(tokens)
    x, bias = torch.randn(tokens, width).to(dtype), torch.randn(37).to(dtype)
    found = int8.matmul(x, packed, bias)
    assert found.dtype == dtype
    compared = found if dtype != torch.float64 else found.float()
    assert torch.equal(compared.to(dtype), found)  # float64 in and out, float32 between
    assert differences(compared, *product(*rounded(x), packed, bias)) == []


def test_the_route_is_a_matter_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def spy(name: str, route: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            taken.append(name)
            return route(*arguments)

        return run

    for name, route in ROUTES.items():
        monkeypatch.setattr(int8, route.__name__, spy(name, route))
    whole, short = (random_packed(QuantSpec(1, 32), (9, width)) for width in (512, 320))
    for tokens in (1, 4, 5, 32, 33):
        int8.matmul(torch.randn(tokens, 512), whole)
    int8.matmul(torch.randn(1, 320), short)
    assert taken == ["tables", "tables", "floats", "floats", "integers", "floats"]


@pytest.mark.parametrize("shape", [(0, 512), (2, 0, 512)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    packed = random_packed(QuantSpec(1, 32), (9, 512))
    assert int8.matmul(torch.empty(shape), packed, torch.ones(9)).shape == (*shape[:-1], 9)


def test_any_strides_and_dimensions() -> None:
    packed, bias = random_packed(QuantSpec(1, 32), (9, 512)), torch.randn(9)
    x = torch.randn(512, 2, 3).permute(2, 1, 0)
    with torch.no_grad():
        found = int8.matmul(x, packed, bias)
    assert found.is_contiguous()
    assert torch.equal(found, int8.matmul(x.contiguous(), packed, bias))
    assert torch.equal(int8.matmul(x[0, 0], packed, bias), int8.matmul(x[:1, 0], packed, bias)[0])
    found += torch.zeros(9, requires_grad=True)  # as PEFT does: not for a view that was made without gradients


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_autocast_leaves_the_sums_alone(tokens: int) -> None:
    x, packed, bias, y = integer_case(QuantSpec(1, 64), (37, 1024), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = int8.matmul_int8(x, *arguments(packed), bias)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), y)


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_it_is_off_by_the_rounding_of_the_activations_only(tokens: int) -> None:
    """|y_8 - y_16| <= sum_k |W_nk| a_m / 2, and about as much as random errors of that size add up to."""
    packed = random_packed(QuantSpec(1, 64, metadata_bits=16), (64, 1024))
    x = torch.randn(tokens, 1024)
    W = reference.dequantize(packed, torch.float64)
    error = int8.matmul(x, packed).double() - x.double() @ W.t()
    step = int8.round_activations(x)[1].double()[:, None]
    assert (error.abs() <= step / 2 * W.abs().sum(1) + 1e-4).all()
    spread = step / 12**0.5 * W.norm(dim=1)
    assert 0.8 < (error / spread).square().mean().sqrt() < 1.2


# The op --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8])
def test_the_op_is_registered_as_torch_wants_it(bits: int) -> None:
    packed = random_packed(QuantSpec(1, 32, metadata_bits=bits), (9, 512))
    for x, bias in ((torch.randn(2, 3, 512), torch.randn(9)), (torch.randn(512), None)):
        torch.library.opcheck(int8.matmul_int8, (x, *arguments(packed), bias))
    x = torch.randn(3, 512)
    assert torch.equal(torch.ops.hqqplus.matmul_int8(x, *arguments(packed)), int8.matmul(x, packed))


def test_a_gradient_is_refused() -> None:
    packed = random_packed(QuantSpec(1, 32), (9, 512))
    x, bias = torch.randn(2, 512, requires_grad=True), torch.randn(9, requires_grad=True)
    for x_, bias_ in ((x, None), (x.detach(), bias)):
        with pytest.raises(ValueError, match="8-bit activations have no gradient"):
            int8.matmul_int8(x_, *arguments(packed), bias_)
        with torch.no_grad():
            found = int8.matmul_int8(x_, *arguments(packed), bias_)
        assert not found.requires_grad


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(8, 32), QuantSpec(1, 32, 0)], ids=str)
def test_other_layers_are_refused(spec: QuantSpec) -> None:
    assert not int8.supports(spec)
    packed = random_packed(spec, (64, 64))
    with pytest.raises(ValueError, match="needs weights of 1 bit with axis 1, not"):
        int8.matmul_int8(torch.randn(2, 64), *arguments(packed))
