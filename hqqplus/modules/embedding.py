"""`PackedEmbedding`: an embedding whose rows are dequantized as they are looked up."""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from hqqplus.kernels import quantize  # importing it registers torch.ops.hqqplus
from hqqplus.modules.linear import PackedLinear
from hqqplus.modules.packed import PackedState
from hqqplus.quantization import QuantSpec


class PackedEmbedding(PackedState, nn.Embedding):  # type: ignore[override]  # weight is a read-only property here
    """A frozen embedding over a packed table: ids [...] -> [..., embedding_dim] in `compute_dtype`.

    Meant for 8 or 4 bits: what is lost here, no adapter on the layers behind can bring back.

    Args:
        row_scale: what the rows are multiplied by as they are looked up, in `compute_dtype` (Gemma's root of the
            width). The packed table, and a head that shares it, are without it.
        kind: the class of the embedding in whose place it stands, `row_scale` being its `embed_scale`.

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
        row_scale: float = 1.0,
        kind: type[nn.Embedding] = nn.Embedding,
    ) -> None:
        if spec.axis != 1:
            raise ValueError("an embedding is quantized along its rows: axis must be 1")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.row_scale, self.kind = row_scale, kind
        self._init_packed(spec, (num_embeddings, embedding_dim), compute_dtype, device)

    @classmethod
    def empty(cls, embedding: nn.Embedding, spec: QuantSpec, compute_dtype: torch.dtype) -> Self:
        """The packed counterpart of `embedding`, which may be packed itself, on the meta device, to be filled.

        Raises:
            ValueError: if it is of a class that does more than `row_scale` says, or for axis 0.
        """
        sizes = embedding.num_embeddings, embedding.embedding_dim
        scale = row_scale(embedding)
        if scale is None:
            raise ValueError(f"a {type(embedding).__name__} does more than a packed embedding can")
        kind = embedding.kind if isinstance(embedding, PackedEmbedding) else type(embedding)
        return cls(*sizes, spec, compute_dtype, embedding.padding_idx, "meta", scale, kind)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, spec: QuantSpec) -> Self:
        """Quantize `embedding`; its table is left alone.

        Raises:
            ValueError: if the table holds NaN or infinite values, or as `empty`.
        """
        table = embedding.weight
        layer = cls.empty(embedding, spec, table.dtype)
        layer.set_packed(quantize(table, spec))
        return layer.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        spec = self.spec
        rows: Tensor = torch.ops.hqqplus.embedding(
            input, self.W_q, *self.metadata(), spec.nbits, spec.group_size, self.embedding_dim, self.compute_dtype
        )
        # A tensor, because the factor is rounded to the dtype of the rows before it is used.
        return rows if self.row_scale == 1.0 else rows * rows.new_full((), self.row_scale)

    def unpacked(self, dtype: torch.dtype) -> nn.Embedding:
        """An ordinary embedding of the class in whose place this one stands, with the dequantized table."""
        extra = {} if self.kind is nn.Embedding else {"embed_scale": self.row_scale}
        embedding = _made(self.kind, 1, self.embedding_dim, **extra).to(self.W_q.device)
        embedding.num_embeddings, embedding.padding_idx = self.num_embeddings, self.padding_idx
        embedding.weight = nn.Parameter(self.dequantize(dtype))
        return embedding.train(self.training)

    def tied_head(self, bias: bool = False) -> PackedLinear:
        """An output head on the same packed tensors: `logits = h W^T`."""
        head = PackedLinear(
            self.embedding_dim, self.num_embeddings, bias, self.spec, self.compute_dtype, device="meta"
        )
        for name, parameter in self.packed_parameters().items():
            setattr(head, name, parameter)
        return head.train(self.training)

    def extra_repr(self) -> str:
        scaled = "" if self.row_scale == 1.0 else f", row_scale={self.row_scale:.4g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}{scaled}"


def row_scale(embedding: nn.Embedding) -> float | None:
    """What `embedding` multiplies the rows of its table by: 1 for torch's own, `embed_scale` for those of Gemma.

    None if it is of a class that does something else.
    """
    if isinstance(embedding, PackedEmbedding):
        return embedding.row_scale
    kind = type(embedding)
    if kind is nn.Embedding:
        return 1.0
    # The buffer `embed_scale` may be on the meta device; the number beside it is not.
    scale: Any = getattr(embedding, "scalar_embed_scale", None)
    return float(scale) if isinstance(scale, int | float) and _scales_its_rows(kind) else None  # type: ignore[arg-type]


@cache
def _scales_its_rows(kind: type[nn.Embedding]) -> bool:
    """Whether embeddings of class `kind` do nothing but multiply rows by `embed_scale`, rounded to the table's dtype.

    Found out by asking a small one: the families of transformers have a class of their own each.
    """
    try:
        with torch.device("cpu"):  # a model may be being made on another one
            embedding, ids = _made(kind, 4, 8, embed_scale=0.7), torch.tensor([2, 0, 3, 1])
            for dtype in (torch.float32, torch.bfloat16):
                table = torch.linspace(-1, 1, 32, dtype=torch.float32).view(4, 8).to(dtype)
                embedding.weight = nn.Parameter(table)
                if not torch.equal(embedding(ids), table[ids] * torch.tensor(0.7, dtype=dtype)):
                    return False
    except (TypeError, RuntimeError, AttributeError):
        return False
    return [name for name, _ in embedding.named_parameters()] == ["weight"]


def _made(kind: type[nn.Embedding], rows: int, width: int, **extra: Any) -> nn.Embedding:
    """An embedding of class `kind` on the CPU; its table is no use, and making it moves no random generator."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # its factor would be rounded to that of a model that is being made
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return kind(rows, width, None, **extra)
    finally:
        torch.set_default_dtype(default)
