"""Memory, disk and time of a recipe, from the configuration of its model alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqqplus.adapters.scales import scale_parameters
from hqqplus.allocation import decoder_blocks
from hqqplus.digests import weight_files
from hqqplus.estimation import passes as simulate
from hqqplus.estimation.cards import CARDS, RESERVE, Card
from hqqplus.estimation.optimizers import is_known, state_bytes, step_bytes
from hqqplus.estimation.parts import backbone_parts, byte_size, trained_bytes, trained_shapes
from hqqplus.estimation.passes import Passes, Shape, Sizes
from hqqplus.integrations.bare import bare_model, read_configuration, stored_dtype
from hqqplus.integrations.transformers import plan_of
from hqqplus.model_names import is_local, resolve_name
from hqqplus.modules import PackedLinear, packed_modules
from hqqplus.quantization.spec import QuantPlan, QuantSpec
from hqqplus.recipe import Recipe
from hqqplus.recovery import trainables
from hqqplus.recovery.distillation import LossWeights
from hqqplus.recovery.teacher import pick_teacher
from hqqplus.recovery.teaching import STUDENT_SHARE

DEFAULT_CONTEXT = 8192
# What SFTConfig takes where a recipe says nothing.
_BATCH, _EPOCHS, _OPTIMIZER = 8, 3.0, "paged_adamw_8bit"
_EIGHT_BIT = QuantPlan(QuantSpec(8, 64))
# A token's place in a teacher's cache: an id in 4 bytes and a log-probability in 2, k times.
_CACHE_BYTES = 6


@dataclass(frozen=True)
class Training:
    """What a training step holds, in bytes. `activations` are those of the recipe's own choice of checkpointing."""

    batch: int
    length: int
    checkpointing: bool
    optimizer: str
    optimizer_known: bool
    adapter_parameters: int
    adapter_shipped: int
    scale_parameters: int
    trained: int
    gradients: int
    optimizer_state: int
    optimizer_step: int
    activations: float
    activations_other: float
    kept: float
    loss: float
    workspace: int


@dataclass(frozen=True)
class Fit:
    """One card: the most that each job holds (bytes), and whether that is within what is usable."""

    card: Card
    teacher: str | None
    quantize: float
    train: float
    infer: float
    tokens_per_second: float
    train_hours: float | None
    calibrate_hours: float | None

    @property
    def fits(self) -> dict[str, bool]:
        return {job: getattr(self, job) <= self.card.usable for job in ("quantize", "train", "infer")}


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found; sizes in bytes, GB being 10^9 of them.

    Attributes:
        model, architecture, parameters: the parent's name, class and size.
        dtype: that is computed in.
        parent: the parent on a card, in `dtype`.
        backbone: the packed model on a card by part (`parts.PARTS`).
        bits_per_weight: of what is packed in the blocks, all that is stored for it over its weights; and
        bits_per_parameter: of everything in the packed folder over all parameters.
        training: a step; teachers: what each kind of teacher takes beside it, with the cache's bytes on the disk for a
            million tokens.
        context: of the generation; cache: its keys and values; prefill: the most beside weights while it is read.
        quantize: the most on a card while the model is quantized, calibration included.
        measure: while the parent is measured; None where it is not.
        host: the most in CPU memory while it is calibrated.
        disk: what is written and downloaded, by kind.
        flops: of a token of training, of generation.
        steps: of the optimizer; None where the number of rows decides.
        fits: by card.
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    parent: int
    backbone: dict[str, int]
    bits_per_weight: float
    bits_per_parameter: float
    training: Training
    teachers: dict[str, float]
    distils: bool
    context: int
    cache: float
    prefill: float
    quantize: float
    measure: float | None
    host: float
    disk: dict[str, float]
    flops: dict[str, float]
    steps: int | None
    tokens_a_step: int
    fits: tuple[Fit, ...]

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for entry, fit in zip(values["fits"], self.fits, strict=True):
            entry["card"] = {**entry["card"], "usable": fit.card.usable}
            entry["fits"] = fit.fits
        return {"unit": "bytes", **values, "reserve": RESERVE}


