"""Task scores by the lm-eval harness, on any model that hqqplus loads: a guard against what perplexity hides.

Conventions are the harness's own: the tokenizer decides which special tokens are written, the task its shots and
metrics, and the usual seeds what is drawn. The package `lm-eval` is optional (`pip install 'hqqplus[eval]'`).
"""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hqqplus.errors import UserError
from hqqplus.evaluation.mode import evaluating
from hqqplus.progress import WorkProgress

if TYPE_CHECKING:
    from rich.console import Console

# What the harness seeds by default: Python's generator, then those of numpy, of torch, and of the choice of shots.
_PYTHON_SEED, _SEED = 0, 1234


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Score a causal language model, packed or not, with or without an adapter, on tasks of the lm-eval harness.

    The model is put in evaluation mode and then back as it was; the states of the random generators too.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files.
        limit: so many examples of each task, or below 1 that share of them; for a quick look.
        num_fewshot: examples in the prompt; by default the task's own number. A task that fixes 0 keeps it.
        include_path: folder with task files of one's own; they win over the harness's.

    Returns:
        {"lm_eval": version, "limit": limit, "tasks": {name: {"version", "shots", "examples", "metrics": {metric:
        {"value", "stderr"}}}}}; a group has no version and no shots, and a standard error is None where the harness
        gives none. All of it JSON.

    Raises:
        UserError: without lm-eval, for a task that it does not know (with near matches), a folder that is not there,
            or data that cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"tasks: they need the package lm-eval: pip install 'hqqplus[eval]' ({error})") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"tasks: include_path: there is no folder '{include_path}'")
    if limit is not None and not limit > 0:
        raise UserError(
            f"tasks: limit is {limit}: it must be a number of examples, or a share of them between 0 and 1"
        )
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"tasks: num_fewshot is {num_fewshot}: it must be 0 or more")
    with _quiet(), _seeded(), evaluating(model), torch.no_grad():
        loaded = _load(tasks, include_path)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        watched = _watched(HFLM)
        harness = watched(pretrained=model, tokenizer=tokenizer, device=str(model.device), batch_size=batch_size)
        found: Any = evaluate(lm=harness, task_dict=loaded, limit=limit, log_samples=False)  # type: ignore[arg-type]
    return {
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "tasks": {name: _entry(name, found) for name in found["results"]},
    }


def print_tasks(results: Mapping[str, Any], console: Console | None = None) -> None:
    """The scores of `run_tasks` as a table on the terminal (or on `console`): a line a metric, with its error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="lm-eval " + results["lm_eval"], title_justify="left")
    for title in ("task", "shots", "examples", "metric", "value", "stderr"):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right", no_wrap=True)
    for name, task in results["tasks"].items():
        about = [name, *("" if task[key] is None else str(task[key]) for key in ("shots", "examples"))]
        for metric, measured in task["metrics"].items():
            error = "" if measured["stderr"] is None else f"± {measured['stderr']:.4f}"
            # Text objects: a task's name is not rich markup.
            table.add_row(*(Text(cell) for cell in (*about, metric, f"{measured['value']:.4f}", error)))
            about = ["", "", ""]
    (console or Console(soft_wrap=True)).print(table)


def _load(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The tasks and groups of these names, with their data, as the harness's `evaluate` takes them."""
    import yaml
    from lm_eval.tasks import TaskManager

    if not names:
        raise UserError("tasks: name one at least")
    options: dict[str, Any] = {"include_path": str(include_path)} if include_path is not None else {}
    # Reading the thousands of files that come with the harness takes a quarter of a minute.
    manager = TaskManager(**options, include_defaults=False) if options else None
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(**options)
    for name in names:
        if name not in manager.all_tasks and not (name.endswith(".yaml") and Path(name).is_file()):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.6)
            hint = f"; near matches: {', '.join(near)}" if near else ""
            raise UserError(f"tasks: lm-eval knows no task, group or tag '{name}'{hint}")
    try:
        return manager.load(list(names))
    except (OSError, ValueError, LookupError, ImportError, yaml.YAMLError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"tasks: {', '.join(names)}: the task or its data cannot be loaded: {reason}") from error


def _entry(name: str, found: Any) -> dict[str, Any]:
    """What the harness says of one task or group, in our form. Its keys: `metric,filter`, `metric_stderr,filter`."""
    values, metrics = found["results"][name], {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and math.isfinite(error)
            shown = metric if kind == "none" else f"{metric} ({kind})"
            metrics[shown] = {"value": float(value), "stderr": float(error) if known else None}
    count = found["n-samples"].get(name, {}).get("effective", values.get("sample_len"))
    version = found["versions"].get(name)
    return {"version": version, "shots": found["n-shot"].get(name), "examples": count, "metrics": metrics}


def _watched(harness: Any) -> Any:
    """The class of the harness's models with our progress in the place of its bars."""

    class Watched(harness):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().loglikelihood, requests, "log-likelihoods")

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().loglikelihood_rolling, requests, "log-likelihoods")

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().generate_until, requests, "completions")

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def _shown(self, answer: Any, requests: Any, what: str) -> Any:
            with WorkProgress(len(requests), unit="requests", what=what) as progress:
                # Where it would keep an answer for later: it has each of them then.
                self.set_cache_hook(_Counter(progress))
                return answer(requests, disable_tqdm=True)

    return Watched


class _Counter:
    def __init__(self, progress: WorkProgress) -> None:
        self._progress = progress

    def add_partial(self, *answered: Any) -> None:
        self._progress.advance(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the harness, which are about its own defaults, and no bar of its own."""
    import lm_eval.api.task as task

    log, bar = logging.getLogger("lm_eval"), task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = lambda documents, **options: documents
    try:
        yield
    finally:
        task.tqdm = bar
        log.setLevel(level)


@contextmanager
def _seeded() -> Iterator[None]:
    """The generators seeded as the harness does (some tasks shuffle their choices), and afterwards as they were."""
    import numpy

    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(_PYTHON_SEED)
        numpy.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)
