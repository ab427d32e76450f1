"""What the packed layers share: their state, and how it is described.

All packed state is `nn.Parameter(requires_grad=False)` of an integer type. As integers no cast can touch it; as
parameters (not buffers) DDP sends it once, FSDP2 shards it and offloading moves it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqqplus.modules.sharding import whole
from hqqplus.quantization import PackedTensor, QuantSpec
from hqqplus.quantization.metadata import metadata_views
from hqqplus.quantization.tensor import state_names, state_shapes


class PackedState(nn.Module):
    """Mixin of the packed layers: parameters `W_q`, `scale`, `offset` and the matrix that they stand for.

    With 8-bit metadata there is a fourth parameter, `blocks`, which is None otherwise.

    Attributes:
        spec: how the matrix is quantized.
        matrix_shape: (rows, columns) of the full matrix: (out_features, in_features) of a linear layer,
            (num_embeddings, embedding_dim) of an embedding. A stack of experts has several of that shape.
        compute_dtype: the dtype of `weight` and of what `dequantize` returns by default.
    """

    W_q: nn.Parameter
    scale: nn.Parameter
    offset: nn.Parameter
    blocks: nn.Parameter | None
    spec: QuantSpec
    matrix_shape: tuple[int, int]
    compute_dtype: torch.dtype

    def _init_packed(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
        matrices: int | None = None,
    ) -> None:
        """Make the parameters; with `matrices` each has one more dimension, of that many matrices of that shape."""
        self.spec, self.matrix_shape, self.compute_dtype = spec, shape, compute_dtype
        for name, (size, dtype) in state_shapes(spec, *shape).items():
            sizes = size if matrices is None else (matrices, *size)
            setattr(self, name, nn.Parameter(torch.empty(sizes, dtype=dtype, device=device), requires_grad=False))
        if spec.metadata_bits != 8:
            self.register_parameter("blocks", None)

    def set_packed(self, packed: PackedTensor) -> None:
        """Take over the tensors of `packed`, which must have this layer's spec and shape.

        Raises:
            ValueError: if it has not.
        """
        self.check_fits(packed)
        for name, tensor in packed.state().items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def check_fits(self, packed: PackedTensor) -> None:
        """Refuse what is not of this layer's spec and shape.

        Raises:
            ValueError: if it is not.
        """
        if (packed.spec, packed.shape) != (self.spec, self.matrix_shape):
            raise ValueError(f"{packed.spec} of {packed.shape} does not fit {self.spec} of {self.matrix_shape}")

    def packed(self) -> PackedTensor:
        """The matrix as a `PackedTensor` (sharing the tensors, where they are not sharded)."""
        scale, offset, blocks = self.stored_metadata()
        codes, scale, offset = (whole(tensor).detach() for tensor in (self.W_q, scale, offset))
        blocks = None if blocks is None else whole(blocks).detach()
        return PackedTensor(codes, scale, offset, self.spec, self.matrix_shape, blocks)

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """The packed tensors by name, in the order of `state_names`."""
        return {name: getattr(self, name) for name in state_names(self.spec)}

    def stored_metadata(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """scale, offset and blocks as bytes; while they are trained, those that are computed with now."""
        return self.scale, self.offset, self.blocks

    def metadata(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """scale, offset and blocks as the ops take them: views of the stored bytes."""
        scale, offset, blocks = self.stored_metadata()
        return metadata_views(whole(scale), whole(offset), whole(blocks), self.spec.metadata_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The full matrix in `dtype` (default: the compute dtype)."""
        spec = self.spec
        return torch.ops.hqqplus.dequantize(
            whole(self.W_q),
            *self.metadata(),
            spec.nbits,
            spec.group_size,
            spec.axis,
            *self.matrix_shape,
            dtype or self.compute_dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The full matrix, dequantized at every access. Read-only: writing into it changes nothing.

        It is here for code that reads `layer.weight`: its dtype and device, or a fused loss that multiplies by it.
        """
        return self.dequantize()

    @property
    def bits_per_weight(self) -> float:
        return self.packed().bits_per_weight

    @property
    def packed_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.packed_parameters().values())

    def _describe(self) -> str:
        spec = self.spec
        group = "row" if spec.group_size == -1 else spec.group_size
        rest = "" if spec.axis == 1 else ", axis=0"
        rest += "" if spec.metadata_bits == 16 else f", metadata_bits={spec.metadata_bits}"
        return f"nbits={spec.nbits}, group_size={group}{rest}, bpw={spec.bits_per_weight(*self.matrix_shape):.3f}"
