"""Other libraries' 4-, 2- and 1-bit products, as `benchmarks/kernels.py` times them. None of them is needed.

    hqq             its own quantizer; the weight is dequantized for each product. Routes: PYTORCH (eager operators),
                    PYTORCH_COMPILE (the dequantization compiled by the inductor), ATEN (its CUDA extension, axis 0)
    humming         our codes in its order (`hqqplus/kernels/humming.py`)
    gemlite         our codes with its scales and zeros
    bitsandbytes    NF4 in blocks of 64, double-quantized: 4 bits, so another size

hqq's routes are called by their parts and not by `HQQLinear`, whose backend is one switch for the whole process, and
whose compiled forward pass would be compiled anew for each copy of a layer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import as_packed, nbytes, reference_product
from torch import Tensor

from hqqplus.quantization import PackedTensor
from hqqplus.quantization.metadata import decode
from hqqplus.quantization.packing import unpack


@dataclass(frozen=True)
class Layer:
    """A competitor's copies of one weight.

    Attributes:
        calls: x [M, in] -> [M, out], one for each copy.
        nbytes: of one copy.
        expected: what a call should give, in float64, by the library's own account of its weights.
    """

    calls: list[Callable[[Tensor], Tensor]]
    nbytes: int
    expected: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Competitor:
    """A route of another library.

    Attributes:
        package: the distribution it comes in; `module`: what is imported.
        build: (one packed weight for each copy) -> its layer. What it raises stands in the table.
        own_bits: whether its size is its own and not that of the packed weight.
        graph: whether it can be captured in a CUDA graph.
        needs: a further module.
    """

    package: str
    module: str
    build: Callable[[list[PackedTensor]], Layer]
    own_bits: bool = False
    graph: bool = True
    needs: str | None = None

    def version(self) -> str | None:
        """The version that is installed; None without it."""
        for name in filter(None, (self.module, self.needs)):
            if importlib.util.find_spec(name) is None:
                return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _by(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.double() @ weight.double().t()


def _hqq(tensors: list[PackedTensor], axis: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], dict[str, Any]]:
    """(W_q, scale, zero) of each copy, and hqq's description of them."""
    from hqq.core.quantize import Quantizer

    spec, device = tensors[0].spec, tensors[0].W_q.device
    W_q, meta = Quantizer.quantize(
        tensors[0].dequantize(torch.float32),
        nbits=spec.nbits,
        group_size=spec.group_size,
        axis=axis,
        compute_dtype=torch.bfloat16,
        device=str(device),
    )
    scale, zero = (meta.pop(name).to(device, torch.bfloat16) for name in ("scale", "zero"))
    W_q = W_q.to(device)
    copies = [(W_q.clone(), scale.clone(), zero.clone()) for _ in tensors]
    return copies, {**meta, "compute_dtype": torch.bfloat16}


