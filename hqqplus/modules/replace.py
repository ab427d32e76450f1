"""Putting packed layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqplus.errors import UserError
from hqqplus.kernels import quantize
from hqqplus.modules.embedding import PackedEmbedding, row_scale
from hqqplus.modules.experts import (
    KNOWN,
    PackedExperts,
    PackedStack,
    fused_experts,
    projections,
    routers,
    why_not,
)
from hqqplus.modules.linear import PackedLinear
from hqqplus.modules.packed import PackedState
from hqqplus.quantization import PackedTensor, QuantPlan, QuantSpec, SolverOptions

# (module name, full-precision weight, what it was packed to)
PackingObserver = Callable[[str, Tensor, PackedTensor], None]
_observers: ContextVar[tuple[PackingObserver, ...]] = ContextVar("hqqplus_packing_observers", default=())


@contextmanager
def observe_packing(observer: PackingObserver) -> Iterator[None]:
    """Within the block, `observer` sees every weight beside its packed form, as it is packed.

    That moment is the only one at which both are in memory; the residual start of LoRA is computed then. The matrices
    of experts, which get no LoRA, are shown only to an observer that has a method
    `expert(name, index, weight, packed)` (name: that of the stack), from the first expert to the last.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


@dataclass(frozen=True)
class Solutions:
    """What layers are quantized to, found beforehand (by a calibration).

    Attributes:
        tensors: module name -> packed tensor; it may read them from disk as they are asked for.
        digest: what tells these from other solutions; work that was begun with others is not continued.
    """

    tensors: Mapping[str, PackedTensor]
    digest: str


_solutions: ContextVar[Solutions | None] = ContextVar("hqqplus_solutions", default=None)


@contextmanager
def packed_already(solutions: Solutions) -> Iterator[None]:
    """Within the block a weight whose module is named in `solutions` is packed to that, and not solved.

    It holds for quantizing while loading, in memory and on the disk. Modules that are not named are solved as ever.
    """
    token = _solutions.set(solutions)
    try:
        yield
    finally:
        _solutions.reset(token)


def solutions_in_use() -> Solutions | None:
    """Those of the innermost `packed_already`."""
    return _solutions.get()


def check_solutions(names: Collection[str]) -> None:
    """Refuse solutions for modules that are not among `names`, those that a model packs.

    Raises:
        ValueError: naming one that is not.
    """
    solutions = _solutions.get()
    strangers = [name for name in solutions.tensors if name not in names] if solutions else []
    if strangers:
        raise ValueError(f"there is a solution for {strangers[0]}, which is no module that this model packs")


def plan_modules(
    model: nn.Module,
    plan: QuantPlan,
    only_if_named: frozenset[str] = frozenset(),
    tied: tuple[str, str] | None = None,
) -> dict[str, QuantSpec]:
    """Which modules of `model` become packed, and how: dotted name -> spec.

    Linear layers follow the plan. Embeddings, and the modules in `only_if_named` (output heads), are packed only
    where an override names them, and so are the linear layers that route tokens to experts. `tied` = (embedding, head)
    share one weight: naming either packs both, alike. Fused experts follow the plan by the names of their Parameters,
    `...experts.gate_up_proj`; a pattern may name the module of experts as well.

    Raises:
        UserError: for experts that are not skipped and cannot be packed.
        ValueError: if the overrides give the two tied modules different specs or an embedding axis 0, or name the head
            of a tied embedding that does more than look up rows and scale them all alike.
    """
    specs = {}
    only_if_named = only_if_named | routers(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedState):
            continue
        # Exact types: a subclass (another library's quantized layer, a LoRA wrapper) has its own idea of `weight`.
        if type(module) is nn.Linear and name not in only_if_named:
            spec = plan.spec_for(name)
        elif type(module) is nn.Linear or (isinstance(module, nn.Embedding) and row_scale(module) is not None):
            spec = plan.override_for(name)
        else:
            continue
        if spec is not None:
            specs[name] = spec
    specs.update(_plan_experts(model, plan))
    if tied is not None:
        named = {specs[name] for name in tied if name in specs}
        if len(named) > 1:
            raise ValueError(f"{tied[0]} and {tied[1]} share one weight, but the overrides give them different bits")
        specs.update(dict.fromkeys(tied, *named) if named else {})
        embedding = model.get_submodule(tied[0])
        if named and not (isinstance(embedding, nn.Embedding) and row_scale(embedding) is not None):
            raise ValueError(
                f"{tied[0]} is a {type(embedding).__name__}: what it does beside the look-up would be lost, so skip it"
            )
    for name, spec in specs.items():
        if not is_stack(model, name) and isinstance(model.get_submodule(name), nn.Embedding) and spec.axis != 1:
            raise ValueError(f"{name} is an embedding: it is quantized along its rows, axis must be 1")
    return specs


