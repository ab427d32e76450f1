"""Where a training is reported to: a plain log of JSON lines, and TensorBoard; `wandb.py` is beside this."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from hqqplus.errors import UserError
from hqqplus.files import full_disk, write_text

LEADING = ("step", "epoch", "loss")
"""What a line of the log begins with; the rest is in alphabetical order."""

# tracker -> (what pip installs, modules one of which it needs)
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "wandb": ("wandb", ("wandb",)),
    "tensorboard": ("'hqqplus[tensorboard]'", ("tensorboard", "tensorboardX")),
    "trackio": ("trackio", ("trackio",)),
    "mlflow": ("mlflow", ("mlflow",)),
    "azure_ml": ("azureml-core", ("azureml.core",)),
    "clearml": ("clearml", ("clearml",)),
    "codecarbon": ("codecarbon", ("codecarbon",)),
    "comet_ml": ("comet_ml", ("comet_ml",)),
    "dagshub": ("dagshub mlflow", ("dagshub",)),
    "dvclive": ("dvclive", ("dvclive",)),
    "flyte": ("flytekit", ("flytekit",)),
    "kubeflow": ("kubeflow", ("kubeflow",)),
    "neptune": ("neptune", ("neptune",)),
    "swanlab": ("swanlab", ("swanlab",)),
}


def require(trackers: Iterable[str]) -> None:
    """Refuse, before hours of work, trackers whose packages are not installed.

    Raises:
        UserError: naming what to install.
    """
    for tracker in trackers:
        package, modules = PACKAGES[tracker]
        if not any(_is_installed(module) for module in modules):
            raise UserError(
                f"tracking.report_to: {tracker} needs a package that is not installed: pip install {package}"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


# JSON lines ----------------------------------------------------------------------------------------------------------


class JsonlLog(TrainerCallback):
    """Everything that the trainer logs, one JSON object a line, written by the main process.

    When a training continues, the log is made anew from that of its checkpoint: what was logged after it, or torn in
    the middle of a line, is dropped, and what was lost is there. No line depends on the clock, so the log of a run
    that was killed and continued is that of an uninterrupted one, byte for byte.

    Raises:
        UserError: in the training, where the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = dict.fromkeys(line for entry in state.log_history if (line := log_line(entry)))
        self._lines = set(lines)
        with full_disk(self.path, "log"):
            write_text(self.path, "".join(lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        line = log_line({**(logs or {}), "step": state.global_step})
        # An evaluation that is made when a training starts is made once more when it continues.
        if not line or line in self._lines:
            return
        self._lines.add(line)
        with full_disk(self.path, "log"), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def log_line(entry: Mapping[str, Any]) -> str:
    """A line of the log, from an entry of `TrainerState.log_history`; empty for the entry that closes a training.

    Floats are written with all of their digits, and as null where they are no number.
    """
    # It sums up one process's share of the training, mostly in seconds.
    if "train_loss" in entry:
        return ""
    kept = {name: value for name, value in entry.items() if not _is_of_this_process(name)}
    ordered = [name for name in LEADING if name in kept] + sorted(kept.keys() - set(LEADING))
    values = {name: _finite(kept[name]) for name in ordered}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _is_of_this_process(name: str) -> bool:
    """Whether a metric is a time, a speed or a use of memory."""
    return name.endswith(("_runtime", "_per_second")) or "_mem_" in name


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# TensorBoard ---------------------------------------------------------------------------------------------------------


class TensorBoard(TensorBoardCallback):
    """TensorBoard, in one folder over all starts of a run: a step that is trained again replaces what it drew before.

    Args:
        folder: for the event files; `TENSORBOARD_LOGGING_DIR` goes before it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.tb_writer is None:
            folder = os.path.expanduser(os.environ.get("TENSORBOARD_LOGGING_DIR") or str(self._folder))
            # What the folder has of this step and later ones came from a process that was killed.
            first = state.global_step + 1 if state.global_step else 0
            self.tb_writer = _summary_writer()(log_dir=folder, purge_step=first)
        super().on_train_begin(args, state, control, **kwargs)


def _summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return importlib.import_module("tensorboardX").SummaryWriter
