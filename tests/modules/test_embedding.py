from __future__ import annotations

import pytest
import torch
from torch import nn

from hqqplus.modules import PackedEmbedding
from hqqplus.quantization import QuantSpec

both = pytest.mark.parametrize("metadata_bits", [16, 8])


def make(nbits: int = 8, metadata_bits: int = 16, group_size: int = 64) -> tuple[nn.Embedding, PackedEmbedding]:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 64, padding_idx=3)
    spec = QuantSpec(nbits, group_size, metadata_bits=metadata_bits)
    return embedding, PackedEmbedding.from_embedding(embedding, spec)


@pytest.mark.parametrize(("nbits", "bound"), [(8, 1e-4), (4, 1e-2)])
@pytest.mark.parametrize("group_size", [64, 8])
@both
def test_rows_come_back_close(nbits: int, bound: float, group_size: int, metadata_bits: int) -> None:
    embedding, packed = make(nbits, metadata_bits, group_size)
    ids = torch.tensor([[1, 49], [0, 7]])
    rows = packed(ids)
    assert torch.equal(rows, packed.weight[ids])
    assert (rows - embedding(ids)).square().mean() / embedding(ids).square().mean() < bound
    assert isinstance(packed, nn.Embedding)
    assert packed.padding_idx == 3


@both
def test_tied_head_shares_the_very_tensors(metadata_bits: int) -> None:
    _, packed = make(metadata_bits=metadata_bits)
    head = packed.tied_head()
    own, shared = dict(packed.named_parameters()), dict(head.named_parameters())
    assert set(own) == set(shared) == {"W_q", "scale", "offset"} | ({"blocks"} if metadata_bits == 8 else set())
    assert all(shared[name] is parameter for name, parameter in own.items())
    h = torch.randn(2, 64)
    torch.testing.assert_close(head(h), h @ packed.weight.t())


def test_axis_0_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be 1"):
        PackedEmbedding.from_embedding(nn.Embedding(16, 16), QuantSpec(8, 8, axis=0))