def _plan_experts(model: nn.Module, plan: QuantPlan) -> dict[str, QuantSpec]:
    specs: dict[str, QuantSpec] = {}
    refused: dict[str, tuple[str, int]] = {}  # class -> (why, how many weights)
    for name, module in fused_experts(model):
        own = {}
        for projection in projections(module):
            path = f"{name}.{projection}"
            spec = plan.override_for(path) or plan.override_for(name) or plan.spec_for(path)
            if spec is not None and not plan.skips(path) and not plan.skips(name):
                own[path] = spec
        reason = why_not(module) if own else None
        if reason is None:
            specs.update(own)
        else:
            weights = sum(module.get_parameter(projection).numel() for projection in projections(module))
            refused[type(module).__name__] = reason, weights + refused.get(type(module).__name__, ("", 0))[1]
    for kind, (reason, weights) in refused.items():
        share = 100 * weights / sum(parameter.numel() for parameter in model.parameters())
        raise UserError(
            f"{type(model).__name__}: {share:.0f} % of its weights are experts of class {kind}, which cannot be "
            f"packed: it {reason}. Those of {KNOWN} can; leave these in 16 bits by a skip pattern "
            f"(quantization.skip, --skip, modules_to_not_convert): {_skip_pattern(model, kind)!r}"
        )
    return specs


def _skip_pattern(model: nn.Module, kind: str) -> str:
    """A pattern that names the modules of experts of class `kind`."""
    names = [name for name, module in fused_experts(model) if type(module).__name__ == kind]
    last = {name.rpartition(".")[2] for name in names}
    return f"*.{last.pop()}" if len(last) == 1 and "." in names[0] else names[0]


def is_stack(model: nn.Module, name: str) -> bool:
    """Whether planned name `name` is that of the matrices of experts, packed or not, and not that of a module."""
    home, _, projection = name.rpartition(".")
    module = model.get_submodule(home)
    return module._parameters.get(projection) is not None or isinstance(getattr(module, projection), PackedStack)