def _hqq_layer(tensors: list[PackedTensor], dequantize: Callable[..., Tensor], axis: int = 1) -> Layer:
    copies, meta = _hqq(tensors, axis)

    def call(parts: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ dequantize(*parts, meta).t()

    return Layer([call(parts) for parts in copies], nbytes(copies[0]), _by(_hqq_eager(*copies[0], meta)))


def _hqq_eager(W_q: Tensor, scale: Tensor, zero: Tensor, meta: dict[str, Any]) -> Tensor:
    from hqq.core.quantize import Quantizer

    return Quantizer.dequantize(W_q, {**meta, "scale": scale, "zero": zero})


def hqq_pytorch(tensors: list[PackedTensor]) -> Layer:
    return _hqq_layer(tensors, _hqq_eager)


def hqq_compiled(tensors: list[PackedTensor]) -> Layer:
    # Each layer's shape and bits are compiled for themselves, more often than is allowed by default.
    torch._dynamo.config.cache_size_limit = 256
    return _hqq_layer(tensors, torch.compile(_hqq_eager, dynamic=False))


def hqq_aten(tensors: list[PackedTensor]) -> Layer:
    import hqq_aten

    def dequantize(W_q: Tensor, scale: Tensor, zero: Tensor, meta: dict[str, Any]) -> Tensor:
        shape, group = meta["shape"], meta["group_size"]
        return hqq_aten.dequantize(W_q, scale, zero, *shape, group, meta["nbits"], meta["axis"], meta["packing"])

    return _hqq_layer(tensors, dequantize, axis=0)


def humming(tensors: list[PackedTensor]) -> Layer:
    from hqqplus.kernels import humming as backend

    packed = [as_packed(tensor) for tensor in tensors]
    if not backend.available(packed[0].W_q.device):
        raise RuntimeError("it does not serve this device")
    layers = [backend.convert(each, torch.bfloat16) for each in packed]
    calls = [lambda x, layer=layer: backend.matmul(x, layer) for layer in layers]
    return Layer(calls, layers[0].nbytes, lambda x: reference_product(x, packed[0]))


def gemlite(tensors: list[PackedTensor]) -> Layer:
    from gemlite import DType, GemLiteLinear

    layers = []
    for tensor in tensors:
        packed, spec = as_packed(tensor), tensor.spec
        layout, (out_features, in_features) = packed.layout, tensor.shape
        if layout.padded != in_features:
            raise ValueError("it pads nothing")
        scale, offset = decode(packed.scale, packed.offset, packed.blocks, spec.qmax)  # [out, groups]
        codes = unpack(packed.W_q, spec.nbits, layout.plane)
        layer = GemLiteLinear(
            spec.nbits,
            group_size=layout.group,
            in_features=in_features,
            out_features=out_features,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        # (codes - zeros) * scales, a row a group.
        zeros = (-offset / scale).to(torch.bfloat16).view(-1, 1)
        layer.pack(codes, scale.to(torch.bfloat16).view(-1, 1), zeros, None)
        layers.append(layer)
    packed = as_packed(tensors[0])
    size = nbytes((layers[0].W_q, layers[0].scales, layers[0].zeros))
    return Layer(list(layers), size, lambda x: reference_product(x, packed))


def bitsandbytes(tensors: list[PackedTensor]) -> Layer:
    from bitsandbytes.functional import dequantize_4bit

    layers = [nf4_linear(tensor.dequantize(torch.bfloat16)) for tensor in tensors]
    state = layers[0].weight.quant_state
    weight = dequantize_4bit(layers[0].weight.data, state).float()
    return Layer(list(layers), nf4_bytes(layers[0]), _by(weight))


def nf4_linear(weight: Tensor) -> Any:
    """bitsandbytes' NF4 layer, as QLoRA has it, of `weight` [out, in] in bfloat16 on its device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out_features, in_features = weight.shape
    settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    layer = Linear4bit(in_features, out_features, bias=False, device="meta", **settings)
    parameter = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
    layer.weight = parameter.to(weight.device)  # quantizes
    return layer


def nf4_bytes(layer: Any) -> int:
    """All that an NF4 layer stores for its weight."""
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code, getattr(state, "offset", None)]
    if getattr(state, "state2", None) is not None:
        tensors += [state.state2.absmax, state.state2.code]
    return nbytes(tensor for tensor in tensors if isinstance(tensor, Tensor))


COMPETITORS = {
    "bitsandbytes NF4": Competitor("bitsandbytes", "bitsandbytes", bitsandbytes, own_bits=True),
    "hqq PYTORCH": Competitor("hqq", "hqq", hqq_pytorch),
    "hqq PYTORCH_COMPILE": Competitor("hqq", "hqq", hqq_compiled),
    # Its kernels go to the legacy stream, which nothing can be captured on.
    "hqq ATEN": Competitor("hqq", "hqq", hqq_aten, graph=False, needs="hqq_aten"),
    "gemlite": Competitor("gemlite", "gemlite", gemlite),
    "humming": Competitor("humming-kernels", "humming", humming),
}
