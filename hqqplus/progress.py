"""How far a long piece of work is, on stderr: a bar where a person looks on, else a plain line now and then.

What is shown at all is settled in one place, by `output`: the functions below that work need not be told.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

_LINE_SECONDS = 15.0
# Where a launcher writes which of several processes this is; those that accelerate reads.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

_quiet: ContextVar[bool] = ContextVar("hqqplus_quiet", default=False)
# Those that are at work, the innermost last. A terminal has room for one bar: it is that one's.
_at_work: list[WorkProgress] = []


# What is shown -------------------------------------------------------------------------------------------------------


@contextmanager
def output(quiet: bool = False, as_json: bool = False) -> Iterator[None]:
    """Within the block, show what these options of a verb say.

    The bars of transformers, datasets and huggingface_hub are shown on a terminal alone: a log would be full of
    carriage returns.

    Args:
        quiet: no progress, in here and in all that is called from here.
        as_json: stdout is for one JSON object, which is written after the block: what is printed goes to stderr.
    """
    token = _quiet.set(quiet or _quiet.get())
    try:
        with ExitStack() as stack:
            if as_json:
                stack.enter_context(redirect_stdout(sys.stderr))
            if is_quiet() or not _console().is_terminal:
                stack.enter_context(without_bars_of_libraries())
            yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether progress is not shown here: `output` said so, or another process is the one that shows it."""
    return _quiet.get() or not is_main_process()


def is_main_process() -> bool:
    """Whether this process is the first of those that a launcher started, or alone."""
    found = (os.environ[name] for name in _RANKS if os.environ.get(name))
    return next(found, "0") == "0"


def say(text: str) -> None:
    """A line about a run on stdout; nothing where progress is not shown."""
    if not is_quiet():
        print(f"hqqplus: {text}", flush=True)


def warn(text: str) -> None:
    """A line about a run that `quiet` shows too: a result, or what a user must not miss."""
    if is_main_process():
        print(f"hqqplus: {text}", flush=True)


@contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """Within the block transformers, datasets and huggingface_hub show no bars."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    switches: list[tuple[bool, Any, Any]] = [
        (logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
        (not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ]
    # Imported late by many verbs, and never by some.
    datasets, name = sys.modules.get("datasets"), "HF_DATASETS_DISABLE_PROGRESS_BARS"
    before = os.environ.get(name)
    if datasets is not None:
        shown = not datasets.are_progress_bars_disabled()
        switches.append((shown, datasets.disable_progress_bars, datasets.enable_progress_bars))
    else:
        os.environ[name] = "1"
    switches = [switch for switch in switches if switch[0]]
    for _, disable, _ in switches:
        disable()
    try:
        yield
    finally:
        for _, _, enable in switches:
            enable()
        if datasets is None and before is None:
            os.environ.pop(name, None)
        elif datasets is None:
            os.environ[name] = str(before)


def _console() -> Any:
    from rich.console import Console

    # By the stream alone: notebooks ask for colours by an environment variable, and bars in a pipe are no good.
    return Console(stderr=True, soft_wrap=True, force_terminal=sys.stderr.isatty())


# How far it is -------------------------------------------------------------------------------------------------------


class WorkProgress:
    """Counts units of work: `with WorkProgress(total) as progress: ...; progress.advance(1000, "the next layer")`.

    Weights rather than layers, tokens rather than rows: layers differ a hundredfold in size and so does the time that
    they take; weights do not.

    Args:
        total: how many there are.
        done: how many of them were done by an earlier start.
        quiet: show nothing. Nothing is shown either where `output` says so.
        unit: what is counted.
        line_seconds: time between two lines, where there is no bar.
        what: is being done, in a word or two.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        quiet: bool = False,
        unit: str = "weights",
        line_seconds: float = _LINE_SECONDS,
        what: str = "",
    ) -> None:
        self._total, self._first, self._done = total, done, done
        self._unit, self._line_seconds, self._what = unit, line_seconds, what
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._logs: list[logging.StreamHandler[Any]] = []
        self._console: Any = None if quiet or is_quiet() else _console()

    def __enter__(self) -> Self:
        console = self._console
        if console is None:
            return self
        if console.is_terminal and not console.is_dumb_terminal and self._done < self._total:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            # Rate and time left are of all that was done here: layers come in too few pieces for a moving window.
            # What is printed meanwhile goes above the bar; not what goes to a file, which would end up here too.
            self._bar = Progress(
                TextColumn("{task.fields[what]}", markup=False), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[pace]}  {task.description}", markup=False),
                console=console, transient=True, redirect_stdout=sys.stdout.isatty(),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self._total, completed=self._done, pace="", what=self._what)
            if _at_work and _at_work[-1]._bar is not None:
                _at_work[-1]._hide()
            self._show()
        _at_work.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._hide()
        if self not in _at_work:
            return
        _at_work.remove(self)
        if kind is None and self._bar is not None and _at_work and _at_work[-1]._bar is not None:
            _at_work[-1]._show()

    def _show(self) -> None:
        screen = sys.stderr
        self._bar.start()
        # Logs keep the stream that they were made with, and would write into the bar.
        self._logs = [handler for handler in _handlers() if handler.stream is screen]
        for handler in self._logs:
            handler.setStream(sys.stderr)

    def _hide(self) -> None:
        self._bar.stop()
        for handler in self._logs:
            handler.setStream(sys.stderr)
        self._logs = []

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)

    def advance(self, units: int, name: str = "") -> None:
        """So many further units are done; `name` is what was just worked on."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=name, pace=self.pace())
        elif units and time.monotonic() - self._shown >= self._line_seconds:
            self._shown = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            head = f"{self._what}: " if self._what else ""
            self.say(f"{head}{share:.1f} % of {count(self._total)} {self._unit}, {self.pace()}")

    def pace(self) -> str:
        """`1.2 M weights/s, 3:20 left`."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        if rate <= 0:
            return ""
        return f"{count(rate)} {self._unit}/s, {clock((self._total - self._done) / rate)} left"


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """What writes logs to a stream, of all loggers."""
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                yield handler


def count(number: float) -> str:
    """A large number as people read it: 6.98 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
