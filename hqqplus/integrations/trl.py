"""TRL: the trainer. `SFTTrainer` with our perplexity as its evaluation, a manifest behind every checkpoint, and, where
they are asked for, distillation, learning rates of their own and parameters that PEFT does not save."""

from __future__ import annotations

import copy
import functools
import os
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# TRL reports every trainer that is made; we don't.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import ModelOutput
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.utils import maybe_gather_lm_head_ctx

from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import PerplexityResult

# (model, process index, number of processes, sum over processes) -> result
Evaluator = Callable[[Any, int, int, Callable[[torch.Tensor], torch.Tensor] | None], PerplexityResult]
# (checkpoint step, seconds of training in this process, tokens seen by it)
OnCheckpoint = Callable[[int, float, int], None]
# model -> groups of its trainable parameters with settings of their own: {"params": [...], "lr": 1e-4}
ParamGroups = Callable[[Any], list[dict[str, Any]]]


class Loss(Protocol):
    """`hqqplus.recovery.distillation.DistillationLoss`: sums over the positions, but for `loss`."""

    @property
    def loss(self) -> Tensor: ...

    @property
    def kl(self) -> Tensor: ...

    @property
    def ce(self) -> Tensor: ...

    @property
    def hidden(self) -> Tensor: ...

    @property
    def correct(self) -> Tensor: ...

    @property
    def positions(self) -> int: ...


class Distillation(Protocol):
    """What the trainer needs to distil: `hqqplus.recovery.distillation.Distillation`."""

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]: ...

    def targets(self, inputs: dict[str, Any]) -> Any: ...

    def loss(
        self, model: Any, hidden: Tensor, labels: Tensor, targets: Any, num_items: Tensor | int | None
    ) -> Loss: ...


class Extras(NamedTuple):
    """State that the checkpoint of a PEFT model leaves out, as a pair of functions of the checkpoint's folder.

    `save` is called by the one process that writes checkpoints, when the model is saved and before the manifest;
    `load` by every process, when the model is loaded and before its optimizer's state is.
    """

    save: Callable[[Path], None]
    load: Callable[[Path], None]


class RecoveryTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluation is the perplexity that parent and quantized model are measured with too.

    Args:
        prepared: the training rows come from `prepare_rows`, and are trained on as they are.
        distillation: what to train on instead of TRL's loss. The load-balancing loss of a mixture of experts is then
            left out.
        param_groups: parameters with a learning rate of their own; the scheduler scales all rates alike. Where a group
            does not say it, weight decay is TRL's: none on norms and biases.
        extras: further state of a checkpoint.
    """

    def __init__(
        self,
        *,
        args: SFTConfig,
        evaluator: Evaluator,
        on_checkpoint: OnCheckpoint,
        prepared: bool = False,
        distillation: Distillation | None = None,
        param_groups: ParamGroups | None = None,
        extras: Extras | None = None,
        **kwargs: Any,
    ) -> None:
        if prepared:
            args = _for_prepared_rows(args)
        super().__init__(args=args, **kwargs)
        self.evaluator, self.distillation = evaluator, distillation
        self._param_groups, self._extras = param_groups, extras
        if distillation is not None:
            self.data_collator = distillation.collator(self.data_collator)
            _add_distillation(self._causal_model)
        self._clock = _Clock(self, on_checkpoint)
        # Last of all, so that the manifest comes after everything that other callbacks write.
        self.add_callback(self._clock)

    @property
    def _causal_model(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        result = self.measure(self.model)
        metrics = {f"{metric_key_prefix}_loss": result.nll, f"{metric_key_prefix}_perplexity": result.perplexity}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card knows nothing of the base; the shipped adapter gets ours."""

    def measure(self, model: Any) -> PerplexityResult:
        state = self.accelerator
        reduce = state.reduce if state.num_processes > 1 else None
        return self.evaluator(model, state.process_index, state.num_processes, reduce)

    @property
    def seconds(self) -> float:
        """Seconds spent in training by this process, evaluation and saving included."""
        return self._clock.seconds

    @property
    def tokens(self) -> int:
        """Tokens trained on by this process and its peers, padding excluded."""
        return int(self._total_train_tokens)

    # Distillation

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """TRL's loss, or that of the distillation, normalised as TRL's is."""
        if self.distillation is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "shift_labels" in inputs:
            raise UserError("distillation: sequences cannot be split between processes")
        arguments = {**inputs, "use_cache": False}
        targets = self.distillation.targets(arguments)
        request = _Request(self.distillation, targets, num_items_in_batch)
        outputs = model(**arguments, distillation=request)
        loss = outputs.loss
        # `num_items_in_batch` counts the tokens of every process, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note_metrics(arguments, outputs)
        return (loss, outputs) if return_outputs else loss

    def _note_metrics(self, inputs: Mapping[str, Any], outputs: _DistilledOutput) -> None:
        """Means over the supervised positions of all processes, and the tokens trained on, under TRL's own names."""
        trained: Any = self.model
        mode = "train" if trained.training else "eval"
        sums = self.accelerator.reduce(outputs.sums, "sum").tolist()
        for name, value in zip(("kl", "ce", "hidden", "mean_token_accuracy"), sums, strict=False):
            self._metrics[mode][name].append(value / sums[-1] if sums[-1] else 0.0)
        if mode == "train":
            # A batch without padding has no mask: all of its tokens count.
            mask, tokens = inputs.get("attention_mask"), inputs["input_ids"]
            count = mask.sum() if mask is not None else torch.tensor(tokens.size(1), device=tokens.device)
            seen = self.accelerator.gather_for_metrics(count).sum().item()
            self._total_train_tokens += seen // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    # Learning rates

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the parameters that `param_groups` names in groups of their own."""
        there = self.optimizer is not None
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if not there and self._param_groups is not None:
            whole: Any = self.model if model is None else model
            decays = set(self.get_decay_parameter_names(whole))
            _regroup(made, whole, self._param_groups(whole), self.args.weight_decay, decays)
        return made

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Called by the Trainer for a checkpoint.
        if _internal_call and output_dir is not None and self._extras is not None and self.args.should_save:
            self._extras.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._extras is not None:
            self._extras.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._extras is not None and self.state.best_model_checkpoint is not None:
            self._extras.load(Path(self.state.best_model_checkpoint))


class _Clock(TrainerCallback):
    """Times the training and reports checkpoints."""

    def __init__(self, trainer: RecoveryTrainer, on_checkpoint: OnCheckpoint) -> None:
        self.trainer, self.on_checkpoint = trainer, on_checkpoint
        self._started: float | None = None
        self._stopped: float | None = None

    @property
    def seconds(self) -> float:
        if self._started is None:
            return 0.0
        return (self._stopped or time.monotonic()) - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._stopped = time.monotonic(), None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stopped = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self.on_checkpoint(state.global_step, self.seconds, self.trainer.tokens)


@dataclass(frozen=True, eq=False)
class _Request:
    """What goes through the wrappers of a model (DDP, FSDP, PEFT) to its forward pass: opaque to all of them."""

    distillation: Distillation
    targets: Any
    num_items: Tensor | int | None


@dataclass
class _DistilledOutput(ModelOutput):
    """`loss`; `sums` [5], detached: kl, ce, hidden and correct summed over the supervised positions, their number."""

    loss: Tensor | None = None
    sums: Tensor | None = None


def _add_distillation(model: Any) -> None:
    """Let `model(..., labels=..., distillation=request)` return the loss of the request, and build no logits.

    In the model's own forward pass, as TRL's fused head is: so it runs inside what DDP, FSDP and autocast put around
    it. Called otherwise, the model is what it was.
    """
    without = model.forward

    # The signature stays the class's: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, distillation: _Request | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return without(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        # Looked up at each call, since FSDP replaces it.
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        # DeepSpeed's ZeRO-3 brings a module's parameters together only where the module itself is called.
        with maybe_gather_lm_head_ctx(*self.get_output_embeddings().parameters()):
            counts = labels != -100
            found = distillation.distillation.loss(
                self, hidden[counts], labels[counts], distillation.targets, distillation.num_items
            )
        parts = [found.kl, found.ce, found.hidden, found.correct]
        sums = torch.stack([*parts, torch.full_like(found.kl, found.positions)]).detach()
        return _DistilledOutput(loss=found.loss, sums=sums)

    model.forward = types.MethodType(forward, model)


def _regroup(
    optimizer: torch.optim.Optimizer, model: Any, groups: list[dict[str, Any]], weight_decay: float, decays: set[str]
) -> None:
    """Move the parameters of `groups` out of the optimizer's groups into these; those named in `decays` decay.

    Raises:
        ValueError: if a group has a parameter twice, or one that is not trained.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = [id(parameter) for group in groups for parameter in group["params"]]
    if len(set(chosen)) < len(chosen) or not names.keys() >= set(chosen):
        raise ValueError("param_groups: each parameter must be one that the model trains, and stand in one group")
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in set(chosen)]
    for group in groups:
        if "weight_decay" in group:
            optimizer.add_param_group(group)
            continue
        for decay in (True, False):
            parameters = [p for p in group["params"] if (names[id(p)] in decays) is decay]
            if parameters:
                own = {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
                optimizer.add_param_group({**group, **own})


def sft_config(settings: Mapping[str, Any], where: str) -> SFTConfig:
    """`SFTConfig(**settings)` with its complaints as a `UserError` of one sentence that names `where`."""
    try:
        return SFTConfig(**settings)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"{where}: training: {str(error).strip().splitlines()[0]}") from None


# Rows ----------------------------------------------------------------------------------------------------------------


def prepare_rows(dataset: Any, tokenizer: Any, arguments: SFTConfig) -> Any:
    """The rows that `SFTTrainer` would train on: tokens, labels and, where packed, lengths of documents.

    No model is needed. Hand them to `RecoveryTrainer(..., prepared=True)`: TRL by itself takes rows that have tokens
    for prepared, but packs them again.

    Raises:
        UserError: if the chat template is to be taken from another model, which TRL can do with a model alone.
    """
    bare: Any = SFTTrainer.__new__(SFTTrainer)
    # All that `_prepare_dataset` reads of a trainer, made as its constructor makes it.
    bare._tokenizer = tokenizer
    sample = next(iter(dataset))
    template = arguments.chat_template_path
    if template is not None:
        if not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
            raise UserError(f"training.chat_template_path: {template}: give a file that ends in .jinja or .j2")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    bare.chat_template = None
    if arguments.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        bare.chat_template = get_training_chat_template(tokenizer)
    bare.completion_only_loss = arguments.completion_only_loss
    if bare.completion_only_loss is None:
        bare.completion_only_loss = "prompt" in sample and "completion" in sample
    return bare._prepare_dataset(dataset, tokenizer, arguments, arguments.packing, None, "train")


def _for_prepared_rows(arguments: SFTConfig) -> SFTConfig:
    """`arguments` with which `SFTTrainer` leaves its rows alone; how they are collated stays as it was."""
    changed = copy.copy(arguments)
    own: Any = arguments.dataset_kwargs
    changed.dataset_kwargs = {**(own or {}), "skip_prepare_dataset": True}
    # The labels say it already, and TRL would look for messages.
    changed.assistant_only_loss = False
    return changed