def estimate(
    recipe: Recipe,
    *,
    config: str | Path | None = None,
    context: int | None = None,
    cards: Sequence[Card] = CARDS,
) -> Estimate:
    """Estimate `recipe` on each of `cards`, as one process on one of them.

    Of a model on the hub nothing but `config.json` is downloaded.

    Args:
        config: a `config.json` to take instead of the model's.
        context: tokens of the generation; by default 8192, or what the model was made for if that is less.

    Raises:
        UserError: if there is no configuration, or the recipe does not go with the model.
    """
    section = recipe.model
    found = read_configuration(section.name_or_path, section.revision, section.trust_remote_code, config)
    text = found.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    dtype = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
    plan = recipe.quantization.plan()
    trust = section.trust_remote_code

    parent = bare_model(_unpacked(found), None, dtype, trust)
    blocks, counted = decoder_blocks(parent), sum(p.numel() for p in parent.parameters())
    parent_bytes = sum(map(byte_size, parent.parameters()))
    model = bare_model(found, plan, dtype, trust)
    backbone = backbone_parts(model)
    on_disk = sum(backbone_parts(model, sixteen_bits=stored_dtype(found).itemsize == 2).values())
    bits, active = _bits(model), _active_weights(parent, text)
    workspace = _workspace(model, dtype)

    training, passes = _training(recipe, model, blocks, dtype, context, workspace)
    specs = plan_of(parent, plan) if getattr(found, "quantization_config", None) is None else {}
    quantize, host = _quantizing(recipe, parent, blocks, specs, parent_bytes, sum(backbone.values()))
    teachers = {"online": float(parent_bytes), "cache": 0.0, "cache_disk": 1e6 * _CACHE_BYTES * recipe.recovery.top_k}
    distils = recipe.recovery.loss == "kd"
    if distils:
        teachers["8bit"] = float(sum(backbone_parts(bare_model(_unpacked(found), _EIGHT_BIT, dtype, trust)).values()))
    measure = parent_bytes + passes.evaluation if recipe.evaluation.parent else None
    steps, tokens = _steps(recipe, training)
    flops = _flops(recipe, text, active, training, context, len(blocks))
    known = _Known(
        recipe,
        counted,
        training,
        sum(backbone.values()),
        _read(backbone, active / _weights(parent)),
        teachers,
        quantize,
        measure,
        passes,
        flops,
        steps,
        tokens,
    )
    return Estimate(
        model=section.name_or_path,
        architecture=type(parent).__name__,
        parameters=counted,
        dtype=str(dtype).removeprefix("torch."),
        parent=parent_bytes,
        backbone=backbone,
        bits_per_weight=bits,
        bits_per_parameter=8 * on_disk / counted,
        training=training,
        teachers=teachers,
        distils=distils,
        context=context,
        cache=passes.cache,
        prefill=passes.generation,
        quantize=quantize,
        measure=measure,
        host=host,
        disk=_disk(recipe, found, counted, on_disk, training, host),
        flops=flops,
        steps=steps,
        tokens_a_step=tokens,
        fits=tuple(known.on(card) for card in cards),
    )


def _unpacked(config: Any) -> Any:
    """`config` as that of the parent."""
    if getattr(config, "quantization_config", None) is None:
        return config
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return type(config).from_dict(values)


# Training ------------------------------------------------------------------------------------------------------------


def _training(
    recipe: Recipe, model: Any, blocks: list[str], dtype: torch.dtype, context: int, workspace: int
) -> tuple[Training, Passes]:
    settings = recipe.training
    batch, length = settings.get("per_device_train_batch_size", _BATCH), recipe.data.max_length
    with torch.device("meta"):
        adapted = trainables.add_adapter(model, recipe)
        adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        trainables.train_scales(adapted, recipe)
    scales = sum(p.numel() for p in scale_parameters(adapted))
    shapes, trained = trained_shapes(adapted), trained_bytes(adapted)
    optimizer = settings.get("optim", _OPTIMIZER)
    checkpointing = _checkpointing(settings)
    mixed = settings.get("bf16", True), settings.get("fp16", False)
    autocast = torch.float16 if mixed[1] else torch.bfloat16 if mixed[0] else None
    # Rows of a batch that are not packed are padded to the longest.
    shape = Shape(batch, length, recipe.data.packing is not False or batch > 1, autocast)
    evaluation = Shape(recipe.evaluation.batch_size, length)
    section = recipe.recovery
    cached = section.teacher == "cache"
    weights = LossWeights(section.kl_weight, section.ce_weight, 0.0 if cached else section.hidden_weight)
    loss = (
        simulate.distillation(weights, section.top_k if cached else None)
        if section.loss == "kd"
        else simulate.cross_entropy
    )
    passes = simulate.run_passes(adapted, blocks, Sizes(shape, evaluation, Shape(1, context), checkpointing), loss)
    return Training(
        batch=batch,
        length=length,
        checkpointing=checkpointing,
        optimizer=optimizer,
        optimizer_known=is_known(optimizer),
        adapter_parameters=adapter,
        adapter_shipped=2 * adapter,
        scale_parameters=scales,
        trained=trained,
        gradients=trained,
        optimizer_state=state_bytes(optimizer, shapes),
        optimizer_step=step_bytes(optimizer, trained),
        activations=passes.step.peak,
        activations_other=passes.other_step.peak,
        kept=passes.step.kept,
        loss=passes.step.loss,
        workspace=workspace,
    ), passes


