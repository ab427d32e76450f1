"""TRL: the trainer. `SFTTrainer` with our perplexity as its evaluation, checkpoints that are whole or not there, and,
where they are asked for, distillation, learning rates of their own and parameters that PEFT does not save."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# TRL reports every trainer that is made; we don't.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# And datasets counts every file that is loaded, those of this machine too.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import torch
from torch import Tensor
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import PerplexityResult
from hqqplus.files import full_disk
from hqqplus.integrations import fsdp
from hqqplus.integrations.chat_templates import settle_template
from hqqplus.integrations.distilling import Distillation, DistilledOutput, Request, add_distillation
from hqqplus.integrations.paging import page_again
from hqqplus.integrations.safekeeping import ROW_ID, ROW_IDS, Clock, LogState, Watch, with_row_ids
from hqqplus.integrations.training_progress import TrainingProgress
from hqqplus.integrations.transformers import refuse_spread

# (model, process index, number of processes, sum over processes) -> result
Evaluator = Callable[[Any, int, int, Callable[[torch.Tensor], torch.Tensor] | None], PerplexityResult]
# (folder that was written, optimizer step, seconds of training in this process, tokens seen by it)
OnCheckpoint = Callable[[Path, int, float, int], None]
# model -> groups of its trainable parameters with settings of their own: {"params": [...], "lr": 1e-4}
ParamGroups = Callable[[Any], list[dict[str, Any]]]


class Extras(NamedTuple):
    """State that the checkpoint of a PEFT model leaves out, as a pair of functions of the checkpoint's folder.

    Every process calls both, since a sharded model is gathered by all: `save` when the model is saved and before the
    manifest (it is for `save` to write in the main process alone), `load` when the model is loaded and before its
    optimizer's state is.
    """

    save: Callable[[Path], None]
    load: Callable[[Path], None]


class RecoveryTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluation is the perplexity that parent and quantized model are measured with too.

    Args:
        on_checkpoint: called by the main process with each checkpoint that is written, in a folder aside, to put it in
            its place.
        aside: name of the folder in the output folder in which checkpoints are written.
        prepared: the training rows come from `prepare_rows`, and are trained on as they are.
        distillation: what to train on instead of TRL's loss. The load-balancing loss of a mixture of experts is then
            left out.
        param_groups: parameters with a learning rate of their own; the scheduler scales all rates alike. Where a group
            does not say it, weight decay is TRL's: none on norms and biases.
        extras: further state of a checkpoint.
        stop_requested: number of the signal that told this process to stop, or 0. The training then ends at the next
            whole optimizer step, with a checkpoint; `stopped` is that number.
        describe_rows: ids of rows in words, for the message of a loss that is no number.
        resumed_from: the checkpoint that `train` will continue from.
        on_sharded: called in every process once a model for FSDP2 is sharded, before anything of it is trained or
            loaded from a checkpoint; without FSDP2 never.

    Attributes:
        last_checkpoint: folder of the newest complete checkpoint; None before there is one.
        log_state: sums that are not logged yet.
    """

    def __init__(
        self,
        *,
        args: SFTConfig,
        evaluator: Evaluator,
        on_checkpoint: OnCheckpoint,
        aside: str = ".checkpoint-being-written",
        prepared: bool = False,
        distillation: Distillation | None = None,
        param_groups: ParamGroups | None = None,
        extras: Extras | None = None,
        stop_requested: Callable[[], int] = lambda: 0,
        describe_rows: Callable[[list[int]], str] | None = None,
        resumed_from: Path | None = None,
        on_sharded: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> None:
        if prepared:
            args = _for_prepared_rows(args)
        refuse_spread(getattr(kwargs.get("model"), "hf_device_map", None))
        super().__init__(args=args, **kwargs)
        self.evaluator, self.distillation = evaluator, distillation
        self._param_groups, self._extras = param_groups, extras
        self._on_checkpoint, self._aside = on_checkpoint, aside
        self._writes_to: str | None = None
        self.last_checkpoint: Path | None = resumed_from
        if distillation is not None:
            self.data_collator = distillation.collator(self.data_collator)
            add_distillation(self._causal_model)
        self.data_collator = with_row_ids(self.data_collator)
        self._clock, self.log_state = Clock(), LogState(self)
        self._watch = Watch(self, stop_requested, describe_rows)
        self._sharded = fsdp.Announce(on_sharded if self.accelerator.is_fsdp2 else None)
        self._progress = TrainingProgress()
        for callback in (self._sharded, self._clock, self.log_state, self._watch, self._progress):
            self.add_callback(callback)
        for theirs in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(theirs)

    @property
    def _causal_model(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # Several processes

    def create_accelerator_and_postprocess(self) -> None:
        fsdp.allow_on_cpu(fsdp.is_requested() or bool(self.args.fsdp))
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            fsdp.keep_precision(self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_fsdp2:
            fsdp.shard_tied(self.model, self.accelerator)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._progress.close()
        trained: Any = self.model
        fsdp.settle(trained)
        return output

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        result = self.measure(self.model)
        metrics = {f"{metric_key_prefix}_loss": result.nll, f"{metric_key_prefix}_perplexity": result.perplexity}
        trained: Any = self.model
        training = trained.training
        # In training mode TRL would take what the training has summed up for part of this entry.
        trained.eval()
        self.log(metrics)
        trained.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _send_telemetry(self) -> None:
        """Nothing leaves a run, whatever the hub's library was told when it was imported."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card knows nothing of the base; the shipped adapter gets ours."""

    def measure(self, model: Any) -> PerplexityResult:
        state = self.accelerator
        reduce = state.reduce if state.num_processes > 1 else None
        result = self.evaluator(model, state.process_index, state.num_processes, reduce)
        fsdp.settle(model)
        return result

    @property
    def seconds(self) -> float:
        """Seconds spent in training by this process, evaluation and saving included."""
        return self._clock.seconds

    @property
    def tokens(self) -> int:
        """Tokens trained on by this process and its peers, padding excluded."""
        return int(self._total_train_tokens)

    @property
    def stopped(self) -> int:
        """Number of the signal that ended the training before its last step; 0 where it is through."""
        return self._watch.stopped

    # Steps

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if ROW_ID not in columns:
            columns.append(ROW_ID)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Continued from its last checkpoint a training is through; the Trainer would make one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = inputs.pop(ROW_IDS, None)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._watch.saw(loss, rows)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            # The closing entry: over the whole training, and not over what was trained since a resume.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

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
        request = Request(self.distillation, targets, num_items_in_batch)
        outputs = model(**arguments, distillation=request)
        loss = outputs.loss
        # `num_items_in_batch` counts the tokens of every process, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._note_metrics(arguments, outputs)
        return (loss, outputs) if return_outputs else loss

    def _note_metrics(self, inputs: Mapping[str, Any], outputs: DistilledOutput) -> None:
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

    def _get_output_dir(self, trial: Any) -> str:
        return self._writes_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint to a folder aside; `on_checkpoint` gives it its name once it is whole."""
        output, step = super()._get_output_dir(trial), self.state.global_step
        aside = Path(output) / self._aside
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._writing_to(aside), full_disk(output, "checkpoint", self._advice):
            super()._save_checkpoint(model, trial)
            written = aside / f"checkpoint-{step}"
            self.log_state.save(written)
            if self.state.best_global_step == step and self.state.best_model_checkpoint is not None:
                self.state.best_model_checkpoint = str(Path(output) / written.name)
                if self.args.should_save:
                    self.state.save_to_json(str(written / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.state.is_world_process_zero:
                self._on_checkpoint(written, step, self.seconds, self.tokens)
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = Path(output) / written.name
        self.log_state.evaluation_due = False

    @contextmanager
    def _writing_to(self, aside: Path) -> Iterator[None]:
        self._writes_to = str(aside)
        try:
            yield
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            self._writes_to = None

    @property
    def _advice(self) -> str:
        kept = f"{self.last_checkpoint} is complete" if self.last_checkpoint else "nothing was saved before"
        return f"{kept}: make room and run the same command again"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.accelerator.is_fsdp2:
            # The Trainer would gather the packed model too, and then save the adapter alone.
            sharded: Any = self.model
            state = fsdp.trained_state(sharded, keep=self.args.should_save)
            self._save(output_dir or self.args.output_dir, state)
        else:
            super().save_model(output_dir, _internal_call)
        # Called by the Trainer for a checkpoint.
        if _internal_call and output_dir is not None and self._extras is not None:
            self._extras.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._sharded.now()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._extras is not None:
            self._extras.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            page_again(self.optimizer)
            self.log_state.load(Path(checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._extras is not None and self.state.best_model_checkpoint is not None:
            self._extras.load(Path(self.state.best_model_checkpoint))


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
    settle_template(tokenizer, arguments.chat_template_path)
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
