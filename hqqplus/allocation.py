"""Plans that spend bits where they are worth most: `allocate` for a target of bits per weight, `hybrid_plan` by rule.

Both need no data and give a `QuantPlan`, which `HqqPlusConfig.from_plan`, `quantize_model` and `quantize_folder` take
as any other. Its overrides name single layers, by patterns that match nothing else in the model.

`allocate` minimises sum a_l NMSE_l over the linear layers (`quantization/allocation.py` has the theorem). What a_l is
decides how much that helps (benchmarks/LOG.md has the figures):

- a model that is loaded is asked: `probe` quantizes one layer at a time and looks how far the predictions on random
  tokens move. Of what was tried this helps most, all in all; asking on real text is no better;
- of a model that is only named no more than one weight is in memory, and nothing can be asked: there
  `prior_weights` goes by the size of a layer and whether it is in the first block. It helps less.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hqqplus import models
from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.kernels import quantize
from hqqplus.modules import PackedState
from hqqplus.modules.experts import fused_experts
from hqqplus.modules.replace import is_stack, plan_modules, weight_of
from hqqplus.progress import WorkProgress
from hqqplus.quantization import QuantPlan, QuantSpec
from hqqplus.quantization.allocation import Option, candidate_specs, choose, measure_nmse, stored_bits
from hqqplus.quantization.spec import NBITS, matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = candidate_specs()
"""1, 2, 3 and 4 bits in groups of 32, 64 and 128."""
FIRST_BLOCK_WEIGHT = 2.0
# How a layer is disturbed in a probe, and on how much: sequences of random tokens.
_PROBE_SPEC = QuantSpec(2, 64)
_PROBE_SHAPE = (8, 64)
# Group sizes tried for an embedding, the coarsest that divides its width first; 4 bits want finer ones.
_EMBEDDING_GROUPS = {8: (64, 32, 16, 8), 4: (32, 16, 8)}


@dataclass(frozen=True)
class LayerErrors:
    """What the candidates do to one linear layer: `nmse[i]` is that of candidate i; `shape` is (out, in) features."""

    name: str
    shape: tuple[int, int]
    nmse: tuple[float, ...]


@dataclass(frozen=True)
class ModelErrors:
    """The errors of all linear layers of a model, from which plans for any target are made (`plan_for`)."""

    candidates: tuple[QuantSpec, ...]
    layers: tuple[LayerErrors, ...]
    modules: frozenset[str]  # the names of all modules, which patterns have to tell apart
    skip: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights all these layers have."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    def plan_for(self, target_bpw: float, weights: Mapping[str, float] | None = None) -> QuantPlan:
        """The plan of least sum a_l NMSE_l among those of `target_bpw` stored bits per weight or fewer.

        Args:
            target_bpw: bits per weight over all these layers, everything stored included.
            weights: a_l by layer name or by pattern, as in `QuantPlan.overrides`: the layer's full name wins, else the
                last pattern that matches; 1 where nothing does.

        Raises:
            UserError: if the target is below the smallest possible or no positive number, or a weight is negative or
                not finite.
        """
        sensitivity = [_weight_of(layer.name, weights or {}) for layer in self.layers]
        options = [
            [
                Option(stored_bits(spec, *layer.shape), weight * nmse)
                for spec, nmse in zip(self.candidates, layer.nmse, strict=True)
            ]
            for layer, weight in zip(self.layers, sensitivity, strict=True)
        ]
        if not (isinstance(target_bpw, int | float) and math.isfinite(target_bpw)):
            raise UserError(f"target_bpw is {target_bpw!r}: it must be a number of bits per weight")
        smallest, largest = (sum(end(option.cost for option in layer) for layer in options) for end in (min, max))
        total = self.weights
        budget = math.floor(target_bpw * total)
        budget += (budget + 1) / total <= target_bpw  # the product may have been rounded down
        if budget < smallest:
            low, high = math.ceil(1e3 * smallest / total) / 1e3, largest / total
            raise UserError(
                f"target_bpw is {target_bpw}: with these candidates the model takes {low:g} bits per weight or more, "
                f"up to {high:.4g}"
            )
        chosen = [self.candidates[index] for index in choose(options, budget)]
        specs = {layer.name: spec for layer, spec in zip(self.layers, chosen, strict=True)}
        sizes: Counter[QuantSpec] = Counter()
        for layer in self.layers:
            sizes[specs[layer.name]] += math.prod(layer.shape)
        default = sizes.most_common(1)[0][0]
        named = {name: spec for name, spec in specs.items() if spec != default}
        return QuantPlan(default, _overrides(named, default, self.modules), self.skip)


def allocate(
    model: PreTrainedModel | nn.Module | str,
    target_bpw: float,
    *,
    candidates: Sequence[QuantSpec] = CANDIDATES,
    weights: Mapping[str, float] | None = None,
    skip: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> QuantPlan:
    """Choose bits and group size of each linear layer, for `target_bpw` stored bits per weight or fewer over them all.

    Embeddings and the output head are not touched and not counted; `hybrid_plan(model, plan, embeddings=8)` adds them.

    Args:
        model: a full-precision model, or the name of one (hub id or folder), whose weights are then read from disk one
            at a time.
        target_bpw: bits per weight, codes, scales, offsets and padding included.
        candidates: what a layer can be quantized to; `candidate_specs` makes grids of them.
        weights: how much the NMSE of a layer counts, by name or pattern (see `ModelErrors.plan_for`). Without it:
            `probe(model)` of a model that is loaded, `prior_weights` of one that is named.
        skip: name patterns of layers that stay in full precision.
        revision, trust_remote_code: as in transformers, for a name.

    Raises:
        UserError: if the target is out of reach, the model is packed already, has no linear layers or cannot be read.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    skeleton = _skeleton(model, **options)
    errors = _errors(model, skeleton, revision, candidates, skip)
    if weights is None:
        loaded = isinstance(model, nn.Module) and _is_transformers(model)
        weights = probe(skeleton, skip=skip) if loaded else prior_weights(skeleton)
    return errors.plan_for(target_bpw, weights)


