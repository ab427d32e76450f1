"""The products in Triton (`matmul`, `gemm`, `simt`, `general`): interpreted, against the float64 product and between
guard bands; on a GPU. As machine code: `test_product_code.py`.

The bound. With u = 2^-24 and h half a last place of the type of x, an element of y may differ from the exact one by

    h |y|              it is rounded once
    h sum |w x|        over the weights that are rounded to the type of x: in matmul and gemm those at the end of a
                       row, in simt none, in general (and in test_dense.py) all
    2 p / 16 u sum (|s| (B + Q) + |o|) |x|      sums in float32 of codes that come as B + q, in planes of p codes

p / 16 (4 at the least) are the steps in which a tensor core adds up a plane; each may cut its sum off instead of
rounding it. A wrong code, scale or X exceeds it (`test_the_bound_is_tight_enough_to_see_one_wrong_code`).
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import combinations, product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from hqqplus.kernels.packed import Packed
from hqqplus.quantization import QuantSpec
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack
from tests.kernels.triton.harness import (
    Guards,
    interpreted,
    meta_packed,
    needs_triton,
    print_outcomes,
    random_packed,
)
from tests.kernels.triton.test_product_code import SHIPPED

METADATA = (("float16", 16), ("bfloat16", 8), ("bfloat16", 16), ("float16", 8))
PROCESSORS = 4


class Case(NamedTuple):
    """A product. `shares` 0 leaves the split to the kernel, `off` are elements by which packed tensors are unaligned,
    `backwards` runs it twice, the second time with its programs from the last to the first."""

    kernel: str
    spec: QuantSpec
    out_features: int
    in_features: int
    rows: int
    dtype: torch.dtype
    shares: int
    bias: str
    strides: str
    off: int
    backwards: bool

    def __str__(self) -> str:
        spec = self.spec
        parts = [
            f"{self.kernel} {spec.nbits} bits g{spec.group_size} axis {spec.axis}",
            f"{spec.metadata_bits}-bit {spec.metadata_dtype}",
            f"[{self.rows}, {self.in_features}] x {self.out_features} {str(self.dtype)[6:]} {self.strides}",
            f"{self.shares} shares" if self.shares else "",
            "" if self.bias == "none" else f"bias {self.bias}",
            "unaligned" if self.off else "",
            "backwards too" if self.backwards else "",
        ]
        return ", ".join(filter(None, parts))


# --- what is right --------------------------------------------------------------------------------------------------


def exact_weight(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """W, and |s| and |o| of each weight, all [out_features, in_features] float64."""
    spec, layout = packed.spec, packed.layout
    scale, offset = (t.double().repeat_interleave(layout.group, 1) for t in decode(*packed[1:4], spec.qmax))
    codes = unpack(packed.W_q, spec.nbits, layout.plane)
    parts = [part[:, : layout.width] for part in (scale * codes + offset, scale.abs(), offset.abs())]
    weight, scales, offsets = parts if spec.axis == 1 else [part.t() for part in parts]
    return weight, scales, offsets


def errors(y: Tensor, kernel: str, x: Tensor, packed: Packed, bias: Tensor | None) -> list[str]:
    """What is wrong with y = x W^T + bias, in words; nothing if all is within the bound."""
    shape = (x.shape[0], packed.shape[0])
    if y.shape != shape or y.dtype != x.dtype or not y.is_contiguous():
        return [f"{y.dtype} of shape {tuple(y.shape)} and strides {y.stride()}, not {x.dtype} of {shape}"]
    if y.numel() == 0:
        return []
    worst = (y.double() - _exact(x, packed, bias)).abs() / allowance(kernel, x, packed, bias)
    if not worst.isfinite().all() or worst.max() > 1:
        wrong = ~(worst <= 1)
        return [f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, by up to {worst.max():.1f} of the bound"]
    return []


def _exact(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    y = x.double() @ exact_weight(packed)[0].t()
    return y if bias is None else y + bias.double()


def allowance(kernel: str, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The bound [M, out_features], float64."""
    weight, scale, offset = exact_weight(packed)
    size, layout = x.double().abs(), packed.layout
    rounded = {"general": layout.width, "dense": layout.width, "simt": 0}.get(
        kernel, layout.width % (layout.plane * 8 // packed.spec.nbits)
    )
    # With codes as they are nothing large is in the sums; else B is what is added to each.
    base = 0.0
    if kernel == "matmul":
        base = {torch.bfloat16: 128, torch.float16: 1024}[x.dtype]
    steps = 2 * max(layout.plane / 16, 4)
    float32 = steps * 2.0**-24 * (size @ (scale * (base + packed.spec.qmax) + offset).t())
    half = torch.finfo(x.dtype).eps / 2
    last = 2.0**-25 if x.dtype == torch.float16 else 0.0  # float16 below 6e-5 has no more digits than that
    at_the_end = slice(layout.width - rounded, None)
    weights = half * weight[:, at_the_end].abs() + last
    y = _exact(x, packed, bias).abs()
    if kernel == "dense" and bias is not None:
        # The bias is rounded too, and a CPU rounds the product before it adds it.
        last = last + half * (bias.double().abs() + y + bias.double().abs())
    return half * y + last + (1 + half) * (size[:, at_the_end] @ weights.t() + float32) + 2.0**-24 * y


# --- a case ---------------------------------------------------------------------------------------------------------


def activations(case: Case, generator: torch.Generator) -> Tensor:
    """x [rows, in_features] of the strides of the case; what lies between its elements is NaN."""
    rows, width, device = case.rows, case.in_features, generator.device
    values = torch.randn(rows, width, generator=generator, device=device).to(case.dtype)
    if case.strides == "contiguous":
        return values
    if case.strides == "turned":
        return values.t().contiguous().t()
    if case.strides == "one for all":
        return values[:1].expand(rows, width)
    apart = {"rows apart": (2 * rows, width + 3), "columns of more": (rows, width + 11)}[case.strides]
    around = torch.full(apart, torch.nan, dtype=case.dtype, device=device)
    x = around[::2, :width] if case.strides == "rows apart" else around[:, 5 : 5 + width]
    return x.copy_(values)


def biases(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.bias == "none":
        return None
    bias = torch.randn(case.out_features, generator=generator, device=generator.device)
    if case.bias == "every other":
        return torch.stack([bias, bias * torch.nan], 1).to(case.dtype)[:, 0]
    return bias.to(case.dtype) if case.bias == "same" else bias


@contextmanager
def backwards() -> Iterator[None]:
    """The interpreter runs the programs of a kernel from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder

    forwards = interpreter_builder.set_grid_idx

    def turned(*place: int) -> None:
        forwards(*(size - 1 - i for i, size in zip(place, interpreter_builder.grid_dim, strict=True)))

    with mock.patch.object(interpreter_builder, "set_grid_idx", turned):
        yield


def check(case: Case, device: str = "cpu", seed: int = 0) -> list[str]:
    """Run a case between guard bands, and compare with the exact product; backwards with itself, bit for bit."""
    module = _module(case.kernel)
    generator = torch.Generator(device).manual_seed(seed)
    guards = Guards()
    packed = guards.packed(random_packed(case.spec, (case.out_features, case.in_features), seed, device), case.off)
    x = guards.input(activations(case, generator), "x")
    bias = biases(case, generator)
    bias = None if bias is None else guards.input(bias, "bias")

    def run() -> Tensor:
        with guards.allocations():
            return module.matmul(x, packed, bias, PROCESSORS, shares=case.shares)

    y = run()
    wrong = errors(y, case.kernel, x, packed, bias)
    if case.backwards and not wrong:
        with backwards() if device == "cpu" else nullcontext():
            wrong += [] if torch.equal(run(), y) else ["another result in another order"]
    return wrong + guards.complaints()


def check_sums(nbits: int, factored: bool, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[str]:
    """The kernel before a product: X, the starts, and counters set to zero, more of them than its programs take at
    once."""
    from hqqplus.kernels.triton import codes, product

    rows, width, guards = 3, 1100, Guards()
    packed = random_packed(QuantSpec(nbits, 32), (64, width), seed, device)
    x = guards.input(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(device, dtype))
    cut = product.Cut(8, 64, 1, 1)
    with guards.allocations():
        tiles = product.tiles_of(x, 64 * 3001, cut, 2, 1, 2)
        sums = product.sums_of(x, packed, factored, cut, tiles)
    sums.launch.run()
    blocks, per, name = product.whole_blocks(packed), 8 // nbits, product.DTYPES[dtype]
    planes = torch.zeros(rows, blocks * per * 32, dtype=torch.float64, device=device)
    planes[:, :width] = x.double()[:, : planes.shape[1]]
    planes = planes.view(rows, blocks * per, 32)
    factors = torch.tensor([codes.factor(i, nbits, name) if factored else 1 for i in range(per)], device=device)
    base = 0 if codes.converted(nbits, name) else codes.base(name)
    shares = (base + factors * (2**nbits - 1) / 2).double().repeat(blocks)[:, None]
    totals, size = planes.sum(-1).t(), planes.abs().sum(-1).t()
    wrong = [] if tiles.used == 3001 and not tiles.counters.any() else ["counters"]
    wrong += [] if ((sums.totals[:, :rows] - totals).abs() <= 2.0**-22 * size).all() else ["totals"]
    wrong += [] if ((sums.starts[:, :rows] + shares * totals).abs() <= 2.0**-22 * shares * size).all() else ["starts"]
    wrong += [] if not sums.totals[:, rows:].any() and not sums.starts[:, rows:].any() else ["no row of x"]
    return wrong + guards.complaints()


def _module(kernel: str) -> Any:
    from hqqplus.kernels.triton import gemm, general, matmul, simt

    return {"matmul": matmul, "gemm": gemm, "simt": simt, "general": general}[kernel]


# --- the cases ------------------------------------------------------------------------------------------------------

CODES = {
    "nbits": (1, 2, 4, 8),
    "group": (16, 32, 64, 128, 256, -1),
    "metadata": METADATA,
    "dtype": (torch.bfloat16, torch.float16),
    "out_features": (37, 70),
    "in_features": (72, 172, 520),
    "end": ("of a block", "in a block", "shorter block"),
    "rows": (1, 8, 9, 16, 17),
    "shares": (0, 1, 2, 4),
    "bias": ("none", "same", "float32", "every other"),
    "strides": ("contiguous", "turned", "rows apart", "columns of more"),
    "off": (0, 1),
}
DOZENS = {**CODES, "group": (16, 64, 256, -1), "rows": (1, 17, 33, 65)}
# What is shared with `matmul` is tried there.
OTHERS = {**CODES, "shares": (0, 1, 4), "bias": ("none", "float32"), "strides": ("turned", "columns of more")}
SIMT = {
    **OTHERS,
    "group": (8, 64, 128, -1),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "in_features": (72, 300),
    "rows": (1, 2, 4, 7),
}
GENERAL = {
    **OTHERS,
    "nbits": (1, 2, 3, 4, 8),
    "axis": (1, 0),
    "group": (8, 64, 24, -1),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "in_features": (72, 172),
    "end": ("any",),
    "rows": (1, 16, 33),
}
KERNELS = {"matmul": CODES, "gemm": DOZENS, "simt": SIMT, "general": GENERAL}


def _pairs(choices: dict[str, tuple[Any, ...]], seed: int) -> list[dict[str, Any]]:
    """Combinations in which every two values of two choices meet: of some, the one with most new pairs for the time
    that the interpreter takes, and so on."""
    generator = random.Random(seed)
    missing = {
        ((a, left), (b, right)) for a, b in combinations(choices, 2) for left, right in product(choices[a], choices[b])
    }

    def gain(one: dict[str, Any]) -> float:
        tiles = math.ceil(one["out_features"] / 64) * math.ceil(one["rows"] / 16)
        return len(missing.intersection(combinations(one.items(), 2))) / (300 + tiles * one["in_features"])

    found = []
    while missing:
        (a, left), (b, right) = min(missing, key=str)
        tries = [{name: generator.choice(values) for name, values in choices.items()} for _ in range(60)]
        found.append(max(({**one, a: left, b: right} for one in tries), key=gain))
        missing.difference_update(combinations(found[-1].items(), 2))
    return found


def _case(kernel: str, chosen: dict[str, Any]) -> Case:
    name, bits = chosen["metadata"]
    spec = QuantSpec(chosen["nbits"], chosen["group"], chosen.get("axis", 1), name, bits)
    in_features = chosen["in_features"]
    if kernel != "general":
        block = spec.layout(1, 1024).plane * 8 // spec.nbits
        # A whole block at the least; and a row that is one group of up to 256 has planes that are no power of two.
        in_features = max(in_features, block, 264 if spec.group_size == -1 else 0)
        if chosen["end"] != "any":
            more = {"of a block": 0, "in a block": -3, "shorter block": spec.group_size % 80 - 5}[chosen["end"]]
            in_features = -(-in_features // block) * block + more
    names = ("rows", "dtype", "shares", "bias", "strides", "off")
    rest = [chosen[name] for name in names]
    return Case(kernel, spec, chosen["out_features"], in_features, *rest, backwards=False)


@cache
def _chosen() -> list[Case]:
    found = [_case(kernel, one) for kernel, choices in KERNELS.items() for one in _pairs(choices, 0)]
    found = [case._replace(backwards=n % 3 == 0 and case.shares > 1) for n, case in enumerate(found)]
    plain = (torch.bfloat16, 0, "same", "contiguous", 0, False)
    for kernel in KERNELS:
        found.append(Case(kernel, QuantSpec(2, 64), 70, 520, 0, *plain))
        # More shares than blocks.
        found.append(Case(kernel, QuantSpec(2, 64), 37, 600, 3, *plain)._replace(shares=16))
        found.append(Case(kernel, QuantSpec(8, -1), 37, 300, 2, *plain))
        found.append(Case(kernel, QuantSpec(2, 32), 37, 600, 3, *plain)._replace(strides="one for all", shares=4))
    return found


def _sweep(count: int = 120) -> list[Case]:
    """Any combinations."""
    generator = random.Random(1)
    found = []
    for _ in range(count):
        kernel = generator.choice([*KERNELS])
        choices: dict[str, tuple[Any, ...]] = KERNELS[kernel]
        choices = {
            **choices,
            "out_features": (generator.randrange(1, 100),),
            "in_features": (generator.randrange(8, 700),),
            "end": ("any",),
            "rows": (generator.randrange(1, 50),),
            "strides": (*choices["strides"], "one for all"),
            "shares": (generator.randrange(9),),
            "off": (generator.randrange(8),),
        }
        found.append(_case(kernel, {name: generator.choice(values) for name, values in choices.items()}))
    return found


def _cases() -> dict[str, Callable[..., list[str]]]:
    cases: dict[str, Callable[..., list[str]]] = {str(case): partial(check, case) for case in _chosen()}
    for nbits, factored, dtype in product((1, 4, 8), (True, False), (torch.bfloat16, torch.float16)):
        name = f"sums of x for {nbits} bits {'with factors ' if factored else ''}{str(dtype)[6:]}"
        cases[name] = partial(check_sums, nbits, factored, dtype)
    return cases


# --- interpreted ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, list[str]]:
    return interpreted(run_python, "tests.kernels.triton.test_product")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", _cases(), ids=str)
def test_interpreted_a_product_is_exact_to_rounding(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


@pytest.mark.slow
@pytest.mark.long
@needs_triton
def test_interpreted_any_products_are_exact_to_rounding(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    module, environment = "tests.kernels.triton.test_product", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    outcomes = json.loads(run_python("-W", "ignore", "-m", module, "sweep", env=environment).stdout)
    assert len(outcomes) > 100
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}


@needs_triton
def test_the_cases_are_served_and_reach_all_there_is() -> None:
    from hqqplus.kernels.triton import product

    reached = set()
    for case in _chosen():
        packed = meta_packed(case.spec, (case.out_features, case.in_features))
        module = _module(case.kernel)
        codes_as_they_are = case.kernel in ("matmul", "gemm")
        assert (product if codes_as_they_are else module).supports(packed, case.dtype), str(case)
        if case.kernel == "general" or case.rows == 0:
            continue
        x, y = (torch.empty(case.rows, width, device="meta", dtype=case.dtype) for width in packed.shape[::-1])
        launch = module.launches(x, packed, None, y, PROCESSORS, shares=case.shares)[-1]
        blocks = product.whole_blocks(packed)
        of = case.kernel, case.spec.nbits
        reached |= {(*of, name, launch.constants[name]) for name in ("EVEN_K", "TAIL", "ONE_GROUP", "HAS_MAPS")}
        reached.add((case.kernel, launch.constants.get("RUN", launch.constants.get("WIDE"))))
        shares = launch.constants["SPLIT"]
        reached |= {"uneven shares"} if blocks % shares else set()
        reached |= {"shares of nothing"} if blocks < shares else set()
    flags = product_of(
        ("matmul", "gemm", "simt"), (1, 2, 4, 8), ("EVEN_K", "TAIL", "ONE_GROUP", "HAS_MAPS"), (False, True)
    )
    assert reached >= flags
    runs = product_of(("matmul", "simt"), (1, 2, 4, 8)) | product_of(("gemm",), (0, 2, 4))
    assert reached >= runs
    assert reached >= {"uneven shares", "shares of nothing"}


def product_of(*choices: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    return set(product(*choices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["matmul", "gemm"])
@pytest.mark.parametrize("spec", [QuantSpec(1, 64), QuantSpec(2, 64), QuantSpec(4, 32, metadata_bits=16)], ids=str)
def test_the_bound_is_tight_enough_to_see_one_wrong_code(kernel: str, spec: QuantSpec, dtype: torch.dtype) -> None:
    """Each code is one off in turn. A rounding hides some of what is lost by that, for small x; hardly any here."""
    packed = random_packed(spec, (64, 512))
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = _exact(x, packed, None).to(dtype)
    assert errors(y, kernel, x, packed, None) == []
    scale = exact_weight(packed)[1]
    seen = []
    for k in range(0, 512, 37):
        step = scale[:, k] * x[:, k : k + 1].double().abs()  # [rows, out_features]
        seen.append((step > allowance(kernel, x, packed, None)).any(0))
    assert torch.stack(seen).double().mean() > 0.8


@needs_triton
def test_what_has_no_product_on_its_codes() -> None:
    from hqqplus.kernels.triton import general, product, simt

    served = meta_packed(QuantSpec(2, 64), (64, 256)), torch.bfloat16
    assert product.supports(*served)
    others = {
        "axis 0": (QuantSpec(2, 64, 0), (64, 256), torch.bfloat16, False),
        "3 bits": (QuantSpec(3, 64), (64, 256), torch.bfloat16, False),
        "planes of 24": (QuantSpec(2, 24), (64, 240), torch.bfloat16, False),
        "planes of 176": (QuantSpec(2, -1), (64, 172), torch.bfloat16, False),
        "planes of 8": (QuantSpec(2, 8), (64, 256), torch.bfloat16, True),
        "no whole block": (QuantSpec(2, 64), (64, 192), torch.bfloat16, True),
        "float32": (QuantSpec(2, 64), (64, 256), torch.float32, True),
    }
    for name, (spec, shape, dtype, without_tensor_cores) in others.items():
        packed = meta_packed(spec, shape)
        assert not product.supports(packed, dtype), name
        assert simt.supports(packed, dtype) == without_tensor_cores, name
        assert general.supports(packed, dtype), name
    for module in (product, simt, general):
        assert not module.supports(served[0], torch.float64)
        # Places of metadata are numbered in 32 bits.
        assert not module.supports(meta_packed(QuantSpec(1, 16), (2**20, 2**15)), torch.bfloat16)


@needs_triton
def test_scales_are_loaded_together_as_far_as_they_are_aligned() -> None:
    from hqqplus.kernels.triton import product

    def aligned(groups: int, scale: int, offset: int) -> int:
        packed = random_packed(QuantSpec(1, 16), (2, 16 * groups))
        shifted = {
            name: torch.empty(64, dtype=torch.uint8)[at : at + 2 * groups].view(2, groups)
            for name, at in (("scale", scale), ("offset", offset))
        }
        return product.run(packed._replace(**shifted), 8)

    assert [aligned(groups, 0, 0) for groups in (8, 4, 6, 7)] == [8, 4, 2, 1]
    assert [aligned(8, at, 0) for at in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert [aligned(8, 0, at) for at in (1, 2, 4, 8)] == [1, 2, 4, 8]

    # The maps are few: where they are not aligned, a copy of them is.
    packed = random_packed(QuantSpec(1, 16), (40, 64))
    assert packed.blocks is not None
    for off in (0, 1, 2, 4):
        blocks = Guards().input(packed.blocks, "blocks", off)
        for alignment in (4, 8):
            maps = product.maps_of(packed._replace(blocks=blocks), alignment)
            assert maps.data_ptr() % alignment == 0
            assert torch.equal(maps, packed.blocks)
            assert (maps is blocks) == (2 * off % alignment == 0)


@needs_triton
def test_k_is_split_until_the_card_is_full() -> None:
    from hqqplus.kernels.triton.product import split

    assert split(1, 1000, 1) == 1
    assert [split(tiles, 1000, 512) for tiles in (1, 64, 128, 256, 512, 1000)] == [16, 8, 4, 2, 1, 1]
    for tiles, steps, programs in product(range(1, 40, 3), range(1, 40), (1, 7, 64, 500)):
        shares = split(tiles, steps, programs)
        assert math.log2(shares).is_integer()
        assert shares == 1 or steps // shares >= 2
        assert shares == 1 or tiles * shares < 2 * programs


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", _cases(), ids=str)
def test_on_a_gpu_a_product_is_exact_to_rounding(name: str) -> None:
    seed = torch.seed() % 2**31
    assert _cases()[name](device="cuda", seed=seed) == [], seed


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096)], ids=str)
@pytest.mark.parametrize("name", SHIPPED)
def test_on_a_gpu_matrices_of_real_sizes(name: str, shape: tuple[int, int]) -> None:
    from hqqplus.kernels import routes

    seed = torch.seed() % 2**31
    packed = random_packed(SHIPPED[name], shape, seed, "cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    processors = routes.processors(torch.device("cuda", 0))
    for kernel, rows in (("matmul", 1), ("matmul", 16), ("gemm", 33), ("gemm", 200), ("simt", 3), ("general", 5)):
        for shares, dtype in product((0, 1, 2, 4, 16), (torch.bfloat16, torch.float16)):
            x = torch.randn(rows, shape[1], generator=generator, device="cuda").to(dtype)
            bias = torch.randn(shape[0], generator=generator, device="cuda")
            y = _module(kernel).matmul(x, packed, bias, processors, shares=shares)
            assert errors(y, kernel, x, packed, bias) == [], (kernel, rows, shares, dtype, seed)
            again = _module(kernel).matmul(x, packed, bias, processors, shares=shares)
            assert torch.equal(y, again), (kernel, rows, shares, dtype, seed)


def _op(packed: Packed) -> Callable[[Tensor], Tensor]:
    from hqqplus import kernels

    spec = packed.spec
    return lambda x: kernels.matmul(x, *packed[:4], spec.nbits, spec.group_size, spec.axis, *packed.shape)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [1, 40, 500])
def test_on_a_gpu_the_op_can_be_captured_in_a_graph(rows: int) -> None:
    seed = torch.seed() % 2**31
    packed = random_packed(SHIPPED["2-bit g64"], (4096, 4096), seed, "cuda")
    op = _op(packed)
    x = torch.randn(rows, 4096, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        op(x)  # compiled before it is captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x)
    for _ in range(3):
        x.copy_(torch.randn(rows, 4096, device="cuda"))
        graph.replay()
        assert torch.equal(y, op(x)), seed


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [1, 40])
def test_on_a_gpu_streams_do_not_disturb_each_other(rows: int) -> None:
    seed = torch.seed() % 2**31
    packed = random_packed(SHIPPED["2-bit g32, 8-bit metadata"], (1024, 4096), seed, "cuda")
    op = _op(packed)
    inputs = [torch.randn(rows, 4096, device="cuda").bfloat16() for _ in range(64)]
    expected = [op(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for n, x in enumerate(inputs):
        with torch.cuda.stream(streams[n % 2]):
            found.append(op(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, other) for y, other in zip(found, expected, strict=True)), seed


if __name__ == "__main__":
    print_outcomes({str(case): partial(check, case) for case in _sweep()} if sys.argv[1:] == ["sweep"] else _cases())
