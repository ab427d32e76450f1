"""`PackedExperts`: what stands in a model where a mixture keeps its experts as 3-D tensors.

transformers stores the weights of all experts of a layer in two Parameters, `gate_up_proj` [experts, 2 inner, width]
and `down_proj` [experts, width, inner] (`up_proj` in the place of the former where there is no gate). Each expert's
matrix is packed by itself; the packed tensors of all of them stand under the Parameter's own name, with a dimension
more than those of a linear layer, in a `PackedStack`:

    model.layers.0.mlp.experts.gate_up_proj.W_q    [experts, rows, bytes]

The forward pass is the one that transformers lets any implementation of an experts class stand in for: a product with
`gate_up_proj`, the class's own `_apply_gate` (its activation, limits and all), a product with `down_proj`, and the sum
weighted by the router. The tokens are sorted by expert, so that every expert is one product, and each stack is called
once, whatever the router chose: what gathers or moves parameters by hooks on calls finds the same calls everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hqqplus.kernels import quantize  # noqa: F401  # importing it registers torch.ops.hqqplus
from hqqplus.modules.packed import PackedState
from hqqplus.modules.sharding import whole
from hqqplus.quantization import PackedTensor, QuantSpec
from hqqplus.quantization.metadata import metadata_views

KNOWN = "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and others of their form"
# What `transformers.integrations.use_experts_implementation` notes on each module of experts.
_FLAGS = ("has_gate", "has_bias", "is_transposed")
_DOWN = "down_proj"


class PackedStack(PackedState):
    """The matrices of all experts of one projection, each packed by itself: parameters [experts, ...] of one state.

    Args:
        experts: how many there are.
        shape: (out_features, in_features) of each.
        spec: how each is quantized.
        compute_dtype: what `dequantize` returns; products are in the dtype of their input.
        device: where the (uninitialised) parameters are made.
    """

    def __init__(
        self,
        experts: int,
        shape: tuple[int, int],
        spec: QuantSpec,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.experts = experts
        self._init_packed(spec, shape, compute_dtype, device, experts)

    def set_packed(self, packed: PackedTensor) -> NoReturn:
        raise TypeError("a stack holds a matrix for each expert: use set_expert")

    def packed(self) -> NoReturn:
        raise TypeError("a stack holds a matrix for each expert: use expert")

    @torch.no_grad()
    def set_expert(self, index: int, packed: PackedTensor) -> None:
        """Copy `packed` into the place of expert `index`.

        Raises:
            ValueError: if its spec or shape is another.
        """
        self.check_fits(packed)
        for name, tensor in packed.state().items():
            getattr(self, name)[index].copy_(tensor)

    def expert(self, index: int) -> PackedTensor:
        """The matrix of expert `index`, sharing the tensors where they are not sharded."""
        state = {name: whole(tensor).detach()[index] for name, tensor in self.packed_parameters().items()}
        return PackedTensor(**state, spec=self.spec, shape=self.matrix_shape)

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The product of each expert with its tokens: [tokens, in_features] -> [tokens, out_features].

        Args:
            counts: how many of the rows of `x` belong to each expert; they come expert by expert.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        spec = self.spec
        sizes = spec.nbits, spec.group_size, spec.axis, *self.matrix_shape
        codes, metadata = whole(self.W_q), self.metadata()

        def product(rows: Tensor, index: int) -> Tensor:
            own = (None if tensor is None else tensor[index] for tensor in (codes, *metadata))
            return torch.ops.hqqplus.matmul(rows, *own, *sizes)

        return _by_expert(x, counts, self.matrix_shape[0], product)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All matrices [experts, out_features, in_features] in `dtype` (default: the compute dtype), one by one."""
        dtype = dtype or self.compute_dtype
        found = torch.empty(self.experts, *self.matrix_shape, dtype=dtype, device=self.W_q.device)
        if not found.is_meta:
            for index in range(self.experts):
                found[index] = self._dequantized(index, dtype)
        return found

    def _dequantized(self, index: int, dtype: torch.dtype) -> Tensor:
        spec, packed = self.spec, self.expert(index)
        views = metadata_views(packed.scale, packed.offset, packed.blocks, spec.metadata_dtype)
        sizes = spec.nbits, spec.group_size, spec.axis, *self.matrix_shape
        return torch.ops.hqqplus.dequantize(packed.W_q, *views, *sizes, dtype)

    @property
    def weight(self) -> NoReturn:
        # So `hasattr(module, "weight")` is false, and nobody dequantizes all experts by asking it.
        raise AttributeError("weight")

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return self.experts * self.matrix_shape[0] * self.matrix_shape[1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / self.weights

    def extra_repr(self) -> str:
        out_features, in_features = self.matrix_shape
        return f"experts={self.experts}, in_features={in_features}, out_features={out_features}, {self._describe()}"


class PackedExperts(nn.Module):
    """Frozen experts over packed stacks, in the place of a transformers module of experts.

    It starts with the Parameters of `original`, which `put` replaces by stacks one after the other; what is never
    replaced is computed with as it is. What else `original` has (its activation) is shared with it.

    Raises:
        ValueError: if `original` is of a class whose forward pass is not known (`why_not`).
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        if (reason := why_not(original)) is not None:
            raise ValueError(f"a {type(original).__name__} cannot be packed: it {reason}")
        self.num_experts: int = original.num_experts  # type: ignore[assignment]
        self._first, _ = projections(original)
        self._gated: bool = original.has_gate  # type: ignore[assignment]
        for name, child in original.named_children():
            self.add_module(name, child)
        for name in (self._first, _DOWN):
            self.register_parameter(name, original._parameters[name])
            original._parameters[name] = None
        # Not as a child: an empty shell that knows how its class applies the gate, and what to turn into again.
        self.__dict__["_original"] = original
        self.train(original.training)

    def put(self, name: str, stack: PackedStack) -> None:
        """Replace Parameter (or stack) `name` by `stack`."""
        if name in self._parameters:
            del self._parameters[name]
        self.add_module(name, stack.train(self.training))
        if name == self._first and _DOWN in self._modules:
            # In which order they come depends on the checkpoint; the order of the model does not.
            self._modules[_DOWN] = self._modules.pop(_DOWN)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs for each token, added up: [tokens, width] as `hidden_states`.

        Args:
            top_k_index: int64 [tokens, k], the experts of each token; one beyond the last is no expert.
            top_k_weights: [tokens, k], what their outputs are multiplied by.
        """
        tokens, top_k = top_k_index.shape
        ids = top_k_index.reshape(-1)
        order = ids.argsort(stable=True)
        counts = torch.bincount(ids, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        used = sum(counts)
        x = hidden_states[order[:used] // top_k]  # [tokens k, width], expert by expert
        inner = self._product(self._first, x, counts)
        inner = self._original._apply_gate(inner) if self._gated else self._original.act_fn(inner)
        y = self._product(_DOWN, inner, counts)
        if used < len(ids):
            y = torch.cat([y, y.new_zeros(len(ids) - used, y.shape[1])])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # A sum over k, not `index_add_`, whose order on a GPU is another one every time.
        y = y[back] * top_k_weights.reshape(-1, 1)
        return y.view(tokens, top_k, y.shape[1]).sum(1).to(hidden_states.dtype)

    def unpacked(self, dtype: torch.dtype) -> nn.Module:
        """The module in whose place this one stands, with dequantized Parameters; this one is of no use afterwards."""
        original = self._original
        for name in (self._first, _DOWN):
            module = getattr(self, name)
            values = module.dequantize(dtype) if isinstance(module, PackedStack) else module.detach()
            original._parameters[name] = nn.Parameter(values)
            if isinstance(module, PackedStack):
                self._modules.pop(name)  # its memory, before the next one is made
        return original.train(self.training)

    def _product(self, name: str, x: Tensor, counts: Sequence[int]) -> Tensor:
        weights = getattr(self, name)
        if isinstance(weights, PackedStack):
            return weights(x, counts)
        return _by_expert(x, counts, weights.shape[1], lambda rows, index: linear(rows, weights[index]))

    @property
    def _original(self) -> Any:
        return self.__dict__["_original"]


def _by_expert(x: Tensor, counts: Sequence[int], width: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`product(rows, expert)` of every expert's rows of `x` [tokens, in] -> [tokens, width]."""
    # One split and one concatenation: slices would each have a gradient of the size of `x`.
    products = [product(rows, index) for index, rows in enumerate(x.split(list(counts))) if len(rows)]
    return torch.cat(products) if products else x.new_zeros(0, width)


# --- what can be packed ----------------------------------------------------------------------------------------------


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that holds weights of experts itself, instead of in linear layers."""
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        ours = isinstance(module, PackedExperts | PackedState | nn.Linear | nn.Embedding)
        named = all(hasattr(module, flag) for flag in _FLAGS) or ("expert" in kind and "router" not in kind)
        if named and not ours and projections(module):
            yield name, module


def projections(experts: nn.Module) -> list[str]:
    """The names of the Parameters of a module of experts that hold matrices, `down_proj` last."""
    found = [
        name
        for name, parameter in experts._parameters.items()
        if parameter is not None and parameter.dim() >= 2 and parameter.is_floating_point() and "bias" not in name
    ]
    return sorted(found, key=lambda name: name == _DOWN)


def why_not(experts: nn.Module) -> str | None:
    """Why module `experts` cannot be packed, after "it"; None where it can.

    Its layout is read off what transformers notes on it. Whether its forward pass is the one of `PackedExperts` is
    found out by asking both, in small.
    """
    if not all(hasattr(experts, flag) for flag in _FLAGS):
        return "is of a layout that is not known"
    settings: Any = experts
    if settings.has_bias:
        return "has biases"
    if settings.is_transposed:
        return "stores its matrices turned"
    if getattr(settings, "has_post_expert_norm", False):
        return "has norms of its own"
    first = "gate_up_proj" if settings.has_gate else "up_proj"
    if [name for name, _ in experts.named_parameters()] != [first, _DOWN] or any(True for _ in experts.buffers()):
        return f"holds other tensors than {first} and {_DOWN}"
    up, down = settings.get_parameter(first), settings.get_parameter(_DOWN)
    inner = up.shape[1] // 2 if settings.has_gate else up.shape[1]
    if up.dim() != 3 or down.shape != (up.shape[0], up.shape[2], inner) or up.shape[0] != settings.num_experts:
        return f"has matrices of shapes {tuple(up.shape)} and {tuple(down.shape)}"
    return None if _computes_as_known(experts, first) else "computes something else than gate, product and sum"


def _computes_as_known(experts: nn.Module, first: str) -> bool:
    """Whether a small module with the settings of `experts` gives what `PackedExperts` gives."""
    own = getattr(type(experts).forward, "__wrapped__", None)
    if own is None:
        return False
    count, width, inner, generator = 3, 8, 4, torch.Generator().manual_seed(0)
    rows = 2 * inner if experts.has_gate else inner

    def small() -> Any:
        """The same class and settings with other Parameters."""
        made: Any = copy.copy(experts)
        made.__dict__ = {**experts.__dict__, "num_experts": count, "_parameters": dict(tensors)}
        return made

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        tensors = {
            first: nn.Parameter(drawn(count, rows, width)),
            _DOWN: nn.Parameter(drawn(count, width, inner)),
        }
        x, weights = drawn(6, width), drawn(6, 2).sigmoid()
        chosen = torch.tensor([[0, 1], [2, 0], [0, 2], [0, 1], [2, 1], [1, 0]])
        ours = PackedExperts.__new__(PackedExperts)
        nn.Module.__init__(ours)
        ours.num_experts, ours._first, ours._gated = count, first, bool(experts.has_gate)
        for name, tensor in tensors.items():
            ours.register_parameter(name, tensor)
        ours.__dict__["_original"] = small()
        try:
            return torch.allclose(own(small(), x, chosen, weights), ours(x, chosen, weights), rtol=1e-4, atol=1e-5)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
            return False


def routers(model: nn.Module) -> set[str]:
    """The names of the linear layers that send tokens to experts, or weigh a shared expert.

    They are small, and what they decide is not to be rounded.
    """
    found = set()
    for name, experts in fused_experts(model):
        parent, _, own = name.rpartition(".")
        outputs = {1, getattr(experts, "num_experts", 1)}
        for path, module in model.get_submodule(parent).named_modules():
            words = path.split(".")
            routes = "router" in words or words[-1] in ("gate", "router") or words[-1].endswith("expert_gate")
            if isinstance(module, nn.Linear) and words[0] != own and routes and module.out_features in outputs:
                found.add(f"{parent}.{path}" if parent else path)
    return found
