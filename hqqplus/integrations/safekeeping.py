"""What keeps a training safe, as callbacks of a Trainer: exact logs across restarts, stopping at a whole step on
request, and a halt where a loss or a gradient is no number."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hqqplus.errors import UserError
from hqqplus.files import write_json

if TYPE_CHECKING:
    from hqqplus.integrations.trl import RecoveryTrainer

# Column of the rows, and key of a batch, that tell where its rows are from.
ROW_ID, ROW_IDS = "row_id", "row_ids"
_NOTHING_SAVED = "there is no checkpoint yet"


class Clock(TrainerCallback):
    """Times the training."""

    def __init__(self) -> None:
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


class LogState(TrainerCallback):
    """What a Trainer has summed up since it last logged, kept with each checkpoint.

    The Trainer itself starts from zero after a resume: the first entry is then the mean over fewer steps, and TRL's
    number of tokens begins anew.
    """

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self.trainer = trainer
        self._kept: dict[str, Any] | None = None
        # An evaluation that was due when the run was stopped.
        self.evaluation_due = False

    def save(self, folder: Path) -> None:
        """Write it to checkpoint `folder`; every process has a file of its own, as its loss is its own."""
        trainer = self.trainer
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / self._file,
            {
                "loss": float(trainer._tr_loss),
                "losses": trainer._total_loss_scalar,
                "logged_at": trainer._globalstep_last_logged,
                "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
                "tokens": trainer._total_train_tokens,
                "evaluation_due": self.evaluation_due,
            },
        )

    def load(self, folder: Path) -> None:
        """Read it from checkpoint `folder`; it takes effect when the training begins."""
        try:
            self._kept = json.loads((folder / self._file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._kept = None  # of a run with fewer processes

    @property
    def _file(self) -> str:
        return f"hqqplus_log_{self.trainer.args.process_index}.json"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept, trainer = self._kept, self.trainer
        if kept is None:
            return
        self._kept = None
        trainer._tr_loss.fill_(kept["loss"])
        trainer._total_loss_scalar = kept["losses"]
        trainer._globalstep_last_logged = kept["logged_at"]
        trainer._metrics["train"] = defaultdict(list, kept["metrics"])
        trainer._total_train_tokens = kept["tokens"]
        if kept["evaluation_due"]:
            trained: Any = trainer.model
            trained.train()
            trainer.evaluate()


class Watch(TrainerCallback):
    """Asks, once an optimizer step and of all processes together: is every number finite, and has anybody been told
    to stop?

    Args:
        trainer: whose micro-batches are reported by `saw`.
        stop_requested: number of the signal that told this process to stop, else 0.
        describe: which rows these are, for a reader (ids as in the column `row_id`).

    Attributes:
        stopped: number of the signal that the training was stopped for; 0 where it was not.
    """

    def __init__(
        self,
        trainer: RecoveryTrainer,
        stop_requested: Callable[[], int],
        describe: Callable[[list[int]], str] | None,
    ) -> None:
        self.trainer, self.stopped, self._save_at_end = trainer, 0, False
        self._stop_requested, self._describe = stop_requested, describe
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    def saw(self, loss: Tensor, rows: Tensor | None) -> None:
        """A micro-batch: its loss, and the ids of its rows. Nothing is read from the device yet."""
        self._losses.append(loss.detach())
        if rows is not None:
            self._rows.append(rows)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = torch.stack([loss.float().mean() for loss in self._losses])
        # Where losses are scaled for float16, a gradient that overflows is an everyday event: its step is left out.
        checked = torch.ones_like(losses[:1], dtype=torch.bool) if args.fp16 else self._gradients_are_finite(losses)
        found = torch.stack([(~losses.isfinite()).any(), ~checked.all()]).double()
        told = torch.tensor([float(self._stop_requested())], dtype=torch.float64, device=found.device)
        bad_loss, bad_gradient, stop = self._largest(torch.cat([found, told]))
        rows, self._losses, self._rows = self._rows, [], []
        if bad_loss or bad_gradient:
            self._halt("the loss" if bad_loss else "a gradient", losses, rows, state.global_step + 1)
        self.stopped = int(stop)

    def _gradients_are_finite(self, losses: Tensor) -> Tensor:
        gradients = [p.grad for p in self.trainer.model_wrapped.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        filled = [g for g in local if g.numel()]
        if not filled:
            return torch.ones_like(losses[:1], dtype=torch.bool)
        # The largest magnitude cannot overflow, as a sum of squares can.
        return torch.stack([n.to(losses.device) for n in torch._foreach_norm(filled, math.inf)]).isfinite()

    def _largest(self, values: Tensor) -> list[float]:
        """The largest of each value over the processes."""
        if self.trainer.accelerator.num_processes > 1:
            if values.device.type == "mps":
                values = values.float()
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in values.tolist()]

    def _halt(self, what: str, losses: Tensor, rows: list[Tensor], step: int) -> None:
        ids = [int(i) for row in rows for i in row.flatten().tolist()]
        bad = [
            int(i) for row, loss in zip(rows, losses.tolist(), strict=False) if not math.isfinite(loss) for i in row
        ]
        values = [loss for loss in losses.tolist() if not math.isfinite(loss)]
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            ids, bad, values = (gather_object(part) for part in (ids, bad, values))
        said = what if not values else f"{what} ({values[0]})"
        named = bad or ids
        which = ""
        if named:
            which = f" in the batch of rows {', '.join(map(str, sorted(set(named))[:64]))}"
            if self._describe is not None:
                which += f" ({self._describe(sorted(set(named))[:2])})"
        good = self.trainer.last_checkpoint
        kept = f"the last good checkpoint is {good}" if good is not None else _NOTHING_SAVED
        raise UserError(
            f"step {step}: {said} is not finite{which}; {kept}, and nothing was written after it: look at these rows, "
            "or try a lower training.learning_rate"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is due at the end of an epoch comes after this: a checkpoint made now would not know that it is due.
        if control.should_save and self._ends_epoch(args, state):
            control.should_save, self._save_at_end = False, True
        # A training that is through needs no stopping.
        if not self.stopped or state.global_step >= state.max_steps:
            self.stopped = 0
            return
        control.should_training_stop = True
        if self._ends_epoch(args, state):
            return
        control.should_save = True
        # An evaluation may take longer than the one who sent the signal waits: it is made up for after the resume.
        if control.should_evaluate and args.metric_for_best_model is None and not self._scheduled_by_evaluation():
            control.should_evaluate = False
            self.trainer.log_state.evaluation_due = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self._save_at_end = control.should_save or self._save_at_end, False
        if not self.stopped:
            return
        whole = self._ends_epoch(args, state)
        # Stopped in the middle of an epoch, the Trainer calls this too, and would evaluate as if it had ended.
        control.should_save = whole
        if not whole:
            control.should_log = control.should_evaluate = False

    def _ends_epoch(self, args: Any, state: Any) -> bool:
        """Whether this step is the last of an epoch, or of all, and something is due then."""
        strategies = (args.eval_strategy, args.save_strategy, args.logging_strategy)
        last = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        return last and IntervalStrategy.EPOCH in strategies

    def _scheduled_by_evaluation(self) -> bool:
        scheduler: Any = self.trainer.lr_scheduler
        return (
            isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or "Greedy" in type(scheduler).__name__
        )


def with_row_ids(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """`collate`, whose batches have the ids of their rows, [rows] int64, where the rows have one."""
    return _Traced(collate)


class _Traced:
    """A class, since data loaders send their collator to worker processes."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if not rows or not all(isinstance(row, dict) and ROW_ID in row for row in rows):
            return self.collate(rows)
        batch = self.collate([{key: value for key, value in row.items() if key != ROW_ID} for row in rows])
        batch[ROW_IDS] = torch.tensor([row[ROW_ID] for row in rows])
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collate":
            raise AttributeError(name)
        return getattr(self.collate, name)
