from __future__ import annotations

import pytest
import torch
from torch import nn

from hqqplus.modules import PackedEmbedding
from hqqplus.quantization import QuantSpec


def make(nbits: int = 8) -> tuple[nn.Embedding, PackedEmbedding]:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 64, padding_idx=3)
    return embedding, PackedEmbedding.from_embedding(embedding, QuantSpec(nbits, 64))


@pytest.mark.parametrize(("nbits", "bound"), [(8, 1e-4), (4, 1e-2)])
def test_rows_come_back_close(nbits: int, bound: float) -> None:
    embedding, packed = make(nbits)
    ids = torch.tensor([[1, 49], [0, 7]])
    rows = packed(ids)
    assert torch.equal(rows, packed.weight[ids])
    assert (rows - embedding(ids)).square().mean() / embedding(ids).square().mean() < bound
    assert isinstance(packed, nn.Embedding)
    assert packed.padding_idx == 3


def test_tied_head_shares_the_very_tensors() -> None:
    _, packed = make()
    head = packed.tied_head()
    assert all(getattr(head, name) is getattr(packed, name) for name in ("W_q", "scale", "offset"))
    h = torch.randn(2, 64)
    torch.testing.assert_close(head(h), h @ packed.weight.t())


def test_axis_0_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be 1"):
        PackedEmbedding.from_embedding(nn.Embedding(16, 16), QuantSpec(8, 8, axis=0))
