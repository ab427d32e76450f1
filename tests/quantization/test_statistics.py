"""The numbers of a layer, against their definitions in plain float64."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqqplus.quantization import QuantSpec, quantize, statistics
from hqqplus.quantization.statistics import LayerStatistics, layer_statistics


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_definition(weight: torch.Tensor, restored: torch.Tensor) -> dict[str, float]:
    w, q = weight.double(), restored.double()
    centred = w - w.mean()
    variance = centred.square().mean()
    return {
        "nmse": float((w - q).square().sum() / w.square().sum()),
        "kurtosis": float(centred.pow(4).mean() / variance.square() - 3),
        "outlier_share": float((centred.abs() >= 6 * variance.sqrt()).double().mean()),
    }


@pytest.mark.parametrize("chunk", [1, 100, 1000, 2**20])
@pytest.mark.parametrize("metadata_bits", [16, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_as_defined_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, axis: int, metadata_bits: int, chunk: int
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    weight = gaussian(37, 172)
    weight[3, 5], weight[30, 171] = 0.5, -0.4
    weight = weight.to(dtype)
    spec = QuantSpec(2, 32, axis, metadata_bits=metadata_bits)
    packed = quantize(weight, spec)
    before = weight.clone()
    found = layer_statistics(weight, packed)
    assert torch.equal(weight, before)
    for name, value in by_definition(weight, packed.dequantize(torch.float32)).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert found.outlier_share == pytest.approx(2 / (37 * 172))
    assert found.nmse == pytest.approx(packed.nmse(weight), rel=1e-9)
    assert found.bits_per_weight == packed.bits_per_weight == spec.bits_per_weight(37, 172)
    assert (found.shape, found.weights) == ((37, 172), 37 * 172)
    assert (found.nbits, found.group_size, found.axis, found.metadata_bits) == (2, 32, axis, metadata_bits)


@given(scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3]), shift=st.sampled_from([0.0, 100.0]), seed=st.integers(0, 99))
def test_moments_do_not_depend_on_scale_or_suffer_from_a_shift(scale: float, shift: float, seed: int) -> None:
    weight = (gaussian(16, 64, seed).double() / 0.02 + shift) * scale
    spec = QuantSpec(8, 64, metadata_dtype="bfloat16", metadata_bits=16)
    found = layer_statistics(weight, quantize(weight, spec))
    plain = by_definition(weight / scale, weight / scale)
    assert found.kurtosis == pytest.approx(plain["kurtosis"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("kind", "kurtosis"), [("normal", 0.0), ("laplace", 3.0), ("uniform", -1.2)])
def test_kurtosis_is_the_excess_one(kind: str, kurtosis: float) -> None:
    torch.manual_seed(0)
    drawn = {
        "normal": torch.randn(512, 512),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((512, 512)),
        "uniform": torch.rand(512, 512),
    }[kind]
    found = layer_statistics(drawn, quantize(drawn, QuantSpec(1, 64, metadata_bits=16)))
    assert found.kurtosis == pytest.approx(kurtosis, abs=0.1)
    assert found.outlier_share == pytest.approx(math.exp(-6 * 2**0.5) if kind == "laplace" else 0, abs=5e-5)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_weights_have_no_kurtosis(value: float) -> None:
    weight = torch.full((8, 64), value)
    found = layer_statistics(weight, quantize(weight, QuantSpec(2, 64, metadata_bits=16)))
    assert found.nmse == 0
    assert found.outlier_share == 0
    assert math.isnan(found.kurtosis)


def test_zeros_that_come_back_as_something_else_are_infinitely_wrong() -> None:
    packed = quantize(gaussian(8, 64), QuantSpec(2, 64, metadata_bits=16))
    assert layer_statistics(torch.zeros(8, 64), packed).nmse == math.inf


def test_another_shape_is_refused() -> None:
    packed = quantize(gaussian(8, 64), QuantSpec(2, 64, metadata_bits=16))
    with pytest.raises(ValueError, match=r"the weight is \(64, 8\), what was packed is \(8, 64\)"):
        layer_statistics(gaussian(64, 8), packed)


def test_there_and_back_through_json() -> None:
    weight = gaussian(8, 64)
    found = layer_statistics(weight, quantize(weight, QuantSpec(2, 64, metadata_bits=16)))
    assert LayerStatistics.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    values: dict[str, Any] = found.to_dict()
    del values["nmse"]
    with pytest.raises(TypeError):
        LayerStatistics.from_dict(values)
