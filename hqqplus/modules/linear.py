"""`PackedLinear`: what stands in a model where `nn.Linear` stood."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from hqqplus.kernels import int8, quantize  # importing them registers torch.ops.hqqplus
from hqqplus.kernels.lora import matmul_lora
from hqqplus.kernels.scales import TrainedScales
from hqqplus.modules import trainable
from hqqplus.modules.packed import PackedState
from hqqplus.quantization import QuantSpec, SolverOptions


class PackedLinear(PackedState, nn.Linear):  # type: ignore[override]  # weight is a read-only property here
    """A frozen linear layer over a packed weight: `y = x W^T + bias`, `x` [..., in_features].

    A subclass of `nn.Linear` so that code which looks for linear layers finds it, but built as a bare module: there
    is no full-precision weight, ever.

    Args:
        in_features, out_features: as in `nn.Linear`.
        bias: whether there is a bias; it stays in full precision, in `compute_dtype` unless it is loaded otherwise.
        spec: how the weight is quantized.
        compute_dtype: the dtype that `weight` and `dequantize()` return; products are in the dtype of their input.
        device: where the (uninitialised) parameters are made.

    Attributes:
        compute: "auto", or "int8": activations are rounded to 8 bits a token (`kernels/int8.py`) wherever no gradient
            is asked for (`torch.no_grad`, `torch.inference_mode`) and the weight has 1 bit and axis 1; everything else
            stays as it is. A choice of this process: part of neither the state nor the configuration.
        scale_delta, offset_delta: what is trained of the scales and offsets (`modules/trainable.py`); None, and no
            part of the state, where nothing is.
    """

    compute: str = "auto"
    scale_delta: nn.Parameter | None
    offset_delta: nn.Parameter | None
    kept_metadata: tuple[Any, trainable.Stored] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: QuantSpec,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._init_packed(spec, (out_features, in_features), compute_dtype, device)
        if bias:
            empty = torch.empty(out_features, dtype=compute_dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        for name in trainable.DELTAS:
            self.register_parameter(name, None)
        self.kept_metadata = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: QuantSpec,
        options: SolverOptions | None = None,
        importance: Tensor | None = None,
    ) -> Self:
        """Quantize `linear`. Its bias is taken over (frozen), its weight is left alone.

        Args:
            options, importance: as in `quantization.quantize`.

        Raises:
            ValueError: if the weight holds NaN or infinite values.
        """
        layer = cls(linear.in_features, linear.out_features, False, spec, linear.weight.dtype, device="meta")
        layer.set_packed(quantize(linear.weight, spec, options, importance))
        layer.take_bias(linear)
        return layer.train(linear.training)

    def take_bias(self, linear: nn.Linear) -> None:
        """Share the bias of `linear`, frozen. The Parameter itself is kept: it may be still on its way from disk."""
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
            self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.scale_delta is not None and torch.is_grad_enabled():
            return matmul_lora(x, self.op_arguments(), self.bias, (), scales=self.trained_scales())
        product = torch.ops.hqqplus.matmul_int8 if self.takes_int8() else torch.ops.hqqplus.matmul
        return product(x, *self.op_arguments(), self.bias)

    def stored_metadata(self) -> trainable.Stored:
        return trainable.trained_metadata(self)

    def trained_scales(self) -> TrainedScales | None:
        """What is trained of the metadata, as `kernels.lora.matmul_lora` takes it."""
        return trainable.trained_scales(self) if trainable.is_trained(self) else None

    def takes_int8(self) -> bool:
        """Whether a call would round its activations to 8 bits now."""
        return self.compute == "int8" and int8.supports(self.spec) and not torch.is_grad_enabled()

    def op_arguments(self) -> tuple[Any, ...]:
        """What `torch.ops.hqqplus.matmul` and `matmul_int8` take between x and the bias."""
        spec = self.spec
        sizes = spec.nbits, spec.group_size, spec.axis, self.out_features, self.in_features
        return self.W_q, *self.metadata(), *sizes

    def extra_repr(self) -> str:
        bias = self.bias is not None
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._describe()}"
        return text if self.compute == "auto" else f"{text}, compute={self.compute}"
