from __future__ import annotations

import pytest
import torch

from hqqplus.quantization.metadata import STORAGE_DTYPE, from_storage, metadata_dtype, to_storage
from hqqplus.quantization.spec import METADATA_DTYPES

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