def _checkpointing(settings: Any) -> bool:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if settings.get(name) is not None:
            return bool(settings[name])
    return True  # TRL's own


def _bits(model: Any) -> float:
    """Bits stored for each weight that is packed in the blocks; a head in more bits would hide how few they are."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    layers = [layer for layer in packed_modules(model).values() if layer not in ends]
    weights = sum(math.prod(layer.matrix_shape) * getattr(layer, "experts", 1) for layer in layers)
    return 8 * sum(layer.packed_bytes for layer in layers) / weights if weights else math.nan


def _workspace(model: Any, dtype: torch.dtype) -> int:
    """What a product of many tokens takes inside: the largest weight, dequantized."""
    head = model.get_output_embeddings()
    layers = [m for m in packed_modules(model).values() if isinstance(m, PackedLinear) and m is not head]
    return max((math.prod(layer.matrix_shape) * dtype.itemsize for layer in layers), default=0)


# Quantizing ----------------------------------------------------------------------------------------------------------


def _quantizing(
    recipe: Recipe, parent: Any, blocks: list[str], specs: dict[str, QuantSpec], parent_bytes: int, backbone: int
) -> tuple[float, float]:
    """The most on a card, and in CPU memory, while the model is packed; nothing where it is packed already."""
    if not specs:
        return 0.0, 0.0
    largest, one = 0, 0
    for name, parameter in parent.named_parameters():
        if parameter.dim() >= 2 and (name.removesuffix(".weight") in specs or name in specs):
            matrix = math.prod(parameter.shape[-2:])
            largest, one = max(largest, matrix), max(one, byte_size(parameter))
    # As stored, in float32, its codes a byte each, and packed.
    solved = one + largest * 6.0
    linear = {name: spec for name, spec in specs.items() if _is_linear(parent, name)}
    if parent.config.sub_configs or len(linear) < len([n for n in specs if not _is_table(parent, n)]):
        # Composed of several models, or its tensors are fused while it is loaded: not file by file, but as a whole.
        solved += backbone
    section = recipe.calibration
    if section.method == "none":
        return solved, float(one)
    length = section.length or recipe.data.max_length
    width = parent.config.get_text_config().hidden_size
    itemsize = parent.dtype.itemsize
    activations = 2.0 * section.samples * length * width * itemsize
    host = parent_bytes + (0.0 if section.store == "disk" else activations)
    shape = Shape(min(section.batch_size, section.samples), length)
    codes = section.weight_learning_rate > 0
    # The parent is in CPU memory then, and the blocks come to the card one by one.
    reconstruction = simulate.reconstruction_bytes(parent, blocks, linear, shape, codes)
    return max(solved, reconstruction), host


def _is_linear(model: Any, name: str, kind: type[nn.Module] = nn.Linear) -> bool:
    try:
        return isinstance(model.get_submodule(name), kind)
    except AttributeError:
        return False  # the weights of experts, which are no module


def _is_table(model: Any, name: str) -> bool:
    return _is_linear(model, name, nn.Embedding)


# Disk and time -------------------------------------------------------------------------------------------------------


def _disk(
    recipe: Recipe, config: Any, parameters: int, packed: int, training: Training, host: float
) -> dict[str, float]:
    name = recipe.model.name_or_path
    folder = Path(resolve_name(name))
    found: dict[str, float] = {}
    if not is_local(name, "model.name_or_path"):
        found["download"] = float(parameters * stored_dtype(config).itemsize)
    elif folder.is_dir():
        found["download"] = 0.0
        found["model"] = float(sum((folder / file).stat().st_size for file in weight_files(folder)))
    saved = recipe.quantization.save_to is not None or recipe.calibration.method != "none"
    found["packed"] = float(packed) if saved else 0.0
    if recipe.calibration.method != "none":
        found["calibration"] = float(packed)
        if recipe.calibration.store == "disk":
            length = recipe.calibration.length or recipe.data.max_length
            width, size = config.get_text_config().hidden_size, stored_dtype(config).itemsize
            found["calibration"] += 2.0 * recipe.calibration.samples * length * width * size
    limit = recipe.training.get("save_total_limit") or 2
    # One more, while it is being written.
    found["checkpoints"] = float((limit + 1) * (training.trained + training.optimizer_state))
    found["adapter"] = float(training.adapter_shipped)
    if recipe.recovery.scales == "bake":
        found["backbone"] = float(packed)
    return found


def _steps(recipe: Recipe, training: Training) -> tuple[int | None, int]:
    """Optimizer steps, and the tokens of one."""
    settings = recipe.training
    tokens = training.batch * training.length * settings.get("gradient_accumulation_steps", 1)
    steps = settings.get("max_steps", -1)
    return (steps if steps > 0 else None), tokens


def _read(backbone: dict[str, int], share: float) -> float:
    """Bytes of the weights that generating a token reads: this share of the blocks, and the head."""
    head = backbone["head"] or backbone["embedding"]  # one table may be both
    return share * (backbone["linears"] + backbone["metadata"] + backbone["16 bits"]) + head


def _weights(parent: Any) -> int:
    """Weights of the blocks' matrices."""
    ends = {id(m.weight) for m in (parent.get_input_embeddings(), parent.get_output_embeddings())}
    return sum(p.numel() for p in parent.parameters() if p.dim() >= 2 and id(p) not in ends)