def weight_name(model: nn.Module, name: str) -> str:
    """The name of the Parameter that is packed into what a plan calls `name`."""
    return name if is_stack(model, name) else f"{name}.weight"


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The full-precision weight of what a plan calls `name`: a matrix, or that of experts [experts, rows, columns]."""
    return model.get_parameter(weight_name(model, name))


def put_empty(model: nn.Module, name: str, spec: QuantSpec, compute_dtype: torch.dtype) -> PackedState:
    """Put the packed counterpart of what a plan calls `name` into its place, on the meta device and to be filled."""
    layer: PackedState
    if is_stack(model, name):
        experts, rows, columns = weight_of(model, name).shape
        layer = PackedStack(experts, (rows, columns), spec, compute_dtype, device="meta")
        put_stack(model, name, layer)
    else:
        layer = empty_packed(model.get_submodule(name), spec, compute_dtype)
        model.set_submodule(name, layer)
    return layer


def put_stack(model: nn.Module, name: str, stack: PackedStack) -> None:
    """Put `stack` into the place of Parameter `name` of a module of experts, which becomes `PackedExperts` by that."""
    home, _, projection = name.rpartition(".")
    experts = model.get_submodule(home)
    if not isinstance(experts, PackedExperts):
        experts = PackedExperts(experts)
        model.set_submodule(home, experts)
    experts.put(projection, stack)


def empty_packed(module: nn.Module, spec: QuantSpec, compute_dtype: torch.dtype) -> PackedLinear | PackedEmbedding:
    """The packed counterpart of a linear layer or embedding on the meta device, to be filled from a checkpoint."""
    if isinstance(module, nn.Embedding):
        return PackedEmbedding.empty(module, spec, compute_dtype)
    assert isinstance(module, nn.Linear)
    packed = PackedLinear(module.in_features, module.out_features, False, spec, compute_dtype, device="meta")
    packed.take_bias(module)
    return packed


def pack_module(
    model: nn.Module,
    name: str,
    weight: Tensor,
    spec: QuantSpec,
    compute_dtype: torch.dtype,
    options: SolverOptions | None = None,
) -> PackedLinear | PackedEmbedding | PackedStack:
    """Quantize `weight` and put the packed layer in the place of module (or matrices of experts) `name` of `model`.

    Within `packed_already` it is not solved where there is a solution for it.

    Raises:
        ValueError: if the weight holds NaN or infinite values, or its solution is of another form; the message names
            the tensor.
    """
    if is_stack(model, name):
        return _pack_experts(model, name, weight, spec, compute_dtype, options)
    module = model.get_submodule(name)
    shape = (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else None
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{name}.weight: its shape is {tuple(weight.shape)}, the model's configuration asks for {shape}"
        )
    try:
        packed = _solved(name, weight, spec) or quantize(weight, spec, options)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from None
    for observer in _observers.get():
        observer(name, weight, packed)
    layer = empty_packed(module, spec, compute_dtype)
    layer.set_packed(packed)
    model.set_submodule(name, layer.train(module.training))
    return layer


def _pack_experts(
    model: nn.Module,
    name: str,
    weight: Tensor,
    spec: QuantSpec,
    compute_dtype: torch.dtype,
    options: SolverOptions | None,
) -> PackedStack:
    shape = tuple(weight_of(model, name).shape)
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: its shape is {tuple(weight.shape)}, the model's configuration asks for {shape}")
    experts, rows, columns = shape
    stack = PackedStack(experts, (rows, columns), spec, compute_dtype, device=weight.device)
    for index in range(experts):
        stack.set_expert(index, pack_expert(name, index, weight[index], spec, options))
    put_stack(model, name, stack)
    return stack


def pack_expert(
    name: str, index: int, weight: Tensor, spec: QuantSpec, options: SolverOptions | None = None
) -> PackedTensor:
    """Quantize the matrix [rows, columns] of one expert of stack `name`; observers see it.

    Raises:
        ValueError: if it holds NaN or infinite values; the message names the tensor and the expert.
    """
    try:
        packed = quantize(weight, spec, options)
    except ValueError as error:
        raise ValueError(f"{name}, expert {index}: {error}") from None
    for observer in _observers.get():
        if (seen := getattr(observer, "expert", None)) is not None:
            seen(name, index, weight, packed)
    return packed


def _solved(name: str, weight: Tensor, spec: QuantSpec) -> PackedTensor | None:
    """The solution in use for module `name`, on the device of `weight`.

    Raises:
        ValueError: if it is of another spec or shape.
    """
    solutions = _solutions.get()
    packed = solutions.tensors.get(name) if solutions else None
    if packed is None:
        return None
    if (packed.spec, packed.shape) != (spec, tuple(weight.shape)):
        raise ValueError(
            f"its solution is {packed.spec} of {packed.shape}, asked for is {spec} of {tuple(weight.shape)}"
        )
    tensors = {key: tensor.to(weight.device) for key, tensor in packed.state().items()}
    return PackedTensor(**tensors, spec=spec, shape=packed.shape)


def tie_head(model: nn.Module, tied: tuple[str, str]) -> None:
    """Give the packed embedding `tied[0]` an output head on the same packed tensors in the place of `tied[1]`."""
    embedding = model.get_submodule(tied[0])
    assert isinstance(embedding, PackedEmbedding)
    head = embedding.tied_head()
    old = model.get_submodule(tied[1])
    if isinstance(old, nn.Linear):
        head.take_bias(old)
    model.set_submodule(tied[1], head)


def unpack_modules(model: nn.Module, dtype: torch.dtype, tied: tuple[str, str] | None = None) -> None:
    """Replace every packed layer by an ordinary one with the dequantized weight in `dtype`; tied ones stay tied."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(name, module.unpacked(dtype))
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedState)]
    for name, module in packed:
        plain: nn.Linear | nn.Embedding
        if isinstance(module, PackedEmbedding):
            plain = module.unpacked(dtype)
        else:
            assert isinstance(module, PackedLinear)
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(module.dequantize(dtype))
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().to(dtype))
        model.set_submodule(name, plain.train(module.training))
    if packed and tied is not None:
        head, embedding = model.get_submodule(tied[1]), model.get_submodule(tied[0])
        head.weight = embedding.weight


def packed_modules(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding | PackedStack]:
    """Dotted name -> packed layer, in the order of the model; a stack of experts counts as one."""
    kinds = (PackedLinear, PackedEmbedding, PackedStack)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def bits_per_weight(model: nn.Module) -> float:
    """Bits stored for the packed linear layers and experts, metadata included, over their number of weights.

    A head that shares an embedding's tensors is counted with the embedding, that is not at all. NaN without any.
    """
    modules: Mapping[str, PackedState] = packed_modules(model)
    shared = {id(module.W_q) for module in modules.values() if isinstance(module, PackedEmbedding)}
    linears = [m for m in modules.values() if isinstance(m, PackedLinear) and id(m.W_q) not in shared]
    stacks = [m for m in modules.values() if isinstance(m, PackedStack)]
    weights = sum(m.in_features * m.out_features for m in linears) + sum(m.weights for m in stacks)
    return 8 * sum(m.packed_bytes for m in [*linears, *stacks]) / weights if weights else float("nan")


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of `model` with floats in 16 bits, as they are shipped; each shared one once.

    A model computes in float32 on a CPU, which says nothing about its size.
    """
    return sum(p.numel() * (2 if p.is_floating_point() else p.element_size()) for p in model.parameters())
