"""TRL: the trainer. `SFTTrainer` with our perplexity as its evaluation and a manifest behind every checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

# TRL reports every trainer that is made; we don't.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hqqplus.errors import UserError
from hqqplus.evaluation.perplexity import PerplexityResult

# (model, process index, number of processes, sum over processes) -> result
Evaluator = Callable[[Any, int, int, Callable[[torch.Tensor], torch.Tensor] | None], PerplexityResult]
# (checkpoint step, seconds of training in this process, tokens seen by it)
OnCheckpoint = Callable[[int, float, int], None]


class RecoveryTrainer(SFTTrainer):
    """`SFTTrainer` whose evaluation is the perplexity that parent and quantized model are measured with too."""

    def __init__(self, *args: Any, evaluator: Evaluator, on_checkpoint: OnCheckpoint, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self._clock = _Clock(self, on_checkpoint)
        # Last of all, so that the manifest comes after everything that other callbacks write.
        self.add_callback(self._clock)

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


def sft_config(settings: Mapping[str, Any], where: str) -> SFTConfig:
    """`SFTConfig(**settings)` with its complaints as a `UserError` of one sentence that names `where`."""
    try:
        return SFTConfig(**settings)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"{where}: training: {str(error).strip().splitlines()[0]}") from None