def _active_weights(parent: Any, text: Any) -> int:
    """Weights of the blocks' matrices that a token is multiplied with: of experts, those that it is sent to."""
    experts = next(
        (n for a in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, a, 0))), 0
    )
    chosen = getattr(text, "num_experts_per_tok", 0) or experts
    ends = {id(m.weight) for m in (parent.get_input_embeddings(), parent.get_output_embeddings())}
    total = 0.0
    for name, parameter in parent.named_parameters():
        if parameter.dim() < 2 or id(parameter) in ends:
            continue
        routed = experts and ".experts" in name
        total += parameter.numel() * (chosen / experts if routed else 1)
    return int(total)


def _flops(recipe: Recipe, text: Any, active: int, training: Training, context: int, blocks: int) -> dict[str, float]:
    """Operations of a token: of training (every product of a pass over the weights), of generating one."""
    head = text.vocab_size * text.hidden_size
    heads = getattr(text, "num_attention_heads", 1)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)

    def attention(length: float) -> float:
        return 4.0 * blocks * width * length

    forward = 2.0 * active + attention(training.length / 2)
    times = 2 + training.checkpointing  # forward, to the inputs, and forward again
    taught = recipe.recovery.loss == "kd" and recipe.recovery.teacher != "cache"
    train = times * forward + attention(training.length / 2) + 2.0 * head * 2
    train += 2.0 * active if training.scale_parameters else 0.0  # gradients of scales are sums over all weights
    train += (forward + 2.0 * head) if taught else 0.0
    calibration = recipe.calibration
    samples = (
        0.0 if calibration.method == "none" else calibration.samples * (calibration.length or recipe.data.max_length)
    )
    epochs = calibration.epochs if calibration.method == "block" else 0
    return {
        "train": train,
        "generate": 2.0 * (active + head) + attention(context),
        # Inputs and targets of each block, moments, and three products for each weight and epoch.
        "calibrate": samples * 2.0 * active * (4 + 3 * epochs),
    }


@dataclass(frozen=True)
class _Known:
    """What does not depend on the card."""

    recipe: Recipe
    parameters: int
    training: Training
    backbone: int
    read: float
    teachers: dict[str, float]
    quantize: float
    measure: float | None
    passes: Passes
    flops: dict[str, float]
    steps: int | None
    tokens: int

    def on(self, card: Card) -> Fit:
        teacher = self._teacher(card)
        held = self.training
        static = self.backbone + held.trained + held.gradients + held.optimizer_state
        beside = max(held.activations + held.workspace, held.optimizer_step)
        train = static + beside + (self.teachers[teacher] if teacher else 0.0)
        generating = self.backbone + 4 * held.adapter_parameters  # PEFT loads an adapter in float32
        read = self.read + 4 * held.adapter_parameters + self.passes.cache
        hours = None
        if self.steps is not None:
            hours = self.steps * self.tokens * self.flops["train"] / card.flops / 3600
        calibrating = self.flops["calibrate"] / card.flops / 3600 if self.flops["calibrate"] else None
        return Fit(
            card,
            teacher,
            self.quantize,
            max(train, self.measure or 0.0),
            generating + self.passes.generation + held.workspace,
            min(card.bandwidth / read, card.flops / self.flops["generate"]),
            hours,
            calibrating,
        )

    def _teacher(self, card: Card) -> str | None:
        section = self.recipe.recovery
        if section.loss != "kd":
            return None
        if section.teacher != "auto":
            return section.teacher
        size = 2 * self.parameters
        # As `recovery.teaching` decides it, with what torch says is free.
        kind = pick_teacher(size, int(card.usable), student_bytes=int(size * STUDENT_SHARE))
        return "8bit" if kind == "cache" and self.recipe.data.streaming else kind
