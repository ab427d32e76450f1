"""Where a run is reported to, over all of its starts: a log in the output folder, wandb, TensorBoard and others.

Nothing is reported that the recipe does not ask for, and nothing to anybody else.
"""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path
from types import TracebackType
from typing import Any

from hqqplus.files import write_json
from hqqplus.integrations.tracking import JsonlLog, TensorBoard, require
from hqqplus.integrations.wandb import Say, WandbRun, first_line
from hqqplus.recipe import Recipe, recipe_digest, to_dict
from hqqplus.untrusted import read_json

LOG = "log.jsonl"
IDS = "tracking.json"
"""In the output folder and in every checkpoint: the id of the run of wandb."""

# These are ours; transformers makes the others by their names.
_OWN = ("wandb", "tensorboard")


def trackers(recipe: Recipe) -> list[str]:
    """What the recipe reports to; none is an empty list."""
    named = recipe.tracking.report_to
    return [name for name in ([named] if isinstance(named, str) else named) if name != "none"]


def reported_by_transformers(recipe: Recipe) -> list[str]:
    """`report_to` of the trainer's arguments: without what `Tracking` reports to itself."""
    return [name for name in trackers(recipe) if name not in _OWN] or ["none"]


class Tracking:
    """The reports of one start of a run. Within its block the training runs; after it they are ended.

    Args:
        checkpoint: the one that the run continues from; None at its beginning.
        say: called with a sentence.
        main: whether this is the main process, which reports for all of them.

    Attributes:
        callbacks: for the Trainer.
        wandb: the run there; None without one.

    Raises:
        UserError: if a tracker's package is not installed.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path | None, say: Say, main: bool = True) -> None:
        named, output_dir = trackers(recipe), Path(recipe.output_dir)
        require(named)
        self.wandb: WandbRun | None = None
        self.callbacks: list[Any] = []
        if not main:
            return
        self.callbacks.append(JsonlLog(output_dir / LOG))
        if "tensorboard" in named:
            self.callbacks.append(TensorBoard(output_dir / "tensorboard"))
        if "wandb" in named:
            run = _wandb_run(recipe, checkpoint, say)
            if run is not None and run.callback is not None:
                self.wandb = run
                self.callbacks.append(run.callback)

    def save(self, folder: Path) -> None:
        """Put into the checkpoint that is being written to `folder` what a later start needs to go on."""
        if self.wandb is not None:
            _write_id(folder, self.wandb.id)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.wandb is not None:
            self.wandb.finish(error)


def _wandb_run(recipe: Recipe, checkpoint: Path | None, say: Say) -> WandbRun | None:
    output_dir, digest = Path(recipe.output_dir), recipe_digest(recipe)
    try:
        return WandbRun(
            id=os.environ.get("WANDB_RUN_ID") or run_id(output_dir, checkpoint, digest),
            folder=output_dir,
            project=recipe.tracking.project,
            name=recipe.tracking.run or output_dir.name,
            config={"recipe": to_dict(recipe)},
            mode=recipe.tracking.mode,
            say=say,
            started=lambda identity: _write_id(output_dir, identity, digest),
        )
    except Exception as error:
        # Its settings may be anything; and the other processes would wait for one that stops here.
        say(f"wandb: {first_line(error)}: nothing is reported to it")
        return None


def run_id(output_dir: Path, checkpoint: Path | None, digest: str) -> str:
    """The id of the run of wandb: of the checkpoint it continues from, else of a start of the same recipe in
    `output_dir` that was killed before it had one, else a new one."""
    kept = _read(checkpoint).get("wandb") if checkpoint is not None else None
    if isinstance(kept, str) and kept:
        return kept
    found = _read(output_dir)
    if isinstance(found.get("wandb"), str) and found["wandb"] and found.get("recipe_digest") == digest:
        return str(found["wandb"])
    # From the system's own source, so that no generator of random numbers is drawn from.
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _write_id(folder: Path, identity: str, digest: str | None = None) -> None:
    write_json(folder / IDS, {"wandb": identity, **({"recipe_digest": digest} if digest else {})})


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / IDS)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
