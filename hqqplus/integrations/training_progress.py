"""How far a training is, in the way of all other work here: a callback of a Trainer, for its own bar and printer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hqqplus.progress import WorkProgress, say

# What of an entry of the Trainer's log is said, how it is called, and in which form.
_SAID = {
    "loss": ("loss", ".4f"),
    "kl": ("KL to the teacher", ".4f"),
    "grad_norm": ("gradient", ".3g"),
    "learning_rate": ("learning rate", ".2e"),
    "eval_perplexity": ("perplexity", ".2f"),
}


class TrainingProgress(TrainerCallback):
    """Optimizer steps as work: a bar on a terminal; a line for each entry of the log, wherever there is one."""

    def __init__(self) -> None:
        self._progress: WorkProgress | None = None
        self._done = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._done = state.global_step
        # Logged steps have lines of their own, but a log may be asked for every thousand steps.
        self._progress = WorkProgress(state.max_steps, self._done, args.disable_tqdm, "steps", what="training")
        self._progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.advance(state.global_step - self._done)
            self._done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        entry = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        found = [f"{title} {entry[name]:{form}}" for name, (title, form) in _SAID.items() if name in entry]
        if found and self._progress is not None:
            say(f"step {state.global_step} of {state.max_steps}: {', '.join(found)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away. Twice does no harm."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None
