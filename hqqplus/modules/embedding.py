"""`PackedEmbedding`: an embedding whose rows are dequantized as they are looked up."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from hqqplus.kernels import quantize  # importing it registers torch.ops.hqqplus
from hqqplus.modules.linear import PackedLinear
from hqqplus.modules.packed import PackedState
from hqqplus.quantization import QuantSpec


class PackedEmbedding(PackedState, nn.Embedding):  # type: ignore[override]  # weight is a read-only property here
    """A frozen embedding over a packed table: ids [...] -> [..., embedding_dim] in `compute_dtype`.

    Meant for 8 or 4 bits: what is lost here, no adapter on the layers behind can bring back.

    Raises:
        ValueError: for a spec with axis 0, whose groups run across rows, so that no row could be read alone.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        compute_dtype: torch.dtype = torch.bfloat16,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if spec.axis != 1:
            raise ValueError("an embedding is quantized along its rows: axis must be 1")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._init_packed(spec, (num_embeddings, embedding_dim), compute_dtype, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, spec: QuantSpec) -> Self:
        """Quantize `embedding`; its table is left alone.

        Raises:
            ValueError: if the table holds NaN or infinite values, or for axis 0.
        """
        table = embedding.weight
        rows, width = table.shape
        layer = cls(rows, width, spec, table.dtype, embedding.padding_idx, device="meta")
        layer.set_packed(quantize(table, spec))
        return layer.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        spec = self.spec
        return torch.ops.hqqplus.embedding(
            input, self.W_q, *self.metadata(), spec.nbits, spec.group_size, self.embedding_dim, self.compute_dtype
        )

    def tied_head(self, bias: bool = False) -> PackedLinear:
        """An output head on the same packed tensors: `logits = h W^T`."""
        head = PackedLinear(
            self.embedding_dim, self.num_embeddings, bias, self.spec, self.compute_dtype, device="meta"
        )
        for name, parameter in self.packed_parameters().items():
            setattr(head, name, parameter)
        return head.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}"