def refine_plan(
    name: str,
    plan: QuantPlan,
    *,
    target_bpw: float | None = None,
    ask: bool = False,
    embeddings: int | None = None,
    edge_blocks: int | None = None,
    down_proj: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> QuantPlan:
    """`plan` for model `name` with bits shared out for `target_bpw`, and then raised as `hybrid_plan` does.

    The plan's own overrides, skips, solver options, axis and metadata stay; its overrides do not count in the target.

    Args:
        ask: where there is a target, load the model and `probe` it, instead of going by `prior_weights`.

    Raises:
        UserError: as `allocate` and `hybrid_plan`.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if target_bpw is not None:
        kept = {field: getattr(plan.default, field) for field in ("axis", "metadata_dtype", "metadata_bits")}
        arguments: dict[str, Any] = {"candidates": [spec.replace(**kept) for spec in CANDIDATES], "skip": plan.skip}
        if ask:
            made = allocate(models.load_causal_lm(name, where="model", **options), target_bpw, **arguments)
        else:
            made = allocate(name, target_bpw, **arguments, **options)
        plan = QuantPlan(made.default, {**made.overrides, **plan.overrides}, plan.skip, plan.solver)
    if (embeddings, edge_blocks, down_proj) != (None, None, None):
        raised: dict[str, Any] = {"embeddings": embeddings, "edge_blocks": edge_blocks, "down_proj": down_proj}
        plan = hybrid_plan(name, plan, **raised, **options)
    return plan


def layer_errors(
    model: PreTrainedModel | nn.Module | str,
    candidates: Sequence[QuantSpec] = CANDIDATES,
    *,
    skip: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelErrors:
    """Measure each candidate on each linear layer of `model`; the arguments are those of `allocate`.

    This is the slow part. Of a large weight some rows are measured (`quantization.allocation.sample_rows`).

    Raises:
        UserError: if there are no candidates, the model is packed already, has no linear layers, cannot be read, or
            holds a weight that cannot be quantized; the message names it.
    """
    return _errors(model, _skeleton(model, revision, trust_remote_code), revision, candidates, skip)


def _errors(
    model: Any, skeleton: nn.Module, revision: str | None, candidates: Sequence[QuantSpec], skip: Sequence[str]
) -> ModelErrors:
    """`layer_errors` of a model whose skeleton is built already."""
    if not candidates:
        raise UserError("allocate: there is no candidate to choose from")
    names = _linear_names(skeleton, skip)
    read = _reader(model, revision)
    layers = []
    with WorkProgress(len(names), unit="layers", what="errors of the candidates") as progress:
        for name in names:
            weight = read(name)
            try:
                nmse = measure_nmse(weight, candidates, quantizer=quantize)
            except ValueError as error:
                raise UserError(f"{name}.weight: {error}") from None
            layers.append(LayerErrors(name, (weight.shape[0], weight.shape[1]), nmse))
            progress.advance(1, name)
    modules = frozenset(name for name, _ in skeleton.named_modules(remove_duplicate=False))
    return ModelErrors(tuple(candidates), tuple(layers), modules, tuple(skip))


def prior_weights(model: PreTrainedModel | nn.Module) -> dict[str, float]:
    """a_l where nothing is known of the model but its structure: the square root of a layer's number of weights, times
    `FIRST_BLOCK_WEIGHT` in the first decoder block, with whose errors all later ones work.

    A rule of thumb, chosen on three small models. What is better for a single model is for `probe` to say.
    """
    first = _blocks(model)[:1]
    return {
        name: math.sqrt(linear.weight.numel()) * (FIRST_BLOCK_WEIGHT if _inside(name, first) else 1.0)
        for name, linear in _linears(model).items()
    }


@torch.no_grad()
def probe(
    model: PreTrainedModel, *, input_ids: Tensor | None = None, skip: Sequence[str] = (), spec: QuantSpec = _PROBE_SPEC
) -> dict[str, float]:
    """a_l of every linear layer, asked from the model: name -> KL(parent || parent with this layer quantized) / NMSE.

    One forward pass for each layer, and one more. The weights are swapped in place and put back.

    Args:
        input_ids: int64 [sequences, length] to predict on; by default 8 x 64 random tokens, the same each time.
        skip: name patterns of layers that are left out.
        spec: what a layer is quantized to. At few bits, the KL is that of a real loss, not the slope at zero.

    Raises:
        UserError: if the model is packed already, a weight cannot be quantized, or its predictions are not finite.
    """
    names = _linear_names(model, skip)
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        embedding: Any = model.get_input_embeddings()
        input_ids = torch.randint(embedding.weight.shape[0], _PROBE_SHAPE, generator=generator)
    input_ids = input_ids.to(model.device)
    weights = {}
    with evaluating(model), WorkProgress(len(names), unit="layers", what="asking the model") as progress:
        parent = _log_probabilities(model, input_ids)
        if not torch.isfinite(parent).all():
            raise UserError(f"the predictions of {type(model).__name__} on random tokens are not finite")
        for name in names:
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            whole = module.weight.data
            try:
                packed = quantize(whole, spec)
            except ValueError as error:
                raise UserError(f"{name}.weight: {error}") from None
            nmse = packed.nmse(whole)
            try:
                module.weight.data = packed.dequantize(whole.dtype)
                changed = _log_probabilities(model, input_ids)
            finally:
                module.weight.data = whole
            divergence = (parent.exp() * (parent - changed)).sum(-1).mean().item()
            if not math.isfinite(divergence):
                raise UserError(
                    f"{name}: quantized, it makes the model's predictions on random tokens infinite or NaN"
                )
            weights[name] = max(divergence, 0.0) / nmse if nmse > 0 else 0.0
            progress.advance(1, name)
    return weights


def hybrid_plan(
    model: PreTrainedModel | str,
    default: QuantSpec | QuantPlan,
    *,
    embeddings: int | None = 8,
    edge_blocks: int | None = None,
    down_proj: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> QuantPlan:
    """`default` with more bits where few hurt most: embeddings and head, first and last block, down projections.

    Args:
        model: a full-precision transformers model, loaded, on the meta device, or the name of one; only its structure
            is looked at.
        default: for everything else: a spec, or a plan (of `allocate`), whose overrides and skips stay.
        embeddings: 8 or 4 bits for the token embedding and the output head, in groups along the row; None leaves them
            as they are in `default`.
        edge_blocks: at least so many bits for the linear layers of the first and the last decoder block.
        down_proj: at least so many bits for the layers that `down_projections` finds.
        revision, trust_remote_code: as in transformers, for a name.

    Raises:
        UserError: for bits that are not allowed, a model that is packed already, or a part that cannot be found in it.
    """
    if embeddings is not None and embeddings not in _EMBEDDING_GROUPS:
        raise UserError(f"embeddings is {embeddings!r}: it must be 8, 4 or None")
    for argument, bits in (("edge_blocks", edge_blocks), ("down_proj", down_proj)):
        if bits is not None and bits not in NBITS:
            raise UserError(f"{argument} is {bits!r}: it must be one of {', '.join(map(str, NBITS))} or None")
    skeleton = _skeleton(model, revision, trust_remote_code)
    plan = default if isinstance(default, QuantPlan) else QuantPlan(default)
    specs = _planned(skeleton, plan)
    blocks = decoder_blocks(skeleton) if edge_blocks is not None else []
    raised: list[tuple[int | None, list[str]]] = [
        (edge_blocks, [name for name in specs if _inside(name, (*blocks[:1], *blocks[-1:]))]),
        (down_proj, down_projections(skeleton) if down_proj is not None else []),
    ]
    for bits, names in raised:
        for name in names:
            if bits is not None and name in specs:
                specs[name] = specs[name].replace(nbits=max(bits, specs[name].nbits))
    if embeddings is not None:
        sizes = _EMBEDDING_GROUPS[embeddings]
        for name, width in _embedding_widths(skeleton).items():
            if not plan.skips(name):
                group = next((size for size in sizes if width % size == 0), sizes[0])
                specs[name] = plan.default.replace(nbits=embeddings, group_size=group, axis=1)
    unnamed = _planned(skeleton, QuantPlan(plan.default, skip=plan.skip))
    named = {name: spec for name, spec in specs.items() if unnamed.get(name) != spec}
    modules = [name for name, _ in skeleton.named_modules(remove_duplicate=False)]
    modules += [name for name in specs if is_stack(skeleton, name)]
    return QuantPlan(plan.default, _overrides(named, plan.default, modules), plan.skip, plan.solver)


def decoder_blocks(model: nn.Module) -> list[str]:
    """The names of the decoder blocks, first to last: the entries of the module list that holds most linear weights.

    That is `model.layers` of a Llama, `transformer.h` of a GPT-J, `model.decoder.layers` of an OPT. Lists within
    blocks (experts) hold less than the one around them.

    Raises:
        UserError: if no module list holds linear layers.
    """
    blocks = _blocks(model)
    if not blocks:
        raise UserError(f"{type(model).__name__} has no list of blocks with linear layers")
    return blocks


def _blocks(model: nn.Module) -> list[str]:
    best, held = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = sum(linear.weight.numel() for linear in _linears(module).values())
            if weights > held:  # of equals the outer one, which comes first
                best, held = name, weights
    if not held:
        return []
    blocks = model.get_submodule(best)
    assert isinstance(blocks, nn.ModuleList)
    return [f"{best}.{index}" if best else str(index) for index in range(len(blocks))]


def down_projections(model: nn.Module) -> list[str]:
    """The names of the linear layers by which the MLPs of the decoder blocks write to the residual stream.

    Found by structure, not by name: `down_proj` of a Llama, `fc2` of an OPT or Phi, `dense_4h_to_h` of a GPT-NeoX,
    `w2` of an expert. Of the linear layers that share a parent module, outside of anything called attention (by
    attribute or class), it is the last one defined, if its outputs are as many as the model is wide. Fused experts
    have theirs in a Parameter called `down_proj`.

    Raises:
        UserError: if there is none.
    """
    width = getattr(_text_config(model), "hidden_size", None)
    found: list[str] = []
    for block in decoder_blocks(model):
        last: dict[str, str] = {}
        for name, linear in _linears(model.get_submodule(block)).items():
            parent = name.rpartition(".")[0]
            if not in_attention(model.get_submodule(block), parent) and linear.out_features == width:
                last[parent] = f"{block}.{name}"
        found += last.values()
        prefix = f"{block}."
        found += [
            f"{name}.down_proj"
            for name, module in fused_experts(model)
            if name.startswith(prefix) and getattr(module, "down_proj", None) is not None
        ]
    if not found:
        raise UserError(
            f"down_proj: in {type(model).__name__} no linear layer of an MLP writes to a residual of width {width}"
        )
    return found


def describe_plan(model: PreTrainedModel | nn.Module | str, plan: QuantPlan) -> str:
    """`plan` for `model` as a Markdown table: a row for each kind of layer and spec, then the total of linear layers.

    A kind is a layer's name within its block; which blocks is said as ranges.
    """
    from hqqplus.integrations.transformers import tied_modules

    skeleton = _skeleton(model, None, False)
    specs = _planned(skeleton, plan)
    if _is_transformers(skeleton) and (tied := tied_modules(skeleton)):
        specs.pop(tied[1], None)  # the embedding's
    blocks = {block: index for index, block in enumerate(_blocks(skeleton))}
    rows: dict[tuple[str, QuantSpec], tuple[list[int], int, int]] = {}
    total_bits = total_weights = 0
    for name, spec in specs.items():
        weight, stack = weight_of(skeleton, name), is_stack(skeleton, name)
        out_features, in_features = weight.shape[-2:]
        experts = len(weight) if stack else 1
        bits, weights = experts * stored_bits(spec, out_features, in_features), weight.numel()
        if stack or isinstance(skeleton.get_submodule(name), nn.Linear):
            total_bits, total_weights = total_bits + bits, total_weights + weights
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        kind = name[len(block) + 1 :] if block else name
        numbers, bits_before, weights_before = rows.get((kind, spec), ([], 0, 0))
        numbers = [*numbers, blocks[block]] if block else numbers
        rows[kind, spec] = (numbers, bits_before + bits, weights_before + weights)
    lines = ["| layer | blocks | bits | group | bits per weight |", "|---|---|---|---|---|"]
    for kind, spec in sorted(rows, key=lambda row: [kind for kind, _ in rows].index(row[0])):
        numbers, bits, weights = rows[kind, spec]
        group = "row" if spec.group_size == -1 else spec.group_size
        lines.append(f"| {kind} | {_ranges(numbers)} | {spec.nbits} | {group} | {bits / weights:.3f} |")
    if total_weights:
        lines.append(f"| all linear layers | | | | {total_bits / total_weights:.3f} |")
    return "\n".join(lines)


def exact_patterns(names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """name -> a pattern for `QuantPlan.overrides` that matches it and none of the other `modules`.

    A pattern is also tried as a trailing part of a name, without wildcards: `head` would match `score.head` too. There
    a letter is put in brackets, `[h]ead`, which only the comparison as a glob understands; or as many letters as it
    takes.
    """
    tails = {part for name in modules for part in _tails(name)}
    patterns = {}
    for name in names:
        escaped = re.sub(r"[*?[]", r"[\g<0>]", name)
        forms = (re.sub(r"\w", r"[\g<0>]", escaped, count=letters) for letters in range(1, len(name) + 1))
        patterns[name] = escaped if escaped not in tails else next(form for form in forms if form not in tails)
    return patterns


def _tails(name: str) -> list[str]:
    """ "a.b.c" -> ["b.c", "c"]."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _overrides(
    specs: Mapping[str, QuantSpec], default: QuantSpec, modules: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Exact pattern -> the fields in which the spec differs from the default."""
    base, patterns = default.to_dict(), exact_patterns(specs, modules)
    return {
        patterns[name]: {key: value for key, value in spec.to_dict().items() if value != base[key]}
        for name, spec in specs.items()
    }


def _weight_of(name: str, weights: Mapping[str, float]) -> float:
    matching = [value for pattern, value in weights.items() if matches(name, pattern)]
    value = weights[name] if name in weights else matching[-1] if matching else 1.0
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise UserError(f"weights: {name} gets {value!r}: a weight must be a number, 0 or more")
    return float(value)


def _skeleton(model: Any, revision: str | None, trust_remote_code: bool) -> Any:
    """`model` itself, or the model of that name on the meta device: modules and shapes, no weights."""
    if not isinstance(model, nn.Module):
        from transformers import AutoConfig, AutoModelForCausalLM

        models.check_folder(model, "model")
        if models.is_packed(model):
            raise UserError(f"model: {model}: this model is packed already; give its parent")
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(models.resolve_name(model), revision=revision, **arguments)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **arguments)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"model: {model}: {str(error).strip().splitlines()[0]}") from error
    elif any(isinstance(module, PackedState) for module in model.modules()):
        raise UserError(f"this {type(model).__name__} is packed already; give its parent")
    return model


def _reader(model: Any, revision: str | None) -> Callable[[str], Tensor]:
    """Module name -> its weight."""
    if isinstance(model, nn.Module):
        return lambda name: model.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
    read, device = models.parent_weights(model, revision), models.pick_device(None)
    return lambda name: read(name).to(device)


def _is_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _planned(model: nn.Module, plan: QuantPlan) -> dict[str, QuantSpec]:
    """What `quantize_model` would pack under `plan`."""
    from hqqplus.integrations.transformers import plan_of

    return plan_of(model, plan) if _is_transformers(model) else plan_modules(model, plan)


def _linear_names(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """The linear layers that a plan without overrides packs: all but the output head and what is skipped."""
    skeleton = _skeleton(model, None, False)
    names = list(_planned(skeleton, QuantPlan(skip=tuple(skip))))
    if experts := next((name for name in names if is_stack(skeleton, name)), None):
        raise UserError(
            f"{type(model).__name__}: {experts} holds the matrices of experts, and bits are shared out for a target "
            "among linear layers only: give experts their bits by overrides, such as "
            "'*.experts.gate_up_proj', or skip them"
        )
    if not names:
        raise UserError(f"{type(model).__name__} has no linear layer to quantize with these skips")
    return names


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def in_attention(block: nn.Module, path: str) -> bool:
    """Whether a module on the way to `path` within `block` is an attention by its attribute's or its class's name."""
    parts = path.split(".") if path else []
    steps = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(
        "attn" in part.lower() or "attention" in part.lower() or "attention" in _class_name(block, step)
        for part, step in zip(parts, steps, strict=True)
    )


def _class_name(block: nn.Module, path: str) -> str:
    return type(block.get_submodule(path)).__name__.lower()


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _embedding_widths(model: Any) -> dict[str, int]:
    """Token embedding and output head: name -> their width, the length of a row."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or (head is not None and type(head) is not nn.Linear):
        raise UserError(
            f"embeddings: those of {type(model).__name__} do more than look rows up and cannot be packed: give None"
        )
    return {names[id(module)]: module.weight.shape[1] for module in (embedding, head) if module is not None}


def _log_probabilities(model: Any, input_ids: Tensor) -> Tensor:
    """float32 [sequences, length, vocabulary]"""
    return model(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
